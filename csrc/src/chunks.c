#include "chunks.h"

enum {
  FM_LEAST_CHUNKS = 8,
  FM_MOST_CHUNKS = 64,
  FM_PARTIAL_BYTES = 512 * 1024,
  FM_LEAST_CHUNK = 2 * FM_RUN,
  FM_THREAD_WORK = 64 * 1024 /* reads: below this, starting a thread costs more than it gains */
};

static int64_t most_chunks(size_t sums) {
  const size_t chunks = FM_PARTIAL_BYTES / (sums * sizeof(double));
  return chunks < FM_LEAST_CHUNKS ? FM_LEAST_CHUNKS : chunks > FM_MOST_CHUNKS ? FM_MOST_CHUNKS : (int64_t)chunks;
}

size_t fm_partial_doubles(size_t sums) {
  /* A bound on n * most_chunks(n) for every n <= sums: that product itself is not monotone in n. */
  size_t doubles = sums * FM_MOST_CHUNKS;
  if (doubles > FM_PARTIAL_BYTES / sizeof(double)) doubles = FM_PARTIAL_BYTES / sizeof(double);
  return doubles < sums * FM_LEAST_CHUNKS ? sums * FM_LEAST_CHUNKS : doubles;
}

static void run_range(int64_t begin, int64_t end, void *context) {
  const fm_chunks *chunks = context;
  fm_cursor cursor = fm_cursor_at(chunks->table, begin * chunks->chunk);
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t left = chunks->length - chunk * chunks->chunk;
    const int64_t length = left < chunks->chunk ? left : chunks->chunk;
    chunks->fn(chunks, length, cursor, chunks->partial + (size_t)chunk * chunks->sums);
    fm_cursor_advance(&cursor, length);
  }
}

void fm_chunks_run(const flatmtl_context *context, fm_chunks *chunks, const flatmtl_rows *table, double cost,
                   fm_chunk_fn fn, double *out) {
  const int64_t most = most_chunks(chunks->sums);
  chunks->table = table;
  chunks->fn = fn;
  chunks->length = fm_total_length(table);
  chunks->chunk = (chunks->length + most - 1) / most;
  if (chunks->chunk < FM_LEAST_CHUNK) chunks->chunk = FM_LEAST_CHUNK;
  chunks->chunk = (chunks->chunk + FM_RUN - 1) / FM_RUN * FM_RUN;
  chunks->partial = context->workspace;
  const int64_t count = (chunks->length + chunks->chunk - 1) / chunks->chunk;
  const double grain = FM_THREAD_WORK / (cost * (double)chunks->chunk);
  fm_parallel(context, count, grain < 1.0 ? 1 : (int64_t)grain, run_range, chunks);
  for (size_t i = 0; i < chunks->sums; i++) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < count; chunk++) sum += chunks->partial[(size_t)chunk * chunks->sums + i];
    out[i] = sum;
  }
}
