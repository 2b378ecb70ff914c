/* solve.h - one solver a file: weights from a Gramian. Private. */
#ifndef FLATMTL_SOLVE_H
#define FLATMTL_SOLVE_H

#include <stddef.h>
#include <stdint.h>

#include "flatmtl.h"

/* One solve. methods.c has checked it: num_tasks >= 1, gramian finite with both triangles filled and a non-negative
 * diagonal, options in range and complete. */
typedef struct fm_solve {
  int32_t num_tasks;
  const double *gramian; /* [K * K] */
  const double *options;
  uint64_t call; /* number of this call of A within the step, for methods that draw */
  double *state; /* fm_state_size(method, K) doubles, in and out; NULL if none */
  double *work;  /* fm_solve_work(K) doubles, contents undefined */
} fm_solve;

/* Doubles of scratch that every solver makes do with. */
size_t fm_solve_work(int32_t num_tasks);

/* Each writes weights [K] and returns OK, PARETO_STATIONARY (weights all 0) or ERROR_INTERNAL. */
typedef flatmtl_status (*fm_solver)(const fm_solve *solve, double *weights);

flatmtl_status fm_solve_sum(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_mean(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_fixed(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_mgda(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_pcgrad(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_cagrad(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_imtl_g(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_nash_mtl(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_fairgrad(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_gradvac(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_aligned_mtl(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_upgrad(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_dualproj(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_config(const fm_solve *solve, double *weights);
flatmtl_status fm_solve_ntkmtl(const fm_solve *solve, double *weights);

#endif
