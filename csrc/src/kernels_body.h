/* kernels_body.h - the kernels, compiled once an instruction set. The including file defines
 *   FM_TABLE, FM_ISA  name of the table, and its name for users
 *   FM_WIDTH          doubles in a register
 *   FM_TILE_ROWS      rows whose inner products with 4 others fit in the registers, at most 4
 *   FM_FMA(a, b, c)   a b + c of vectors, fused or not
 *   FM_WIDEN(v), FM_NARROW(v)  a vector of FM_WIDTH F32 to F64, and back
 *
 * Inner products are written with vectors of FM_WIDTH lanes and sweep over the run once for every FM_WIDTH of the
 * FM_LANES lanes, so that the order of additions within a lane is the same everywhere. The rest are plain loops for the
 * compiler to vectorise.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "kernels.h"

typedef double fm_vd __attribute__((vector_size(8 * FM_WIDTH)));
typedef double fm_vd_any __attribute__((vector_size(8 * FM_WIDTH), aligned(8), may_alias));
typedef float fm_vf_any __attribute__((vector_size(4 * FM_WIDTH), aligned(4), may_alias));

#define FM_INLINE static inline __attribute__((always_inline))

FM_INLINE fm_vd load_f32(const float *p) {
  const fm_vf_any v = *(const fm_vf_any *)p;
  return (fm_vd)FM_WIDEN(v);
}
FM_INLINE fm_vd load_f64(const double *p) {
  return *(const fm_vd_any *)p;
}
FM_INLINE void store_f32(float *p, fm_vd v) {
  *(fm_vf_any *)p = (fm_vf_any)FM_NARROW(v);
}
FM_INLINE void store_f64(double *p, fm_vd v) {
  *(fm_vd_any *)p = v;
}

/* How far ahead a row is asked from memory, in bytes: the blocks of one row are too short for the hardware to foresee
 * the next. Every row is in one triangle, so asking there is enough. */
enum { FM_AHEAD = 2048 };

#define FM_MUL_ADD(a, b, c) ((a) * (b) + (c))
#define FM_SUM(i, j) (sums + ((i)*FM_GROUP + (j)) * FM_LANES + lane)
#define FM_UNROLL _Pragma("GCC unroll 4")

/* NX rows of x with 4 rows of y. */
#define FM_DEFINE_TILE(NAME, TYPE, LOAD, MULADD, NX)                                                                   \
  static void NAME(const TYPE *const *x, const TYPE *const *y, int64_t n, double *sums) {                              \
    for (int lane = 0; lane < FM_LANES; lane += FM_WIDTH) {                                                            \
      fm_vd acc[NX][4];                                                                                                \
      FM_UNROLL for (int i = 0; i < NX; i++) FM_UNROLL for (int j = 0; j < 4; j++) acc[i][j] = load_f64(FM_SUM(i, j)); \
      for (int64_t p = lane; p < n; p += FM_LANES) {                                                                   \
        fm_vd a[NX];                                                                                                   \
        FM_UNROLL for (int i = 0; i < NX; i++) a[i] = LOAD(x[i] + p);                                                  \
        FM_UNROLL for (int j = 0; j < 4; j++) {                                                                        \
          const fm_vd b = LOAD(y[j] + p);                                                                              \
          FM_UNROLL for (int i = 0; i < NX; i++) acc[i][j] = MULADD(a[i], b, acc[i][j]);                               \
        }                                                                                                              \
      }                                                                                                                \
      FM_UNROLL for (int i = 0; i < NX; i++) FM_UNROLL for (int j = 0; j < 4; j++) * (fm_vd_any *)FM_SUM(i, j) =       \
          acc[i][j];                                                                                                   \
    }                                                                                                                  \
  }

