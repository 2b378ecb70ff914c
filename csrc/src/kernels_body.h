/* kernels_body.h - the kernels, compiled once an instruction set. The including file defines
 *   FM_TABLE, FM_ISA  name of the table, and its name for users
 *   FM_WIDTH          doubles in a register
 *   FM_WIDTH_F32      floats in a register
 *   FM_TILE_ROWS, FM_TILE_ROWS_F32  rows whose inner products with 4 others fit in the registers, at most 4
 *   FM_REGISTERS, FM_REGISTERS_F32  registers a pair, of triangles of 1 to 4 rows and of tiles of 1 to 4 rows
 *   FM_FMA(a, b, c)   a b + c of vectors of doubles, fused or not
 *   FM_FMA_F32(a, b, c)  a b + c of vectors of floats in one rounding
 *   FM_WIDEN(v), FM_NARROW(v)  a vector of FM_WIDTH F32 to F64, and back
 *   FM_LOAD_BF16(p), FM_LOAD_BF16_F32(p)  BF16 to a vector of doubles, of floats; loops where it is not defined
 *
 * Inner products (kernels_pairs.h) and combinations are written with vectors, the rest are plain loops for the compiler
 * to vectorise.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "kernels.h"
#include "random.h"

typedef double fm_vd __attribute__((vector_size(8 * FM_WIDTH)));
typedef double fm_vd_any __attribute__((vector_size(8 * FM_WIDTH), aligned(8), may_alias));
typedef uint64_t fm_vu __attribute__((vector_size(8 * FM_WIDTH)));
typedef int64_t fm_vi __attribute__((vector_size(8 * FM_WIDTH)));
typedef float fm_vh_any __attribute__((vector_size(4 * FM_WIDTH), aligned(4), may_alias));
typedef float fm_vf __attribute__((vector_size(4 * FM_WIDTH_F32)));
typedef float fm_vf_any __attribute__((vector_size(4 * FM_WIDTH_F32), aligned(4), may_alias));

#define FM_INLINE static inline __attribute__((always_inline))

FM_INLINE fm_vd load_f32(const float *p) {
  const fm_vh_any v = *(const fm_vh_any *)p;
  return (fm_vd)FM_WIDEN(v);
}
FM_INLINE fm_vd load_f64(const double *p) {
  return *(const fm_vd_any *)p;
}
FM_INLINE void store_f32(float *p, fm_vd v) {
  *(fm_vh_any *)p = (fm_vh_any)FM_NARROW(v);
}
FM_INLINE void store_f64(double *p, fm_vd v) {
  *(fm_vd_any *)p = v;
}

FM_INLINE fm_vf load_fast(const float *p) {
  return *(const fm_vf_any *)p;
}

FM_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FM_INLINE float from_bf16(uint16_t x) {
  return as_float((uint32_t)x << 16);
}

#define FM_DEFINE_LOAD_BF16(NAME, VEC, WIDTH)               \
  FM_INLINE VEC NAME(const uint16_t *p) {                   \
    VEC v = {0};                                            \
    for (int l = 0; l < WIDTH; l++) v[l] = from_bf16(p[l]); \
    return v;                                               \
  }

#ifndef FM_LOAD_BF16
FM_DEFINE_LOAD_BF16(lanes_bf16, fm_vd, FM_WIDTH)
#define FM_LOAD_BF16 lanes_bf16
#endif
#ifndef FM_LOAD_BF16_F32
FM_DEFINE_LOAD_BF16(lanes_bf16_f32, fm_vf, FM_WIDTH_F32)
#define FM_LOAD_BF16_F32 lanes_bf16_f32
#endif

FM_INLINE fm_vd load_bf16(const uint16_t *p) {
  return (fm_vd)FM_LOAD_BF16(p);
}
FM_INLINE fm_vf load_fast_bf16(const uint16_t *p) {
  return (fm_vf)FM_LOAD_BF16_F32(p);
}

#define FM_MUL_ADD(a, b, c) ((a) * (b) + (c))

#ifdef FM_EMULATE_FMA
/* A fused multiply-add by double precision: the product of two F32 is exact there; the sum is rounded to odd, after
 * which the rounding to F32 has the value of a single one. */
