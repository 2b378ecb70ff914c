/* linalg.h - small dense linear algebra for the solvers: K x K, row-major, double and double-double. Private.
 *
 * Nothing allocates or keeps state. Sums run in index order and libm is asked for exact functions alone (sqrt, fabs,
 * frexp, ldexp), so that results do not depend on the platform. Needs -ffp-contract=off.
 */
#ifndef FLATMTL_LINALG_H
#define FLATMTL_LINALG_H

#include <math.h>
#include <stdint.h>

#define FM_EPS 2.220446049250313e-16 /* 2^-52 */

/* ------------------------------------------------------------------------------------------------------------------
 * Double-double numbers: hi + lo, |lo| <= ulp(hi) / 2; about 106 bits (Dekker 1971)
 */

typedef struct fm_dd {
  double hi, lo;
} fm_dd;

static inline fm_dd fm_dd_make(double hi, double lo) {
  fm_dd r;
  r.hi = hi;
  r.lo = lo;
  return r;
}

/* a + b exactly */
static inline fm_dd fm_two_sum(double a, double b) {
  double s = a + b, t = s - a;
  return fm_dd_make(s, (a - (s - t)) + (b - t));
}

/* a + b exactly, for |a| >= |b| or a == 0 */
static inline fm_dd fm_fast_two_sum(double a, double b) {
  double s = a + b;
  return fm_dd_make(s, b - (s - a));
}

/* a * b exactly, for |a|, |b| < 2^995 and a product not near underflow */
static inline fm_dd fm_two_prod(double a, double b) {
  const double split = 134217729.0; /* 2^27 + 1 */
  double p = a * b, as = split * a, bs = split * b;
  double ah = as - (as - a), bh = bs - (bs - b), al = a - ah, bl = b - bh;
  return fm_dd_make(p, ((ah * bh - p) + ah * bl + al * bh) + al * bl);
}

static inline fm_dd fm_dd_neg(fm_dd a) {
  return fm_dd_make(-a.hi, -a.lo);
}

static inline fm_dd fm_dd_add(fm_dd a, fm_dd b) {
  fm_dd s = fm_two_sum(a.hi, b.hi), t = fm_two_sum(a.lo, b.lo);
  s = fm_fast_two_sum(s.hi, s.lo + t.hi);
  return fm_fast_two_sum(s.hi, s.lo + t.lo);
}

static inline fm_dd fm_dd_sub(fm_dd a, fm_dd b) {
  return fm_dd_add(a, fm_dd_neg(b));
}

static inline fm_dd fm_dd_mul(fm_dd a, fm_dd b) {
  fm_dd p = fm_two_prod(a.hi, b.hi);
  return fm_fast_two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}

static inline fm_dd fm_dd_mul_d(fm_dd a, double b) {
  fm_dd p = fm_two_prod(a.hi, b);
  return fm_fast_two_sum(p.hi, p.lo + a.lo * b);
}

static inline fm_dd fm_dd_div(fm_dd a, fm_dd b) {
  double q = a.hi / b.hi;
  fm_dd r = fm_dd_sub(a, fm_dd_mul_d(b, q));
  return fm_fast_two_sum(q, r.hi / b.hi);
}

/* a >= 0 */
static inline fm_dd fm_dd_sqrt(fm_dd a) {
  if (!(a.hi > 0.0)) return fm_dd_make(0.0, 0.0);
  double s = sqrt(a.hi);
  fm_dd r = fm_dd_sub(a, fm_two_prod(s, s));
  return fm_fast_two_sum(s, r.hi / (2.0 * s));
}

/* ------------------------------------------------------------------------------------------------------------------
 * Products. "exactly" below: with an error of about 2^-104 relative to the sum of absolute values.
 */

/* SUM x_i y_i in plain double, in index order */
double fm_dot(int32_t n, const double *x, const double *y);

/* SUM x_i y_i exactly */
fm_dd fm_dot_dd(int32_t n, const double *x, const double *y);

/* y = |A| |x| in plain double: the scale of the rounding errors of A x */
void fm_abs_matvec(int32_t n, const double *a, int32_t lda, const double *x, double *y);

/* r = b - A x, exactly before the rounding to double. b may be NULL (0) and r may be b. */
void fm_residual(int32_t n, const double *a, int32_t lda, const double *x, const double *b, double *r);

/* x'Ax exactly */
fm_dd fm_quadratic(int32_t n, const double *a, int32_t lda, const double *x);

/* ------------------------------------------------------------------------------------------------------------------
 * Cholesky: A = L L', the lower triangle of A is read and overwritten by L, the strict upper triangle is left alone
 */

/* Returns n, or the index of the first pivot that is not > 0 (rows before it are factored). */
int32_t fm_cholesky(int32_t n, double *a, int32_t lda);

/* P'AP = L L' with the largest pivot first, stopping at pivots <= tolerance * (largest diagonal). A has both triangles;
 * rows and columns are swapped in place. permutation[k] = the original index of row k. Returns the rank; rows >= rank
 * of L are filled in columns < rank. */
int32_t fm_cholesky_pivoted(int32_t n, double *a, int32_t lda, double tolerance, int32_t *permutation);

/* x = L^-1 x */
void fm_solve_lower(int32_t n, const double *l, int32_t lda, double *x);

/* x = L^-T x */
void fm_solve_lower_transposed(int32_t n, const double *l, int32_t lda, double *x);

/* x = (L L')^-1 x */
void fm_cholesky_solve(int32_t n, const double *l, int32_t lda, double *x);

/* ------------------------------------------------------------------------------------------------------------------
 * Scaling
 */

/* e with |x| in [2^e, 2^(e+1)); x finite, not 0. Exact for denormals too. */
int32_t fm_exponent(double x);

/* C = D^-1 G D^-1 with D = diag(2^e_i), exact but for underflow: C_ii in [1, 4), or row and column 0 where G_ii = 0
 * (e_i = 0 there). Entries beyond what a positive semidefinite matrix can hold are cut to +-4. c may not be G.
 * Returns the number of zero rows. */
int32_t fm_equilibrate(int32_t n, const double *gramian, double *c, int32_t *exponents);

/* The cosine matrix: C = D^-1 G D^-1 with d_i = sqrt(G_ii); C_ii = 1, or row and column 0 where G_ii = 0 (d_i = 0
 * there); off the diagonal cut to [-1, 1]. c may not be G. Returns the number of zero rows. */
int32_t fm_cosines(int32_t n, const double *gramian, double *c, double *d);

#endif
