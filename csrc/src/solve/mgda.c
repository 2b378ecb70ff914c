/* mgda.c - MGDA (Desideri 2012; 1810.04650): w = argmin w'Gw over the simplex, the point of least norm of a polytope.
 *
 * In y_i = d_i w_i, with the cosine matrix C and u_i = d_min / d_i, the problem is to minimise y'Cy subject to u'y =
 * d_min; rows of very different lengths do no harm there. */
#include <stddef.h>

#include "linalg.h"
#include "newton.h"
#include "simplex.h"
#include "solve.h"

flatmtl_status fm_solve_mgda(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  double *c = solve->work, *d = c + (size_t)n * (size_t)n, *u = d + n, *y = u + n, *work = y + n;
  int32_t *index = (int32_t *)(void *)(work + FM_SIMPLEX_WORK(n));
  const int32_t m = fm_nonzero_cosines(n, solve->gramian, c, d, index, u);
  if (m < n) { /* the zero rows are the minimum */
    for (int32_t i = 0, k = 0; i < n; ++i) {
      const int nonzero = k < m && index[k] == i;
      weights[i] = nonzero ? 0.0 : 1.0 / (n - m);
      k += nonzero;
    }
    return FLATMTL_OK;
  }
  double shortest = d[0], sum = 0.0;
  for (int32_t i = 1; i < n; ++i) shortest = fmin(shortest, d[i]);
  for (int32_t i = 0; i < n; ++i) {
    u[i] = shortest / d[i];
    y[i] = 0.0;
  }
  const flatmtl_status status = fm_simplex_minimum(n, c, u, NULL, 0.0, y, work);
  for (int32_t i = 0; i < n; ++i) sum += weights[i] = y[i] * u[i];
  for (int32_t i = 0; i < n; ++i) weights[i] /= sum;
  return status;
}
