/* plain.c - weights that do not depend on the Gramian. */
#include "solve.h"

flatmtl_status fm_solve_sum(const fm_solve *solve, double *weights) {
  for (int32_t i = 0; i < solve->num_tasks; ++i) weights[i] = 1.0;
  return FLATMTL_OK;
}

flatmtl_status fm_solve_mean(const fm_solve *solve, double *weights) {
  for (int32_t i = 0; i < solve->num_tasks; ++i) weights[i] = 1.0 / solve->num_tasks;
  return FLATMTL_OK;
}

flatmtl_status fm_solve_fixed(const fm_solve *solve, double *weights) {
  for (int32_t i = 0; i < solve->num_tasks; ++i) weights[i] = solve->options[i];
  return FLATMTL_OK;
}
