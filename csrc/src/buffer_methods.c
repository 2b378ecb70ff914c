/* buffer_methods.c - the buffer methods: names, options, their K-sized parts, and one step of them. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "flatmtl.h"
#include "methods.h"
#include "rows.h"
#include "weighting/weighting.h"

enum { MAX_OPTIONS = 6, MAX_STATE = 3 };

typedef struct method {
  const char *name;
  int32_t num_options, per_task; /* then one a task, 0 by default, if per_task */
  double defaults[MAX_OPTIONS];
  int32_t state, buffers;
} method;

static const method methods[FLATMTL_NUM_BUFFER_METHODS] = {
    [FLATMTL_BUFFER_GRADDROP] = {"graddrop", 2, 1, {0.0, 0.0}, 0, 0},
    [FLATMTL_BUFFER_MOCO] = {"moco", 6, 0, {0.5, 0.5, 0.1, 0.5, 0.0, 1.0}, 2, 1},
    [FLATMTL_BUFFER_DB_MTL] = {"db_mtl", 2, 0, {0.9, 0.0}, 1, 1},
    [FLATMTL_BUFFER_EXCESS_MTL] = {"excess_mtl", 1, 0, {0.01}, 3, 1},
    [FLATMTL_BUFFER_SDMGRAD] = {"sdmgrad", 4, 0, {0.3, 10.0, 0.5, 20.0}, 2, 0},
};

static const method *find(flatmtl_buffer_method number) {
  const int32_t n = (int32_t)number;
  return n >= 0 && n < FLATMTL_NUM_BUFFER_METHODS ? &methods[n] : NULL;
}

static int32_t count_options(const method *entry, int32_t num_tasks) {
  return entry->num_options + (entry->per_task ? num_tasks : 0);
}

static int is_integer(double value, double least) {
  return value >= least && value < 0x1p53 && value == floor(value);
}

static int in_range(flatmtl_buffer_method number, int32_t option, double value) {
  if (!isfinite(value)) return 0;
  switch (number) {
    case FLATMTL_BUFFER_GRADDROP:
      return option < 2 ? is_integer(value, 0.0) : value >= 0.0 && value <= 1.0;
    case FLATMTL_BUFFER_MOCO:
      if (option == 0) return value > 0.0 && value <= 1.0;
      return option == 5 ? value == 0.0 || value == 1.0 : value >= 0.0;
    case FLATMTL_BUFFER_DB_MTL:
      return value >= 0.0 && (option == 1 || value < 1.0);
    case FLATMTL_BUFFER_SDMGRAD:
      if (option == 3) return is_integer(value, 1.0) && value <= 1e6;
      return option == 1 ? value > 0.0 : value >= 0.0 && (option == 0 || value < 1.0);
    default:
      return value >= 0.0;
  }
}

static flatmtl_status check_method(flatmtl_buffer_method number, const double *options, int32_t num_options,
                                   int32_t num_tasks, flatmtl_error *error) {
  const method *entry = find(number);
  if (!entry) return fm_fail(error, FLATMTL_ERROR_NAME, "method", -1, -1, (double)(int)number);
  if (num_tasks < 1 || num_tasks > FLATMTL_MAX_TASKS)
    return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "num_tasks", -1, -1, num_tasks);
  if (num_options < 0) return fm_fail(error, FLATMTL_ERROR_SIZE, "num_options", -1, -1, num_options);
  if (num_options == 0) return FLATMTL_OK;
  if (!options) return fm_fail(error, FLATMTL_ERROR_NULL, "options", -1, -1, NAN);
  if (num_options != count_options(entry, num_tasks))
    return fm_fail(error, FLATMTL_ERROR_OPTION, "num_options", -1, -1, num_options);
  for (int32_t i = 0; i < num_options; i++)
    if (!in_range(number, i, options[i])) return fm_fail(error, FLATMTL_ERROR_OPTION, "options", -1, -1, options[i]);
  return FLATMTL_OK;
}

static const double *or_defaults(const method *entry, const double *options, int32_t num_options) {
  return num_options == 0 ? entry->defaults : options; /* of the options that are not per task */
}

/* ---- factors ---- */

