/* dualproj.c - DualProj (from GEM, Lopez-Paz and Ranzato, 1706.08840): SUM_i p_i g_i is projected on the dual cone:
 * w = argmin v'Gv over v >= p.
 *
 * With v = p + D^-1 y it is the problem of cone.h for the offset D p. */
#include <math.h>

#include "cone.h"
#include "solve.h"

flatmtl_status fm_solve_dualproj(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  fm_quadprog q;
  fm_quadprog_init(&q, n, solve->gramian, solve->work);
  double *offset = solve->work + fm_quadprog_work(n), largest = 0.0; /* in units of the largest */
  int32_t unit = INT32_MIN;
  for (int32_t i = 0; i < n; ++i) {
    const double preference = weights[i] = solve->options[i];
    if (!(q.a[i] > 0.0 && preference > 0.0)) continue;
    const int32_t exponent = fm_exponent(preference) + q.exponents[i];
    if (exponent > unit) unit = exponent;
    largest = 1.0;
  }
  if (largest == 0.0) return FLATMTL_OK;
  for (int32_t i = 0; i < n; ++i) offset[i] = q.a[i] > 0.0 ? ldexp(weights[i], q.exponents[i] - unit) : 0.0;
  fm_quadprog_offset(&q, offset);
  const flatmtl_status status = fm_project(&q, offset + n);
  if (status != FLATMTL_OK) return status;
  for (int32_t i = 0; i < n; ++i) {
    if (q.y[i] > 0.0) weights[i] += ldexp(q.y[i], unit - q.exponents[i]);
  }
  return FLATMTL_OK;
}
