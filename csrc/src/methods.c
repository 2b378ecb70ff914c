/* methods.c - the table of aggregators: names, options, and the scaling around every solve. */
#include "methods.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "solve/solve.h"
#include "status.h"

enum { MAX_OPTIONS = 3, PER_TASK = -1 };

/* How w(G) scales: w(c^2 G) = c^(degree - 1) w(G). */
typedef enum fm_degree { DEGREE_ONE, DEGREE_ZERO, DEGREE_FAIRGRAD } fm_degree;

typedef struct fm_method {
  const char *name;
  fm_solver solve;
  fm_degree degree;
  int32_t num_options; /* PER_TASK: as many as tasks; default 1 each in fixed, 1/K elsewhere */
  double defaults[MAX_OPTIONS];
  int32_t state_matrices; /* K x K, of one call */
} fm_method;

static const fm_method methods[FLATMTL_NUM_METHODS] = {
    [FLATMTL_SUM] = {"sum", fm_solve_sum, DEGREE_ONE, 0, {0}, 0},
    [FLATMTL_MEAN] = {"mean", fm_solve_mean, DEGREE_ONE, 0, {0}, 0},
    [FLATMTL_FIXED] = {"fixed", fm_solve_fixed, DEGREE_ONE, PER_TASK, {0}, 0},
    [FLATMTL_MGDA] = {"mgda", fm_solve_mgda, DEGREE_ONE, 0, {0}, 0},
    [FLATMTL_PCGRAD] = {"pcgrad", fm_solve_pcgrad, DEGREE_ONE, 2, {0.0, 0.0}, 0},
    [FLATMTL_CAGRAD] = {"cagrad", fm_solve_cagrad, DEGREE_ONE, 1, {0.4}, 0},
    [FLATMTL_IMTL_G] = {"imtl_g", fm_solve_imtl_g, DEGREE_ONE, 0, {0}, 0},
    [FLATMTL_NASH_MTL] = {"nash_mtl", fm_solve_nash_mtl, DEGREE_ZERO, 0, {0}, 0},
    [FLATMTL_FAIRGRAD] = {"fairgrad", fm_solve_fairgrad, DEGREE_FAIRGRAD, 1, {2.0}, 0},
    [FLATMTL_GRADVAC] = {"gradvac", fm_solve_gradvac, DEGREE_ONE, 3, {0.01, 0.0, 0.0}, 1},
    [FLATMTL_ALIGNED_MTL] = {"aligned_mtl", fm_solve_aligned_mtl, DEGREE_ONE, 2, {0.0, 0x1p-23}, 0},
    [FLATMTL_UPGRAD] = {"upgrad", fm_solve_upgrad, DEGREE_ONE, PER_TASK, {0}, 0},
    [FLATMTL_DUALPROJ] = {"dualproj", fm_solve_dualproj, DEGREE_ONE, PER_TASK, {0}, 0},
    [FLATMTL_CONFIG] = {"config", fm_solve_config, DEGREE_ONE, 0, {0}, 0},
    [FLATMTL_NTKMTL] = {"ntkmtl", fm_solve_ntkmtl, DEGREE_ONE, 1, {0.5}, 0},
};

static const fm_method *find_method(flatmtl_method method) {
  int32_t number = (int32_t)method;
  return number >= 0 && number < FLATMTL_NUM_METHODS && methods[number].name ? &methods[number] : NULL;
}

static int32_t count_options(const fm_method *method, int32_t num_tasks) {
  return method->num_options == PER_TASK ? num_tasks : method->num_options;
}

static void write_defaults(const fm_method *method, int32_t count, double *options) {
  double per_task = method->solve == fm_solve_fixed ? 1.0 : 1.0 / count;
  for (int32_t i = 0; i < count; ++i) options[i] = method->num_options == PER_TASK ? per_task : method->defaults[i];
}

int fm_has_option_per_task(flatmtl_method method) {
  return find_method(method)->num_options == PER_TASK;
}

static int is_integer_below_2_53(double value) {
  return value >= 0.0 && value < 9007199254740992.0 && value == floor(value);
}

static int option_in_range(flatmtl_method method, int32_t option, double value) {
  switch (method) {
    case FLATMTL_PCGRAD:
      return is_integer_below_2_53(value);
    case FLATMTL_GRADVAC:
      return option == 0 ? value >= 0.0 && value <= 1.0 : is_integer_below_2_53(value);
    case FLATMTL_ALIGNED_MTL:
      return option == 0 ? value == 0.0 || value == 1.0 || value == 2.0 : value >= 0.0 && value < 1.0;
    case FLATMTL_UPGRAD:
    case FLATMTL_DUALPROJ:
      return value >= 0.0 && isfinite(value);
    case FLATMTL_NTKMTL:
      return value >= 0.0 && value <= 1.0;
    case FLATMTL_CAGRAD:
      return value >= 0.0 && value < 1.0;
    case FLATMTL_FAIRGRAD:
      return value > 0.0 && isfinite(value);
    default:
      return isfinite(value);
  }
}

