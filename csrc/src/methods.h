/* methods.h - the table of aggregators, and what stands before and after every solve. Private. */
#ifndef FLATMTL_METHODS_H
#define FLATMTL_METHODS_H

#include <stddef.h>
#include <stdint.h>

#include "flatmtl.h"

/* The most K x K matrices of state that a method keeps for one call. */
#define FM_MOST_STATE_MATRICES 1

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

/* Whether a method has an option for every task. */
int fm_has_option_per_task(flatmtl_method method);

/* Doubles of state of one call of a known method. */
size_t fm_state_size(flatmtl_method method, int32_t num_tasks);

/* Whether the state of one call is there and in range; ERROR_OPTION names the row. */
flatmtl_status fm_check_state(flatmtl_method method, int32_t num_tasks, const char *argument, const double *state,
                              flatmtl_error *error);

/* The same for the state of a whole step, settings->state. */
flatmtl_status fm_check_step_state(const flatmtl_settings *settings, int32_t num_tasks, flatmtl_error *error);

/* Where in a step's state the block of the loss family's K rows is (each: the call that joins the tasks). */
size_t fm_step_state_of_loss(const flatmtl_settings *settings, int32_t num_tasks);

/* w = w(G) for a method, options and state that have passed the checks; G / (trace(G) / K) in place of G if scale is
 * FLATMTL_SCALE_RMS. OK, PARETO_STATIONARY (weights all 0) or ERROR_INTERNAL (weights and state undefined).
 *  call     number of this call of the aggregator within the step, for methods that draw
 *  state    [fm_state_size], in and out; NULL if none
 *  weights  [K], out
 *  work     fm_weights_work(K) doubles */
flatmtl_status fm_solve_weights(flatmtl_method method, const double *options, int32_t num_options, uint64_t call,
                                flatmtl_family_scale scale, const fm_gramian *gramian, double *state, double *weights,
                                double *work);

/* Doubles of scratch for fm_weights, and for flatmtl_step_weights. */
size_t fm_weights_work(int32_t num_tasks);
size_t fm_step_weights_work(int32_t num_tasks);

/* Doubles of scratch for flatmtl_loss_weights and flatmtl_loss_observe. */
size_t fm_weightings_work(int32_t num_tasks);

/* Doubles of scratch for the buffer methods: their sums over rows, and their weights. */
size_t fm_buffers_work(int32_t num_tasks);
size_t fm_buffer_weights_work(int32_t num_tasks);

/* Pointers, tables and factors of x. */
flatmtl_status fm_check_mixed(const flatmtl_mixed_rows *x, const char *argument, flatmtl_error *error);

/* The dtype of the buffers for rows of a dtype. */
flatmtl_dtype fm_buffer_dtype(flatmtl_dtype rows);

/* The context's workspace as doubles, after a check that it holds flatmtl_workspace_size(num_tasks) bytes. */
flatmtl_status fm_workspace(const flatmtl_context *context, int32_t num_tasks, double **work, flatmtl_error *error);

/* Whether two pieces of memory share a byte. */
static inline int fm_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes) {
  uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
  return a_bytes > 0 && b_bytes > 0 && x < y + b_bytes && y < x + a_bytes;
}

/* Numbers that a call reads or writes. */
typedef struct fm_array {
  const char *argument;
  const void *begin;
  size_t bytes; /* 0 if there are none */
} fm_array;

/* None of the first num_written arrays overlaps another one; ERROR_OVERLAP names it. */
flatmtl_status fm_check_arrays(const fm_array *arrays, int num_written, int num_arrays, flatmtl_error *error);

#endif
