/* weightings.c - the table of loss weightings: names, options, state, and the checks around every call. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "flatmtl.h"
#include "methods.h"
#include "rows.h"
#include "weighting/weighting.h"

enum { MAX_OPTIONS = 3, MAX_STATE = 5 };

typedef enum loss_range { ANY, NOT_NEGATIVE, POSITIVE, ABOVE_FLOOR } loss_range;

typedef struct weighting {
  const char *name;
  fm_weighting_fn weigh, observe;
  int32_t num_options, per_task; /* then one a task, all of the default `each`, if per_task */
  double defaults[MAX_OPTIONS], each;
  int32_t state; /* vectors of K */
  loss_range range;
  int norms;
} weighting;

static const weighting weightings[FLATMTL_NUM_WEIGHTINGS] = {
    [FLATMTL_WEIGHTING_FIXED] = {"fixed", fm_weigh_fixed, NULL, 0, 1, {0}, 1.0, 0, ANY, 0},
    [FLATMTL_WEIGHTING_UW] = {"uw", fm_weigh_uw, NULL, 2, 0, {0.025, -0.5}, 0, 4, ANY, 0},
    [FLATMTL_WEIGHTING_DWA] = {"dwa", fm_weigh_dwa, NULL, 2, 0, {2.0, 25.0}, 0, 5, NOT_NEGATIVE, 0},
    [FLATMTL_WEIGHTING_RLW] = {"rlw", fm_weigh_rlw, NULL, 2, 0, {0}, 0, 0, ANY, 0},
    [FLATMTL_WEIGHTING_SI] = {"si", fm_weigh_si, NULL, 0, 0, {0}, 0, 0, POSITIVE, 0},
    [FLATMTL_WEIGHTING_GLS] = {"gls", fm_weigh_gls, NULL, 0, 0, {0}, 0, 0, POSITIVE, 0},
    [FLATMTL_WEIGHTING_STCH] = {"stch", fm_weigh_stch, NULL, 3, 0, {1.0, 25.0, 4.0}, 0, 2, POSITIVE, 0},
    [FLATMTL_WEIGHTING_IMTL_L] = {"imtl_l", fm_weigh_imtl_l, NULL, 1, 0, {0.001}, 0, 4, POSITIVE, 0},
    [FLATMTL_WEIGHTING_FAMO] = {"famo", fm_weigh_famo, fm_observe_famo, 2, 1, {0.025, 0.01}, 0.0, 4, ABOVE_FLOOR, 0},
    [FLATMTL_WEIGHTING_GRADNORM] = {"gradnorm", fm_weigh_gradnorm, NULL, 2, 0, {1.5, 0.025}, 0, 5, POSITIVE, 1},
    [FLATMTL_WEIGHTING_GO4ALIGN] = {"go4align", fm_weigh_go4align, NULL, 2, 0, {1e-4, 1.0}, 0, 1, POSITIVE, 0},
    [FLATMTL_WEIGHTING_SLAW] = {"slaw", fm_weigh_slaw, NULL, 1, 0, {0.99}, 0, 3, ANY, 0},
    [FLATMTL_WEIGHTING_BMTL] = {"bmtl", fm_weigh_bmtl, NULL, 1, 0, {50.0}, 0, 0, ANY, 0},
    [FLATMTL_WEIGHTING_EMTL] = {"emtl", fm_weigh_emtl, NULL, 1, 0, {1.0}, 0, 0, POSITIVE, 1},
};

static const weighting *find(flatmtl_weighting number) {
  const int32_t n = (int32_t)number;
  return n >= 0 && n < FLATMTL_NUM_WEIGHTINGS ? &weightings[n] : NULL;
}

static int32_t count_options(const weighting *entry, int32_t num_tasks) {
  return entry->num_options + (entry->per_task ? num_tasks : 0);
}

static void write_defaults(const weighting *entry, int32_t count, double *options) {
  for (int32_t i = 0; i < count; i++) options[i] = i < entry->num_options ? entry->defaults[i] : entry->each;
}

static int is_integer(double value, double least) {
  return value >= least && value < 0x1p53 && value == floor(value);
}

