/* gramian.c - Gramians: the inner products of rows.
 *
 * The rows are cut into chunks that depend on their total length and number alone, a chunk into runs. Within a run
 * lanes are summed by the kernels, then the lanes, then the runs, then the chunks, in order. No sum depends on the
 * threads, nor on the segments: the elements around a boundary between two of them are packed first.
 *
 * Two precisions: F64 throughout, with runs of FM_RUN elements; or, for many long rows, F32 within runs of FM_BLOCK
 * elements and F64 across them. A sum in F32 could overflow, or lose terms by underflow, and its rounding errors could
 * hide a rank deficiency. What it gave is looked at, and the Gramian computed again in F64 if one of these may be so.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "chunks.h"
#include "flatmtl.h"
#include "kernels.h"
#include "methods.h"
#include "pack.h"
#include "rows.h"

enum {
  FM_FAST_ROWS = 4,           /* F32 from so many rows of F32 on: below, F64 is as fast as memory */
  FM_FAST_HALF_ROWS = 2,      /* the same of BF16 and F16, which are rounded more coarsely themselves */
  FM_FAST_LENGTH = 96 * 1024, /* and from this length on: its rounding errors need company to average out */
};

/* Squared norms below this are not left to F32: 2^32 terms lost to underflow, at most 2^-126 each, are then below 2^-30
 * of the result even where subnormal numbers are flushed. */
static const double smallest_fast = 0x1p-64;

/* Rows whose part that the rows before them do not span is smaller than this, squared and relative to the row, are not
 * left to F32 either: its errors would be a visible share of that part, on which the solves depend. */
static const double smallest_part = 1e-5;

/* Row i of the lower triangle starts at fm_triangle(i); a row is filled up to a multiple of 4 columns. */
static size_t triangle(int32_t i) {
  const size_t q = (size_t)i / 4, r = (size_t)i % 4;
  return 8 * q * (q + 1) + 4 * (q + 1) * r;
}

static size_t triangle_size(int32_t n) {
  return triangle((n + 3) / 4 * 4);
}

flatmtl_status flatmtl_workspace_size(int32_t num_tasks, size_t *bytes, flatmtl_error *error) {
  if (!bytes) return fm_fail(error, FLATMTL_ERROR_NULL, "bytes", -1, -1, NAN);
  if (num_tasks < 1 || num_tasks > FLATMTL_MAX_TASKS)
    return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "num_tasks", -1, -1, num_tasks);
  size_t doubles = fm_partial_doubles(triangle_size(2 * num_tasks));
  const size_t others[] = {fm_partial_doubles(2 * triangle_size(num_tasks)),
                           fm_partial_doubles((size_t)num_tasks),
                           FM_BLOCK,
                           fm_weights_work(num_tasks),
                           fm_step_weights_work(num_tasks),
                           fm_weightings_work(num_tasks),
                           fm_buffers_work(num_tasks),
                           fm_buffer_weights_work(num_tasks)};
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    if (doubles < others[i]) doubles = others[i];
  *bytes = (doubles * sizeof(double) + 63) / 64 * 64;
  return FLATMTL_OK;
}

/* Virtual rows 0 .. K-1 are those of `rows`; K .. 2K-1, if `perturbed` is given, the flat ones. They make one family,
 * or two of K each, and products are of rows of one family. */
typedef struct job {
  fm_chunks chunks; /* first: fm_chunks_run hands this out */
  const fm_kernels *kernels;
  const flatmtl_rows *rows;
  const flatmtl_rows *perturbed;
  int32_t num_families;
  int32_t size; /* rows of a family */
  int fast;
  int as_is;       /* whether rows that are not flat are multiplied as they lie, in BF16 */
  int32_t scanned; /* the row that scan_chunks looks at */
} job;

/* Room for a block of rows that have to be packed, widened or subtracted. */
typedef union scratch {
  uint16_t bf16[FM_PANEL][FM_BLOCK];
  float f32[FM_PANEL][FM_BLOCK];
  double f64[FM_GROUP][FM_BLOCK];
} scratch;

static int is_as_is(const job *job, int32_t row) {
  return job->as_is && row < job->rows->num_rows;
}

/* Whether a row can be read where it lies. */
static int is_direct(const job *job, int32_t row) {
  return row < job->rows->num_rows && (job->as_is || fm_dtype_size(job->rows->dtype) > 2);
}

