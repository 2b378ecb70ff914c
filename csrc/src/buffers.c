/* buffers.c - the passes over memory of the buffer methods: moving averages, roots of sums of squares, GradDrop, and
 * inner products between the gradients of two batches.
 *
 * Their rows are x_i = a_i g_i + b_i (s_i - g_i), formed block by block in double. Sums over a row are cut into chunks
 * and lanes by position alone, as in gramian.c. */
#include <stddef.h>
#include <string.h>

#include "flatmtl.h"
#include "kernels.h"
#include "methods.h"
#include "random.h"
#include "rows.h"

enum {
  GRAIN = 32 * 1024,
  LEAST_CHUNK = 16 * 1024,
  LEAST_CHUNKS = 8,
  MOST_CHUNKS = 64,
  PARTIALS = 64 * 1024,
  GROUP = 16
};

typedef struct job {
  const fm_kernels *kernels;
  const flatmtl_mixed_rows *rows, *other;
  const flatmtl_buffers *buffers;
  const double *factors; /* keep, leak or weights, [K] */
  const flatmtl_rows *out;
  uint64_t start; /* of the random sequence */
  int64_t position;
  int64_t length, chunk;
  double *partial; /* [chunks][sums] */
  size_t sums;
} job;

static int32_t count_rows(const flatmtl_mixed_rows *x) {
  return x->loss_rows->num_rows;
}

/* ---- blocks ---- */

/* n elements of x_i, all in the cursor's segment. */
static void load_piece(const fm_kernels *kernels, const flatmtl_mixed_rows *x, int32_t i, const fm_cursor *cursor,
                       int64_t n, double *out) {
  const flatmtl_dtype dtype = x->loss_rows->dtype;
  const size_t size = fm_dtype_size(dtype);
  const void *g = fm_row_at(x->loss_rows, i, cursor, size);
  const void *s = x->perturbed_rows ? fm_row_at(x->perturbed_rows, i, cursor, size) : NULL;
  const double a = x->loss_factors ? x->loss_factors[i] : s ? 0.0 : 1.0, b = x->flat_factors ? x->flat_factors[i] : 1.0;
  float g_wide[FM_BLOCK], s_wide[FM_BLOCK];
  if (dtype == FLATMTL_F64) {
    kernels->add_f64(g, s, a, b, 1, n, out);
    return;
  }
  if (size == 2) {
    void (*widen)(const uint16_t *, int64_t, float *) =
        dtype == FLATMTL_BF16 ? kernels->widen_bf16 : kernels->widen_f16;
    widen(g, n, g_wide);
    if (s) widen(s, n, s_wide);
    g = g_wide;
    s = s ? s_wide : NULL;
  }
  kernels->add_f32(g, s, a, b, 1, n, out);
}

/* n elements of x_i from the cursor on, over segments; padded with zeros to whole lanes. */
static void load_block(const fm_kernels *kernels, const flatmtl_mixed_rows *x, int32_t i, fm_cursor cursor, int64_t n,
                       double *out) {
  for (int64_t done = 0; done < n;) {
    const int64_t room = fm_cursor_room(&cursor), take = room < n - done ? room : n - done;
    if (take > 0) load_piece(kernels, x, i, &cursor, take, out + done);
    fm_cursor_advance(&cursor, take);
    done += take;
  }
  for (; n % FM_LANES != 0; n++) out[n] = 0.0;
}

static flatmtl_rows as_rows(const flatmtl_buffers *buffers) {
  const flatmtl_rows rows = {buffers->dtype, buffers->num_rows, buffers->num_segments, buffers->lengths,
                             (const void *const *)buffers->data};
  return rows;
}