static flatmtl_status check_num_tasks(int32_t num_tasks, flatmtl_error *error) {
  if (num_tasks >= 1 && num_tasks <= FLATMTL_MAX_TASKS) return FLATMTL_OK;
  return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "num_tasks", -1, -1, num_tasks);
}

flatmtl_status fm_check_method(flatmtl_method method, const double *options, int32_t num_options, int32_t num_tasks,
                               flatmtl_error *error) {
  const fm_method *entry = find_method(method);
  if (!entry) return fm_fail(error, FLATMTL_ERROR_NAME, "method", -1, -1, (double)method);
  flatmtl_status status = check_num_tasks(num_tasks, error);
  if (status < 0) return status;
  if (num_options < 0) return fm_fail(error, FLATMTL_ERROR_SIZE, "num_options", -1, -1, num_options);
  if (num_options == 0) return FLATMTL_OK;
  if (!options) return fm_fail(error, FLATMTL_ERROR_NULL, "options", -1, -1, NAN);
  if (num_options != count_options(entry, num_tasks)) {
    return fm_fail(error, FLATMTL_ERROR_OPTION, "num_options", -1, -1, num_options);
  }
  for (int32_t i = 0; i < num_options; ++i) {
    if (!option_in_range(method, i, options[i])) {
      return fm_fail(error, FLATMTL_ERROR_OPTION, "options", entry->num_options == PER_TASK ? i : -1, -1, options[i]);
    }
  }
  return FLATMTL_OK;
}

flatmtl_status fm_check_gramian(const char *argument, const double *gramian, int32_t num_rows, flatmtl_error *error) {
  for (int32_t i = 0; i < num_rows; ++i) {
    for (int32_t j = 0; j <= i; ++j) {
      double value = gramian[(size_t)i * num_rows + j];
      if (!isfinite(value)) return fm_fail(error, FLATMTL_ERROR_NONFINITE, argument, i, -1, value);
    }
  }
  return FLATMTL_OK;
}

flatmtl_status fm_check_arrays(const fm_array *arrays, int num_written, int num_arrays, flatmtl_error *error) {
  for (int i = 0; i < num_written; ++i) {
    for (int j = i + 1; j < num_arrays; ++j) {
      if (fm_overlap(arrays[i].begin, arrays[i].bytes, arrays[j].begin, arrays[j].bytes)) {
        return fm_fail(error, FLATMTL_ERROR_OVERLAP, arrays[i].argument, -1, -1, NAN);
      }
    }
  }
  return FLATMTL_OK;
}

size_t fm_state_size(flatmtl_method method, int32_t num_tasks) {
  return (size_t)find_method(method)->state_matrices * (size_t)num_tasks * (size_t)num_tasks;
}

flatmtl_status fm_check_state(flatmtl_method method, int32_t num_tasks, const char *argument, const double *state,
                              flatmtl_error *error) {
  const size_t count = fm_state_size(method, num_tasks);
  if (count > 0 && !state) return fm_fail(error, FLATMTL_ERROR_NULL, argument, -1, -1, NAN);
  for (size_t i = 0; i < count; ++i) {
    if (!(state[i] >= -1.0 && state[i] <= 1.0)) {
      const int64_t row = (int64_t)(i / (size_t)num_tasks % (size_t)num_tasks);
      return fm_fail(error, FLATMTL_ERROR_OPTION, argument, row, -1, state[i]);
    }
  }
  return FLATMTL_OK;
}

/* ---- scaling ---- */

/* Copies G / 4^m, both triangles, and returns m: a multiple of 3, such that the largest diagonal entry lies in [1, 64).
 * Powers of two round nothing, and no product of entries over- or underflows from here on. Rows 2^-500 times shorter
 * than the longest count as zero rows (their weights could not be represented), and so do rows with G_ii <= 0. An entry
 * that breaks the Cauchy-Schwarz inequality by more than rounding is cut to the bound. */
