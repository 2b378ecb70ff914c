/* Plain streams and a chain of fused multiply-adds: what this machine gives, for the benchmark to compare with.
 * Built when the benchmark runs, for the CPU it runs on. Threads are those of torch's pool. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

typedef uint64_t words __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef float floats __attribute__((vector_size(WIDTH)));
typedef float loaded __attribute__((vector_size(WIDTH), aligned(1), may_alias));

typedef void (*range_fn)(int64_t begin, int64_t end, void *context);
typedef int (*torch_for)(int64_t begin, int64_t end, int64_t grain, range_fn fn,
                         void *context); /* torch_parallel_for */

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

/* -- read and multiply: every byte as probe_read reads them, and multiply-adds of F32 on what was read -- */

typedef struct {
  stream in;
  int64_t rounds; /* of SUMS multiply-adds, for two vectors read */
} reading;

enum { SUMS = 10, PAIRS = SUMS, STEP = PAIRS * 2 * WIDTH }; /* a step reads so many times two vectors */

/* `rest` multiply-adds for two vectors beside the rounds: a constant, so that the chains are in registers. They begin
 * at another chain for each two vectors, because a chain waits for itself. What multiplies is the chain, what is added
 * was read: no two multiply-adds have anything in common. */
static inline __attribute__((always_inline)) void multiply_range(int64_t begin, int64_t end, const reading *job,
                                                                 const int rest) {
  const stream *s = &job->in;
  const int64_t rounds = job->rounds;
  floats x[SUMS], scale;
  for (int i = 0; i < WIDTH / 4; ++i) scale[i] = 0.999f;
  for (int c = 0; c < SUMS; ++c) x[c] = 0 * scale;
  char padded[STEP];
  for (int64_t row = 0; row < s->count; ++row) {
    const int64_t first = begin * BLOCK, last = end * BLOCK < s->bytes ? end * BLOCK : s->bytes;
    const char *p = s->in[row] + first;
    for (int64_t left = last - first; left > 0; left -= STEP, p += STEP) {
      const char *q = p;
      if (left < STEP) {
        memset(padded, 0, STEP);
        q = (const char *)memcpy(padded, p, (size_t)left);
      }
#pragma GCC unroll 10
      for (int pair = 0; pair < PAIRS; ++pair) {
        const floats a = *(const loaded *)(q + (size_t)(2 * pair) * WIDTH);
        const floats b = *(const loaded *)(q + (size_t)(2 * pair + 1) * WIDTH);
        for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 10
          for (int c = 0; c < SUMS; ++c) x[c] = x[c] * scale + (c % 2 ? b : a);
#pragma GCC unroll 10
        for (int i = 0; i < rest; ++i) {
          const int c = (pair * rest + i) % SUMS;
          x[c] = x[c] * scale + (i % 2 ? b : a);
        }
      }
    }
  }
  for (int c = 1; c < SUMS; ++c) x[0] += x[c];
  float sum = 0;
  for (int i = 0; i < WIDTH / 4; ++i) sum += x[0][i];
  *(volatile float *)s->sink = sum;
}

#define MULTIPLY(rest)                                                     \
  static void multiply_##rest(int64_t begin, int64_t end, void *context) { \
    multiply_range(begin, end, (const reading *)context, rest);            \
  }                                                                        \
  _Static_assert(rest < SUMS, "more is a round")
MULTIPLY(0);
MULTIPLY(1);
MULTIPLY(2);
MULTIPLY(3);
MULTIPLY(4);
MULTIPLY(5);
MULTIPLY(6);
MULTIPLY(7);
MULTIPLY(8);
MULTIPLY(9);

/* `products` vectors of multiply-adds for every two vectors read, at least 2: fewer would leave some unread. Returns
 * the sum of one thread's chains. */
float probe_multiply(void *pool, const char *const *in, int64_t count, int64_t bytes, int64_t products,
                     uint64_t *sink) {
  static const range_fn ranges[SUMS] = {multiply_0, multiply_1, multiply_2, multiply_3, multiply_4,
                                        multiply_5, multiply_6, multiply_7, multiply_8, multiply_9};
  reading job = {{in, count, bytes, (bytes + BLOCK - 1) / BLOCK, NULL, sink}, products / SUMS};
  parallel((torch_for)pool, job.in.blocks, ranges[products % SUMS], &job);
  return *(volatile float *)sink;
}