static void *buffer_at(const flatmtl_buffers *buffers, int32_t i, const fm_cursor *cursor) {
  const size_t size = fm_dtype_size(buffers->dtype);
  return (char *)buffers->data[i * buffers->num_segments + cursor->segment] + (size_t)cursor->offset * size;
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

static void ema_block(const job *job, const fm_cursor *cursor, int64_t at, int64_t n) {
  double x[FM_BLOCK];
  (void)at;
  for (int32_t i = 0; i < count_rows(job->rows); i++) {
    load_piece(job->kernels, job->rows, i, cursor, n, x);
    void *y = buffer_at(job->buffers, i, cursor);
    if (job->buffers->dtype == FLATMTL_F64) {
      job->kernels->ema_f64(y, x, job->factors[i], n);
    } else {
      job->kernels->ema_f32(y, x, job->factors[i], n);
    }
  }
}

static void drop_block(const job *job, const fm_cursor *cursor, int64_t at, int64_t n) {
  double x[FM_BLOCK], sum[FM_BLOCK] = {0}, mass[FM_BLOCK] = {0}, sign[FM_BLOCK];
  const int32_t k = count_rows(job->rows);
  for (int32_t i = 0; i < k; i++) {
    load_piece(job->kernels, job->rows, i, cursor, n, x);
    job->kernels->drop_sums(x, n, sum, mass);
  }
  job->kernels->drop_signs(job->start, job->position + at, sum, mass, n, sign);
  memset(sum, 0, sizeof sum);
  for (int32_t i = 0; i < k; i++) {
    load_piece(job->kernels, job->rows, i, cursor, n, x);
    job->kernels->drop_add(x, sign, job->factors ? job->factors[i] : 0.0, n, sum);
  }
  store(job, sum, cursor, n);
}

static void combine_block(const job *job, const fm_cursor *cursor, int64_t at, int64_t n) {
  double sum[FM_BLOCK];
  (void)at;
  for (int32_t i = 0; i < job->buffers->num_rows; i++) {
    const void *y = buffer_at(job->buffers, i, cursor);
    if (job->buffers->dtype == FLATMTL_F64) {
      job->kernels->add_f64(y, NULL, job->factors[i], 0.0, i == 0, n, sum);
    } else {
      job->kernels->add_f32(y, NULL, job->factors[i], 0.0, i == 0, n, sum);
    }
  }
  store(job, sum, cursor, n);
}

/* Blocks of one segment each over [begin, end). */
static void for_blocks(const job *job, const flatmtl_rows *table, int64_t begin, int64_t end,
                       void (*block)(const struct job *, const fm_cursor *, int64_t, int64_t)) {
  fm_cursor cursor = fm_cursor_at(table, begin);
  while (begin < end) {
    int64_t n = fm_cursor_room(&cursor);
    if (n > end - begin) n = end - begin;
    if (n > FM_BLOCK) n = FM_BLOCK;
    block(job, &cursor, begin, n);
    fm_cursor_advance(&cursor, n);
    begin += n;
  }
}

static void ema_range(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  for_blocks(job, job->rows->loss_rows, begin, end, ema_block);
}

static void drop_range(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  for_blocks(job, job->rows->loss_rows, begin, end, drop_block);
}

static void combine_range(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  for_blocks(job, job->out, begin, end, combine_block);
}

/* ---- sums over rows ---- */

/* Roots of n elements from the cursor on, their terms in out, padded with zeros. */
static void excess_block(const job *job, int32_t i, fm_cursor cursor, int64_t n, double *terms) {
  double x[FM_BLOCK];
  for (int64_t done = 0; done < n;) {
    const int64_t room = fm_cursor_room(&cursor), take = room < n - done ? room : n - done;
    if (take > 0) {
      load_piece(job->kernels, job->rows, i, &cursor, take, x);
      void *root = buffer_at(job->buffers, i, &cursor);
      if (job->buffers->dtype == FLATMTL_F64) {
        job->kernels->excess_f64(root, x, take, terms + done);
      } else {
        job->kernels->excess_f32(root, x, take, terms + done);
      }
    }
    fm_cursor_advance(&cursor, take);
    done += take;
  }
  for (; n % FM_LANES != 0; n++) terms[n] = 0.0;
}

static void excess_chunks(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  double terms[FM_BLOCK], lanes[FM_LANES];
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t first = chunk * job->chunk,
                  stop = first + job->chunk < job->length ? first + job->chunk : job->length;
    const fm_cursor start = fm_cursor_at(job->rows->loss_rows, first);
    for (int32_t i = 0; i < count_rows(job->rows); i++) {
      fm_cursor cursor = start;
      memset(lanes, 0, sizeof lanes);
      for (int64_t at = first; at < stop; at += FM_BLOCK) {
        const int64_t n = stop - at < FM_BLOCK ? stop - at : FM_BLOCK;
        excess_block(job, i, cursor, n, terms);
        for (int64_t p = 0; p < n; p += FM_LANES)
          for (int lane = 0; lane < FM_LANES; lane++) lanes[lane] += terms[p + lane];
        fm_cursor_advance(&cursor, n);
      }
      double sum = 0.0;
      for (int lane = 0; lane < FM_LANES; lane++) sum += lanes[lane];
      job->partial[(size_t)chunk * job->sums + (size_t)i] = sum;
    }
  }
}