flatmtl_status flatmtl_buffer_factors(flatmtl_buffer_method number, const double *options, int32_t num_options,
                                      int32_t n, const double *losses, const double *sq_norms, const double *state,
                                      double *factors, double *keep, flatmtl_error *error) {
  flatmtl_status status = check_method(number, options, num_options, n, error);
  if (status != FLATMTL_OK) return status;
  if (!factors) return fm_fail(error, FLATMTL_ERROR_NULL, "factors", -1, -1, NAN);
  if (!keep) return fm_fail(error, FLATMTL_ERROR_NULL, "keep", -1, -1, NAN);
  const double *o = or_defaults(find(number), options, num_options);
  const int moco = number == FLATMTL_BUFFER_MOCO, averages = moco || number == FLATMTL_BUFFER_DB_MTL;
  if (averages) {
    status = fm_check_finite(losses, n, "losses", error);
    if (status == FLATMTL_OK) status = fm_check_finite(state, n, "state", error);
    if (status == FLATMTL_OK && moco) status = fm_check_finite(sq_norms, n, "sq_norms", error);
    for (int32_t i = 0; status == FLATMTL_OK && i < n; i++)
      if (!(moco ? losses[i] >= 0.0 : losses[i] > 0.0))
        status = fm_fail(error, FLATMTL_ERROR_LOSS, "losses", i, -1, losses[i]);
    if (status != FLATMTL_OK) return status;
  }
  const size_t bytes = (size_t)n * sizeof(double), read = averages ? bytes : 0;
  const fm_array arrays[] = {{"factors", factors, bytes},
                             {"keep", keep, bytes},
                             {"losses", losses, read},
                             {"state", state, read},
                             {"sq_norms", sq_norms, moco ? bytes : 0},
                             {"options", options, (size_t)num_options * sizeof(double)}};
  status = fm_check_arrays(arrays, 2, 6, error);
  if (status != FLATMTL_OK) return status;
  for (int32_t i = 0; i < n; i++) {
    factors[i] = keep[i] = 1.0;
    if (!averages) continue;
    const double decayed = o[0] * pow(state[i] + 1.0, -o[1]);
    keep[i] = moco ? 1.0 - decayed : decayed;
    if (!moco) factors[i] = fmin(1.0 / losses[i], DBL_MAX);
    if (moco && o[5] == 1.0) {
      const double norm = sqrt(sq_norms[i]);
      factors[i] = norm > 0.0 ? fmin(losses[i] / norm, DBL_MAX) : 0.0;
    }
  }
  return FLATMTL_OK;
}

/* ---- weights ---- */

static void moco(const double *o, int32_t n, const double *gramian, double *state, double *weights) {
  double *count = state, *lambda = state + n;
  for (int32_t i = 0; i < n; i++)
    if (count[i] == 0.0) lambda[i] = 1.0 / n;
  for (int32_t i = 0; i < n; i++) {
    double sum = o[4] * lambda[i];
    for (int32_t j = 0; j < n; j++) sum += gramian[(size_t)i * (size_t)n + (size_t)j] * lambda[j];
    count[i] += 1.0;
    weights[i] = fm_clamp(lambda[i] - o[2] * pow(count[i], -o[3]) * sum, 0x1p1000);
  }
  fm_softmax(n, weights, 1.0, weights);
  memcpy(lambda, weights, (size_t)n * sizeof(double));
}

static void db_mtl(int32_t n, const double *sq_norms, double *count, double *weights) {
  double largest = 0.0;
  for (int32_t i = 0; i < n; i++) {
    weights[i] = sqrt(sq_norms[i]);
    largest = fmax(largest, weights[i]);
    count[i] += 1.0;
  }
  for (int32_t i = 0; i < n; i++) weights[i] = weights[i] > 0x1p-500 * largest ? largest / weights[i] : 0.0;
}

static void excess_mtl(const double *o, int32_t n, const double *excess, double *state, double *weights) {
  double *count = state, *first = state + n, *log_w = first + n;
  for (int32_t i = 0; i < n; i++) {
    if (excess[i] > 0.0) {
      if (count[i] == 0.0) first[i] = excess[i];
      count[i] += 1.0;
      log_w[i] = fmin(log_w[i] + o[0] * fmin(excess[i] / first[i], 1e300), 1e300);
    }
    weights[i] = log_w[i];
  }
  fm_softmax(n, weights, n, weights);
}

