/* elementwise.c - combine, perturb and copy: one pass over memory, every element on its own. */
#include <stddef.h>
#include <string.h>

#include "flatmtl.h"
#include "kernels.h"
#include "rows.h"

enum { FM_GRAIN = 32 * 1024, FM_DIRECT_ROWS = 8 };

typedef struct job {
  const fm_kernels *kernels;
  const flatmtl_rows *out; /* the vector written to, as a row */
  const flatmtl_rows *rows, *perturbed;
  const double *weights, *flat_weights;
  const flatmtl_rows *saved, *gradient;
  const double *scale;
  int64_t scale_stride; /* 0: one scale for all segments */
  int adaptive;
  double eta;
} job;

/* n elements as F32 or F64: in place, or widened into `to`. */
static const void *widened(const job *job, const flatmtl_rows *rows, int64_t row, const fm_cursor *cursor, int64_t n,
                           float *to) {
  const void *from = fm_row_at(rows, row, cursor, fm_dtype_size(rows->dtype));
  if (rows->dtype == FLATMTL_BF16) {
    job->kernels->widen_bf16(from, n, to);
  } else if (rows->dtype == FLATMTL_F16) {
    job->kernels->widen_f16(from, n, to);
  } else {
    return from;
  }
  return to;
}

static void store(const job *job, const double *values, const fm_cursor *cursor, int64_t n) {
  void *out = (void *)(uintptr_t)fm_row_at(job->out, 0, cursor, fm_dtype_size(job->out->dtype));
  switch (job->out->dtype) {
    case FLATMTL_F32:
      job->kernels->round_f32(values, n, out);
      break;
    case FLATMTL_F64:
      memcpy(out, values, (size_t)n * sizeof(double));
      break;
    case FLATMTL_BF16:
      job->kernels->round_bf16(values, n, out);
      break;
    case FLATMTL_F16:
      job->kernels->round_f16(values, n, out);
      break;
  }
}

/* All rows at once: the sum stays in registers. */
static void combine_direct(const job *job, const fm_cursor *cursor, int64_t n) {
  const void *g[FM_DIRECT_ROWS], *s[FM_DIRECT_ROWS];
  const fm_kernels *kernels = job->kernels;
  const flatmtl_dtype dtype = job->rows->dtype;
  const size_t size = fm_dtype_size(dtype);
  const int32_t k = job->rows->num_rows;
  const int flat = job->perturbed != NULL;
  const double *a = job->weights, *b = job->flat_weights;
  for (int32_t i = 0; i < k; i++) {
    g[i] = fm_row_at(job->rows, i, cursor, size);
    if (flat) s[i] = fm_row_at(job->perturbed, i, cursor, size);
  }
  void *out = (void *)(uintptr_t)fm_row_at(job->out, 0, cursor, fm_dtype_size(job->out->dtype));
  if (dtype == FLATMTL_F64) {
    kernels->combine_f64((const double *const *)g, flat ? (const double *const *)s : NULL, a, b, k, n, out);
  } else if (dtype == FLATMTL_F32) {
    kernels->combine_f32((const float *const *)g, flat ? (const float *const *)s : NULL, a, b, k, n, out);
  } else if (job->out->dtype == FLATMTL_BF16) {
    kernels->combine_bf16((const uint16_t *const *)g, flat ? (const uint16_t *const *)s : NULL, a, b, k, n, out);
  } else {
    kernels->combine_bf16_f32((const uint16_t *const *)g, flat ? (const uint16_t *const *)s : NULL, a, b, k, n, out);
  }
}

/* Whether rows are combined in registers, all at once. */
static int is_direct(const flatmtl_rows *rows) {
  return rows->num_rows <= FM_DIRECT_ROWS && rows->dtype != FLATMTL_F16;
}

/* Some rows at a time: the hardware follows only so many streams. The order of the sum is that of the rows all the
 * same. */