/* <x_i, y_j> over one block. */
static void cross_block(const job *job, fm_cursor cursor, int64_t n, double *out) {
  double x[GROUP][FM_BLOCK], y[FM_BLOCK];
  const int32_t k = count_rows(job->rows);
  const int64_t padded = (n + FM_LANES - 1) / FM_LANES * FM_LANES;
  for (int32_t first = 0; first < k; first += GROUP) {
    const int32_t count = k - first < GROUP ? k - first : GROUP;
    for (int32_t i = 0; i < count; i++) load_block(job->kernels, job->rows, first + i, cursor, n, x[i]);
    for (int32_t j = 0; j < k; j++) {
      load_block(job->kernels, job->other, j, cursor, n, y);
      for (int32_t i = 0; i < count; i++) {
        double lanes[FM_LANES] = {0};
        job->kernels->dot(x[i], y, padded, lanes);
        double sum = 0.0;
        for (int lane = 0; lane < FM_LANES; lane++) sum += lanes[lane];
        out[(size_t)(first + i) * (size_t)k + (size_t)j] += sum;
      }
    }
  }
}

static void cross_chunks(int64_t begin, int64_t end, void *context) {
  const job *job = context;
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t first = chunk * job->chunk,
                  stop = first + job->chunk < job->length ? first + job->chunk : job->length;
    double *out = job->partial + (size_t)chunk * job->sums;
    memset(out, 0, job->sums * sizeof(double));
    fm_cursor cursor = fm_cursor_at(job->rows->loss_rows, first);
    for (int64_t at = first; at < stop; at += FM_BLOCK) {
      const int64_t n = stop - at < FM_BLOCK ? stop - at : FM_BLOCK;
      cross_block(job, cursor, n, out);
      fm_cursor_advance(&cursor, n);
    }
  }
}

static int64_t most_chunks(size_t sums) {
  const int64_t chunks = (int64_t)(PARTIALS / sums);
  return chunks < LEAST_CHUNKS ? LEAST_CHUNKS : chunks > MOST_CHUNKS ? MOST_CHUNKS : chunks;
}

/* Runs fn over chunks and adds the partial sums up into the first of them, in the workspace. */
static const double *run_chunks(const flatmtl_context *context, job *job, flatmtl_range_fn fn) {
  const int64_t most = most_chunks(job->sums);
  job->kernels = fm_kernels_get();
  job->length = fm_total_length(job->rows->loss_rows);
  job->chunk = (job->length + most - 1) / most;
  if (job->chunk < LEAST_CHUNK) job->chunk = LEAST_CHUNK;
  job->chunk = (job->chunk + FM_BLOCK - 1) / FM_BLOCK * FM_BLOCK;
  job->partial = context->workspace;
  const int64_t chunks = (job->length + job->chunk - 1) / job->chunk;
  fm_parallel(context, chunks, 1, fn, job);
  for (size_t i = 0; i < job->sums; i++) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) sum += job->partial[(size_t)chunk * job->sums + i];
    job->partial[i] = sum;
  }
  return job->partial;
}

