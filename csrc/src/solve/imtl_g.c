/* imtl_g.c - IMTL-G (ICLR 2021): w = G^+ d / (1'G^+ d), d_i = sqrt(G_ii).
 *
 * Of full rank, with the cosine matrix C: w_i = x_i / d_i up to a factor, Cx = 1, by Cholesky with refinement.
 * Otherwise by the eigenvalues of G above rounding. */
#include <stddef.h>
#include <string.h>

#include "eigen.h"
#include "linalg.h"
#include "newton.h"
#include "solve.h"

/* Cx = 1 refined; 0 if C is singular up to rounding. */
static int solve_cosines(int32_t n, const double *c, double *factor, double *x, double *r) {
  const size_t square = (size_t)n * (size_t)n;
  memcpy(factor, c, square * sizeof *c);
  if (fm_cholesky(n, factor, n) < n) return 0;
  for (int32_t i = 0; i < n; ++i) {
    if (factor[(size_t)i * (size_t)n + (size_t)i] <= sqrt(8.0 * n * FM_EPS)) return 0;
    x[i] = 1.0;
  }
  fm_cholesky_solve(n, factor, n, x);
  for (int round = 0; round < 4; ++round) {
    for (int32_t i = 0; i < n; ++i) r[i] = 1.0;
    fm_residual(n, c, n, x, r, r);
    fm_cholesky_solve(n, factor, n, r);
    for (int32_t i = 0; i < n; ++i) x[i] += r[i];
  }
  return 1;
}

/* w = G^+ d of the m rows in index, with G scaled by a power of 4. */
static void solve_pseudo(const fm_solve *solve, int32_t m, const int32_t *index, const double *d, double *a,
                         double *vectors, double *values, double *w) {
  const size_t n = (size_t)solve->num_tasks;
  for (int32_t i = 0; i < m; ++i)
    for (int32_t j = 0; j < m; ++j)
      a[(size_t)i * (size_t)m + (size_t)j] = solve->gramian[(size_t)index[i] * n + (size_t)index[j]];
  const int32_t exponent = fm_scale_gramian(m, a, a);
  fm_eigen(m, a, values, vectors);
  double largest = 0.0;
  for (int32_t i = 0; i < m; ++i) {
    largest = fmax(largest, values[i]);
    w[i] = 0.0;
  }
  for (int32_t k = 0; k < m; ++k) {
    if (!(values[k] > 8.0 * m * FM_EPS * largest)) continue;
    double along = 0.0;
    for (int32_t i = 0; i < m; ++i) along += vectors[(size_t)i * (size_t)m + (size_t)k] * ldexp(d[i], -exponent);
    for (int32_t i = 0; i < m; ++i) w[i] += vectors[(size_t)i * (size_t)m + (size_t)k] * (along / values[k]);
  }
}

flatmtl_status fm_solve_imtl_g(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  const size_t square = (size_t)n * (size_t)n;
  double *c = solve->work, *factor = c + square, *d = factor + square, *x = d + n, *r = x + n, *vectors = r + n;
  int32_t *index = (int32_t *)(void *)(vectors + square);
  const int32_t m = fm_nonzero_cosines(n, solve->gramian, c, d, index, x);
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  if (m == 0) return FLATMTL_PARETO_STATIONARY;
  double shortest = d[0];
  for (int32_t i = 1; i < m; ++i) shortest = fmin(shortest, d[i]);
  if (solve_cosines(m, c, factor, x, r)) {
    for (int32_t i = 0; i < m; ++i) x[i] *= shortest / d[i];
  } else {
    solve_pseudo(solve, m, index, d, factor, vectors, r, x);
  }
  double sum = 0.0, size = 0.0;
  for (int32_t i = 0; i < m; ++i) {
    sum += x[i];
    size += fabs(x[i]);
  }
  if (!(fabs(sum) > 1e-12 * size)) return FLATMTL_PARETO_STATIONARY;
  for (int32_t i = 0; i < m; ++i) weights[index[i]] = x[i] / sum;
  return FLATMTL_OK;
}