/* Of row i of a group that starts at first_row. */
static void *place(const job *job, int32_t first_row, scratch *to, int32_t i, int64_t offset) {
  if (is_as_is(job, first_row)) return to->bf16[i] + offset;
  return job->rows->dtype == FLATMTL_F64 ? (void *)(to->f64[i] + offset) : (void *)(to->f32[i] + offset);
}

static void widen(const job *job, int32_t row, fm_cursor cursor, int64_t n, void *to) {
  const int flat = row >= job->rows->num_rows;
  fm_pack(job->kernels, job->rows, flat ? job->perturbed : NULL, flat ? row - job->rows->num_rows : row, cursor, n, to);
}

static void pack(const job *job, int32_t row, fm_cursor cursor, int64_t n, void *to) {
  if (is_as_is(job, row))
    fm_gather(job->rows, row, cursor, n, to);
  else
    widen(job, row, cursor, n, to);
}

/* The rows of a group at the cursor, which stands where the next block starts. */
static void look_ahead(const job *job, int32_t first_row, int32_t count, fm_cursor cursor, fm_ahead *ahead) {
  ahead->count = 0;
  ahead->size = (int64_t)fm_dtype_size(job->rows->dtype);
  if (fm_cursor_room(&cursor) == 0) return;
  for (int32_t row = first_row; row < first_row + count; row++) {
    const int32_t k = job->rows->num_rows, task = row < k ? row : row - k;
    ahead->rows[ahead->count++] = fm_row_at(row < k ? job->rows : job->perturbed, task, &cursor, (size_t)ahead->size);
  }
}

static void multiply(const job *job, int32_t first_row, const void *const *x, int32_t nx, const void *const *y,
                     int32_t ny, int64_t n, int first, int last, double *lanes, double *const *out,
                     const fm_ahead *ahead) {
  const int64_t padded = (n + FM_LANES - 1) / FM_LANES * FM_LANES;
  if (is_as_is(job, first_row) && !job->fast) {
    job->kernels->gram_bf16((const uint16_t *const *)x, nx, (const uint16_t *const *)y, ny, padded, first, last, lanes,
                            out, ahead);
  } else if (is_as_is(job, first_row)) {
    job->kernels->gram_fast_bf16((const uint16_t *const *)x, nx, (const uint16_t *const *)y, ny, padded, first, last,
                                 (float *)lanes, out, ahead);
  } else if (job->rows->dtype == FLATMTL_F64) {
    job->kernels->gram_f64((const double *const *)x, nx, (const double *const *)y, ny, padded, first, last, lanes, out,
                           ahead);
  } else if (job->fast) {
    job->kernels->gram_fast((const float *const *)x, nx, (const float *const *)y, ny, padded, first, last,
                            (float *)lanes, out, ahead);
  } else {
    job->kernels->gram_f32((const float *const *)x, nx, (const float *const *)y, ny, padded, first, last, lanes, out,
                           ahead);
  }
}

/* A group of at most FM_GROUP rows with itself over a block, piece by piece: only what surrounds a boundary between
 * segments is packed. */
static void add_pieces(const job *job, int32_t first_row, int32_t count, fm_cursor cursor, int64_t n, int first,
                       int last, scratch *room, double *lanes, double *const *out) {
  const void *x[FM_GROUP];
  const size_t size = fm_dtype_size(job->rows->dtype);
  fm_cursor next = cursor;
  fm_ahead ahead;
  int any_direct = 0;
  fm_cursor_advance(&next, n);
  look_ahead(job, first_row, count, next, &ahead);
  for (int32_t i = 0; i < count; i++)
    if (is_direct(job, first_row + i)) {
      any_direct = 1;
    } else {
      pack(job, first_row + i, cursor, n, place(job, first_row, room, i, 0));
    }
  for (int64_t done = 0; done < n;) {
    int direct = 1;
    const int64_t length = any_direct ? fm_piece(cursor, n - done, &direct) : n;
    for (int32_t i = 0; i < count; i++) {
      x[i] = place(job, first_row, room, i, done);
      if (!is_direct(job, first_row + i)) continue;
      if (direct) {
        x[i] = fm_row_at(job->rows, first_row + i, &cursor, size);
      } else {
        pack(job, first_row + i, cursor, length, place(job, first_row, room, i, done));
      }
    }
    multiply(job, first_row, x, count, NULL, 0, length, first && done == 0, last && done + length == n, lanes, out,
             &ahead);
    for (int32_t i = 0; i < ahead.count; i++) ahead.rows[i] += length * ahead.size;
    fm_cursor_advance(&cursor, length);
    done += length;
  }
}