static void combine_block(const job *job, const fm_cursor *cursor, int64_t n) {
  const int32_t rows = job->rows->num_rows;
  const flatmtl_dtype dtype = job->rows->dtype;
  const size_t size = fm_dtype_size(dtype);
  if (is_direct(job->rows)) {
    combine_direct(job, cursor, n);
    return;
  }
  double sum[FM_BLOCK];
  float g_wide[FM_DIRECT_ROWS][FM_BLOCK], s_wide[FM_DIRECT_ROWS][FM_BLOCK];
  const void *g[FM_DIRECT_ROWS], *s[FM_DIRECT_ROWS];
  for (int32_t first = 0; first < rows; first += FM_DIRECT_ROWS) {
    const int32_t k = rows - first < FM_DIRECT_ROWS ? rows - first : FM_DIRECT_ROWS;
    const double *a = job->weights + first, *b = job->perturbed ? job->flat_weights + first : NULL;
    for (int32_t i = 0; i < k; i++) {
      const int f16 = dtype == FLATMTL_F16;
      g[i] = f16 ? widened(job, job->rows, first + i, cursor, n, g_wide[i])
                 : fm_row_at(job->rows, first + i, cursor, size);
      if (b)
        s[i] = f16 ? widened(job, job->perturbed, first + i, cursor, n, s_wide[i])
                   : fm_row_at(job->perturbed, first + i, cursor, size);
    }
    if (dtype == FLATMTL_F64) {
      job->kernels->sum_f64((const double *const *)g, b ? (const double *const *)s : NULL, a, b, k, first == 0, n, sum);
    } else if (dtype == FLATMTL_BF16) {
      job->kernels->sum_bf16((const uint16_t *const *)g, b ? (const uint16_t *const *)s : NULL, a, b, k, first == 0, n,
                             sum);
    } else {
      job->kernels->sum_f32((const float *const *)g, b ? (const float *const *)s : NULL, a, b, k, first == 0, n, sum);
    }
  }
  store(job, sum, cursor, n);
}

static void perturb_block(const job *job, const fm_cursor *cursor, int64_t n) {
  const fm_kernels *kernels = job->kernels;
  const flatmtl_dtype dtype = job->saved->dtype;
  const double scale = job->scale[cursor->segment * job->scale_stride], eta = job->eta;
  const int adaptive = job->adaptive;
  const size_t size = fm_dtype_size(dtype);
  const void *from = fm_row_at(job->saved, 0, cursor, size);
  const void *along = fm_row_at(job->gradient, 0, cursor, fm_dtype_size(job->gradient->dtype));
  void *out = (void *)(uintptr_t)fm_row_at(job->out, 0, cursor, size);
  float saved_wide[FM_BLOCK], gradient_wide[FM_BLOCK];
  double moved[FM_BLOCK];
  if (job->gradient->dtype == FLATMTL_F16) along = widened(job, job->gradient, 0, cursor, n, gradient_wide);
  if (dtype == FLATMTL_F64) {
    kernels->perturb_f64(from, along, scale, adaptive, eta, n, out);
  } else if (dtype == FLATMTL_F32 && job->gradient->dtype == FLATMTL_BF16) {
    kernels->perturb_f32_bf16(from, along, scale, adaptive, eta, n, out);
  } else if (dtype == FLATMTL_F32) {
    kernels->perturb_f32(from, along, scale, adaptive, eta, n, out);
  } else if (dtype == FLATMTL_BF16) {
    kernels->perturb_bf16(from, along, scale, adaptive, eta, n, out);
  } else {
    kernels->perturb_wide(widened(job, job->saved, 0, cursor, n, saved_wide), along, scale, adaptive, eta, n, moved);
    store(job, moved, cursor, n);
  }
}

