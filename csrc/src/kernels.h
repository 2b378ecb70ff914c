/* kernels.h - loops over contiguous memory, one table of them an instruction set. Private.
 *
 * Numerical contract, the same for every instruction set: element p of a run belongs to lane p % FM_LANES; a lane's
 * terms are added in the order of p, and the lanes at the end of the run by halves: l and l + 8, l and l + 4, and so
 * on. In double precision, products of widened F32 numbers are exact, so that a fused multiply-add has the value of a
 * multiplication and an addition; everywhere else the two are rounded one by one. gram_fast is made of fused
 * multiply-adds in F32, one rounding each, on every instruction set.
 */
#ifndef FM_KERNELS_H
#define FM_KERNELS_H

#include <stdint.h>

enum {
  FM_LANES = 16,  /* partial sums of one inner product */
  FM_GROUP = 16,  /* rows handled together, if their lanes are kept between calls */
  FM_PANEL = 32,  /* rows handled together otherwise */
  FM_BLOCK = 512, /* elements of a run that stay in the first cache */
};

/* Memory to ask for while a kernel runs over n elements: n elements of `size` bytes from each of `rows` on. */
typedef struct fm_ahead {
  const char *rows[2 * FM_PANEL];
  int32_t count;
  int64_t size;
} fm_ahead;

/* Arrays may not overlap, and n may be any number >= 0, unless said otherwise. */
typedef struct fm_kernels {
  const char *name;

  /* Sums of x_i y_j over a run, for every pair of the nx rows x and the ny rows y; for y == NULL, of x with itself,
   * j <= i. ny and n are multiples of 4 and of FM_LANES. A run may take several calls: the first starts at zero, the
   * last adds the sums to out[i][j], in between they stay in lanes [FM_GROUP][FM_GROUP][FM_LANES]. lanes is not used
   * where a call is both first and last; otherwise nx and ny are at most FM_GROUP. Of a row of out, the columns up to
   * the next multiple of 4 are written, those beyond i with nothing of meaning. */
  void (*gram_f32)(const float *const *x, int32_t nx, const float *const *y, int32_t ny, int64_t n, int first, int last,
                   double *lanes, double *const *out, const fm_ahead *ahead);
  void (*gram_f64)(const double *const *x, int32_t nx, const double *const *y, int32_t ny, int64_t n, int first,
                   int last, double *lanes, double *const *out, const fm_ahead *ahead);
  /* gram_fast: with products and sums in F32, for runs of at most FM_BLOCK elements. BF16 is widened on the way. */
  void (*gram_fast)(const float *const *x, int32_t nx, const float *const *y, int32_t ny, int64_t n, int first,
                    int last, float *lanes, double *const *out, const fm_ahead *ahead);
  void (*gram_bf16)(const uint16_t *const *x, int32_t nx, const uint16_t *const *y, int32_t ny, int64_t n, int first,
                    int last, double *lanes, double *const *out, const fm_ahead *ahead);
  void (*gram_fast_bf16)(const uint16_t *const *x, int32_t nx, const uint16_t *const *y, int32_t ny, int64_t n,
                         int first, int last, float *lanes, double *const *out, const fm_ahead *ahead);

  /* ((|params| + eta) x)^2 over a run, as gram_f32 of one row; out is one sum. */
  void (*sq_scaled_f32)(const float *x, const float *params, double eta, int64_t n, int first, int last, double *lanes,
                        double *out);
  void (*sq_scaled_f64)(const double *x, const double *params, double eta, int64_t n, int first, int last,
                        double *lanes, double *out);

  /* out = s - g, widened first. out may be s in F32 and F64. */
  void (*diff_f32)(const float *s, const float *g, int64_t n, float *out);
  void (*diff_f64)(const double *s, const double *g, int64_t n, double *out);
  void (*diff_bf16)(const uint16_t *s, const uint16_t *g, int64_t n, float *out);
  void (*diff_f16)(const uint16_t *s, const uint16_t *g, int64_t n, float *out);

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
  void (*combine_bf16)(const uint16_t *const *g, const uint16_t *const *s, const double *a, const double *b, int32_t k,
                       int64_t n, uint16_t *out);
  void (*combine_bf16_f32)(const uint16_t *const *g, const uint16_t *const *s, const double *a, const double *b,
                           int32_t k, int64_t n, float *out);

  /* The terms of combine for some of its rows: sum += them, or `sum =` if first. */
  void (*sum_f32)(const float *const *g, const float *const *s, const double *a, const double *b, int32_t k, int first,
                  int64_t n, double *sum);
  void (*sum_f64)(const double *const *g, const double *const *s, const double *a, const double *b, int32_t k,
                  int first, int64_t n, double *sum);
  void (*sum_bf16)(const uint16_t *const *g, const uint16_t *const *s, const double *a, const double *b, int32_t k,
                   int first, int64_t n, double *sum);

  /* One row of them. */
  void (*add_f32)(const float *g, const float *s, double a, double b, int first, int64_t n, double *sum);
  void (*add_f64)(const double *g, const double *s, double a, double b, int first, int64_t n, double *sum);

  /* out = saved + scale t^2 gradient, t = 1 or |saved| + eta. */
  void (*perturb_f32)(const float *saved, const float *gradient, double scale, int adaptive, double eta, int64_t n,
                      float *out);
  void (*perturb_f64)(const double *saved, const double *gradient, double scale, int adaptive, double eta, int64_t n,
                      double *out);
  void (*perturb_bf16)(const uint16_t *saved, const uint16_t *gradient, double scale, int adaptive, double eta,
                       int64_t n, uint16_t *out);
  void (*perturb_f32_bf16)(const float *saved, const uint16_t *gradient, double scale, int adaptive, double eta,
                           int64_t n, float *out);
  void (*perturb_wide)(const float *saved, const float *gradient, double scale, int adaptive, double eta, int64_t n,
                       double *out);

  /* The buffer methods: y = x + keep (y - x); root = sqrt(root^2 + x^2), terms = x^2 / root (0 / 0 = 0). */
  void (*ema_f32)(float *y, const double *x, double keep, int64_t n);
  void (*ema_f64)(double *y, const double *x, double keep, int64_t n);
  void (*excess_f32)(float *root, const double *x, int64_t n, double *terms);
  void (*excess_f64)(double *root, const double *x, int64_t n, double *terms);

  /* lanes[p % FM_LANES] += x y; n is a multiple of FM_LANES. */
  void (*dot)(const double *x, const double *y, int64_t n, double *lanes);

  /* GradDrop. sum += x, mass += |x|; then the sign that is kept, by the position-th and following random numbers of
   * the sequence; then out += x where x has that sign, leak x elsewhere. */
  void (*drop_sums)(const double *x, int64_t n, double *sum, double *mass);
  void (*drop_signs)(uint64_t start, int64_t position, const double *sum, const double *mass, int64_t n, double *sign);
  void (*drop_add)(const double *x, const double *sign, double leak, int64_t n, double *out);
} fm_kernels;

/* NULL where the build lacks them. */
extern const fm_kernels *const fm_kernels_base;
extern const fm_kernels *const fm_kernels_avx2;
extern const fm_kernels *const fm_kernels_avx512;
extern const fm_kernels *const fm_kernels_neon;

/* The table in use: chosen on the first call. */
const fm_kernels *fm_kernels_get(void);

#endif