/* Rows over a block as they are, if they lie in one piece, or packed. */
static void fetch(const job *job, int32_t first_row, int32_t count, fm_cursor cursor, int64_t n, scratch *room,
                  const void **x) {
  const int whole = n % FM_LANES == 0 && fm_cursor_room(&cursor) >= n;
  for (int32_t i = 0; i < count; i++) {
    if (whole && is_direct(job, first_row + i)) {
      x[i] = fm_row_at(job->rows, first_row + i, &cursor, fm_dtype_size(job->rows->dtype));
    } else {
      pack(job, first_row + i, cursor, n, place(job, first_row, room, i, 0));
      x[i] = place(job, first_row, room, i, 0);
    }
  }
}

/* One pair of groups of the family that starts at virtual row `base`, over one run of n elements. */
static void add_run(const job *job, int32_t base, int32_t gi, int32_t gj, int32_t group, fm_cursor cursor, int64_t n,
                    double *sums) {
  const int32_t ni = job->size - gi < group ? job->size - gi : group;
  double lanes[FM_GROUP * FM_GROUP * FM_LANES];
  scratch a, b;
  fm_ahead ahead;
  const void *x[FM_PANEL], *y[FM_PANEL];
  double *out[FM_PANEL];
  for (int32_t i = 0; i < ni; i++) out[i] = sums + triangle(gi + i) + gj;
  for (int64_t done = 0; done < n; done += FM_BLOCK) {
    const int64_t block = n - done < FM_BLOCK ? n - done : FM_BLOCK;
    const int first = done == 0, last = done + block == n;
    fm_cursor next = cursor;
    fm_cursor_advance(&next, block);
    if (job->size <= FM_GROUP) {
      add_pieces(job, base, ni, cursor, block, first, last, &a, lanes, out);
    } else {
      fetch(job, base + gi, ni, cursor, block, &a, x);
      if (gi != gj) fetch(job, base + gj, group, cursor, block, &b, y);
      look_ahead(job, base + gi, gi == gj ? ni : 0, next, &ahead);
      multiply(job, base + gi, x, ni, gi == gj ? NULL : y, group, block, first, last, lanes, out, &ahead);
    }
    cursor = next;
  }
}

static void gram_chunk(const fm_chunks *chunks, int64_t length, fm_cursor cursor, double *out) {
  const job *job = (const struct job *)chunks;
  const int64_t run = job->fast ? FM_BLOCK : FM_RUN;
  const int32_t group = job->fast ? FM_PANEL : FM_GROUP;
  memset(out, 0, chunks->sums * sizeof(double));
  for (int64_t at = 0; at < length; at += run) {
    const int64_t n = length - at < run ? length - at : run;
    for (int32_t f = 0; f < job->num_families; f++)
      for (int32_t gi = 0; gi < job->size; gi += group)
        for (int32_t gj = 0; gj <= gi; gj += group)
          add_run(job, f * job->size, gi, gj, group, cursor, n, out + (size_t)f * triangle_size(job->size));
    fm_cursor_advance(&cursor, n);
  }
}

/* Whether a row has an element that is not zero. */
static void scan_chunk(const fm_chunks *chunks, int64_t length, fm_cursor cursor, double *out) {
  const job *job = (const struct job *)chunks;
  float block[FM_BLOCK];
  *out = 0.0;
  for (int64_t at = 0; at < length; at += FM_BLOCK) {
    const int64_t n = length - at < FM_BLOCK ? length - at : FM_BLOCK;
    widen(job, job->scanned, cursor, n, block);
    for (int64_t p = 0; p < n; p++)
      if (block[p] != 0.0f) *out = 1.0;
    fm_cursor_advance(&cursor, n);
  }
}

/* Whether n rows are linearly independent by that measure; rows of zeros do not count. By Cholesky's factorization of
 * their Gramian, whose rows are `stride` apart, with its diagonal scaled to 1, in `factor` [n (n + 1) / 2]. */
static int are_independent(const double *gramian, size_t n, size_t stride, double *factor) {
  double *row = factor;
  for (size_t i = 0; i < n; row += ++i) {
    const double square = gramian[i * (stride + 1)];
    double rest = square > 0.0 ? 1.0 : 0.0;
    const double *other = factor;
    for (size_t j = 0; j < i; other += ++j) {
      const double scale = sqrt(square) * sqrt(gramian[j * (stride + 1)]);
      double value = scale > 0.0 ? gramian[i * stride + j] / scale : 0.0;
      for (size_t l = 0; l < j; l++) value -= row[l] * other[l];
      row[j] = other[j] > 0.0 ? value / other[j] : 0.0;
      rest -= row[j] * row[j];
    }
    if (square > 0.0 && !(rest >= smallest_part)) return 0;
    row[i] = square > 0.0 ? sqrt(rest) : 0.0;
  }
  return 1;
}

