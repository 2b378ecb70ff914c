/* kernels.h - loops over contiguous memory, one table of them an instruction set. Private.
 *
 * Numerical contract, the same for every instruction set: element p of a run belongs to lane p % 8; a lane's terms are
 * added in the order of p in double precision. Products of widened F32 numbers are exact, so that a fused multiply-add
 * has the value of a multiplication and an addition; everywhere else the two are rounded one by one.
 */
#ifndef FM_KERNELS_H
#define FM_KERNELS_H

#include <stdint.h>

enum {
  FM_LANES = 8,   /* partial sums of one inner product */
  FM_GROUP = 16,  /* rows handled together */
  FM_BLOCK = 512, /* elements of a run that stay in the first cache */
};

/* Arrays may not overlap, and n may be any number >= 0, unless said otherwise. */
typedef struct fm_kernels {
  const char *name;

  /* sums[i][j][lane] += x_i y_j for every pair of the nx rows x and the FM_GROUP rows y, sums being
   * [FM_GROUP][FM_GROUP][FM_LANES]; for y == NULL, of x with itself, j <= i. n is a multiple of FM_LANES. */
  void (*gram_f32)(const float *const *x, int32_t nx, const float *const *y, int64_t n, double *sums);
  void (*gram_f64)(const double *const *x, int32_t nx, const double *const *y, int64_t n, double *sums);

  /* sums[lane] += ((|params| + eta) x)^2; n is a multiple of FM_LANES. */
  void (*sq_scaled_f32)(const float *x, const float *params, double eta, int64_t n, double *sums);
  void (*sq_scaled_f64)(const double *x, const double *params, double eta, int64_t n, double *sums);

  /* out = s - g */
  void (*diff_f32)(const float *s, const float *g, int64_t n, float *out);
  void (*diff_f64)(const double *s, const double *g, int64_t n, double *out);

  /* Exact. */
  void (*widen_bf16)(const uint16_t *x, int64_t n, float *out);
  void (*widen_f16)(const uint16_t *x, int64_t n, float *out);

  /* To nearest, ties to even, in one rounding; NaN becomes the quiet NaN of its sign. */
  void (*round_f32)(const double *x, int64_t n, float *out);
  void (*round_bf16)(const double *x, int64_t n, uint16_t *out);
  void (*round_f16)(const double *x, int64_t n, uint16_t *out);

  /* out = SUM_i a_i g_i, or SUM_i a_i g_i + b_i (s_i - g_i) if s is not NULL, from 0 on in that order. */
  void (*combine_f32)(const float *const *g, const float *const *s, const double *a, const double *b, int32_t k,
                      int64_t n, float *out);
  void (*combine_f64)(const double *const *g, const double *const *s, const double *a, const double *b, int32_t k,
                      int64_t n, double *out);

  /* One term of combine: sum += a g, or a g + b (s - g) if s is not NULL; `sum =` if first. */
  void (*add_f32)(const float *g, const float *s, double a, double b, int first, int64_t n, double *sum);
  void (*add_f64)(const double *g, const double *s, double a, double b, int first, int64_t n, double *sum);

  /* out = saved + scale t^2 gradient, t = 1 or |saved| + eta. */
  void (*perturb_f32)(const float *saved, const float *gradient, double scale, int adaptive, double eta, int64_t n,
                      float *out);
  void (*perturb_f64)(const double *saved, const double *gradient, double scale, int adaptive, double eta, int64_t n,
                      double *out);
  void (*perturb_wide)(const float *saved, const float *gradient, double scale, int adaptive, double eta, int64_t n,
                       double *out);
} fm_kernels;

/* NULL where the build lacks them. */
extern const fm_kernels *const fm_kernels_base;
extern const fm_kernels *const fm_kernels_avx2;
extern const fm_kernels *const fm_kernels_avx512;
extern const fm_kernels *const fm_kernels_neon;

/* The table in use: chosen on the first call. */
const fm_kernels *fm_kernels_get(void);

#endif