/* Never less for more tasks: a bound on sums * most_chunks(sums), which is not monotone. */
size_t fm_buffers_work(int32_t num_tasks) {
  const size_t sums = (size_t)num_tasks * (size_t)num_tasks, most = sums * MOST_CHUNKS, least = sums * LEAST_CHUNKS;
  const size_t partials = most < PARTIALS ? most : least > PARTIALS ? least : PARTIALS;
  return partials + (size_t)num_tasks * MOST_CHUNKS;
}

/* ---- checks ---- */

flatmtl_status fm_check_mixed(const flatmtl_mixed_rows *x, const char *argument, flatmtl_error *error) {
  if (!x) return fm_fail(error, FLATMTL_ERROR_NULL, argument, -1, -1, NAN);
  flatmtl_status status = fm_check_rows(x->loss_rows, 0, "loss_rows", error);
  if (status != FLATMTL_OK) return status;
  const int32_t k = x->loss_rows->num_rows;
  if (x->perturbed_rows) {
    status = fm_check_rows(x->perturbed_rows, k, "perturbed_rows", error);
    if (status == FLATMTL_OK) status = fm_check_same_table(x->loss_rows, x->perturbed_rows, "perturbed_rows", error);
  }
  if (status == FLATMTL_OK && x->loss_factors) status = fm_check_finite(x->loss_factors, k, "loss_factors", error);
  if (status == FLATMTL_OK && x->flat_factors) status = fm_check_finite(x->flat_factors, k, "flat_factors", error);
  return status;
}

flatmtl_dtype fm_buffer_dtype(flatmtl_dtype rows) {
  return rows == FLATMTL_F64 ? FLATMTL_F64 : FLATMTL_F32;
}

/* buffers: one for each row, of the wide dtype; and they overlap neither rows nor one another. */
static flatmtl_status check_buffers(const flatmtl_context *context, const flatmtl_mixed_rows *x,
                                    const flatmtl_buffers *buffers, flatmtl_error *error) {
  if (!buffers) return fm_fail(error, FLATMTL_ERROR_NULL, "buffers", -1, -1, NAN);
  const flatmtl_rows rows = as_rows(buffers);
  flatmtl_rows table = *x->loss_rows;
  table.dtype = fm_buffer_dtype(table.dtype);
  flatmtl_status status = fm_check_rows(&rows, table.num_rows, "buffers", error);
  if (status == FLATMTL_OK) status = fm_check_same_table(&table, &rows, "buffers", error);
  if (status != FLATMTL_OK) return status;
  const fm_buffers outputs[] = {{"buffers", &rows, NULL, 1}};
  const fm_buffers inputs[] = {{"loss_rows", x->loss_rows, NULL, 1}, {"perturbed_rows", x->perturbed_rows, NULL, 1}};
  return fm_check_overlap(outputs, 1, inputs, x->perturbed_rows ? 2 : 1, context->workspace, context->workspace_size,
                          error);
}

/* The factors, and another array of K numbers or NULL, lie outside of the vectors written to. */
static flatmtl_status check_factors(const flatmtl_mixed_rows *x, const double *more, const flatmtl_rows *written,
                                    const char *argument, flatmtl_error *error) {
  const double *arrays[] = {x->loss_factors, x->flat_factors, more};
  const size_t bytes = (size_t)count_rows(x) * sizeof(double);
  flatmtl_status status = FLATMTL_OK;
  for (int i = 0; status == FLATMTL_OK && i < 3; i++)
    if (arrays[i]) status = fm_check_outside(arrays[i], bytes, written, argument, error);
  return status;
}

