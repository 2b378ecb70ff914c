/* methods.h - the table of aggregators, and what stands before and after every solve. Private. */
#ifndef FLATMTL_METHODS_H
#define FLATMTL_METHODS_H

#include <stddef.h>
#include <stdint.h>

#include "flatmtl.h"

/* A Gramian inside a larger matrix. */
typedef struct fm_gramian {
  const double *values; /* [num_tasks] rows, `stride` apart; the lower triangle is read; finite */
  int32_t num_tasks;
  int32_t stride;
} fm_gramian;

/* Whether method is known, num_tasks in range, and the options of the right number and in range. No options at all are
 * the defaults, and pass. */
flatmtl_status fm_check_method(flatmtl_method method, const double *options, int32_t num_options, int32_t num_tasks,
                               flatmtl_error *error);

/* Whether the lower triangle of a [num_rows * num_rows] matrix is finite; ERROR_NONFINITE names the first row with an
 * entry that is not. */
flatmtl_status fm_check_gramian(const char *argument, const double *gramian, int32_t num_rows, flatmtl_error *error);

/* w = w(G) for a method and options that fm_check_method has passed; G / (trace(G) / K) in place of G if scale is
 * FLATMTL_SCALE_RMS. OK, PARETO_STATIONARY (weights all 0) or ERROR_INTERNAL (weights undefined).
 *  call     number of this call of the aggregator within the step, for methods that draw
 *  weights  [K], out
 *  work     fm_weights_work(K) doubles */
flatmtl_status fm_solve_weights(flatmtl_method method, const double *options, int32_t num_options, uint64_t call,
                                flatmtl_family_scale scale, const fm_gramian *gramian, double *weights, double *work);

/* The checks and the solve of a [K * K] Gramian as it is. weights is not written on an error. */
flatmtl_status fm_weights(flatmtl_method method, const double *options, int32_t num_options, uint64_t call,
                          int32_t num_tasks, const double *gramian, double *weights, double *work,
                          flatmtl_error *error);

/* Doubles of scratch for fm_weights, and for flatmtl_step_weights. */
size_t fm_weights_work(int32_t num_tasks);
size_t fm_step_weights_work(int32_t num_tasks);

/* Doubles of scratch for flatmtl_loss_weights and flatmtl_loss_observe. */
size_t fm_weightings_work(int32_t num_tasks);

/* The context's workspace as doubles, after a check that it holds flatmtl_workspace_size(num_tasks) bytes. */
flatmtl_status fm_workspace(const flatmtl_context *context, int32_t num_tasks, double **work, flatmtl_error *error);

/* Whether two pieces of memory share a byte. */
static inline int fm_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes) {
  uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
  return a_bytes > 0 && b_bytes > 0 && x < y + b_bytes && y < x + a_bytes;
}

#endif
