/* config.c - ConFIG (Liu et al., 2408.11104): the direction with equal cosines to all gradients, as long as the sum of
 * the gradients' projections on it.
 *
 * Direction SUM_i v_i u_i with u_i = g_i / d_i and v = C^+ 1, C the cosine matrix: its square is v'Cv = 1'v and its
 * inner products with the u_i are (Cv)_i, all 1 where C has full rank. So w_i = (d'Cv / 1'v) v_i / d_i. Zero rows are
 * left out. Where C^+ 1 = 0 there is no direction. */
#include <math.h>
#include <stddef.h>

#include "linalg.h"
#include "newton.h"
#include "pseudo.h"
#include "solve.h"

flatmtl_status fm_solve_config(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  const size_t square = (size_t)n * (size_t)n;
  double *c = solve->work, *factor = c + square, *d = factor + square, *x = d + n, *scratch = x + n;
  double *copy = scratch + 4 * (size_t)n, *ones = copy + square;
  int32_t *index = (int32_t *)(void *)(ones + n);
  const int32_t m = fm_nonzero_cosines(n, solve->gramian, c, d, index, x);
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  if (m == 0) return FLATMTL_PARETO_STATIONARY;
  double length = 0.0;
  if (fm_solve_ones(m, c, factor, x, scratch)) {
    for (int32_t i = 0; i < m; ++i) length += d[i];
  } else {
    for (size_t i = 0; i < (size_t)m * m; ++i) copy[i] = c[i];
    for (int32_t i = 0; i < m; ++i) ones[i] = 1.0;
    if (!fm_solve_deficient(m, copy, ones, x, factor, index + n, scratch)) return FLATMTL_PARETO_STATIONARY;
    for (int32_t i = 0; i < m; ++i) length += d[i] * fm_dot_dd(m, c + (size_t)i * m, x).hi;
  }
  fm_dd sum = fm_dd_make(0.0, 0.0);
  for (int32_t i = 0; i < m; ++i) sum = fm_dd_add(sum, fm_dd_make(x[i], 0.0));
  if (!(sum.hi > 0.0)) return FLATMTL_PARETO_STATIONARY;
  for (int32_t i = 0; i < m; ++i) weights[index[i]] = x[i] / sum.hi * (length / d[i]);
  return FLATMTL_OK;
}