/* Whether F32 did no harm: see smallest_fast and smallest_part. Sums that overflowed are Inf or NaN; rows that are zero
 * are known exactly. */
static int is_sound(const flatmtl_context *context, job *job, const double *gramian) {
  const size_t size = (size_t)job->size, n = (size_t)job->num_families * size;
  for (size_t i = 0; i < n; i++) {
    for (size_t j = 0; j <= i; j++)
      if (!isfinite(gramian[i * n + j])) return 0;
    const double square = gramian[i * (n + 1)];
    if (square >= smallest_fast) continue;
    if (square != 0.0) return 0;
    double nonzero;
    job->scanned = (int32_t)i;
    job->chunks.sums = 1;
    fm_chunks_run(context, &job->chunks, job->rows, 1, scan_chunk, &nonzero);
    if (nonzero != 0.0) return 0;
  }
  for (size_t first = 0; first < n; first += size)
    if (!are_independent(gramian + first * (n + 1), size, n, context->workspace)) return 0;
  return 1;
}

/* Gramian of the virtual rows into the full matrix; zeros between families. */
static void fill(const flatmtl_context *context, job *job, double *gramian) {
  const size_t size = (size_t)job->size, n = (size_t)job->num_families * size;
  const size_t per_family = triangle_size(job->size);
  const double *sums = context->workspace;
  const int32_t least = fm_dtype_size(job->rows->dtype) > 2 ? FM_FAST_ROWS : FM_FAST_HALF_ROWS;
  job->kernels = fm_kernels_get();
  job->fast = context->accumulate == FLATMTL_ACCUMULATE_AUTO && job->rows->dtype != FLATMTL_F64 &&
              job->rows->num_rows >= least && fm_total_length(job->rows) >= FM_FAST_LENGTH;
  job->as_is = job->rows->dtype == FLATMTL_BF16 && size == (size_t)job->rows->num_rows;
  memset(gramian, 0, n * n * sizeof(double));
  for (;;) {
    const double product = job->fast ? 0.06 : 0.12; /* of the time to read a number */
    job->chunks.sums = (size_t)job->num_families * per_family;
    fm_chunks_run(context, &job->chunks, job->rows, (double)n * (1.0 + product * (double)size), gram_chunk,
                  context->workspace);
    for (size_t first = 0, f = 0; first < n; first += size, f++)
      for (size_t i = 0; i < size; i++)
        for (size_t j = 0; j <= i; j++)
          gramian[(first + i) * n + first + j] = gramian[(first + j) * n + first + i] =
              sums[f * per_family + triangle((int32_t)i) + j];
    if (!job->fast || is_sound(context, job, gramian)) return;
    job->fast = 0;
  }
}

static flatmtl_status check_output(const void *out, size_t bytes, const flatmtl_rows *rows, const flatmtl_rows *other,
                                   const char *argument, flatmtl_error *error) {
  flatmtl_status status = fm_check_outside(out, bytes, rows, argument, error);
  if (status == FLATMTL_OK && other) status = fm_check_outside(out, bytes, other, argument, error);
  return status;
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
  job job = {.rows = rows, .num_families = 1, .size = n};
  fill(context, &job, gramian);
  for (int32_t i = 0; i < n; i++) {
    const double diagonal = gramian[(size_t)i * (size_t)(n + 1)];
    if (!isfinite(diagonal)) return fm_fail(error, FLATMTL_ERROR_NONFINITE, "rows", i, -1, diagonal);
  }
  return FLATMTL_OK;
}

flatmtl_status flatmtl_gramian_pair(const flatmtl_context *context, const flatmtl_rows *loss_rows,
                                    const flatmtl_rows *perturbed_rows, int cross, double *gramian,
                                    flatmtl_error *error) {
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
  job job = {.rows = loss_rows, .perturbed = perturbed_rows, .num_families = cross ? 1 : 2, .size = cross ? n : k};
  fill(context, &job, gramian);
  for (int32_t i = 0; i < n; i++) {
    const double diagonal = gramian[(size_t)i * (size_t)(n + 1)];
    if (!isfinite(diagonal))
      return fm_fail(error, FLATMTL_ERROR_NONFINITE, i < k ? "loss_rows" : "perturbed_rows", i, -1, diagonal);
  }
  return FLATMTL_OK;
}
