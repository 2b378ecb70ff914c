/* chunks.h - sums over long rows: cut into chunks by their length alone, summed on any number of threads, and added up
 * in order. Private. */
#ifndef FM_CHUNKS_H
#define FM_CHUNKS_H

#include <stddef.h>
#include <stdint.h>

#include "flatmtl.h"
#include "rows.h"

enum { FM_RUN = 2048 }; /* chunks are multiples of this */

typedef struct fm_chunks fm_chunks;

/* Sums [chunks->sums] over `length` elements from the cursor on. */
typedef void (*fm_chunk_fn)(const fm_chunks *chunks, int64_t length, fm_cursor cursor, double *out);

struct fm_chunks {
  size_t sums; /* set by the caller, the rest by fm_chunks_run */
  const flatmtl_rows *table;
  fm_chunk_fn fn;
  int64_t length, chunk;
  double *partial; /* [chunks][sums] */
};

/* Doubles of workspace that are enough for every call with up to this many sums. */
size_t fm_partial_doubles(size_t sums);

/* fn over the chunks of the rows' table, and the results added up into out [sums], which may be the workspace.
 *  cost   of an element, in units of one F32 read from memory: how much work is worth a thread */
void fm_chunks_run(const flatmtl_context *context, fm_chunks *chunks, const flatmtl_rows *table, double cost,
                   fm_chunk_fn fn, double *out);

#endif
