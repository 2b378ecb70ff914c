/* imtl_g.c - IMTL-G (Liu et al., ICLR 2021): w = G^+ d / (1'G^+ d), d_i = sqrt(G_ii).
 *
 * With C the cosine matrix, G = D C D. Of full rank: w_i = x_i / d_i up to a factor, Cx = 1. Otherwise see pseudo.h. */
#include <math.h>
#include <stddef.h>

#include "newton.h"
#include "pseudo.h"
#include "solve.h"

flatmtl_status fm_solve_imtl_g(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  const size_t square = (size_t)n * (size_t)n;
  double *c = solve->work, *factor = c + square, *d = factor + square, *x = d + n, *scratch = x + n;
  int32_t *index = (int32_t *)(void *)(scratch + 4 * (size_t)n);
  const int32_t m = fm_nonzero_cosines(n, solve->gramian, c, d, index, x);
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  if (m == 0) return FLATMTL_PARETO_STATIONARY;
  if (fm_solve_ones(m, c, factor, x, scratch)) {
    double shortest = d[0];
    for (int32_t i = 1; i < m; ++i) shortest = fmin(shortest, d[i]);
    for (int32_t i = 0; i < m; ++i) x[i] *= shortest / d[i];
  } else if (!fm_solve_deficient(m, c, d, x, factor, index + n, scratch)) {
    return FLATMTL_PARETO_STATIONARY;
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