static int copy_scaled(const fm_gramian *gramian, double *copy) {
  int32_t n = gramian->num_tasks;
  double largest = 0.0;
  for (int32_t i = 0; i < n; ++i) largest = fmax(largest, gramian->values[(size_t)i * gramian->stride + i]);
  if (largest == 0.0) {
    memset(copy, 0, (size_t)n * n * sizeof(double));
    return 0;
  }
  int exponent;
  frexp(largest, &exponent); /* largest is in [2^(exponent-1), 2^exponent) */
  int m = (int)floor((exponent - 1) / 6.0) * 3;
  const double slack = 1.0 + 1e-8, shortest = 0x1p-1000;
  for (int32_t i = 0; i < n; ++i) {
    const double *row = gramian->values + (size_t)i * gramian->stride;
    double diagonal = ldexp(row[i], -2 * m);
    copy[(size_t)i * n + i] = diagonal >= shortest ? diagonal : 0.0;
    for (int32_t j = 0; j < i; ++j) {
      double bound = sqrt(copy[(size_t)i * n + i]) * sqrt(copy[(size_t)j * n + j]);
      double value = ldexp(row[j], -2 * m);
      if (fabs(value) > bound * slack) value = copysign(bound, value);
      copy[(size_t)i * n + j] = copy[(size_t)j * n + i] = bound > 0.0 ? value : 0.0;
    }
  }
  return m;
}

static void divide_by_mean_square(int32_t n, double *gramian) {
  double trace = 0.0;
  for (int32_t i = 0; i < n; ++i) trace += gramian[(size_t)i * n + i];
  if (trace == 0.0) return;
  double mean_square = trace / n;
  for (size_t i = 0; i < (size_t)n * n; ++i) gramian[i] /= mean_square;
}

/* w(4^m G) = 2^(m (degree - 1)) w(G). */
static void scale_weights(const fm_method *method, const double *options, int m, int32_t n, double *weights) {
  if (method->degree == DEGREE_ZERO) {
    for (int32_t i = 0; i < n; ++i) weights[i] = ldexp(weights[i], -m);
  } else if (method->degree == DEGREE_FAIRGRAD && m != 0) {
    double alpha = options[0];
    if (alpha == 2.0) { /* exact: m is a multiple of 3 */
      for (int32_t i = 0; i < n; ++i) weights[i] = ldexp(weights[i], -4 * m / 3);
    } else {
      double exponent = -2.0 * m * (alpha / (1.0 + alpha)), whole = nearbyint(exponent);
      double fraction = exp2(exponent - whole);
      for (int32_t i = 0; i < n; ++i) weights[i] = ldexp(weights[i] * fraction, (int)whole);
    }
  }
}

flatmtl_status fm_solve_weights(flatmtl_method method, const double *options, int32_t num_options, uint64_t call,
                                flatmtl_family_scale scale, const fm_gramian *gramian, double *state, double *weights,
                                double *work) {
  const fm_method *entry = find_method(method);
  int32_t n = gramian->num_tasks;
  double *copy = work, *complete = copy + (size_t)n * n, *scratch = complete + n + MAX_OPTIONS;
  if (num_options == 0) {
    write_defaults(entry, count_options(entry, n), complete);
    options = complete;
  }
  int m = copy_scaled(gramian, copy);
  /* A method of degree 1 has the same weights at every scale. */
  int divide = scale == FLATMTL_SCALE_RMS && entry->degree != DEGREE_ONE;
  if (divide) divide_by_mean_square(n, copy);
  fm_solve solve = {n, copy, options, call, state, scratch};
  flatmtl_status status = entry->solve(&solve, weights);
  if (status < 0) return status; /* the weights may not be written */
  if (!divide) scale_weights(entry, options, m, n, weights);
  /* A weight beyond the range of doubles is cut to it. */
  for (int32_t i = 0; i < n; ++i) weights[i] = fmin(fmax(weights[i], -DBL_MAX), DBL_MAX);
  return status;
}

/* ---- public ---- */

size_t fm_solve_work(int32_t num_tasks) {
  size_t n = (size_t)num_tasks;
  return 16 * n * n + 64 * n;
}

size_t fm_weights_work(int32_t num_tasks) {
  size_t n = (size_t)num_tasks;
  /* copy, options, weights and state of flatmtl_weights, scratch */
  return n * n + n + MAX_OPTIONS + n + FM_MOST_STATE_MATRICES * n * n + fm_solve_work(num_tasks);
}

