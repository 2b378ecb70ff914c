#include "rows.h"

#include <math.h>

size_t fm_dtype_size(flatmtl_dtype dtype) {
  switch (dtype) {
    case FLATMTL_F32:
      return 4;
    case FLATMTL_F64:
      return 8;
    case FLATMTL_BF16:
    case FLATMTL_F16:
      return 2;
  }
  return 0;
}

flatmtl_rows fm_as_rows(const flatmtl_vector *vector) {
  flatmtl_rows rows = {vector->dtype, 1, vector->num_segments, vector->lengths, (const void *const *)vector->data};
  return rows;
}

int64_t fm_total_length(const flatmtl_rows *rows) {
  int64_t total = 0;
  for (int64_t t = 0; t < rows->num_segments; t++) total += rows->lengths[t];
  return total;
}

flatmtl_status fm_check_rows(const flatmtl_rows *rows, int32_t rows_wanted, const char *argument,
                             flatmtl_error *error) {
  if (!rows) return fm_fail(error, FLATMTL_ERROR_NULL, argument, -1, -1, NAN);
  if (fm_dtype_size(rows->dtype) == 0)
    return fm_fail(error, FLATMTL_ERROR_DTYPE, argument, -1, -1, (double)(int)rows->dtype);
  if (rows->num_rows < 1 || rows->num_rows > FLATMTL_MAX_TASKS)
    return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, argument, -1, -1, rows->num_rows);
  if (rows_wanted && rows->num_rows != rows_wanted)
    return fm_fail(error, FLATMTL_ERROR_MISMATCH, argument, -1, -1, rows->num_rows);
  const int64_t segments = rows->num_segments;
  /* The table of pointers and the rows themselves must be addressable. */
  if (segments < 0 || segments > INT64_MAX / 8 / rows->num_rows)
    return fm_fail(error, FLATMTL_ERROR_SIZE, argument, -1, -1, (double)segments);
  if (segments == 0) return FLATMTL_OK;
  if (!rows->lengths || !rows->data) return fm_fail(error, FLATMTL_ERROR_NULL, argument, -1, -1, NAN);
  int64_t total = 0;
  for (int64_t t = 0; t < segments; t++) {
    if (rows->lengths[t] < 0 || rows->lengths[t] > INT64_MAX / 8 - total)
      return fm_fail(error, FLATMTL_ERROR_SIZE, argument, -1, t, (double)rows->lengths[t]);
    total += rows->lengths[t];
  }
  for (int64_t i = 0; i < rows->num_rows; i++)
    for (int64_t t = 0; t < segments; t++)
      if (!rows->data[i * segments + t] && rows->lengths[t] > 0)
        return fm_fail(error, FLATMTL_ERROR_NULL, argument, i, t, NAN);
  return FLATMTL_OK;
}

flatmtl_status fm_check_vector(const flatmtl_vector *vector, const char *argument, flatmtl_error *error) {
  if (!vector) return fm_fail(error, FLATMTL_ERROR_NULL, argument, -1, -1, NAN);
  const flatmtl_rows rows = fm_as_rows(vector);
  return fm_check_rows(&rows, 1, argument, error);
}

flatmtl_status fm_check_same_table(const flatmtl_rows *reference, const flatmtl_rows *rows, const char *argument,
                                   flatmtl_error *error) {
  if (rows->dtype != reference->dtype)
    return fm_fail(error, FLATMTL_ERROR_DTYPE, argument, -1, -1, (double)(int)rows->dtype);
  if (rows->num_segments != reference->num_segments)
    return fm_fail(error, FLATMTL_ERROR_MISMATCH, argument, -1, -1, (double)rows->num_segments);
  if (rows->lengths == reference->lengths) return FLATMTL_OK;
  for (int64_t t = 0; t < rows->num_segments; t++)
    if (rows->lengths[t] != reference->lengths[t])
      return fm_fail(error, FLATMTL_ERROR_MISMATCH, argument, -1, t, (double)rows->lengths[t]);
  return FLATMTL_OK;
}

flatmtl_status fm_check_beside(const flatmtl_rows *vector, const flatmtl_rows *rows, const flatmtl_rows *named,
                               const char *argument, flatmtl_error *error) {
  flatmtl_rows other = named == rows ? *vector : *rows;
  if (vector->dtype == FLATMTL_F32 && fm_dtype_size(rows->dtype) == 2) other.dtype = named->dtype;
  return fm_check_same_table(&other, named, argument, error);
}

flatmtl_status fm_check_finite(const double *values, int64_t n, const char *argument, flatmtl_error *error) {
  if (!values && n > 0) return fm_fail(error, FLATMTL_ERROR_NULL, argument, -1, -1, NAN);
  for (int64_t i = 0; i < n; i++)
    if (!isfinite(values[i])) return fm_fail(error, FLATMTL_ERROR_NONFINITE, argument, i, -1, values[i]);
  return FLATMTL_OK;
}

flatmtl_status fm_check_context(const flatmtl_context *context, int32_t num_tasks, flatmtl_error *error) {
  if (!context) return fm_fail(error, FLATMTL_ERROR_NULL, "context", -1, -1, NAN);
  size_t need = 0;
  flatmtl_status status = flatmtl_workspace_size(num_tasks, &need, error);
  if (status < 0) return status;
  if (!context->workspace) return fm_fail(error, FLATMTL_ERROR_NULL, "workspace", -1, -1, NAN);
  if ((uintptr_t)context->workspace % 64 != 0) return fm_fail(error, FLATMTL_ERROR_SIZE, "workspace", -1, -1, NAN);
  if (context->workspace_size < need)
    return fm_fail(error, FLATMTL_ERROR_SIZE, "workspace_size", -1, -1, (double)context->workspace_size);
  if (context->accumulate != FLATMTL_ACCUMULATE_AUTO && context->accumulate != FLATMTL_ACCUMULATE_F64)
    return fm_fail(error, FLATMTL_ERROR_NAME, "accumulate", -1, -1, (double)(int)context->accumulate);
  return FLATMTL_OK;
}

fm_cursor fm_cursor_at(const flatmtl_rows *rows, int64_t position) {
  fm_cursor cursor = {rows->lengths, rows->num_segments, 0, 0};
  fm_cursor_advance(&cursor, position);
  return cursor;
}

void fm_parallel(const flatmtl_context *context, int64_t n, int64_t grain, flatmtl_range_fn fn, void *arg) {
  if (n <= 0) return;
  if (context->parallel_for && n > grain)
    context->parallel_for(0, n, grain, fn, arg, context->host);
  else
    fn(0, n, arg);
}
