/* step_weights.c - coefficients of the combined update from the Gramian of both families (paper, section 4.3).
 *
 * Rows g_i (loss) and f_i (flat); every combination ends in SUM_i a_i g_i + b_i f_i. The aggregator A sees nothing but
 * Gramians, and those of its own results follow from the coefficients. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "methods.h"
#include "solve/solve.h"
#include "status.h"

typedef struct step_weights {
  const flatmtl_settings *settings;
  int32_t num_tasks;
  const double *pair; /* [2K * 2K] */
  double *loss;       /* [K] */
  double *flat;       /* [K] */
  double *z;          /* [K] */
  double *results;    /* [K * K]: Gramian of the results of A */
  double *state;      /* a copy of settings->state, or NULL */
  double *work;
} step_weights;

static double entry(const step_weights *s, int32_t i, int32_t j) {
  return i >= j ? s->pair[(size_t)i * 2 * s->num_tasks + j] : s->pair[(size_t)j * 2 * s->num_tasks + i];
}

static flatmtl_status worst(flatmtl_status a, flatmtl_status b) {
  if (a < 0 || b < 0) return a < b ? a : b;
  return a > b ? a : b;
}

/* Doubles of state of the calls before number `call`. each has K calls with two rows and one with K; the others have
 * two with K, then one with two. */
static size_t state_before(const flatmtl_settings *settings, int32_t num_tasks, uint64_t call) {
  const size_t all_rows = fm_state_size(settings->method, num_tasks), two_rows = fm_state_size(settings->method, 2);
  if (settings->combine == FLATMTL_EACH) {
    const size_t k = (size_t)num_tasks;
    return call <= k ? call * two_rows : k * two_rows + all_rows;
  }
  return call <= 2 ? call * all_rows : 2 * all_rows + two_rows;
}

static size_t state_of_all(const flatmtl_settings *settings, int32_t num_tasks) {
  switch (settings->combine) {
    case FLATMTL_DIRECT:
      return state_before(settings, num_tasks, 1);
    case FLATMTL_SECOND:
      return state_before(settings, num_tasks, 3);
    case FLATMTL_EACH:
      return state_before(settings, num_tasks, (uint64_t)num_tasks + 1);
    default:
      return state_before(settings, num_tasks, 2);
  }
}

size_t fm_step_state_of_loss(const flatmtl_settings *settings, int32_t num_tasks) {
  return settings->combine == FLATMTL_EACH ? state_before(settings, num_tasks, (uint64_t)num_tasks) : 0;
}

/* One call of A. Options for K tasks say nothing about two rows of another kind: fixed sums those, the others take
 * their defaults. */
static flatmtl_status aggregate(const step_weights *s, uint64_t call, int two_rows, const fm_gramian *gramian,
                                double *weights) {
  const flatmtl_settings *settings = s->settings;
  const int defaults = two_rows && fm_has_option_per_task(settings->method);
  double *state = s->state ? s->state + state_before(settings, s->num_tasks, call) : NULL;
  if (two_rows && settings->method == FLATMTL_FIXED) {
    weights[0] = weights[1] = 1.0;
    return FLATMTL_OK;
  }
  for (int32_t i = 0; i < gramian->num_tasks; ++i) {
    for (int32_t j = 0; j <= i; ++j) {
      if (!isfinite(gramian->values[(size_t)i * gramian->stride + j])) return FLATMTL_ERROR_NONFINITE; /* overflow */
    }
  }
  return fm_solve_weights(settings->method, settings->options, defaults ? 0 : settings->num_options, call,
                          settings->family_scale, gramian, state, weights, s->work);
}

static flatmtl_status decomposed(const step_weights *s, flatmtl_status *family_status) {
  int32_t n = s->num_tasks;
  fm_gramian loss = {s->pair, n, 2 * n}, flat = {s->pair + (size_t)n * 2 * n + n, n, 2 * n};
  family_status[0] = aggregate(s, 0, 0, &loss, s->loss);
  family_status[1] = aggregate(s, 1, 0, &flat, s->flat);
  return worst(family_status[0], family_status[1]);
}

static flatmtl_status direct(const step_weights *s, const double *perturbed) {
  fm_gramian gramian = {perturbed, s->num_tasks, s->num_tasks};
  flatmtl_status status = aggregate(s, 0, 0, &gramian, s->loss);
  memcpy(s->flat, s->loss, (size_t)s->num_tasks * sizeof(double));
  return status;
}

/* A squared norm that is no more than the rounding of its terms is 0: what remains of a combination that cancels. */
static double drop_rounding(double square, double terms, int32_t count) {
  return square > 4.0 * count * DBL_EPSILON * terms ? square : 0.0;
}