flatmtl_status fm_workspace(const flatmtl_context *context, int32_t num_tasks, double **work, flatmtl_error *error) {
  if (!context) return fm_fail(error, FLATMTL_ERROR_NULL, "context", -1, -1, NAN);
  if (!context->workspace) return fm_fail(error, FLATMTL_ERROR_NULL, "context->workspace", -1, -1, NAN);
  size_t bytes = 0;
  flatmtl_status status = flatmtl_workspace_size(num_tasks, &bytes, error);
  if (status < 0) return status;
  if (context->workspace_size < bytes || (uintptr_t)context->workspace % 64 != 0) {
    return fm_fail(error, FLATMTL_ERROR_SIZE, "context->workspace", -1, -1, (double)context->workspace_size);
  }
  *work = context->workspace;
  return FLATMTL_OK;
}

flatmtl_status flatmtl_weights(const flatmtl_context *context, flatmtl_method method, const double *options,
                               int32_t num_options, int32_t num_tasks, const double *gramian, double *state,
                               double *weights, flatmtl_error *error) {
  flatmtl_status status = fm_check_method(method, options, num_options, num_tasks, error);
  if (status < 0) return status;
  double *work = NULL;
  status = fm_workspace(context, num_tasks, &work, error);
  if (status < 0) return status;
  if (!gramian) return fm_fail(error, FLATMTL_ERROR_NULL, "gramian", -1, -1, NAN);
  if (!weights) return fm_fail(error, FLATMTL_ERROR_NULL, "weights", -1, -1, NAN);
  size_t n = (size_t)num_tasks, bytes = n * sizeof(double),
         state_bytes = fm_state_size(method, num_tasks) * sizeof(double);
  const fm_array arrays[] = {{"weights", weights, bytes},
                             {"state", state, state_bytes},
                             {"gramian", gramian, n * bytes},
                             {"options", options, (size_t)num_options * sizeof(double)}};
  status = fm_check_arrays(arrays, 2, 4, error);
  if (status < 0) return status;
  status = fm_check_state(method, num_tasks, "state", state, error);
  if (status < 0) return status;
  status = fm_check_gramian("gramian", gramian, num_tasks, error);
  if (status < 0) return status;
  double *result = work, *new_state = state_bytes > 0 ? work + n : NULL;
  if (new_state) memcpy(new_state, state, state_bytes);
  fm_gramian whole = {gramian, num_tasks, num_tasks};
  status = fm_solve_weights(method, options, num_options, 0, FLATMTL_SCALE_NONE, &whole, new_state, result,
                            work + n + FM_MOST_STATE_MATRICES * n * n);
  if (status < 0) return fm_fail(error, status, "gramian", -1, -1, NAN);
  memcpy(weights, result, bytes);
  if (new_state) memcpy(state, new_state, state_bytes);
  return status;
}

flatmtl_status flatmtl_state_size(flatmtl_method method, int32_t num_tasks, int64_t *count, flatmtl_error *error) {
  flatmtl_status status = fm_check_method(method, NULL, 0, num_tasks, error);
  if (status < 0) return status;
  if (!count) return fm_fail(error, FLATMTL_ERROR_NULL, "count", -1, -1, NAN);
  *count = (int64_t)fm_state_size(method, num_tasks);
  return FLATMTL_OK;
}

flatmtl_status flatmtl_method_by_name(const char *name, flatmtl_method *method, flatmtl_error *error) {
  if (!name) return fm_fail(error, FLATMTL_ERROR_NULL, "name", -1, -1, NAN);
  if (!method) return fm_fail(error, FLATMTL_ERROR_NULL, "method", -1, -1, NAN);
  for (int32_t i = 0; i < FLATMTL_NUM_METHODS; ++i) {
    if (methods[i].name && strcmp(methods[i].name, name) == 0) {
      *method = (flatmtl_method)i;
      return FLATMTL_OK;
    }
  }
  return fm_fail(error, FLATMTL_ERROR_NAME, "name", -1, -1, NAN);
}

const char *flatmtl_method_name(flatmtl_method method) {
  const fm_method *entry = find_method(method);
  return entry ? entry->name : NULL;
}

flatmtl_status flatmtl_method_defaults(flatmtl_method method, int32_t num_tasks, double *options, int32_t *num_options,
                                       flatmtl_error *error) {
  flatmtl_status status = fm_check_method(method, NULL, 0, num_tasks, error);
  if (status < 0) return status;
  if (!num_options) return fm_fail(error, FLATMTL_ERROR_NULL, "num_options", -1, -1, NAN);
  const fm_method *entry = find_method(method);
  int32_t count = count_options(entry, num_tasks);
  if (options) {
    if (*num_options < count) return fm_fail(error, FLATMTL_ERROR_SIZE, "num_options", -1, -1, *num_options);
    write_defaults(entry, count, options);
  }
  *num_options = count;
  return FLATMTL_OK;
}