/* NX rows of x with themselves: the lower triangle. */
#define FM_DEFINE_TRIANGLE(NAME, TYPE, LOAD, MULADD, NX)                                                               \
  static void NAME(const TYPE *const *x, int64_t n, double *sums) {                                                    \
    for (int lane = 0; lane < FM_LANES; lane += FM_WIDTH) {                                                            \
      fm_vd acc[NX][NX];                                                                                               \
      FM_UNROLL for (int i = 0; i < NX; i++) FM_UNROLL for (int j = 0; j <= i; j++) acc[i][j] =                        \
          load_f64(FM_SUM(i, j));                                                                                      \
      for (int64_t p = lane; p < n; p += FM_LANES) {                                                                   \
        fm_vd a[NX];                                                                                                   \
        if (lane == 0) FM_UNROLL for (int i = 0; i < NX; i++) __builtin_prefetch((const char *)(x[i] + p) + FM_AHEAD); \
        FM_UNROLL for (int i = 0; i < NX; i++) a[i] = LOAD(x[i] + p);                                                  \
        FM_UNROLL for (int i = 0; i < NX; i++) FM_UNROLL for (int j = 0; j <= i; j++) acc[i][j] =                      \
            MULADD(a[i], a[j], acc[i][j]);                                                                             \
      }                                                                                                                \
      FM_UNROLL for (int i = 0; i < NX; i++) FM_UNROLL for (int j = 0; j <= i; j++) * (fm_vd_any *)FM_SUM(i, j) =      \
          acc[i][j];                                                                                                   \
    }                                                                                                                  \
  }