/* Blocks of one segment each, over [begin, end) of the concatenation. */
static void for_blocks(const job *job, int64_t begin, int64_t end, int64_t longest,
                       void (*block)(const struct job *, const fm_cursor *, int64_t)) {
  fm_cursor cursor = fm_cursor_at(job->out, begin);
  while (begin < end) {
    int64_t n = fm_cursor_room(&cursor);
    if (n > end - begin) n = end - begin;
    if (n > longest) n = longest;
    block(job, &cursor, n);
    fm_cursor_advance(&cursor, n);
    begin += n;
  }
}

static void combine_range(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  for_blocks(job, begin, end, is_direct(job->rows) ? INT64_MAX : FM_BLOCK, combine_block);
}

static void perturb_range(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  for_blocks(job, begin, end, job->gradient->dtype != FLATMTL_F16 ? INT64_MAX : FM_BLOCK, perturb_block);
}

static void copy_block(const job *job, const fm_cursor *cursor, int64_t n) {
  const size_t size = fm_dtype_size(job->out->dtype);
  memcpy((void *)(uintptr_t)fm_row_at(job->out, 0, cursor, size), fm_row_at(job->saved, 0, cursor, size),
         (size_t)n * size);
}

static void copy_range(int64_t begin, int64_t end, void *context) {
  for_blocks(context, begin, end, INT64_MAX, copy_block);
}

static void run(const flatmtl_context *context, job *job, flatmtl_range_fn fn) {
  job->kernels = fm_kernels_get();
  fm_parallel(context, fm_total_length(job->out), FM_GRAIN, fn, job);
}

/* out overlaps none of the inputs. */
static flatmtl_status check_output(const flatmtl_context *context, const flatmtl_rows *out, const char *argument,
                                   const fm_buffers *inputs, int num_inputs, flatmtl_error *error) {
  const fm_buffers output = {argument, out, NULL, 1};
  return fm_check_overlap(&output, 1, inputs, num_inputs, context->workspace, context->workspace_size, error);
}

static flatmtl_status combine(const flatmtl_context *context, const flatmtl_rows *rows, const char *rows_name,
                              const flatmtl_rows *perturbed, const double *weights, const char *weights_name,
                              const double *flat_weights, const flatmtl_vector *out, flatmtl_error *error) {
  flatmtl_status status = fm_check_rows(rows, 0, rows_name, error);
  if (status == FLATMTL_OK && perturbed) status = fm_check_rows(perturbed, rows->num_rows, "perturbed_rows", error);
  if (status == FLATMTL_OK && perturbed) status = fm_check_same_table(rows, perturbed, "perturbed_rows", error);
  if (status == FLATMTL_OK) status = fm_check_finite(weights, rows->num_rows, weights_name, error);
  if (status == FLATMTL_OK && perturbed) status = fm_check_finite(flat_weights, rows->num_rows, "flat_weights", error);
  if (status == FLATMTL_OK) status = fm_check_vector(out, "out", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, rows->num_rows, error);
  if (status != FLATMTL_OK) return status;
  const flatmtl_rows target = fm_as_rows(out);
  const fm_buffers inputs[] = {{rows_name, rows, NULL, 1}, {"perturbed_rows", perturbed, NULL, 1}};
  status = fm_check_beside(&target, rows, &target, "out", error);
  if (status == FLATMTL_OK) status = check_output(context, &target, "out", inputs, perturbed ? 2 : 1, error);
  const size_t bytes = (size_t)rows->num_rows * sizeof(double);
  if (status == FLATMTL_OK) status = fm_check_outside(weights, bytes, &target, "out", error);
  if (status == FLATMTL_OK && perturbed) status = fm_check_outside(flat_weights, bytes, &target, "out", error);
  if (status != FLATMTL_OK) return status;
  job job = {.out = &target, .rows = rows, .perturbed = perturbed, .weights = weights, .flat_weights = flat_weights};
  run(context, &job, combine_range);
  return FLATMTL_OK;
}

