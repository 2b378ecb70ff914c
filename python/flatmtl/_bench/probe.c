/* Plain streams and a chain of fused multiply-adds: what this machine gives, for the benchmark to compare with.
 * Built when the benchmark runs, for the CPU it runs on. Threads are those of torch's pool. */
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

typedef uint64_t words __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef float floats __attribute__((vector_size(WIDTH)));

typedef void (*range_fn)(int64_t begin, int64_t end, void *context);
typedef int (*torch_for)(int64_t begin, int64_t end, int64_t grain, range_fn fn, void *context); /* torch_parallel_for */

enum { BLOCK = 1 << 15, CHAINS = 12 };

static void parallel(torch_for pool, int64_t count, range_fn fn, void *context) {
  if (pool == NULL || count < 2)
    fn(0, count, context);
  else
    pool(0, count, 1, fn, context);
}

/* -- torch's pool as a flatmtl_parallel_for; host is torch_parallel_for -- */

typedef struct {
  int64_t begin, end, grain;
  range_fn fn;
  void *context;
} grains;

static void run_grains(int64_t first, int64_t last, void *context) {
  const grains *g = (const grains *)context;
  const int64_t end = g->begin + last * g->grain;
  g->fn(g->begin + first * g->grain, end < g->end ? end : g->end, g->context);
}

void probe_parallel_for(int64_t begin, int64_t end, int64_t grain, range_fn fn, void *context, void *host) {
  if (begin >= end) return;
  if (grain < 1) grain = 1;
  grains g = {begin, end, grain, fn, context};
  parallel((torch_for)host, (end - begin - 1) / grain + 1, run_grains, &g);
}

/* -- read: every byte of the buffers once, one buffer after another -- */

typedef struct {
  const char *const *in;
  int64_t count, bytes, blocks; /* blocks of a buffer */
  char *out;
  uint64_t *sink;
} stream;

static void read_range(int64_t begin, int64_t end, void *context) {
  const stream *s = (const stream *)context;
  words a = {0}, b = {0}, c = {0}, d = {0};
  for (int64_t row = 0; row < s->count; ++row) {
    const int64_t first = begin * BLOCK, last = end * BLOCK < s->bytes ? end * BLOCK : s->bytes;
    const char *p = s->in[row] + first;
    int64_t left = last - first;
    for (; left >= 4 * WIDTH; left -= 4 * WIDTH, p += 4 * WIDTH) {
      a ^= *(const words *)p;
      b ^= *(const words *)(p + WIDTH);
      c ^= *(const words *)(p + 2 * WIDTH);
      d ^= *(const words *)(p + 3 * WIDTH);
    }
    for (; left > 0; --left, ++p) a[0] ^= (uint64_t)(unsigned char)*p;
  }
  a ^= b ^ c ^ d;
  *(volatile uint64_t *)s->sink = a[0] ^ a[1];
}

void probe_read(void *pool, const char *const *in, int64_t count, int64_t bytes, uint64_t *sink) {
  stream s = {in, count, bytes, (bytes + BLOCK - 1) / BLOCK, NULL, sink};
  parallel((torch_for)pool, s.blocks, read_range, &s);
}

/* -- mix: out = in_0 ^ in_1 ^ ..., element by element: count reads and one write -- */

static void mix_range(int64_t begin, int64_t end, void *context) {
  const stream *s = (const stream *)context;
  const int64_t last = end * BLOCK < s->bytes ? end * BLOCK : s->bytes;
  int64_t at = begin * BLOCK;
  for (; at + 4 * WIDTH <= last; at += 4 * WIDTH) {
    const char *p = s->in[0] + at;
    words a = *(const words *)p, b = *(const words *)(p + WIDTH);
    words c = *(const words *)(p + 2 * WIDTH), d = *(const words *)(p + 3 * WIDTH);
    for (int64_t row = 1; row < s->count; ++row) {
      p = s->in[row] + at;
      a ^= *(const words *)p;
      b ^= *(const words *)(p + WIDTH);
      c ^= *(const words *)(p + 2 * WIDTH);
      d ^= *(const words *)(p + 3 * WIDTH);
    }
    char *q = s->out + at;
    *(words *)q = a;
    *(words *)(q + WIDTH) = b;
    *(words *)(q + 2 * WIDTH) = c;
    *(words *)(q + 3 * WIDTH) = d;
  }
  for (; at < last; ++at) {
    char x = s->in[0][at];
    for (int64_t row = 1; row < s->count; ++row) x = (char)(x ^ s->in[row][at]);
    s->out[at] = x;
  }
}

void probe_mix(void *pool, const char *const *in, int64_t count, int64_t bytes, char *out) {
  stream s = {in, count, bytes, (bytes + BLOCK - 1) / BLOCK, out, NULL};
  parallel((torch_for)pool, s.blocks, mix_range, &s);
}

/* -- fused multiply-adds of F32 in registers: CHAINS * WIDTH / 4 of them an iteration -- */

typedef struct {
  int64_t iterations;
  float *sink;
} chains;

static void fma_range(int64_t begin, int64_t end, void *context) {
  const chains *job = (const chains *)context;
  floats x[CHAINS], scale, shift;
  for (int i = 0; i < WIDTH / 4; ++i) {
    scale[i] = 0.999f;
    shift[i] = 1e-3f * (float)(i + 1);
  }
  for (int c = 0; c < CHAINS; ++c) x[c] = shift * (float)c;
  for (int64_t n = 0; n < job->iterations * (end - begin); ++n)
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; ++c) x[c] = x[c] * scale + shift;
  for (int c = 1; c < CHAINS; ++c) x[0] += x[c];
  *(volatile float *)job->sink = x[0][0];
}

/* Each of `threads` ranges runs `iterations`. Returns the operations (a multiply-add counts two) of one of them. */
int64_t probe_fma(void *pool, int64_t threads, int64_t iterations, float *sink) {
  chains job = {iterations, sink};
  parallel((torch_for)pool, threads, fma_range, &job);
  return 2 * CHAINS * (WIDTH / 4) * iterations;
}
