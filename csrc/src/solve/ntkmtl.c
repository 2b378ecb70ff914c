/* ntkmtl.c - NTKMTL (NeurIPS 2025) with one batch, n = 1: w_i = (S / G_ii)^p, S the mean of the G_ii.
 *
 * A zero row has no finite weight: it gets 0, and does not count in S. p = 1/2 takes nothing but square roots, other
 * values take pow. */
#include <math.h>

#include "solve.h"

flatmtl_status fm_solve_ntkmtl(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  const double p = solve->options[0];
  int32_t count = 0;
  double sum = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    const double square = solve->gramian[(size_t)i * n + i];
    sum += square;
    count += square > 0.0;
    weights[i] = 0.0;
  }
  if (count == 0) return FLATMTL_PARETO_STATIONARY;
  for (int32_t i = 0; i < n; ++i) {
    const double square = solve->gramian[(size_t)i * n + i];
    if (!(square > 0.0)) continue;
    const double ratio = sum / count / square;
    weights[i] = p == 0.5 ? sqrt(ratio) : pow(ratio, p);
  }
  return FLATMTL_OK;
}