/* A result of so many bytes lies outside of rows and factors. */
static flatmtl_status check_result(const double *result, size_t bytes, const flatmtl_mixed_rows *x,
                                   const char *argument, flatmtl_error *error) {
  const size_t factors = (size_t)count_rows(x) * sizeof(double);
  const fm_array arrays[] = {{argument, result, bytes},
                             {"loss_factors", x->loss_factors, x->loss_factors ? factors : 0},
                             {"flat_factors", x->flat_factors, x->flat_factors ? factors : 0}};
  flatmtl_status status = fm_check_arrays(arrays, 1, 3, error);
  if (status == FLATMTL_OK) status = fm_check_outside(result, bytes, x->loss_rows, argument, error);
  if (status == FLATMTL_OK && x->perturbed_rows)
    status = fm_check_outside(result, bytes, x->perturbed_rows, argument, error);
  return status;
}

/* ---- public ---- */

flatmtl_status flatmtl_moving_average(const flatmtl_context *context, const flatmtl_mixed_rows *rows,
                                      const double *keep, const flatmtl_buffers *buffers, flatmtl_error *error) {
  flatmtl_status status = fm_check_mixed(rows, "rows", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, count_rows(rows), error);
  if (status == FLATMTL_OK) status = fm_check_finite(keep, count_rows(rows), "keep", error);
  if (status == FLATMTL_OK) status = check_buffers(context, rows, buffers, error);
  if (status != FLATMTL_OK) return status;
  const flatmtl_rows written = as_rows(buffers);
  status = check_factors(rows, keep, &written, "buffers", error);
  if (status != FLATMTL_OK) return status;
  job job = {.kernels = fm_kernels_get(), .rows = rows, .buffers = buffers, .factors = keep};
  fm_parallel(context, fm_total_length(rows->loss_rows), GRAIN, ema_range, &job);
  return FLATMTL_OK;
}

flatmtl_status flatmtl_excess(const flatmtl_context *context, const flatmtl_mixed_rows *rows,
                              const flatmtl_buffers *buffers, double *excess, flatmtl_error *error) {
  flatmtl_status status = fm_check_mixed(rows, "rows", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, count_rows(rows), error);
  if (status == FLATMTL_OK && !excess) status = fm_fail(error, FLATMTL_ERROR_NULL, "excess", -1, -1, NAN);
  if (status == FLATMTL_OK) status = check_buffers(context, rows, buffers, error);
  if (status != FLATMTL_OK) return status;
  const size_t bytes = (size_t)count_rows(rows) * sizeof(double);
  const flatmtl_rows written = as_rows(buffers);
  status = check_result(excess, bytes, rows, "excess", error);
  if (status == FLATMTL_OK) status = fm_check_outside(excess, bytes, &written, "excess", error);
  if (status == FLATMTL_OK) status = check_factors(rows, NULL, &written, "buffers", error);
  if (status != FLATMTL_OK) return status;
  job job = {.rows = rows, .buffers = buffers, .sums = (size_t)count_rows(rows)};
  memcpy(excess, run_chunks(context, &job, excess_chunks), bytes);
  return FLATMTL_OK;
}

flatmtl_status flatmtl_cross_gramian(const flatmtl_context *context, const flatmtl_mixed_rows *rows,
                                     const flatmtl_mixed_rows *others, double *gramian, flatmtl_error *error) {
  flatmtl_status status = fm_check_mixed(rows, "rows", error);
  if (status == FLATMTL_OK) status = fm_check_mixed(others, "others", error);
  if (status != FLATMTL_OK) return status;
  const int32_t k = count_rows(rows);
  if (count_rows(others) != k) return fm_fail(error, FLATMTL_ERROR_MISMATCH, "others", -1, -1, count_rows(others));
  status = fm_check_same_table(rows->loss_rows, others->loss_rows, "others", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, k, error);
  if (status != FLATMTL_OK) return status;
  if (!gramian) return fm_fail(error, FLATMTL_ERROR_NULL, "gramian", -1, -1, NAN);
  const size_t bytes = (size_t)k * (size_t)k * sizeof(double);
  status = check_result(gramian, bytes, rows, "gramian", error);
  if (status == FLATMTL_OK) status = check_result(gramian, bytes, others, "gramian", error);
  if (status != FLATMTL_OK) return status;
  job job = {.rows = rows, .other = others, .sums = (size_t)k * (size_t)k};
  memcpy(gramian, run_chunks(context, &job, cross_chunks), bytes);
  return FLATMTL_OK;
}