FM_INLINE fm_vf fma_f32(fm_vf a, fm_vf b, fm_vf c) {
  fm_vf out = {0};
  for (int half = 0; half < FM_WIDTH_F32; half += FM_WIDTH) {
    fm_vd x = {0}, y = {0}, z = {0};
    for (int l = 0; l < FM_WIDTH; l++) x[l] = a[half + l], y[l] = b[half + l], z[l] = c[half + l];
    const fm_vd product = x * y, sum = product + z;
    const fm_vd back = sum - product, error = (product - (sum - back)) + (z - back);
    /* -1 where true. NaN compares false: Inf and NaN stay as they are. */
    const fm_vi up = (fm_vi)(error > 0.0), down = (fm_vi)(error < 0.0), negative = (fm_vi)(sum < 0.0);
    const fm_vi even = ((fm_vi)sum & 1) - 1, away = ((down - up) ^ negative) - negative;
    const fm_vd odd = (fm_vd)((fm_vi)sum + (away & even));
    for (int l = 0; l < FM_WIDTH; l++) out[half + l] = (float)odd[l];
  }
  return out;
}
#endif

#include "kernels_pairs.h"

/* One body for both precisions of the rows; all arithmetic but diff's in double. */
#define FM_DEFINE_LOOPS(T, TYPE)                                                                           \
  static void sq_scaled_##T(const TYPE *x, const TYPE *params, double eta, int64_t n, int first, int last, \
                            double *lanes, double *out) {                                                  \
    fm_vd acc[FM_LANES / FM_WIDTH];                                                                        \
    FM_UNROLL for (int v = 0; v < FM_LANES / FM_WIDTH; v++) acc[v] =                                       \
        first ? (fm_vd){0} : load_f64(lanes + v * FM_WIDTH);                                               \
    for (int64_t p = 0; p < n; p += FM_LANES) FM_UNROLL for (int v = 0; v < FM_LANES / FM_WIDTH; v++) {    \
        fm_vd t = load_##T(params + p + v * FM_WIDTH);                                                     \
        t = (fm_vd)((fm_vi)t & ~((fm_vi){0} + INT64_MIN)) + eta;                                           \
        const fm_vd value = t * load_##T(x + p + v * FM_WIDTH);                                            \
        acc[v] += value * value;                                                                           \
      }                                                                                                    \
    FM_UNROLL for (int v = 0; v < FM_LANES / FM_WIDTH; v++) store_f64(lanes + v * FM_WIDTH, acc[v]);       \
    if (last) close_f64(lanes, out, 1);                                                                    \
  }

FM_DEFINE_LOOPS(f32, float)
FM_DEFINE_LOOPS(f64, double)

FM_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FM_INLINE float from_f16(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, body = (uint32_t)(x & 0x7fffu) << 13;
  const uint32_t normal = body + (body >= (31u << 23) ? 224u << 23 : 112u << 23);       /* Inf, NaN: exponent 255 */
  const uint32_t small = as_bits(as_float(body + (113u << 23)) - as_float(113u << 23)); /* subnormal: exact */
  return as_float(sign | (body < (1u << 23) ? small : normal));
}

FM_INLINE double wide_f32(float x) {
  return (double)x;
}
FM_INLINE double wide_f64(double x) {
  return x;
}
FM_INLINE double wide_bf16(uint16_t x) {
  return (double)from_bf16(x);
}

FM_INLINE fm_vd absolute(fm_vd x) {
  return (fm_vd)((fm_vi)x & ~((fm_vi){0} + INT64_MIN));
}

#ifndef FM_ALL
FM_INLINE int all_lanes(fm_vi mask) {
  int64_t all = -1;
  FM_UNROLL for (int l = 0; l < FM_WIDTH; l++) all &= mask[l];
  return all != 0;
}
#define FM_ALL all_lanes
#endif

#ifndef FM_STORE_HIGH16
FM_INLINE void store_high16(uint16_t *p, fm_vh_any v) {
  FM_UNROLL for (int l = 0; l < FM_WIDTH; l++) p[l] = (uint16_t)(as_bits(v[l]) >> 16);
}
#define FM_STORE_HIGH16 store_high16
#endif

