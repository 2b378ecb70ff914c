/* gramian.c - inner products of rows: squared norms, Gramians.
 *
 * The rows are cut into chunks that depend on their total length and number alone, a chunk into runs of FM_RUN
 * elements. Within a run lanes are summed by the kernels, then the lanes, then the runs, then the chunks, in order. No
 * sum depends on the threads, nor on the segments: a block that spans two of them is packed first.
 */
#include <stddef.h>
#include <string.h>

#include "flatmtl.h"
#include "kernels.h"
#include "methods.h"
#include "rows.h"

enum { FM_RUN = 2048, FM_LEAST_CHUNKS = 8, FM_MOST_CHUNKS = 64, FM_PARTIAL_BYTES = 512 * 1024 };

static size_t pairs(int32_t n) {
  return (size_t)n * ((size_t)n + 1) / 2;
}

static int64_t most_chunks(size_t sums) {
  const size_t chunks = FM_PARTIAL_BYTES / (sums * sizeof(double));
  return chunks < FM_LEAST_CHUNKS ? FM_LEAST_CHUNKS : chunks > FM_MOST_CHUNKS ? FM_MOST_CHUNKS : (int64_t)chunks;
}

flatmtl_status flatmtl_workspace_size(int32_t num_tasks, size_t *bytes, flatmtl_error *error) {
  if (!bytes) return fm_fail(error, FLATMTL_ERROR_NULL, "bytes", -1, -1, NAN);
  if (num_tasks < 1 || num_tasks > FLATMTL_MAX_TASKS)
    return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "num_tasks", -1, -1, num_tasks);
  /* A bound on n * most_chunks(n) for every n <= sums: that product itself is not monotone in n, and calls with fewer
   * tasks, or without flat rows, must find room too. */
  const size_t sums = pairs(2 * num_tasks);
  size_t doubles = sums * FM_MOST_CHUNKS;
  if (doubles > FM_PARTIAL_BYTES / sizeof(double)) doubles = FM_PARTIAL_BYTES / sizeof(double);
  if (doubles < sums * FM_LEAST_CHUNKS) doubles = sums * FM_LEAST_CHUNKS;
  if (doubles < (size_t)num_tasks * FM_MOST_CHUNKS) doubles = (size_t)num_tasks * FM_MOST_CHUNKS;
  if (doubles < FM_BLOCK) doubles = FM_BLOCK;
  if (doubles < fm_weights_work(num_tasks)) doubles = fm_weights_work(num_tasks);
  if (doubles < fm_step_weights_work(num_tasks)) doubles = fm_step_weights_work(num_tasks);
  if (doubles < fm_weightings_work(num_tasks)) doubles = fm_weightings_work(num_tasks);
  *bytes = (doubles * sizeof(double) + 63) / 64 * 64;
  return FLATMTL_OK;
}

/* One job over the chunks. Virtual rows 0 .. K-1 are those of `rows`; K .. 2K-1, if `perturbed` is given, the flat
 * ones. */
typedef struct job {
  const fm_kernels *kernels;
  const flatmtl_rows *rows;
  const flatmtl_rows *perturbed;
  const flatmtl_rows *params;
  double eta;
  int64_t length, chunk;
  double *partial; /* [chunks][sums] */
  size_t sums;
} job;

/* Blocks of up to FM_GROUP rows, where they have to be packed, widened or subtracted. */
typedef union scratch {
  float f32[FM_GROUP][FM_BLOCK];
  double f64[FM_GROUP][FM_BLOCK];
} scratch;

/* n elements of one row at the cursor: in place, or packed into `to` and padded with zeros to whole lanes. */
static const void *fetch(const job *job, const flatmtl_rows *rows, int64_t row, fm_cursor cursor, int64_t n, void *to) {
  const size_t size = fm_dtype_size(rows->dtype);
  const int wide = rows->dtype == FLATMTL_F64, half = size == 2;
  if (!half && n % FM_LANES == 0 && fm_cursor_room(&cursor) >= n) return fm_row_at(rows, row, &cursor, size);
  int64_t done = 0;
  while (done < n) {
    const int64_t room = fm_cursor_room(&cursor), take = room < n - done ? room : n - done;
    const void *from = fm_row_at(rows, row, &cursor, size);
    if (rows->dtype == FLATMTL_BF16) {
      job->kernels->widen_bf16(from, take, (float *)to + done);
    } else if (rows->dtype == FLATMTL_F16) {
      job->kernels->widen_f16(from, take, (float *)to + done);
    } else {
      memcpy((char *)to + (size_t)done * size, from, (size_t)take * size);
    }
    fm_cursor_advance(&cursor, take);
    done += take;
  }
  for (; n % FM_LANES != 0; n++) {
    if (wide) {
      ((double *)to)[n] = 0.0;
    } else {
      ((float *)to)[n] = 0.0f;
    }
  }
  return to;
}

