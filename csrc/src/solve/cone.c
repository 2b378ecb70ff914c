#include "cone.h"

flatmtl_status fm_project(fm_quadprog *q, double *scratch) {
  const int32_t n = q->n;
  fm_quadprog_outcome outcome = FM_QUADPROG_UNDECIDED;
  q->kappa = 0.0;
  q->mu = fm_dd_make(0.0, 0.0);
  for (int attempt = 0; attempt < 3 && outcome != FM_QUADPROG_SOLVED; ++attempt) {
    q->size = 0;
    for (int32_t i = 0; i < n; ++i) {
      q->y[i] = 0.0;
      /* All that conflict at the start: most of them stay, and one factorisation is cheaper than one after another. */
      if (q->c_offset[i].hi < 0.0) q->support[q->size++] = i;
    }
    if (attempt < 2) {
      outcome = fm_quadprog_solve(q, attempt == 0 ? FM_DOUBLE : FM_DOUBLE_DOUBLE);
      continue;
    }
    /* C is indefinite, by rounding: a ridge of that size makes it definite. */
    for (int32_t i = 0; i < n; ++i) {
      double *diagonal = q->c + (size_t)i * n + i;
      scratch[i] = *diagonal;
      *diagonal *= 1.0 + 16.0 * n * FM_EPS;
    }
    outcome = fm_quadprog_solve(q, FM_DOUBLE_DOUBLE);
    for (int32_t i = 0; i < n; ++i) q->c[(size_t)i * n + i] = scratch[i];
  }
  return outcome == FM_QUADPROG_SOLVED ? FLATMTL_OK : FLATMTL_ERROR_INTERNAL;
}