/* Any number to BF16 in one rounding, from the bits of the F64: 45 of them go. Numbers below 2^-126 are rounded by an
 * addition to multiples of 2^-133. */
static void store_bf16_any(uint16_t *p, fm_vd v) {
  const fm_vd size = absolute(v);
  const fm_vu bits = (fm_vu)size;
  const fm_vi normal = (fm_vi)((bits + ((UINT64_C(1) << 44) - 1) + ((bits >> 45) & 1)) >> 45) - ((1023 - 127) << 7);
  const fm_vi small = (fm_vi)(size + 0x1p-81) - (fm_vi)((fm_vd){0} + 0x1p-81);
  const fm_vi is_small = (fm_vi)(size < 0x1p-126), is_large = (fm_vi)(size >= 0x1p128), is_nan = (fm_vi)(size != size);
  fm_vi half = (small & is_small) | (normal & ~is_small);
  half = (0x7fc0 & is_nan) | (0x7f80 & is_large) | (half & ~(is_nan | is_large));
  half |= (fm_vi)(((fm_vu)v >> 48) & 0x8000u);
  for (int l = 0; l < FM_WIDTH; l++) p[l] = (uint16_t)half[l];
}

/* A normal number is rounded to 8 bits by adding and subtracting one that is 2^45 times as large, and is an F32 then.
 * Zeros and subnormal numbers, which may be flushed, Inf and NaN take the long way. */
FM_INLINE void store_bf16(uint16_t *p, fm_vd v) {
  const fm_vd size = absolute(v);
  const fm_vd large = 0x1.8p45 * (fm_vd)((fm_vi)v & INT64_C(0x7ff0000000000000));
  if (__builtin_expect(FM_ALL((fm_vi)(size >= 0x1p-126) & (fm_vi)(size < 0x1p128)), 1))
    FM_STORE_HIGH16(p, (fm_vh_any)FM_NARROW((v + large) - large));
  else
    store_bf16_any(p, v);
}

FM_INLINE float narrow_f32(double x) {
  return (float)x;
}
FM_INLINE double narrow_f64(double x) {
  return x;
}
FM_INLINE uint16_t narrow_bf16(double x) {
  uint16_t out[FM_WIDTH];
  store_bf16(out, (fm_vd){x});
  return out[0];
}

/* out = saved + scale t^2 gradient: T, G and S say how saved and gradient are loaded and out is stored. */
#define FM_DEFINE_PERTURB(NAME, T, TYPE, G, GRADIENT, S, OUT)                                                     \
  static void NAME(const TYPE *restrict saved, const GRADIENT *restrict gradient, double scale, int adaptive,     \
                   double eta, int64_t n, OUT *restrict out) {                                                    \
    int64_t p = 0;                                                                                                \
    for (; p + 4 * FM_WIDTH <= n; p += 4 * FM_WIDTH) FM_UNROLL for (int v = 0; v < 4 * FM_WIDTH; v += FM_WIDTH) { \
        const fm_vd x = load_##T(saved + p + v), g = load_##G(gradient + p + v);                                  \
        if (adaptive) {                                                                                           \
          const fm_vd t = absolute(x) + eta;                                                                      \
          store_##S(out + p + v, x + scale * (t * t) * g);                                                        \
        } else {                                                                                                  \
          store_##S(out + p + v, x + scale * g);                                                                  \
        }                                                                                                         \
      }                                                                                                           \
    for (; p < n; p++) {                                                                                          \
      const double x = wide_##T(saved[p]), g = wide_##G(gradient[p]), t = fabs(x) + eta;                          \
      out[p] = narrow_##S(adaptive ? x + scale * (t * t) * g : x + scale * g);                                    \
    }                                                                                                             \
  }

