/* norms.c - squared norms of rows, in double precision, summed as a Gramian's diagonal is. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "chunks.h"
#include "flatmtl.h"
#include "kernels.h"
#include "pack.h"
#include "rows.h"

typedef struct job {
  fm_chunks chunks; /* first: fm_chunks_run hands this out */
  const fm_kernels *kernels;
  const flatmtl_rows *rows;
  const flatmtl_rows *params;
  double eta;
} job;

/* Elements at the cursor: where they lie, or packed into room. */
static const void *fetch(const job *job, const flatmtl_rows *rows, int32_t row, const fm_cursor *cursor, int64_t n,
                         int direct, void *room) {
  if (direct) return fm_row_at(rows, row, cursor, fm_dtype_size(rows->dtype));
  fm_pack(job->kernels, rows, NULL, row, *cursor, n, room);
  return room;
}

static void add_run(const job *job, int32_t row, fm_cursor cursor, int64_t n, double *lanes, double *out) {
  double x_room[FM_RUN], p_room[FM_RUN];
  const int wide = job->rows->dtype == FLATMTL_F64, half = fm_dtype_size(job->rows->dtype) == 2;
  for (int64_t done = 0; done < n;) {
    int direct = 0;
    const int64_t length = half ? n : fm_piece(cursor, n - done, &direct);
    const int64_t padded = (length + FM_LANES - 1) / FM_LANES * FM_LANES;
    const int starts = done == 0, ends = done + length == n;
    const void *x = fetch(job, job->rows, row, &cursor, length, direct, x_room);
    const fm_ahead ahead = {{(const char *)x + FM_RUN}, 1, wide ? 8 : 4};
    const void *p = job->params ? fetch(job, job->params, 0, &cursor, length, direct, p_room) : NULL;
    if (p) {
      if (wide) {
        job->kernels->sq_scaled_f64(x, p, job->eta, padded, starts, ends, lanes, out);
      } else {
        job->kernels->sq_scaled_f32(x, p, job->eta, padded, starts, ends, lanes, out);
      }
    } else if (wide) {
      const double *one = x;
      job->kernels->gram_f64(&one, 1, NULL, 0, padded, starts, ends, lanes, &out, &ahead);
    } else {
      const float *one = x;
      job->kernels->gram_f32(&one, 1, NULL, 0, padded, starts, ends, lanes, &out, &ahead);
    }
    fm_cursor_advance(&cursor, length);
    done += length;
  }
}

static void norm_chunk(const fm_chunks *chunks, int64_t length, fm_cursor start, double *out) {
  const job *job = (const struct job *)chunks;
  double lanes[4 * FM_LANES];
  for (int32_t row = 0; row < job->rows->num_rows; row++) {
    fm_cursor cursor = start;
    double sum[4] = {0.0, 0.0, 0.0, 0.0}; /* the kernels write 4 columns */
    for (int64_t at = 0; at < length; at += FM_RUN) {
      const int64_t n = length - at < FM_RUN ? length - at : FM_RUN;
      add_run(job, row, cursor, n, lanes, sum);
      fm_cursor_advance(&cursor, n);
    }
    out[row] = sum[0];
  }
}

flatmtl_status flatmtl_sq_norms(const flatmtl_context *context, const flatmtl_rows *rows, const flatmtl_rows *params,
                                double eta, double *sq_norms, flatmtl_error *error) {
  flatmtl_status status = fm_check_rows(rows, 0, "rows", error);
  if (status == FLATMTL_OK && params) status = fm_check_rows(params, 1, "params", error);
  if (status == FLATMTL_OK && params) status = fm_check_beside(params, rows, params, "params", error);
  if (status != FLATMTL_OK) return status;
  if (params && !(eta >= 0.0 && eta < INFINITY)) return fm_fail(error, FLATMTL_ERROR_OPTION, "eta", -1, -1, eta);
  if (!sq_norms) return fm_fail(error, FLATMTL_ERROR_NULL, "sq_norms", -1, -1, NAN);
  status = fm_check_context(context, rows->num_rows, error);
  const size_t bytes = (size_t)rows->num_rows * sizeof(double);
  if (status == FLATMTL_OK) status = fm_check_outside(sq_norms, bytes, rows, "sq_norms", error);
  if (status == FLATMTL_OK && params) status = fm_check_outside(sq_norms, bytes, params, "sq_norms", error);
  if (status != FLATMTL_OK) return status;
  job job = {.kernels = fm_kernels_get(), .rows = rows, .params = params, .eta = eta};
  job.chunks.sums = (size_t)rows->num_rows;
  fm_chunks_run(context, &job.chunks, rows, rows->num_rows, norm_chunk, sq_norms);
  return fm_check_finite(sq_norms, rows->num_rows, "rows", error);
}