/* x' G y for the block of G that starts at (row, column). */
static double product(const step_weights *s, const double *x, int32_t row, const double *y, int32_t column) {
  double sum = 0.0, terms = 0.0;
  for (int32_t i = 0; i < s->num_tasks; ++i) {
    double inner = 0.0, inner_terms = 0.0;
    for (int32_t j = 0; j < s->num_tasks; ++j) {
      double term = entry(s, row + i, column + j) * y[j];
      inner += term;
      inner_terms += fabs(term);
    }
    sum += x[i] * inner;
    terms += fabs(x[i]) * inner_terms;
  }
  return x == y ? drop_rounding(sum, terms, s->num_tasks) : sum;
}

static flatmtl_status second(const step_weights *s) {
  int32_t n = s->num_tasks;
  flatmtl_status families[2];
  flatmtl_status status = decomposed(s, families);
  if (status < 0) return status;
  double results[4] = {product(s, s->loss, 0, s->loss, 0), 0.0, product(s, s->flat, n, s->loss, 0),
                       product(s, s->flat, n, s->flat, n)};
  fm_gramian gramian = {results, 2, 2};
  double w[2];
  status = worst(status, aggregate(s, 2, 1, &gramian, w));
  for (int32_t i = 0; i < n; ++i) {
    s->loss[i] *= w[0];
    s->flat[i] *= w[1];
  }
  return status;
}

static flatmtl_status each(const step_weights *s) {
  int32_t n = s->num_tasks;
  flatmtl_status status = FLATMTL_OK;
  for (int32_t i = 0; i < n; ++i) {
    double own[4] = {entry(s, i, i), 0.0, entry(s, n + i, i), entry(s, n + i, n + i)}, w[2];
    fm_gramian gramian = {own, 2, 2};
    status = worst(status, aggregate(s, (uint64_t)i, 1, &gramian, w));
    s->loss[i] = w[0];
    s->flat[i] = w[1];
  }
  const double *u = s->loss, *v = s->flat;
  for (int32_t i = 0; i < n; ++i) {
    for (int32_t j = 0; j <= i; ++j) {
      double gg = u[i] * u[j] * entry(s, i, j), gf = u[i] * v[j] * entry(s, i, n + j);
      double fg = v[i] * u[j] * entry(s, n + i, j), ff = v[i] * v[j] * entry(s, n + i, n + j);
      double sum = (gg + gf) + (fg + ff);
      if (i == j) sum = drop_rounding(sum, fabs(gg) + fabs(gf) + fabs(fg) + fabs(ff), 1);
      s->results[(size_t)i * n + j] = sum;
    }
  }
  fm_gramian gramian = {s->results, n, n};
  status = worst(status, aggregate(s, (uint64_t)n, 0, &gramian, s->z));
  for (int32_t i = 0; i < n; ++i) {
    s->loss[i] *= s->z[i];
    s->flat[i] *= s->z[i];
  }
  return status;
}

size_t fm_step_weights_work(int32_t num_tasks) {
  size_t n = (size_t)num_tasks;
  size_t two_rows = fm_weights_work(2), all_rows = fm_weights_work(num_tasks);
  size_t state = FM_MOST_STATE_MATRICES * (2 * n * n + 4 * n); /* more than any combination has */
  return 3 * n + n * n + state + (two_rows > all_rows ? two_rows : all_rows);
}

static flatmtl_status check_settings(const flatmtl_settings *settings, int32_t num_tasks, flatmtl_error *error) {
  if (!settings) return fm_fail(error, FLATMTL_ERROR_NULL, "settings", -1, -1, NAN);
  flatmtl_status status = fm_check_method(settings->method, settings->options, settings->num_options, num_tasks, error);
  if (status < 0) return status;
  if ((int)settings->combine < FLATMTL_DECOMPOSED || (int)settings->combine > FLATMTL_EACH) {
    return fm_fail(error, FLATMTL_ERROR_NAME, "settings->combine", -1, -1, (double)settings->combine);
  }
  return FLATMTL_OK;
}

flatmtl_status flatmtl_step_state_size(const flatmtl_settings *settings, int32_t num_tasks, int64_t *count,
                                       flatmtl_error *error) {
  flatmtl_status status = check_settings(settings, num_tasks, error);
  if (status < 0) return status;
  if (!count) return fm_fail(error, FLATMTL_ERROR_NULL, "count", -1, -1, NAN);
  *count = (int64_t)state_of_all(settings, num_tasks);
  return FLATMTL_OK;
}