static int in_range(flatmtl_weighting number, int32_t option, double value) {
  if (!isfinite(value)) return 0;
  switch (number) {
    case FLATMTL_WEIGHTING_FIXED:
    case FLATMTL_WEIGHTING_EMTL:
      return value >= 0.0;
    case FLATMTL_WEIGHTING_UW:
      return option == 1 || value > 0.0;
    case FLATMTL_WEIGHTING_DWA:
      return option == 1 ? is_integer(value, 1.0) : value > 0.0;
    case FLATMTL_WEIGHTING_RLW:
      return is_integer(value, 0.0);
    case FLATMTL_WEIGHTING_STCH:
      return option == 0 ? value > 0.0 : is_integer(value, option == 1 ? 1.0 : 0.0);
    case FLATMTL_WEIGHTING_FAMO:
      return option == 0 ? value > 0.0 : option == 1 ? value >= 0.0 : 1;
    case FLATMTL_WEIGHTING_GRADNORM:
      return option == 0 ? value >= 0.0 : value > 0.0;
    case FLATMTL_WEIGHTING_GO4ALIGN:
      return option == 0 ? value >= 0.0 : is_integer(value, 1.0);
    case FLATMTL_WEIGHTING_SLAW:
      return value >= 0.0 && value < 1.0;
    default:
      return value > 0.0;
  }
}

static flatmtl_status check_weighting(flatmtl_weighting number, const double *options, int32_t num_options,
                                      int32_t num_tasks, flatmtl_error *error) {
  const weighting *entry = find(number);
  if (!entry) return fm_fail(error, FLATMTL_ERROR_NAME, "weighting", -1, -1, (double)(int)number);
  if (num_tasks < 1 || num_tasks > FLATMTL_MAX_TASKS)
    return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "num_tasks", -1, -1, num_tasks);
  if (num_options < 0) return fm_fail(error, FLATMTL_ERROR_SIZE, "num_options", -1, -1, num_options);
  if (num_options == 0) return FLATMTL_OK;
  if (!options) return fm_fail(error, FLATMTL_ERROR_NULL, "options", -1, -1, NAN);
  if (num_options != count_options(entry, num_tasks))
    return fm_fail(error, FLATMTL_ERROR_OPTION, "num_options", -1, -1, num_options);
  for (int32_t i = 0; i < num_options; i++)
    if (!in_range(number, i, options[i]))
      return fm_fail(error, FLATMTL_ERROR_OPTION, "options", i < entry->num_options ? -1 : i - entry->num_options, -1,
                     options[i]);
  return FLATMTL_OK;
}

static flatmtl_status check_losses(const weighting *entry, const double *options, int32_t n, const double *losses,
                                   flatmtl_error *error) {
  for (int32_t i = 0; i < n; i++) {
    const double l = losses[i];
    int ok = 1;
    if (entry->range == NOT_NEGATIVE) ok = l >= 0.0;
    if (entry->range == POSITIVE) ok = l > 0.0;
    if (entry->range == ABOVE_FLOOR) ok = l - options[entry->num_options + i] > 0.0;
    if (!ok) return fm_fail(error, FLATMTL_ERROR_LOSS, "losses", i, -1, l);
  }
  return FLATMTL_OK;
}

/* options, state and weights in the workspace, then scratch. */
size_t fm_weightings_work(int32_t num_tasks) {
  const size_t n = (size_t)num_tasks;
  return MAX_OPTIONS + n + MAX_STATE * n + n + fm_weighting_work(num_tasks);
}

/* weights == NULL: observe. */
static flatmtl_status run(const flatmtl_context *context, flatmtl_weighting number, const double *options,
                          int32_t num_options, int32_t n, const double *losses, const double *norms,
                          const double *after, double *state, double *weights, flatmtl_error *error) {
  const weighting *entry = find(number);
  double *work = NULL;
  flatmtl_status status = fm_workspace(context, n, &work, error);
  if (status < 0) return status;
  const size_t count = (size_t)entry->state * (size_t)n, state_bytes = count * sizeof(double);
  if (count > 0 && !state) return fm_fail(error, FLATMTL_ERROR_NULL, "state", -1, -1, NAN);
  status = fm_check_finite(losses, n, "losses", error);
  if (status == FLATMTL_OK && norms) status = fm_check_finite(norms, n, "norms", error);
  for (int32_t i = 0; status == FLATMTL_OK && norms && i < n; i++)
    if (norms[i] < 0.0) status = fm_fail(error, FLATMTL_ERROR_OPTION, "norms", i, -1, norms[i]);
  if (status == FLATMTL_OK) status = fm_check_finite(state, (int64_t)count, "state", error);
  const size_t bytes = (size_t)n * sizeof(double);
  const fm_array arrays[] = {{"weights", weights, weights ? bytes : 0},
                             {"state", state, state_bytes},
                             {"losses", losses, bytes},
                             {"norms", norms, norms ? bytes : 0},
                             {"losses_after", after, after ? bytes : 0},
                             {"options", options, (size_t)num_options * sizeof(double)}};
  if (status == FLATMTL_OK) status = fm_check_arrays(arrays, 2, 6, error);
  if (status < 0) return status;

  double *complete = work, *new_state = complete + MAX_OPTIONS + n, *c = new_state + MAX_STATE * (size_t)n;
  if (num_options == 0) {
    write_defaults(entry, count_options(entry, n), complete);
  } else {
    memcpy(complete, options, (size_t)num_options * sizeof(double));
  }
  status = check_losses(entry, complete, n, losses, error);
  if (status < 0) return status;
  if (count > 0) memcpy(new_state, state, state_bytes);
  const fm_weighting_call call = {n, losses, norms, after, complete, new_state, c + n};
  (weights ? entry->weigh : entry->observe)(&call, c);
  for (int32_t i = 0; weights && i < n; i++) weights[i] = fmin(c[i], DBL_MAX);
  if (count > 0) memcpy(state, new_state, state_bytes);
  return FLATMTL_OK;
}