/* The nearest point of the simplex: u - t, cut at 0, with t such that the sum is 1. sorted: [n] scratch. */
static void project(int32_t n, double *u, double *sorted) {
  for (int32_t i = 0; i < n; i++) {
    int32_t j = i;
    for (; j > 0 && sorted[j - 1] < u[i]; j--) sorted[j] = sorted[j - 1];
    sorted[j] = u[i];
  }
  double sum = 0.0, t = 0.0;
  for (int32_t j = 0; j < n; j++) {
    sum += sorted[j];
    const double bound = (sum - 1.0) / (j + 1);
    if (sorted[j] > bound) t = bound;
  }
  sum = 0.0;
  for (int32_t i = 0; i < n; i++) {
    u[i] = fmax(u[i] - t, 0.0);
    sum += u[i];
  }
  for (int32_t i = 0; i < n; i++) u[i] = sum > 0.0 ? u[i] / sum : 1.0 / n;
}

static void sdmgrad(const double *o, int32_t n, const double *cross, double *state, double *weights, double *work) {
  double *count = state, *u = state + n, *sorted = work, *velocity = work + n, *at = velocity + n;
  double scale = 0.0;
  for (int32_t i = 0; i < n; i++) {
    if (count[i] == 0.0) u[i] = 1.0 / n;
    count[i] += 1.0;
    velocity[i] = 0.0;
    scale += fabs(cross[(size_t)i * (size_t)(n + 1)]) / n;
  }
  project(n, u, sorted); /* other tasks may be present than the last time */
  const int32_t iterations = scale > 0.0 ? (int32_t)o[3] : 0;
  for (int32_t step = 0; step < iterations; step++) {
    for (int32_t i = 0; i < n; i++) at[i] = (u[i] + o[0] / n) / scale;
    for (int32_t i = 0; i < n; i++) {
      double sum = 0.0;
      for (int32_t j = 0; j < n; j++) sum += cross[(size_t)i * (size_t)n + (size_t)j] * at[j];
      velocity[i] = fm_clamp(o[2] * velocity[i] + sum, 0x1p900);
    }
    for (int32_t i = 0; i < n; i++) u[i] = fm_clamp(u[i] - o[1] * velocity[i], 0x1p950);
    project(n, u, sorted);
  }
  for (int32_t i = 0; i < n; i++) weights[i] = (u[i] + o[0] / n) / (1.0 + o[0]);
}

size_t fm_buffer_weights_work(int32_t num_tasks) {
  const size_t n = (size_t)num_tasks;
  return (MAX_STATE + 1 + 3) * n + n * n;
}

flatmtl_status flatmtl_buffer_weights(const flatmtl_context *context, flatmtl_buffer_method number,
                                      const double *options, int32_t num_options, int32_t n, const double *sums,
                                      double *state, double *weights, flatmtl_error *error) {
  flatmtl_status status = check_method(number, options, num_options, n, error);
  if (status != FLATMTL_OK) return status;
  if (number == FLATMTL_BUFFER_GRADDROP) return fm_fail(error, FLATMTL_ERROR_NAME, "method", -1, -1, (double)number);
  double *work = NULL;
  status = fm_workspace(context, n, &work, error);
  if (status != FLATMTL_OK) return status;
  if (!sums) return fm_fail(error, FLATMTL_ERROR_NULL, "sums", -1, -1, NAN);
  if (!weights) return fm_fail(error, FLATMTL_ERROR_NULL, "weights", -1, -1, NAN);
  const int square = number == FLATMTL_BUFFER_MOCO || number == FLATMTL_BUFFER_SDMGRAD;
  const size_t k = (size_t)n, width = square ? k : 1, bytes = k * sizeof(double);
  const size_t state_bytes = (size_t)find(number)->state * bytes;
  for (size_t i = 0; i < k; i++)
    for (size_t j = 0; j < width; j++)
      if (!isfinite(sums[i * width + j]))
        return fm_fail(error, FLATMTL_ERROR_NONFINITE, "sums", (int64_t)i, -1, sums[i * width + j]);
  status = fm_check_finite(state, (int64_t)(state_bytes / sizeof(double)), "state", error);
  if (status != FLATMTL_OK) return status;
  const fm_array arrays[] = {{"weights", weights, bytes},
                             {"state", state, state_bytes},
                             {"sums", sums, width * bytes},
                             {"options", options, (size_t)num_options * sizeof(double)}};
  status = fm_check_arrays(arrays, 2, 4, error);
  if (status != FLATMTL_OK) return status;
  const double *o = or_defaults(find(number), options, num_options);
  double *w = work, *new_state = w + k, *scratch = new_state + MAX_STATE * k;
  memcpy(new_state, state, state_bytes);
  if (number == FLATMTL_BUFFER_MOCO) moco(o, n, sums, new_state, w);
  if (number == FLATMTL_BUFFER_DB_MTL) db_mtl(n, sums, new_state, w);
  if (number == FLATMTL_BUFFER_EXCESS_MTL) excess_mtl(o, n, sums, new_state, w);
  if (number == FLATMTL_BUFFER_SDMGRAD) sdmgrad(o, n, sums, new_state, w, scratch);
  memcpy(state, new_state, state_bytes);
  memcpy(weights, w, bytes);
  return FLATMTL_OK;
}