/* All pairs, by tiles of up to FM_TILE_ROWS x 4. */
#define FM_DEFINE_GRAM(T, TYPE, LOAD, MULADD)                                                                  \
  FM_DEFINE_TILE(tile1_##T, TYPE, LOAD, MULADD, 1)                                                             \
  FM_DEFINE_TILE(tile2_##T, TYPE, LOAD, MULADD, 2)                                                             \
  FM_DEFINE_TILE(tile3_##T, TYPE, LOAD, MULADD, 3)                                                             \
  FM_DEFINE_TILE(tile4_##T, TYPE, LOAD, MULADD, 4)                                                             \
  FM_DEFINE_TRIANGLE(triangle1_##T, TYPE, LOAD, MULADD, 1)                                                     \
  FM_DEFINE_TRIANGLE(triangle2_##T, TYPE, LOAD, MULADD, 2)                                                     \
  FM_DEFINE_TRIANGLE(triangle3_##T, TYPE, LOAD, MULADD, 3)                                                     \
  FM_DEFINE_TRIANGLE(triangle4_##T, TYPE, LOAD, MULADD, 4)                                                     \
  static void strip_##T(const TYPE *const *x, int32_t nx, const TYPE *const *y, int64_t n, double *sums) {     \
    static void (*const tiles[])(const TYPE *const *, const TYPE *const *, int64_t, double *) = {              \
        tile1_##T, tile2_##T, tile3_##T, tile4_##T};                                                           \
    for (int32_t i = 0; i < nx; i += FM_TILE_ROWS) {                                                           \
      const int32_t rows = nx - i < FM_TILE_ROWS ? nx - i : FM_TILE_ROWS;                                      \
      tiles[rows - 1](x + i, y, n, sums + (ptrdiff_t)i * FM_GROUP * FM_LANES);                                 \
    }                                                                                                          \
  }                                                                                                            \
  static void gram_##T(const TYPE *const *x, int32_t nx, const TYPE *const *y, int64_t n, double *sums) {      \
    static void (*const triangles[])(const TYPE *const *, int64_t, double *) = {triangle1_##T, triangle2_##T,  \
                                                                                triangle3_##T, triangle4_##T}; \
    for (int32_t i = 0; i < nx; i += 4) {                                                                      \
      const int32_t rows = nx - i < 4 ? nx - i : 4;                                                            \
      double *out = sums + (ptrdiff_t)i * FM_GROUP * FM_LANES;                                                 \
      for (int32_t j = 0; j < (y ? FM_GROUP : i); j += 4)                                                      \
        strip_##T(x + i, rows, (y ? y : x) + j, n, out + (ptrdiff_t)j * FM_LANES);                             \
      if (!y) triangles[rows - 1](x + i, n, out + (ptrdiff_t)i * FM_LANES);                                    \
    }                                                                                                          \
  }

FM_DEFINE_GRAM(f32, float, load_f32, FM_FMA)
FM_DEFINE_GRAM(f64, double, load_f64, FM_MUL_ADD)

/* One body for both precisions of the rows; all arithmetic but diff's in double. */
#define FM_DEFINE_LOOPS(T, TYPE)                                                                                \
  static void sq_scaled_##T(const TYPE *restrict x, const TYPE *restrict params, double eta, int64_t n,         \
                            double *restrict sums) {                                                            \
    double acc[FM_LANES];                                                                                       \
    memcpy(acc, sums, sizeof acc);                                                                              \
    for (int64_t p = 0; p < n; p += FM_LANES)                                                                   \
      for (int lane = 0; lane < FM_LANES; lane++) {                                                             \
        const double v = (fabs((double)params[p + lane]) + eta) * (double)x[p + lane];                          \
        acc[lane] += v * v;                                                                                     \
      }                                                                                                         \
    memcpy(sums, acc, sizeof acc);                                                                              \
  }                                                                                                             \
  static void diff_##T(const TYPE *restrict s, const TYPE *restrict g, int64_t n, TYPE *restrict out) {         \
    for (int64_t p = 0; p < n; p++) out[p] = s[p] - g[p];                                                       \
  }                                                                                                             \
  static void add_##T(const TYPE *restrict g, const TYPE *restrict s, double a, double b, int first, int64_t n, \
                      double *restrict sum) {                                                                   \
    if (first) memset(sum, 0, (size_t)n * sizeof *sum);                                                         \
    if (s)                                                                                                      \
      for (int64_t p = 0; p < n; p++) sum[p] = (sum[p] + a * (double)g[p]) + b * ((double)s[p] - (double)g[p]); \
    else                                                                                                        \
      for (int64_t p = 0; p < n; p++) sum[p] += a * (double)g[p];                                               \
  }

FM_DEFINE_LOOPS(f32, float)
FM_DEFINE_LOOPS(f64, double)

#define FM_DEFINE_PERTURB(NAME, TYPE, OUT)                                                                            \
  static void NAME(const TYPE *restrict saved, const TYPE *restrict gradient, double scale, int adaptive, double eta, \
                   int64_t n, OUT *restrict out) {                                                                    \
    if (adaptive)                                                                                                     \
      for (int64_t p = 0; p < n; p++) {                                                                               \
        const double t = fabs((double)saved[p]) + eta;                                                                \
        out[p] = (OUT)((double)saved[p] + scale * (t * t) * (double)gradient[p]);                                     \
      }                                                                                                               \
    else                                                                                                              \
      for (int64_t p = 0; p < n; p++) out[p] = (OUT)((double)saved[p] + scale * (double)gradient[p]);                 \
  }

FM_DEFINE_PERTURB(perturb_f32, float, float)
FM_DEFINE_PERTURB(perturb_f64, double, double)
FM_DEFINE_PERTURB(perturb_wide, float, double)

/* VECTORS registers of elements at p, all rows one after another; FLAT is a constant: whether there is an s. */
#define FM_COMBINE_AT(T, VECTORS, FLAT)                                                    \
  do {                                                                                     \
    fm_vd acc[VECTORS];                                                                    \
    FM_UNROLL for (int v = 0; v < VECTORS; v++) acc[v] = (fm_vd){0};                       \
    for (int32_t i = 0; i < k; i++) FM_UNROLL for (int v = 0; v < VECTORS; v++) {          \
        const fm_vd x = load_##T(g[i] + p + v * FM_WIDTH);                                 \
        acc[v] += a[i] * x;                                                                \
        if (FLAT) acc[v] += b[i] * (load_##T(s[i] + p + v * FM_WIDTH) - x);                \
      }                                                                                    \
    FM_UNROLL for (int v = 0; v < VECTORS; v++) store_##T(out + p + v * FM_WIDTH, acc[v]); \
  } while (0)

#define FM_DEFINE_COMBINE_ONE(NAME, T, TYPE, FLAT)                                                                     \
  static void NAME(const TYPE *const *g, const TYPE *const *s, const double *a, const double *b, int32_t k, int64_t n, \
                   TYPE *restrict out) {                                                                               \
    int64_t p = 0;                                                                                                     \
    for (; p + 4 * FM_WIDTH <= n; p += 4 * FM_WIDTH) FM_COMBINE_AT(T, 4, FLAT);                                        \
    for (; p < n; p++) {                                                                                               \
      double sum = 0.0;                                                                                                \
      for (int32_t i = 0; i < k; i++) {                                                                                \
        sum += a[i] * (double)g[i][p];                                                                                 \
        if (FLAT) sum += b[i] * ((double)s[i][p] - (double)g[i][p]);                                                   \
      }                                                                                                                \
      out[p] = (TYPE)sum;                                                                                              \
    }                                                                                                                  \
    (void)s;                                                                                                           \
    (void)b;                                                                                                           \
  }

#define FM_DEFINE_COMBINE(T, TYPE)                                                                                 \
  FM_DEFINE_COMBINE_ONE(combine_loss_##T, T, TYPE, 0)                                                              \
  FM_DEFINE_COMBINE_ONE(combine_pair_##T, T, TYPE, 1)                                                              \
  static void combine_##T(const TYPE *const *g, const TYPE *const *s, const double *a, const double *b, int32_t k, \
                          int64_t n, TYPE *out) {                                                                  \
    (s ? combine_pair_##T : combine_loss_##T)(g, s, a, b, k, n, out);                                              \
  }

FM_DEFINE_COMBINE(f32, float)
FM_DEFINE_COMBINE(f64, double)

FM_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FM_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static void widen_bf16(const uint16_t *restrict x, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = as_float((uint32_t)x[p] << 16);
}

static void widen_f16(const uint16_t *restrict x, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) {
    const uint32_t sign = (uint32_t)(x[p] & 0x8000u) << 16, body = (uint32_t)(x[p] & 0x7fffu) << 13;
    const uint32_t normal = body + (body >= (31u << 23) ? 224u << 23 : 112u << 23);       /* Inf, NaN: exponent 255 */
    const uint32_t small = as_bits(as_float(body + (113u << 23)) - as_float(113u << 23)); /* subnormal: exact */
    out[p] = as_float(sign | (body < (1u << 23) ? small : normal));
  }
}

static void round_f32(const double *restrict x, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = (float)x[p];
}

/* x rounded to odd in F32: a second rounding, to fewer bits, then has the value of a single one. */
FM_INLINE uint32_t round_to_odd(double x) {
  const float f = (float)x;
  const uint32_t bits = as_bits(f);
  const double back = (double)f;
  const uint32_t inexact = back != x && (bits & 1u) == 0;
  return bits + (inexact ? (fabs(back) < fabs(x) ? 1u : 0xffffffffu) : 0u);
}

static void round_bf16(const double *restrict x, int64_t n, uint16_t *restrict out) {
  for (int64_t p = 0; p < n; p++) {
    const uint32_t bits = round_to_odd(x[p]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = ((as_bits((float)x[p]) >> 16) & 0x8000u) | 0x7fc0u;
    out[p] = (uint16_t)(x[p] != x[p] ? nan : rounded);
  }
}

static void round_f16(const double *restrict x, int64_t n, uint16_t *restrict out) {
  for (int64_t p = 0; p < n; p++) {
    const uint32_t bits = round_to_odd(x[p]), sign = (as_bits((float)x[p]) >> 16) & 0x8000u, body = bits & 0x7fffffffu;
    const uint32_t small = as_bits(as_float(body) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (body + 0xc8000fffu + ((body >> 13) & 1u)) >> 13;
    uint32_t half = body < (113u << 23) ? small : normal;
    half = body >= (143u << 23) ? 0x7c00u : half;
    out[p] = (uint16_t)(sign | (x[p] != x[p] ? 0x7e00u : half));
  }
}

static const fm_kernels table = {FM_ISA,     gram_f32,    gram_f64,    sq_scaled_f32, sq_scaled_f64,
                                 diff_f32,   diff_f64,    widen_bf16,  widen_f16,     round_f32,
                                 round_bf16, round_f16,   combine_f32, combine_f64,   add_f32,
                                 add_f64,    perturb_f32, perturb_f64, perturb_wide};

const fm_kernels *const FM_TABLE = &table;