/* A group of virtual rows at the cursor. */
static void fetch_group(const job *job, int32_t first, int32_t count, fm_cursor cursor, int64_t n, scratch *to,
                        const void **rows) {
  const int wide = job->rows->dtype == FLATMTL_F64;
  double other[FM_BLOCK];
  for (int32_t i = 0; i < count; i++) {
    const int32_t row = first + i;
    void *place = wide ? (void *)to->f64[i] : (void *)to->f32[i];
    if (row < job->rows->num_rows) {
      rows[i] = fetch(job, job->rows, row, cursor, n, place);
      continue;
    }
    const int32_t task = row - job->rows->num_rows;
    const int64_t padded = (n + FM_LANES - 1) / FM_LANES * FM_LANES;
    /* g goes into `other`; s may take the row's own place, as diff reads before it writes each element */
    const void *g = fetch(job, job->rows, task, cursor, n, other);
    const void *s = fetch(job, job->perturbed, task, cursor, n, place);
    double from[FM_BLOCK];
    if (s == place) {
      memcpy(from, s, (size_t)padded * (wide ? 8 : 4));
      s = from;
    }
    if (wide) {
      job->kernels->diff_f64(s, g, padded, place);
    } else {
      job->kernels->diff_f32(s, g, padded, place);
    }
    rows[i] = place;
  }
}

/* The sums of one pair of groups over one run. */
static void add_run(const job *job, int32_t total, int32_t gi, int32_t gj, fm_cursor cursor, int64_t n, double *out) {
  const int32_t ni = total - gi < FM_GROUP ? total - gi : FM_GROUP;
  double sums[FM_GROUP * FM_GROUP * FM_LANES];
  scratch a, b;
  const void *x[FM_GROUP], *y[FM_GROUP];
  for (int32_t i = 0; i < ni; i++)
    for (int32_t j = 0; j < (gi == gj ? i + 1 : FM_GROUP); j++)
      memset(sums + (i * FM_GROUP + j) * FM_LANES, 0, FM_LANES * sizeof(double));
  for (int64_t done = 0; done < n; done += FM_BLOCK) {
    const int64_t block = n - done < FM_BLOCK ? n - done : FM_BLOCK;
    const int64_t padded = (block + FM_LANES - 1) / FM_LANES * FM_LANES;
    fetch_group(job, gi, ni, cursor, block, &a, x);
    if (gi != gj) fetch_group(job, gj, FM_GROUP, cursor, block, &b, y);
    if (job->rows->dtype == FLATMTL_F64) {
      job->kernels->gram_f64((const double *const *)x, ni, gi == gj ? NULL : (const double *const *)y, padded, sums);
    } else {
      job->kernels->gram_f32((const float *const *)x, ni, gi == gj ? NULL : (const float *const *)y, padded, sums);
    }
    fm_cursor_advance(&cursor, block);
  }
  for (int32_t i = 0; i < ni; i++)
    for (int32_t j = 0; j < (gi == gj ? i + 1 : FM_GROUP); j++) {
      const double *lanes = sums + (i * FM_GROUP + j) * FM_LANES;
      double sum = lanes[0];
      for (int lane = 1; lane < FM_LANES; lane++) sum += lanes[lane];
      out[pairs(gi + i) + (size_t)(gj + j)] += sum;
    }
}