/* ---- one step ---- */

enum { AT_ONCE = 64 }; /* tasks, for arrays on the stack: this call has no room of its own */

/* Squared norms of the x_i, in the first n doubles of the cross Gramian's place; row by row, so that n stays small. */
static flatmtl_status check_rows_finite(const flatmtl_context *context, const flatmtl_mixed_rows *x, int32_t n,
                                        double *squares, flatmtl_error *error) {
  for (int32_t i = 0; i < n; i++) {
    const int64_t segments = x->loss_rows->num_segments;
    flatmtl_rows g = *x->loss_rows, s = {0};
    g.num_rows = 1;
    g.data = segments > 0 ? g.data + i * segments : NULL;
    if (x->perturbed_rows) {
      s = *x->perturbed_rows;
      s.num_rows = 1;
      s.data = segments > 0 ? s.data + i * segments : NULL;
    }
    const flatmtl_mixed_rows one = {&g, x->perturbed_rows ? &s : NULL, x->loss_factors ? x->loss_factors + i : NULL,
                                    x->flat_factors ? x->flat_factors + i : NULL};
    const flatmtl_status status = flatmtl_cross_gramian(context, &one, &one, &squares[i], error);
    if (status != FLATMTL_OK) return status;
    if (!isfinite(squares[i])) return fm_fail(error, FLATMTL_ERROR_NONFINITE, "rows", i, -1, squares[i]);
  }
  return FLATMTL_OK;
}

/* The numbers of a call, weights and state first: those two lie outside of the rows, all outside of the vectors
 * written to, out and, if any, the buffers. */
static flatmtl_status check_numbers(const fm_array *arrays, int count, const flatmtl_mixed_rows *rows,
                                    const fm_buffers *written, int num_written, flatmtl_error *error) {
  flatmtl_status status = fm_check_arrays(arrays, 2, count, error);
  for (int i = 0; i < count; i++) {
    const fm_array *a = &arrays[i];
    if (a->bytes == 0) continue;
    if (status == FLATMTL_OK && i < 2)
      status = fm_check_outside(a->begin, a->bytes, rows->loss_rows, a->argument, error);
    if (status == FLATMTL_OK && i < 2 && rows->perturbed_rows)
      status = fm_check_outside(a->begin, a->bytes, rows->perturbed_rows, a->argument, error);
    for (int j = 0; status == FLATMTL_OK && j < num_written; j++)
      status = fm_check_outside(a->begin, a->bytes, written[j].rows, written[j].argument, error);
  }
  return status;
}

