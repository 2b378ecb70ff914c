/* upgrad.c - UPGrad (Quinton and Rey, 2406.16232): every p_i g_i is projected on the dual cone, and the projections are
 * summed: w = SUM_i v^(i), v^(i) = argmin v'Gv over v >= p_i e_i.
 *
 * With v = p_i e_i + D^-1 y the i-th problem is that of cone.h for the offset p_i D_i e_i; both are solved for the
 * offset e_i and multiplied. */
#include <math.h>

#include "cone.h"
#include "solve.h"

flatmtl_status fm_solve_upgrad(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  fm_quadprog q;
  fm_quadprog_init(&q, n, solve->gramian, solve->work);
  double *scratch = solve->work + fm_quadprog_work(n);
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    const double preference = solve->options[i];
    weights[i] += preference;
    if (!(q.a[i] > 0.0) || preference == 0.0) continue;
    for (int32_t j = 0; j < n; ++j) { /* fm_quadprog_offset of e_i */
      const double entry = q.c[(size_t)i * n + j];
      q.c_offset[j] = fm_dd_make(entry, 0.0);
      q.abs_c_offset[j] = fabs(entry);
    }
    const flatmtl_status status = fm_project(&q, scratch);
    if (status != FLATMTL_OK) return status;
    for (int32_t j = 0; j < n; ++j) {
      if (q.y[j] > 0.0) weights[j] += ldexp(preference * q.y[j], q.exponents[i] - q.exponents[j]);
    }
  }
  return FLATMTL_OK;
}