/* ---- public ---- */

flatmtl_status flatmtl_loss_weights(const flatmtl_context *context, flatmtl_weighting weighting, const double *options,
                                    int32_t num_options, int32_t num_tasks, const double *losses, const double *norms,
                                    double *state, double *weights, flatmtl_error *error) {
  flatmtl_status status = check_weighting(weighting, options, num_options, num_tasks, error);
  if (status < 0) return status;
  if (!weights) return fm_fail(error, FLATMTL_ERROR_NULL, "weights", -1, -1, NAN);
  if (!find(weighting)->norms) norms = NULL;
  if (find(weighting)->norms && !norms) return fm_fail(error, FLATMTL_ERROR_NULL, "norms", -1, -1, NAN);
  return run(context, weighting, options, num_options, num_tasks, losses, norms, NULL, state, weights, error);
}

flatmtl_status flatmtl_loss_observe(const flatmtl_context *context, flatmtl_weighting weighting, const double *options,
                                    int32_t num_options, int32_t num_tasks, const double *losses,
                                    const double *losses_after, double *state, flatmtl_error *error) {
  flatmtl_status status = check_weighting(weighting, options, num_options, num_tasks, error);
  if (status < 0) return status;
  if (!find(weighting)->observe) return FLATMTL_OK;
  if (!losses_after) return fm_fail(error, FLATMTL_ERROR_NULL, "losses_after", -1, -1, NAN);
  return run(context, weighting, options, num_options, num_tasks, losses, NULL, losses_after, state, NULL, error);
}

int flatmtl_weighting_observes(flatmtl_weighting weighting) {
  return find(weighting) && find(weighting)->observe;
}

flatmtl_status flatmtl_weighting_by_name(const char *name, flatmtl_weighting *weighting, flatmtl_error *error) {
  if (!name) return fm_fail(error, FLATMTL_ERROR_NULL, "name", -1, -1, NAN);
  if (!weighting) return fm_fail(error, FLATMTL_ERROR_NULL, "weighting", -1, -1, NAN);
  for (int32_t i = 0; i < FLATMTL_NUM_WEIGHTINGS; i++)
    if (strcmp(weightings[i].name, name) == 0) {
      *weighting = (flatmtl_weighting)i;
      return FLATMTL_OK;
    }
  return fm_fail(error, FLATMTL_ERROR_NAME, "name", -1, -1, NAN);
}

const char *flatmtl_weighting_name(flatmtl_weighting weighting) {
  return find(weighting) ? find(weighting)->name : NULL;
}

flatmtl_status flatmtl_weighting_defaults(flatmtl_weighting weighting, int32_t num_tasks, double *options,
                                          int32_t *num_options, flatmtl_error *error) {
  flatmtl_status status = check_weighting(weighting, NULL, 0, num_tasks, error);
  if (status < 0) return status;
  if (!num_options) return fm_fail(error, FLATMTL_ERROR_NULL, "num_options", -1, -1, NAN);
  const int32_t count = count_options(find(weighting), num_tasks);
  if (options) {
    if (*num_options < count) return fm_fail(error, FLATMTL_ERROR_SIZE, "num_options", -1, -1, *num_options);
    write_defaults(find(weighting), count, options);
  }
  *num_options = count;
  return FLATMTL_OK;
}

flatmtl_status flatmtl_weighting_state_size(flatmtl_weighting weighting, int32_t num_tasks, int64_t *count,
                                            flatmtl_error *error) {
  flatmtl_status status = check_weighting(weighting, NULL, 0, num_tasks, error);
  if (status < 0) return status;
  if (!count) return fm_fail(error, FLATMTL_ERROR_NULL, "count", -1, -1, NAN);
  *count = (int64_t)find(weighting)->state * num_tasks;
  return FLATMTL_OK;
}