static flatmtl_status check_update(const flatmtl_context *context, const method *entry, const flatmtl_mixed_rows *rows,
                                   const flatmtl_buffers *buffers, const fm_array *arrays, int num_arrays,
                                   const flatmtl_vector *out, flatmtl_error *error) {
  flatmtl_status status = fm_check_vector(out, "out", error);
  if (status != FLATMTL_OK) return status;
  const flatmtl_rows target = fm_as_rows(out);
  status = fm_check_beside(&target, rows->loss_rows, &target, "out", error);
  if (status != FLATMTL_OK) return status;
  const fm_buffers inputs[] = {{"loss_rows", rows->loss_rows, NULL, 1},
                               {"perturbed_rows", rows->perturbed_rows, NULL, 1}};
  fm_buffers outputs[2] = {{"out", &target, NULL, 1}, {"buffers", NULL, NULL, 1}};
  flatmtl_rows written;
  if (entry->buffers) {
    if (!buffers) return fm_fail(error, FLATMTL_ERROR_NULL, "buffers", -1, -1, NAN);
    written = (flatmtl_rows){buffers->dtype, buffers->num_rows, buffers->num_segments, buffers->lengths,
                             (const void *const *)buffers->data};
    flatmtl_rows table = *rows->loss_rows;
    table.dtype = fm_buffer_dtype(table.dtype);
    status = fm_check_rows(&written, table.num_rows, "buffers", error);
    if (status == FLATMTL_OK) status = fm_check_same_table(&table, &written, "buffers", error);
    if (status != FLATMTL_OK) return status;
    outputs[1].rows = &written;
  }
  const int num_outputs = entry->buffers ? 2 : 1;
  status = fm_check_overlap(outputs, num_outputs, inputs, rows->perturbed_rows ? 2 : 1, context->workspace,
                            context->workspace_size, error);
  return status == FLATMTL_OK ? check_numbers(arrays, num_arrays, rows, outputs, num_outputs, error) : status;
}

/* The new buffers stay in the range of their dtype, with room for their squares: factor ||x|| bounds every element. */
static flatmtl_status check_range(flatmtl_dtype dtype, int32_t n, const double *factors, const double *squares,
                                  flatmtl_error *error) {
  const double most = dtype == FLATMTL_F64 ? 0x1p511 : FLT_MAX;
  for (int32_t i = 0; i < n; i++) {
    const double norm = factors[i] * sqrt(squares[i]);
    if (!(norm <= most)) return fm_fail(error, FLATMTL_ERROR_NONFINITE, "rows", i, -1, norm);
  }
  return FLATMTL_OK;
}

flatmtl_status flatmtl_buffer_update(const flatmtl_context *context, flatmtl_buffer_method number,
                                     const double *options, int32_t num_options, const flatmtl_mixed_rows *rows,
                                     const double *losses, int64_t call, const flatmtl_buffers *buffers, double *state,
                                     double *weights, const flatmtl_vector *out, flatmtl_error *error) {
  flatmtl_status status = fm_check_mixed(rows, "rows", error);
  if (status != FLATMTL_OK) return status;
  const int32_t n = rows->loss_rows->num_rows;
  status = check_method(number, options, num_options, n, error);
  if (status == FLATMTL_OK && number == FLATMTL_BUFFER_SDMGRAD)
    status = fm_fail(error, FLATMTL_ERROR_NAME, "method", -1, -1, (double)number);
  if (status == FLATMTL_OK && n > AT_ONCE) status = fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "rows", -1, -1, n);
  if (status == FLATMTL_OK) status = fm_check_context(context, n, error);
  if (status != FLATMTL_OK) return status;
  const method *entry = find(number);
  const int averages = number == FLATMTL_BUFFER_MOCO || number == FLATMTL_BUFFER_DB_MTL;
  const size_t bytes = (size_t)n * sizeof(double), state_bytes = (size_t)entry->state * bytes;
  const fm_array arrays[] = {{"weights", weights, weights ? bytes : 0},
                             {"state", state, state_bytes},
                             {"losses", losses, averages && losses ? bytes : 0},
                             {"options", options, (size_t)num_options * sizeof(double)},
                             {"loss_factors", rows->loss_factors, rows->loss_factors ? bytes : 0},
                             {"flat_factors", rows->flat_factors, rows->flat_factors ? bytes : 0}};
  status = fm_check_finite(state, (int64_t)entry->state * n, "state", error);
  if (status == FLATMTL_OK) status = check_update(context, entry, rows, buffers, arrays, 6, out, error);
  if (status != FLATMTL_OK) return status;
  double squares[AT_ONCE], factors[AT_ONCE], keep[AT_ONCE], a[AT_ONCE], b[AT_ONCE], w[AT_ONCE];
  double gramian[AT_ONCE * AT_ONCE];
  status = check_rows_finite(context, rows, n, squares, error);
  if (status != FLATMTL_OK) return status;
  const double *o = or_defaults(find(number), options, num_options);
  if (number == FLATMTL_BUFFER_GRADDROP) {
    status = flatmtl_graddrop(context, rows, num_options ? options + 2 : NULL, (int64_t)o[0], (int64_t)o[1], call, 0,
                              out, error);
    for (int32_t i = 0; status == FLATMTL_OK && weights && i < n; i++) weights[i] = NAN;
    return status;
  }
  status = flatmtl_buffer_factors(number, options, num_options, n, losses, squares, state, factors, keep, error);
  if (status == FLATMTL_OK) status = check_range(buffers->dtype, n, factors, squares, error);
  if (status != FLATMTL_OK) return status;
  for (int32_t i = 0; i < n; i++) {
    a[i] = factors[i] * (rows->loss_factors ? rows->loss_factors[i] : rows->perturbed_rows ? 0.0 : 1.0);
    b[i] = factors[i] * (rows->flat_factors ? rows->flat_factors[i] : 1.0);
  }
  const flatmtl_mixed_rows x = {rows->loss_rows, rows->perturbed_rows, a, b};
  if (number == FLATMTL_BUFFER_EXCESS_MTL) {
    status = flatmtl_excess(context, &x, buffers, gramian, error);
  } else {
    const flatmtl_rows y = {buffers->dtype, n, buffers->num_segments, buffers->lengths,
                            (const void *const *)buffers->data};
    status = flatmtl_moving_average(context, &x, keep, buffers, error);
    if (status == FLATMTL_OK)
      status = number == FLATMTL_BUFFER_MOCO ? flatmtl_gramian(context, &y, gramian, error)
                                             : flatmtl_sq_norms(context, &y, NULL, 0.0, gramian, error);
  }
  if (status == FLATMTL_OK)
    status = flatmtl_buffer_weights(context, number, options, num_options, n, gramian, state, w, error);
  if (status != FLATMTL_OK) return status;
  if (weights) memcpy(weights, w, (size_t)n * sizeof(double));
  if (number != FLATMTL_BUFFER_EXCESS_MTL) return flatmtl_combine_buffers(context, buffers, w, out, error);
  for (int32_t i = 0; i < n; i++) {
    a[i] *= w[i];
    b[i] *= w[i];
  }
  return rows->perturbed_rows ? flatmtl_combine_pair(context, rows->loss_rows, rows->perturbed_rows, a, b, out, error)
                              : flatmtl_combine(context, rows->loss_rows, a, out, error);
}

