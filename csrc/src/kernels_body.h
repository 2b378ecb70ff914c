/* kernels_body.h - the kernels, compiled once an instruction set. The including file defines
 *   FM_TABLE               name of the table, FM_ISA its name for users
 *   FM_WIDTH               doubles in a register
 *   FM_TILE_ROWS           rows of x whose inner products with 4 rows of y fit in registers, at most 4
 *   FM_FMA(a, b, c)        a b + c of vectors, fused or not
 *   FM_WIDEN(v), FM_NARROW(v)  vectors of FM_WIDTH F32 to F64 and back
 *
 * What has sums over elements or rows is written with vectors, the rest as plain loops that the compiler vectorises.
 */
#include <stddef.h>
#include <string.h>

#include "kernels.h"

typedef double fm_vd __attribute__((vector_size(8 * FM_WIDTH)));
typedef int64_t fm_vi __attribute__((vector_size(8 * FM_WIDTH)));
typedef double fm_vd_any __attribute__((vector_size(8 * FM_WIDTH), aligned(8), may_alias));
typedef float fm_vf __attribute__((vector_size(4 * FM_WIDTH)));
typedef float fm_vf_any __attribute__((vector_size(4 * FM_WIDTH), aligned(4), may_alias));

#define FM_INLINE static inline __attribute__((always_inline))
#define FM_UNROLL _Pragma("GCC unroll 16")

FM_INLINE fm_vd load_f32(const float *p) { return (fm_vd)FM_WIDEN((fm_vf) * (const fm_vf_any *)p); }
FM_INLINE fm_vd load_f64(const double *p) { return *(const fm_vd_any *)p; }
FM_INLINE void store_f32(float *p, fm_vd v) { *(fm_vf_any *)p = (fm_vf)FM_NARROW(v); }
FM_INLINE void store_f64(double *p, fm_vd v) { *(fm_vd_any *)p = v; }
FM_INLINE fm_vd splat(double v) { return (fm_vd){0} + v; }
FM_INLINE fm_vd absolute(fm_vd v) { return (fm_vd)((fm_vi)v & INT64_MAX); }

/* Not fused, for products that are rounded. */
#define FM_MUL_ADD(a, b, c) ((a) * (b) + (c))

/* ------------------------------------------------------------------------------------------------------------------
 * Inner products. A tile whose accumulators leave registers free takes several vectors of lanes at once; the others
 * sweep over the run once for every FM_WIDTH lanes. The order of additions within a lane is the same.
 */

#define FM_SUM(i, j, lane) (sums + ((i) * FM_GROUP + (j)) * FM_LANES + (lane))

/* How far ahead a row is asked from memory, in bytes. */
enum { FM_AHEAD = 2048 };

/* NX rows of x with NY rows of y, or, if TRIANGLE, of x with itself; VECTORS registers of lanes at once. */
#define FM_DEFINE_TILE(NAME, TYPE, LOAD, MULADD, NX, NY, VECTORS, TRIANGLE)                                 \
  static void NAME(const TYPE *const *x, const TYPE *const *y, int64_t n, double *sums) {                   \
    for (int lane = 0; lane < FM_LANES; lane += FM_WIDTH * (VECTORS)) {                                     \
      fm_vd acc[NX][NY][VECTORS];                                                                           \
      const TYPE *px[NX], *py[NY];                                                                          \
      FM_UNROLL for (int i = 0; i < (NX); i++) px[i] = x[i] + lane;                                         \
      FM_UNROLL for (int j = 0; j < (NY); j++) py[j] = y[j] + lane;                                         \
      FM_UNROLL for (int i = 0; i < (NX); i++)                                                              \
          FM_UNROLL for (int j = 0; j < ((TRIANGLE) ? i + 1 : (NY)); j++)                                   \
              FM_UNROLL for (int v = 0; v < (VECTORS); v++)                                                 \
                  acc[i][j][v] = load_f64(FM_SUM(i, j, lane + v * FM_WIDTH));                               \
      for (int64_t p = 0; p < n; p += FM_LANES) {                                                           \
        fm_vd a[NX][VECTORS];                                                                               \
        FM_UNROLL for (int i = 0; i < (NX); i++) {                                                          \
          if ((TRIANGLE) && lane == 0) __builtin_prefetch((const char *)(px[i] + p) + FM_AHEAD);            \
          FM_UNROLL for (int v = 0; v < (VECTORS); v++) a[i][v] = LOAD(px[i] + p + v * FM_WIDTH);           \
        }                                                                                                   \
        FM_UNROLL for (int j = 0; j < (NY); j++) FM_UNROLL for (int v = 0; v < (VECTORS); v++) {            \
          const fm_vd b = (TRIANGLE) ? a[j < (NX) ? j : 0][v] : LOAD(py[j] + p + v * FM_WIDTH);             \
          FM_UNROLL for (int i = (TRIANGLE) ? j : 0; i < (NX); i++) acc[i][j][v] = MULADD(a[i][v], b, acc[i][j][v]); \
        }                                                                                                   \
      }                                                                                                     \
      FM_UNROLL for (int i = 0; i < (NX); i++)                                                              \
          FM_UNROLL for (int j = 0; j < ((TRIANGLE) ? i + 1 : (NY)); j++)                                   \
              FM_UNROLL for (int v = 0; v < (VECTORS); v++)                                                 \
                  store_f64(FM_SUM(i, j, lane + v * FM_WIDTH), acc[i][j][v]);                               \
    }                                                                                                       \
  }