flatmtl_status flatmtl_combine(const flatmtl_context *context, const flatmtl_rows *rows, const double *weights,
                               const flatmtl_vector *out, flatmtl_error *error) {
  return combine(context, rows, "rows", NULL, weights, "weights", NULL, out, error);
}

flatmtl_status flatmtl_combine_pair(const flatmtl_context *context, const flatmtl_rows *loss_rows,
                                    const flatmtl_rows *perturbed_rows, const double *loss_weights,
                                    const double *flat_weights, const flatmtl_vector *out, flatmtl_error *error) {
  if (!perturbed_rows) return fm_fail(error, FLATMTL_ERROR_NULL, "perturbed_rows", -1, -1, NAN);
  return combine(context, loss_rows, "loss_rows", perturbed_rows, loss_weights, "loss_weights", flat_weights, out,
                 error);
}

flatmtl_status fm_perturb(const flatmtl_context *context, const flatmtl_vector *params, const flatmtl_rows *saved,
                          const flatmtl_rows *gradient, const double *scale, int64_t scale_stride, int adaptive,
                          double eta, flatmtl_error *error) {
  flatmtl_status status = fm_check_vector(params, "params", error);
  if (status == FLATMTL_OK) status = fm_check_rows(saved, 1, "saved", error);
  if (status == FLATMTL_OK) status = fm_check_rows(gradient, 1, "gradient", error);
  if (status == FLATMTL_OK) status = fm_check_beside(saved, gradient, gradient, "gradient", error);
  if (status == FLATMTL_OK) status = fm_check_finite(scale, scale_stride ? params->num_segments : 1, "scale", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, 1, error);
  if (status != FLATMTL_OK) return status;
  if (adaptive && !(eta >= 0.0 && eta < INFINITY)) return fm_fail(error, FLATMTL_ERROR_OPTION, "eta", -1, -1, eta);
  const flatmtl_rows target = fm_as_rows(params);
  const fm_buffers inputs[] = {{"saved", saved, NULL, 1}, {"gradient", gradient, NULL, 1}};
  status = fm_check_same_table(saved, &target, "params", error);
  if (status == FLATMTL_OK) status = check_output(context, &target, "params", inputs, 2, error);
  const size_t scale_bytes = (scale_stride ? (size_t)params->num_segments : 1) * sizeof(double);
  if (status == FLATMTL_OK) status = fm_check_outside(scale, scale_bytes, &target, "params", error);
  if (status != FLATMTL_OK) return status;
  job job = {.out = &target,
             .saved = saved,
             .gradient = gradient,
             .scale = scale,
             .scale_stride = scale_stride,
             .adaptive = adaptive,
             .eta = eta};
  run(context, &job, perturb_range);
  return FLATMTL_OK;
}

flatmtl_status flatmtl_perturb(const flatmtl_context *context, const flatmtl_vector *params, const flatmtl_rows *saved,
                               const flatmtl_rows *gradient, const double *scale, int adaptive, double eta,
                               flatmtl_error *error) {
  return fm_perturb(context, params, saved, gradient, scale, 1, adaptive, eta, error);
}

flatmtl_status flatmtl_copy(const flatmtl_context *context, const flatmtl_vector *to, const flatmtl_rows *from,
                            flatmtl_error *error) {
  flatmtl_status status = fm_check_vector(to, "to", error);
  if (status == FLATMTL_OK) status = fm_check_rows(from, 1, "from", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, 1, error);
  if (status != FLATMTL_OK) return status;
  const flatmtl_rows target = fm_as_rows(to);
  const fm_buffers inputs[] = {{"from", from, NULL, 1}};
  status = fm_check_same_table(from, &target, "to", error);
  if (status == FLATMTL_OK) status = check_output(context, &target, "to", inputs, 1, error);
  if (status != FLATMTL_OK) return status;
  job job = {.out = &target, .saved = from};
  run(context, &job, copy_range);
  return FLATMTL_OK;
}