FM_DEFINE_PERTURB(perturb_f32, f32, float, f32, float, f32, float)
FM_DEFINE_PERTURB(perturb_f64, f64, double, f64, double, f64, double)
FM_DEFINE_PERTURB(perturb_bf16, bf16, uint16_t, bf16, uint16_t, bf16, uint16_t)
FM_DEFINE_PERTURB(perturb_f32_bf16, f32, float, bf16, uint16_t, f32, float)
FM_DEFINE_PERTURB(perturb_wide, f32, float, f32, float, f64, double)

/* How far ahead combinations ask for their rows, in bytes. */
enum { FM_COMBINE_AHEAD = 512 };

/* VECTORS registers of elements at p, all rows one after another. FLAT and SUMS are constants: whether there is an s,
 * and whether out holds what was summed before. */
#define FM_COMBINE_AT(T, S, VECTORS, FLAT, SUMS)                                                                 \
  do {                                                                                                           \
    fm_vd acc[VECTORS];                                                                                          \
    FM_UNROLL for (int v = 0; v < VECTORS; v++) acc[v] =                                                         \
        SUMS && !first ? load_f64((const double *)(const void *)(out + p) + v * FM_WIDTH) : (fm_vd){0};          \
    for (int32_t i = 0; i < k; i++) {                                                                            \
      for (size_t at = 0; at < VECTORS * FM_WIDTH * sizeof **g; at += 64) {                                      \
        __builtin_prefetch((const char *)(g[i] + p) + (SUMS ? FM_BLOCK * sizeof **g : FM_COMBINE_AHEAD) + at);   \
        if (FLAT)                                                                                                \
          __builtin_prefetch((const char *)(s[i] + p) + (SUMS ? FM_BLOCK * sizeof **g : FM_COMBINE_AHEAD) + at); \
      }                                                                                                          \
      FM_UNROLL for (int v = 0; v < VECTORS; v++) {                                                              \
        const fm_vd x = load_##T(g[i] + p + v * FM_WIDTH);                                                       \
        acc[v] += a[i] * x;                                                                                      \
        if (FLAT) acc[v] += b[i] * (load_##T(s[i] + p + v * FM_WIDTH) - x);                                      \
      }                                                                                                          \
    }                                                                                                            \
    FM_UNROLL for (int v = 0; v < VECTORS; v++) store_##S(out + p + v * FM_WIDTH, acc[v]);                       \
  } while (0)

#define FM_DEFINE_COMBINE_ONE(NAME, T, TYPE, S, OUT, FLAT, SUMS)                                                       \
  static void NAME(const TYPE *const *g, const TYPE *const *s, const double *a, const double *b, int32_t k, int first, \
                   int64_t n, OUT *restrict out) {                                                                     \
    int64_t p = 0;                                                                                                     \
    for (; p + 4 * FM_WIDTH <= n; p += 4 * FM_WIDTH) FM_COMBINE_AT(T, S, 4, FLAT, SUMS);                               \
    for (; p < n; p++) {                                                                                               \
      double sum = SUMS && !first ? (double)out[p] : 0.0;                                                              \
      for (int32_t i = 0; i < k; i++) {                                                                                \
        const double x = wide_##T(g[i][p]);                                                                            \
        sum += a[i] * x;                                                                                               \
        if (FLAT) sum += b[i] * (wide_##T(s[i][p]) - x);                                                               \
      }                                                                                                                \
      out[p] = narrow_##S(sum);                                                                                        \
    }                                                                                                                  \
    (void)s;                                                                                                           \
    (void)b;                                                                                                           \
    (void)first;                                                                                                       \
  }

#define FM_DEFINE_COMBINE(NAME, T, TYPE, S, OUT)                                                                       \
  FM_DEFINE_COMBINE_ONE(NAME##_loss, T, TYPE, S, OUT, 0, 0)                                                            \
  FM_DEFINE_COMBINE_ONE(NAME##_pair, T, TYPE, S, OUT, 1, 0)                                                            \
  static void NAME(const TYPE *const *g, const TYPE *const *s, const double *a, const double *b, int32_t k, int64_t n, \
                   OUT *out) {                                                                                         \
    (s ? NAME##_pair : NAME##_loss)(g, s, a, b, k, 1, n, out);                                                         \
  }

#define FM_DEFINE_SUM(T, TYPE)                                                                                 \
  FM_DEFINE_COMBINE_ONE(sum_loss_##T, T, TYPE, f64, double, 0, 1)                                              \
  FM_DEFINE_COMBINE_ONE(sum_pair_##T, T, TYPE, f64, double, 1, 1)                                              \
  static void sum_##T(const TYPE *const *g, const TYPE *const *s, const double *a, const double *b, int32_t k, \
                      int first, int64_t n, double *sum) {                                                     \
    (s ? sum_pair_##T : sum_loss_##T)(g, s, a, b, k, first, n, sum);                                           \
  }

FM_DEFINE_COMBINE(combine_f32, f32, float, f32, float)
FM_DEFINE_COMBINE(combine_f64, f64, double, f64, double)
FM_DEFINE_COMBINE(combine_bf16, bf16, uint16_t, bf16, uint16_t)
FM_DEFINE_COMBINE(combine_bf16_f32, bf16, uint16_t, f32, float)
FM_DEFINE_SUM(f32, float)
FM_DEFINE_SUM(f64, double)
FM_DEFINE_SUM(bf16, uint16_t)

#define FM_DEFINE_ADD(T, TYPE)                                                                               \
  static void add_##T(const TYPE *g, const TYPE *s, double a, double b, int first, int64_t n, double *sum) { \
    sum_##T(&g, s ? &s : NULL, &a, &b, 1, first, n, sum);                                                    \
  }

FM_DEFINE_ADD(f32, float)
FM_DEFINE_ADD(f64, double)

static void widen_bf16(const uint16_t *restrict x, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = from_bf16(x[p]);
}

static void widen_f16(const uint16_t *restrict x, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = from_f16(x[p]);
}

/* out may be s. */
#define FM_DEFINE_DIFF(T, TYPE, VEC, ANY)                                               \
  static void diff_##T(const TYPE *s, const TYPE *g, int64_t n, TYPE *out) {            \
    enum { WIDTH = sizeof(VEC) / sizeof(TYPE) };                                        \
    int64_t p = 0;                                                                      \
    for (; p + 2 * WIDTH <= n; p += 2 * WIDTH) {                                        \
      const VEC first = *(const ANY *)(s + p) - *(const ANY *)(g + p);                  \
      const VEC second = *(const ANY *)(s + p + WIDTH) - *(const ANY *)(g + p + WIDTH); \
      *(ANY *)(out + p) = first;                                                        \
      *(ANY *)(out + p + WIDTH) = second;                                               \
    }                                                                                   \
    for (; p < n; p++) out[p] = s[p] - g[p];                                            \
  }

FM_DEFINE_DIFF(f32, float, fm_vf, fm_vf_any)
FM_DEFINE_DIFF(f64, double, fm_vd, fm_vd_any)

static void diff_bf16(const uint16_t *restrict s, const uint16_t *restrict g, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = from_bf16(s[p]) - from_bf16(g[p]);
}

static void diff_f16(const uint16_t *restrict s, const uint16_t *restrict g, int64_t n, float *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] = from_f16(s[p]) - from_f16(g[p]);
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
  int64_t p = 0;
  for (; p + FM_WIDTH <= n; p += FM_WIDTH) store_bf16(out + p, load_f64(x + p));
  for (; p < n; p++) out[p] = narrow_bf16(x[p]);
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

#include "kernels_buffers.h"

static const fm_kernels table = {
    FM_ISA,    gram_f32,    gram_f64,    gram_fast,    gram_bf16,        gram_fast_bf16,   sq_scaled_f32, sq_scaled_f64,
    diff_f32,  diff_f64,    diff_bf16,   diff_f16,     widen_bf16,       widen_f16,        round_f32,     round_bf16,
    round_f16, combine_f32, combine_f64, combine_bf16, combine_bf16_f32, sum_f32,          sum_f64,       sum_bf16,
    add_f32,   add_f64,     perturb_f32, perturb_f64,  perturb_bf16,     perturb_f32_bf16, perturb_wide,  ema_f32,
    ema_f64,   excess_f32,  excess_f64,  dot,          drop_sums,        drop_signs,       drop_add};

const fm_kernels *const FM_TABLE = &table;