#define FM_ALL (FM_LANES / FM_WIDTH)
#define FM_SOME(vectors) (FM_ALL < (vectors) ? FM_ALL : (vectors))

/* gram_TYPE: tiles of 4 rows, and the rows below them FM_TILE_ROWS at a time. */
#define FM_DEFINE_GRAM(SUFFIX, TYPE, MULADD)                                                                 \
  FM_DEFINE_TILE(triangle1_##SUFFIX, TYPE, load_##SUFFIX, MULADD, 1, 1, FM_ALL, 1)                           \
  FM_DEFINE_TILE(triangle2_##SUFFIX, TYPE, load_##SUFFIX, MULADD, 2, 2, FM_SOME(2), 1)                       \
  FM_DEFINE_TILE(triangle3_##SUFFIX, TYPE, load_##SUFFIX, MULADD, 3, 3, 1, 1)                                \
  FM_DEFINE_TILE(triangle4_##SUFFIX, TYPE, load_##SUFFIX, MULADD, 4, 4, 1, 1)                                \
  FM_DEFINE_TILE(below1_##SUFFIX, TYPE, load_##SUFFIX, MULADD, 1, 4, FM_SOME(2), 0)                          \
  FM_DEFINE_TILE(below2_##SUFFIX, TYPE, load_##SUFFIX, MULADD, 2, 4, 1, 0)                                   \
  FM_DEFINE_TILE(below3_##SUFFIX, TYPE, load_##SUFFIX, MULADD, (FM_TILE_ROWS < 3 ? 1 : 3), 4, 1, 0)          \
  FM_DEFINE_TILE(below4_##SUFFIX, TYPE, load_##SUFFIX, MULADD, (FM_TILE_ROWS < 4 ? 1 : 4), 4, 1, 0)          \
  static void gram_##SUFFIX(const TYPE *const *x, int32_t nx, const TYPE *const *y, int64_t n, double *sums) { \
    typedef void (*tile)(const TYPE *const *, const TYPE *const *, int64_t, double *);                       \
    static const tile triangle[4] = {triangle1_##SUFFIX, triangle2_##SUFFIX, triangle3_##SUFFIX, triangle4_##SUFFIX}; \
    static const tile below[4] = {below1_##SUFFIX, below2_##SUFFIX, below3_##SUFFIX, below4_##SUFFIX};       \
    const int32_t ny = y ? FM_GROUP : nx;                                                                    \
    for (int32_t j = 0; j < ny; j += 4) {                                                                    \
      int32_t i = 0;                                                                                         \
      if (!y) {                                                                                              \
        const int32_t rows = nx - j < 4 ? nx - j : 4;                                                        \
        triangle[rows - 1](x + j, x + j, n, FM_SUM(j, j, 0));                                                \
        i = j + 4;                                                                                           \
      }                                                                                                      \
      while (i < nx) {                                                                                       \
        const int32_t rows = nx - i < FM_TILE_ROWS ? nx - i : FM_TILE_ROWS;                                  \
        below[rows - 1](x + i, (y ? y : x) + j, n, FM_SUM(i, j, 0));                                         \
        i += rows;                                                                                           \
      }                                                                                                      \
    }                                                                                                        \
  }

FM_DEFINE_GRAM(f32, float, FM_FMA)
FM_DEFINE_GRAM(f64, double, FM_MUL_ADD)

#define FM_DEFINE_SQ_SCALED(SUFFIX, TYPE)                                                                      \
  static void sq_scaled_##SUFFIX(const TYPE *x, const TYPE *params, double eta, int64_t n, double *sums) {     \
    fm_vd acc[FM_ALL];                                                                                         \
    const fm_vd e = splat(eta);                                                                                \
    FM_UNROLL for (int v = 0; v < FM_ALL; v++) acc[v] = load_f64(sums + v * FM_WIDTH);                         \
    for (int64_t p = 0; p < n; p += FM_LANES) FM_UNROLL for (int v = 0; v < FM_ALL; v++) {                     \
      const fm_vd t = absolute(load_##SUFFIX(params + p + v * FM_WIDTH)) + e;                                  \
      const fm_vd y = t * load_##SUFFIX(x + p + v * FM_WIDTH);                                                 \
      acc[v] += y * y;                                                                                         \
    }                                                                                                          \
    FM_UNROLL for (int v = 0; v < FM_ALL; v++) store_f64(sums + v * FM_WIDTH, acc[v]);                         \
  }

FM_DEFINE_SQ_SCALED(f32, float)
FM_DEFINE_SQ_SCALED(f64, double)

/* ------------------------------------------------------------------------------------------------------------------
 * Sums over rows
 */

/* VECTORS registers of elements of out at p; S is a constant: whether there are flat rows. */
#define FM_COMBINE_AT(SUFFIX, VECTORS, S)                                                      \
  do {                                                                                         \
    fm_vd acc[VECTORS];                                                                        \
    FM_UNROLL for (int v = 0; v < (VECTORS); v++) acc[v] = splat(-0.0); /* x + -0 is x */       \
    for (int32_t i = 0; i < k; i++) {                                                          \
      const fm_vd ai = splat(a[i]);                                                            \
      FM_UNROLL for (int v = 0; v < (VECTORS); v++) {                                          \
        const fm_vd gi = load_##SUFFIX(g[i] + p + v * FM_WIDTH);                               \
        acc[v] += ai * gi;                                                                     \
        if (S) acc[v] += splat(b[i]) * (load_##SUFFIX(s[i] + p + v * FM_WIDTH) - gi);          \
      }                                                                                        \
    }                                                                                          \
    FM_UNROLL for (int v = 0; v < (VECTORS); v++) store_##SUFFIX(out + p + v * FM_WIDTH, acc[v]); \
  } while (0)

#define FM_DEFINE_COMBINE_ONE(NAME, SUFFIX, TYPE, S)                                                             \
  static void NAME(const TYPE *const *g, const TYPE *const *s, const double *a, const double *b, int32_t k,      \
                   int64_t n, TYPE *restrict out) {                                                              \
    enum { WIDE = 4 };                                                                                           \
    int64_t p = 0;                                                                                               \
    for (; p + WIDE * FM_WIDTH <= n; p += WIDE * FM_WIDTH) FM_COMBINE_AT(SUFFIX, WIDE, S);                       \
    for (; p + FM_WIDTH <= n; p += FM_WIDTH) FM_COMBINE_AT(SUFFIX, 1, S);                                        \
    for (; p < n; p++) {                                                                                         \
      double sum = -0.0;                                                                                         \
      for (int32_t i = 0; i < k; i++) {                                                                          \
        sum += a[i] * (double)g[i][p];                                                                           \
        if (S) sum += b[i] * ((double)s[i][p] - (double)g[i][p]);                                                \
      }                                                                                                          \
      out[p] = (TYPE)sum;                                                                                        \
    }                                                                                                            \
    (void)s;                                                                                                     \
    (void)b;                                                                                                     \
  }

#define FM_DEFINE_COMBINE(SUFFIX, TYPE)                                                                          \
  FM_DEFINE_COMBINE_ONE(combine_loss_##SUFFIX, SUFFIX, TYPE, 0)                                                  \
  FM_DEFINE_COMBINE_ONE(combine_pair_##SUFFIX, SUFFIX, TYPE, 1)                                                  \
  static void combine_##SUFFIX(const TYPE *const *g, const TYPE *const *s, const double *a, const double *b,     \
                               int32_t k, int64_t n, TYPE *out) {                                                \
    (s ? combine_pair_##SUFFIX : combine_loss_##SUFFIX)(g, s, a, b, k, n, out);                                  \
  }

FM_DEFINE_COMBINE(f32, float)
FM_DEFINE_COMBINE(f64, double)

static void add_f32(const float *g, const float *s, double a, double b, int64_t n, double *restrict sum) {
  if (s)
    for (int64_t p = 0; p < n; p++) sum[p] = (sum[p] + a * (double)g[p]) + b * ((double)s[p] - (double)g[p]);
  else
    for (int64_t p = 0; p < n; p++) sum[p] += a * (double)g[p];
}

/* ------------------------------------------------------------------------------------------------------------------
 * One element at a time
 */

static void diff_f32(const float *s, const float *g, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = s[p] - g[p];
}

static void diff_f64(const double *s, const double *g, int64_t n, double *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = s[p] - g[p];
}

#define FM_DEFINE_PERTURB(NAME, TYPE, OUT)                                                                        \
  static void NAME(const TYPE *saved, const TYPE *gradient, double scale, int adaptive, double eta, int64_t n,    \
                   OUT *restrict out) {                                                                           \
    if (!adaptive) {                                                                                              \
      for (int64_t p = 0; p < n; p++) out[p] = (OUT)((double)saved[p] + scale * (double)gradient[p]);             \
      return;                                                                                                     \
    }                                                                                                             \
    for (int64_t p = 0; p < n; p++) {                                                                             \
      const double t = __builtin_fabs((double)saved[p]) + eta;                                                    \
      out[p] = (OUT)((double)saved[p] + (scale * (t * t)) * (double)gradient[p]);                                 \
    }                                                                                                             \
  }

FM_DEFINE_PERTURB(perturb_f32, float, float)
FM_DEFINE_PERTURB(perturb_f64, double, double)
FM_DEFINE_PERTURB(perturb_f32_wide, float, double)

FM_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FM_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static void widen_bf16(const uint16_t *x, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = as_float((uint32_t)x[p] << 16);
}

static void widen_f16(const uint16_t *x, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) {
    const uint32_t sign = (uint32_t)(x[p] & 0x8000u) << 16;
    const uint32_t magnitude = (uint32_t)(x[p] & 0x7fffu) << 13; /* exponent still off by 127 - 15 */
    const uint32_t normal = magnitude + (112u << 23);
    /* Inf and NaN move to the top exponent; a subnormal is read as 2^-14 too much and has that taken off. */
    const uint32_t special = magnitude + (224u << 23);
    const uint32_t subnormal = as_bits(as_float(magnitude + (113u << 23)) - as_float(113u << 23));
    const uint32_t bits = magnitude >= (31u << 23) ? special : magnitude < (1u << 23) ? subnormal : normal;
    out[p] = as_float(sign | bits);
  }
}

/* To F32, odd if inexact: rounding the result to a format with at least 2 bits less is then rounding x at once. */
FM_INLINE uint32_t round_to_odd(double x) {
  const float near = (float)x;
  const double back = (double)near;
  uint32_t bits = as_bits(near);
  bits -= __builtin_fabs(back) > __builtin_fabs(x) ? 1u : 0u;
  return bits | (back != x ? 1u : 0u);
}

static void round_bf16(const double *x, int64_t n, uint16_t *restrict out) {
  for (int64_t p = 0; p < n; p++) {
    const uint32_t bits = round_to_odd(x[p]);
    const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = ((bits >> 16) & 0x8000u) | 0x7fc0u;
    out[p] = (uint16_t)(x[p] != x[p] ? nan : even);
  }
}

static void round_f16(const double *x, int64_t n, uint16_t *restrict out) {
  for (int64_t p = 0; p < n; p++) {
    const uint32_t bits = round_to_odd(x[p]);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    /* Adding 1/2 leaves the multiple of 2^-24 in the low bits, rounded to nearest even by the addition. */
    const uint32_t subnormal = as_bits(as_float(magnitude < (113u << 23) ? magnitude : 0u) + 0.5f) - (126u << 23);
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half; /* from 65520 on, Inf */
    half = x[p] != x[p] ? 0x7e00u : half;
    out[p] = (uint16_t)(sign | half);
  }
}

static const fm_kernels table = {
    FM_ISA,     gram_f32,   gram_f64,  sq_scaled_f32, sq_scaled_f64, diff_f32,    diff_f64,    widen_bf16,      widen_f16,
    round_bf16, round_f16, combine_f32,   combine_f64,   add_f32,     perturb_f32, perturb_f64, perturb_f32_wide,
};
const fm_kernels *const FM_TABLE = &table;