flatmtl_status flatmtl_graddrop(const flatmtl_context *context, const flatmtl_mixed_rows *rows, const double *leak,
                                int64_t seed, int64_t draw, int64_t call, int64_t position, const flatmtl_vector *out,
                                flatmtl_error *error) {
  flatmtl_status status = fm_check_mixed(rows, "rows", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, count_rows(rows), error);
  if (status == FLATMTL_OK && leak) status = fm_check_finite(leak, count_rows(rows), "leak", error);
  if (status == FLATMTL_OK) status = fm_check_vector(out, "out", error);
  if (status != FLATMTL_OK) return status;
  const int64_t numbers[] = {seed, draw, call, position};
  const char *const names[] = {"seed", "draw", "call", "position"};
  for (int i = 0; i < 4; i++)
    if (numbers[i] < 0) return fm_fail(error, FLATMTL_ERROR_OPTION, names[i], -1, -1, (double)numbers[i]);
  const flatmtl_rows target = fm_as_rows(out);
  status = fm_check_beside(&target, rows->loss_rows, &target, "out", error);
  if (status != FLATMTL_OK) return status;
  const fm_buffers outputs[] = {{"out", &target, NULL, 1}};
  const fm_buffers inputs[] = {{"loss_rows", rows->loss_rows, NULL, 1},
                               {"perturbed_rows", rows->perturbed_rows, NULL, 1}};
  status = fm_check_overlap(outputs, 1, inputs, rows->perturbed_rows ? 2 : 1, context->workspace,
                            context->workspace_size, error);
  if (status == FLATMTL_OK) status = check_factors(rows, leak, &target, "out", error);
  if (status != FLATMTL_OK) return status;
  job job = {.kernels = fm_kernels_get(),
             .rows = rows,
             .factors = leak,
             .out = &target,
             .start = fm_start_sequence((uint64_t)seed, (uint64_t)draw, (uint64_t)call, 0),
             .position = position};
  fm_parallel(context, fm_total_length(&target), GRAIN, drop_range, &job);
  return FLATMTL_OK;
}

flatmtl_status flatmtl_combine_buffers(const flatmtl_context *context, const flatmtl_buffers *buffers,
                                       const double *weights, const flatmtl_vector *out, flatmtl_error *error) {
  if (!buffers) return fm_fail(error, FLATMTL_ERROR_NULL, "buffers", -1, -1, NAN);
  const flatmtl_rows rows = as_rows(buffers);
  flatmtl_status status = fm_check_rows(&rows, 0, "buffers", error);
  if (status == FLATMTL_OK) status = fm_check_context(context, rows.num_rows, error);
  if (status == FLATMTL_OK) status = fm_check_finite(weights, rows.num_rows, "weights", error);
  if (status == FLATMTL_OK) status = fm_check_vector(out, "out", error);
  if (status != FLATMTL_OK) return status;
  const flatmtl_rows target = fm_as_rows(out);
  flatmtl_rows wide = target;
  wide.dtype = fm_buffer_dtype(wide.dtype);
  status = fm_check_same_table(&wide, &rows, "buffers", error);
  if (status != FLATMTL_OK) return status;
  const fm_buffers outputs[] = {{"out", &target, NULL, 1}}, inputs[] = {{"buffers", &rows, NULL, 1}};
  status = fm_check_overlap(outputs, 1, inputs, 1, context->workspace, context->workspace_size, error);
  if (status == FLATMTL_OK)
    status = fm_check_outside(weights, (size_t)rows.num_rows * sizeof(double), &target, "out", error);
  if (status != FLATMTL_OK) return status;
  job job = {.kernels = fm_kernels_get(), .buffers = buffers, .factors = weights, .out = &target};
  fm_parallel(context, fm_total_length(&target), GRAIN, combine_range, &job);
  return FLATMTL_OK;
}