/* ---- public names ---- */

flatmtl_status flatmtl_buffer_method_by_name(const char *name, flatmtl_buffer_method *number, flatmtl_error *error) {
  if (!name) return fm_fail(error, FLATMTL_ERROR_NULL, "name", -1, -1, NAN);
  if (!number) return fm_fail(error, FLATMTL_ERROR_NULL, "method", -1, -1, NAN);
  for (int32_t i = 0; i < FLATMTL_NUM_BUFFER_METHODS; i++)
    if (strcmp(methods[i].name, name) == 0) {
      *number = (flatmtl_buffer_method)i;
      return FLATMTL_OK;
    }
  return fm_fail(error, FLATMTL_ERROR_NAME, "name", -1, -1, NAN);
}

const char *flatmtl_buffer_method_name(flatmtl_buffer_method number) {
  return find(number) ? find(number)->name : NULL;
}

flatmtl_status flatmtl_buffer_method_defaults(flatmtl_buffer_method number, int32_t num_tasks, double *options,
                                              int32_t *num_options, flatmtl_error *error) {
  flatmtl_status status = check_method(number, NULL, 0, num_tasks, error);
  if (status < 0) return status;
  if (!num_options) return fm_fail(error, FLATMTL_ERROR_NULL, "num_options", -1, -1, NAN);
  const method *entry = find(number);
  const int32_t count = count_options(entry, num_tasks);
  if (options) {
    if (*num_options < count) return fm_fail(error, FLATMTL_ERROR_SIZE, "num_options", -1, -1, *num_options);
    for (int32_t i = 0; i < count; i++) options[i] = i < entry->num_options ? entry->defaults[i] : 0.0;
  }
  *num_options = count;
  return FLATMTL_OK;
}

flatmtl_status flatmtl_buffer_state_size(flatmtl_buffer_method number, int32_t num_tasks, int64_t *count,
                                         int32_t *has_buffers, flatmtl_error *error) {
  flatmtl_status status = check_method(number, NULL, 0, num_tasks, error);
  if (status < 0) return status;
  if (count) *count = (int64_t)find(number)->state * num_tasks;
  if (has_buffers) *has_buffers = find(number)->buffers;
  return FLATMTL_OK;
}