flatmtl_status fm_check_step_state(const flatmtl_settings *settings, int32_t num_tasks, flatmtl_error *error) {
  const size_t all_rows = fm_state_size(settings->method, num_tasks), count = state_of_all(settings, num_tasks);
  for (size_t at = 0; at < count;) {
    const int two_rows = settings->combine == FLATMTL_EACH ? at + all_rows < count : at >= 2 * all_rows;
    const int32_t rows = two_rows ? 2 : num_tasks;
    const double *state = settings->state ? settings->state + at : NULL;
    flatmtl_status status = fm_check_state(settings->method, rows, "settings->state", state, error);
    if (status < 0) return status;
    at += fm_state_size(settings->method, rows);
  }
  return FLATMTL_OK;
}

static flatmtl_status check_arguments(const flatmtl_settings *settings, int32_t num_tasks, const double *pair,
                                      const double *perturbed, const double *loss_weights, const double *flat_weights,
                                      const flatmtl_status *family_status, flatmtl_error *error) {
  if (!pair) return fm_fail(error, FLATMTL_ERROR_NULL, "gramian_pair", -1, -1, NAN);
  if (!loss_weights) return fm_fail(error, FLATMTL_ERROR_NULL, "loss_weights", -1, -1, NAN);
  if (!flat_weights) return fm_fail(error, FLATMTL_ERROR_NULL, "flat_weights", -1, -1, NAN);
  int is_direct = settings->combine == FLATMTL_DIRECT;
  if (is_direct && !perturbed) return fm_fail(error, FLATMTL_ERROR_NULL, "perturbed_gramian", -1, -1, NAN);
  size_t n = (size_t)num_tasks, bytes = n * sizeof(double),
         status_bytes = family_status ? 2 * sizeof(*family_status) : 0;
  const fm_array arrays[] = {{"loss_weights", loss_weights, bytes},
                             {"flat_weights", flat_weights, bytes},
                             {"family_status", family_status, status_bytes},
                             {"settings->state", settings->state, state_of_all(settings, num_tasks) * sizeof(double)},
                             {"gramian_pair", pair, 4 * n * bytes},
                             {"perturbed_gramian", perturbed, is_direct ? n * bytes : 0},
                             {"options", settings->options, (size_t)settings->num_options * sizeof(double)}};
  flatmtl_status status = fm_check_arrays(arrays, 4, 7, error);
  if (status < 0) return status;
  status = fm_check_step_state(settings, num_tasks, error);
  if (status < 0) return status;
  return is_direct ? fm_check_gramian("perturbed_gramian", perturbed, num_tasks, error)
                   : fm_check_gramian("gramian_pair", pair, 2 * num_tasks, error);
}

flatmtl_status flatmtl_step_weights(const flatmtl_context *context, const flatmtl_settings *settings, int32_t num_tasks,
                                    const double *gramian_pair, const double *perturbed_gramian, double *loss_weights,
                                    double *flat_weights, flatmtl_status *family_status, flatmtl_error *error) {
  flatmtl_status status = check_settings(settings, num_tasks, error);
  if (status < 0) return status;
  if (settings->family_scale != FLATMTL_SCALE_NONE && settings->family_scale != FLATMTL_SCALE_RMS) {
    return fm_fail(error, FLATMTL_ERROR_NAME, "settings->family_scale", -1, -1, (double)settings->family_scale);
  }
  double *work = NULL;
  status = fm_workspace(context, num_tasks, &work, error);
  if (status < 0) return status;
  status = check_arguments(settings, num_tasks, gramian_pair, perturbed_gramian, loss_weights, flat_weights,
                           family_status, error);
  if (status < 0) return status;

  size_t n = (size_t)num_tasks, state_doubles = state_of_all(settings, num_tasks);
  double *state = work + 3 * n + n * n;
  step_weights s = {settings,
                    num_tasks,
                    gramian_pair,
                    work,
                    work + n,
                    work + 2 * n,
                    work + 3 * n,
                    state_doubles > 0 ? state : NULL,
                    state + state_doubles};
  if (s.state) memcpy(s.state, settings->state, state_doubles * sizeof(double));
  flatmtl_status families[2];
  switch (settings->combine) {
    case FLATMTL_DIRECT:
      status = families[0] = families[1] = direct(&s, perturbed_gramian);
      break;
    case FLATMTL_SECOND:
      status = families[0] = families[1] = second(&s);
      break;
    case FLATMTL_EACH:
      status = families[0] = families[1] = each(&s);
      break;
    default:
      status = decomposed(&s, families);
  }
  if (status < 0) return fm_fail(error, status, "gramian_pair", -1, -1, NAN);
  memcpy(loss_weights, s.loss, n * sizeof(double));
  memcpy(flat_weights, s.flat, n * sizeof(double));
  if (s.state) memcpy(settings->state, s.state, state_doubles * sizeof(double));
  if (family_status) memcpy(family_status, families, sizeof(families));
  return status;
}