static void gram_chunks(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  const int32_t total = job->rows->num_rows * (job->perturbed ? 2 : 1);
  for (int64_t chunk = begin; chunk < end; chunk++) {
    double *out = job->partial + (size_t)chunk * job->sums;
    memset(out, 0, job->sums * sizeof(double));
    const int64_t stop = (chunk + 1) * job->chunk < job->length ? (chunk + 1) * job->chunk : job->length;
    int64_t at = chunk * job->chunk;
    fm_cursor cursor = fm_cursor_at(job->rows, at);
    while (at < stop) {
      const int64_t n = stop - at < FM_RUN ? stop - at : FM_RUN;
      for (int32_t gi = 0; gi < total; gi += FM_GROUP)
        for (int32_t gj = 0; gj <= gi; gj += FM_GROUP) add_run(job, total, gi, gj, cursor, n, out);
      fm_cursor_advance(&cursor, n);
      at += n;
    }
  }
}

static void norm_chunks(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  double sums[FM_GROUP * FM_LANES]; /* gram's first row of sums */
  double x_place[FM_BLOCK], p_place[FM_BLOCK];
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t stop = (chunk + 1) * job->chunk < job->length ? (chunk + 1) * job->chunk : job->length;
    const fm_cursor start = fm_cursor_at(job->rows, chunk * job->chunk);
    for (int32_t row = 0; row < job->rows->num_rows; row++) {
      fm_cursor cursor = start;
      double total = 0.0;
      for (int64_t at = chunk * job->chunk; at < stop;) {
        const int64_t run_end = stop - at < FM_RUN ? stop : at + FM_RUN;
        memset(sums, 0, FM_LANES * sizeof(double));
        while (at < run_end) {
          const int64_t n = run_end - at < FM_BLOCK ? run_end - at : FM_BLOCK;
          const int64_t padded = (n + FM_LANES - 1) / FM_LANES * FM_LANES;
          const void *x = fetch(job, job->rows, row, cursor, n, x_place);
          const void *p = job->params ? fetch(job, job->params, 0, cursor, n, p_place) : NULL;
          if (job->rows->dtype == FLATMTL_F64) {
            const double *one = x;
            if (p) {
              job->kernels->sq_scaled_f64(x, p, job->eta, padded, sums);
            } else {
              job->kernels->gram_f64(&one, 1, NULL, padded, sums);
            }
          } else {
            const float *one = x;
            if (p) {
              job->kernels->sq_scaled_f32(x, p, job->eta, padded, sums);
            } else {
              job->kernels->gram_f32(&one, 1, NULL, padded, sums);
            }
          }
          fm_cursor_advance(&cursor, n);
          at += n;
        }
        double sum = sums[0];
        for (int lane = 1; lane < FM_LANES; lane++) sum += sums[lane];
        total += sum;
      }
      job->partial[(size_t)chunk * job->sums + (size_t)row] = total;
    }
  }
}

/* Runs fn over the chunks and adds the partial sums up into out [sums], which may be the first of them. */
static void run(const flatmtl_context *context, job *job, flatmtl_range_fn fn, double *out) {
  const int64_t most = most_chunks(job->sums), least = 8 * FM_RUN;
  job->kernels = fm_kernels_get();
  job->length = fm_total_length(job->rows);
  job->chunk = (job->length + most - 1) / most;
  if (job->chunk < least) job->chunk = least;
  job->chunk = (job->chunk + FM_RUN - 1) / FM_RUN * FM_RUN;
  job->partial = context->workspace;
  const int64_t chunks = (job->length + job->chunk - 1) / job->chunk;
  fm_parallel(context, chunks, 1, fn, job);
  for (size_t i = 0; i < job->sums; i++) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) sum += job->partial[(size_t)chunk * job->sums + i];
    out[i] = sum;
  }
}

static flatmtl_status check_output(const void *out, size_t bytes, const flatmtl_rows *rows, const flatmtl_rows *other,
                                   const char *argument, flatmtl_error *error) {
  flatmtl_status status = fm_check_outside(out, bytes, rows, argument, error);
  if (status == FLATMTL_OK && other) status = fm_check_outside(out, bytes, other, argument, error);
  return status;
}

flatmtl_status flatmtl_sq_norms(const flatmtl_context *context, const flatmtl_rows *rows, const flatmtl_rows *params,
                                double eta, double *sq_norms, flatmtl_error *error) {
  flatmtl_status status = fm_check_rows(rows, 0, "rows", error);
  if (status == FLATMTL_OK && params) status = fm_check_rows(params, 1, "params", error);
  if (status == FLATMTL_OK && params) status = fm_check_same_table(rows, params, "params", error);
  if (status != FLATMTL_OK) return status;
  if (params && !(eta >= 0.0 && eta < INFINITY)) return fm_fail(error, FLATMTL_ERROR_OPTION, "eta", -1, -1, eta);
  if (!sq_norms) return fm_fail(error, FLATMTL_ERROR_NULL, "sq_norms", -1, -1, NAN);
  status = fm_check_context(context, rows->num_rows, error);
  if (status != FLATMTL_OK) return status;
  status = check_output(sq_norms, (size_t)rows->num_rows * sizeof(double), rows, params, "sq_norms", error);
  if (status != FLATMTL_OK) return status;
  job job = {.rows = rows, .params = params, .eta = eta, .sums = (size_t)rows->num_rows};
  run(context, &job, norm_chunks, sq_norms);
  return fm_check_finite(sq_norms, rows->num_rows, "rows", error);
}

/* Gramian of the n virtual rows into the full matrix. */
static void fill(const flatmtl_context *context, job *job, int32_t n, double *gramian) {
  job->sums = pairs(n);
  run(context, job, gram_chunks, context->workspace);
  const double *sums = context->workspace;
  for (int32_t i = 0; i < n; i++)
    for (int32_t j = 0; j <= i; j++) {
      const double value = sums[pairs(i) + (size_t)j];
      gramian[(size_t)i * (size_t)n + (size_t)j] = gramian[(size_t)j * (size_t)n + (size_t)i] = value;
    }
}

flatmtl_status flatmtl_gramian(const flatmtl_context *context, const flatmtl_rows *rows, double *gramian,
                               flatmtl_error *error) {
  flatmtl_status status = fm_check_rows(rows, 0, "rows", error);
  if (status != FLATMTL_OK) return status;
  if (!gramian) return fm_fail(error, FLATMTL_ERROR_NULL, "gramian", -1, -1, NAN);
  const int32_t n = rows->num_rows;
  status = fm_check_context(context, n, error);
  if (status == FLATMTL_OK)
    status = check_output(gramian, (size_t)n * (size_t)n * sizeof(double), rows, NULL, "gramian", error);
  if (status != FLATMTL_OK) return status;
  job job = {.rows = rows};
  fill(context, &job, n, gramian);
  for (int32_t i = 0; i < n; i++) {
    const double diagonal = gramian[(size_t)i * (size_t)(n + 1)];
    if (!isfinite(diagonal)) return fm_fail(error, FLATMTL_ERROR_NONFINITE, "rows", i, -1, diagonal);
  }
  return FLATMTL_OK;
}

flatmtl_status flatmtl_gramian_pair(const flatmtl_context *context, const flatmtl_rows *loss_rows,
                                    const flatmtl_rows *perturbed_rows, double *gramian, flatmtl_error *error) {
  flatmtl_status status = fm_check_rows(loss_rows, 0, "loss_rows", error);
  if (status == FLATMTL_OK) status = fm_check_rows(perturbed_rows, loss_rows->num_rows, "perturbed_rows", error);
  if (status == FLATMTL_OK) status = fm_check_same_table(loss_rows, perturbed_rows, "perturbed_rows", error);
  if (status != FLATMTL_OK) return status;
  if (!gramian) return fm_fail(error, FLATMTL_ERROR_NULL, "gramian", -1, -1, NAN);
  const int32_t k = loss_rows->num_rows, n = 2 * k;
  status = fm_check_context(context, k, error);
  if (status == FLATMTL_OK)
    status = check_output(gramian, (size_t)n * (size_t)n * sizeof(double), loss_rows, perturbed_rows, "gramian", error);
  if (status != FLATMTL_OK) return status;
  job job = {.rows = loss_rows, .perturbed = perturbed_rows};
  fill(context, &job, n, gramian);
  for (int32_t i = 0; i < n; i++) {
    const double diagonal = gramian[(size_t)i * (size_t)(n + 1)];
    if (!isfinite(diagonal))
      return fm_fail(error, FLATMTL_ERROR_NONFINITE, i < k ? "loss_rows" : "perturbed_rows", i, -1, diagonal);
  }
  return FLATMTL_OK;
}
