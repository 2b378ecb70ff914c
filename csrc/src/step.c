/* step.c - the F-MTL step as a state machine over the kernels (arXiv 2211.13723, Algorithm 1). */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "flatmtl.h"
#include "methods.h"
#include "rows.h"

typedef enum phase { PHASE_NEW, PHASE_BEGUN, PHASE_PERTURBED, PHASE_FINISHED } phase;

struct flatmtl_step {
  const flatmtl_problem *problem;
  const flatmtl_settings *settings;
  phase phase;
  int32_t task;     /* the task at whose point the parameters stand, in PHASE_PERTURBED */
  int32_t *visited; /* [K] */
  flatmtl_status family_status[2];
  /* Arrays behind the struct, K = num_tasks. */
  double *sq_shared, *sq_own;                 /* [K] squared norms, ASAM-weighted if adaptive */
  double *norms_loss, *norms_flat;            /* [K] */
  double *weights_loss, *weights_flat;        /* [K] */
  double *cosine_loss, *cosine_flat, *direct; /* [K * K] */
  double *pair;                               /* [2K * 2K] */
};

static size_t rounded(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

flatmtl_status flatmtl_settings_default(flatmtl_settings *settings, flatmtl_error *error) {
  if (!settings) return fm_fail(error, FLATMTL_ERROR_NULL, "settings", -1, -1, NAN);
  *settings = (flatmtl_settings){
      .method = FLATMTL_CAGRAD,
      .combine = FLATMTL_DECOMPOSED,
      .family_scale = FLATMTL_SCALE_RMS,
      .norm = FLATMTL_NORM_SEPARATE,
      .rho_shared = 0.05,
      .rho_task = 0.05,
  };
  return FLATMTL_OK;
}

flatmtl_status flatmtl_step_size(int32_t num_tasks, size_t *bytes, flatmtl_error *error) {
  if (!bytes) return fm_fail(error, FLATMTL_ERROR_NULL, "bytes", -1, -1, NAN);
  if (num_tasks < 1 || num_tasks > FLATMTL_MAX_TASKS)
    return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "num_tasks", -1, -1, num_tasks);
  const size_t k = (size_t)num_tasks;
  *bytes = rounded(sizeof(flatmtl_step)) + rounded((6 * k + 7 * k * k) * sizeof(double)) + rounded(k * sizeof(int32_t));
  return FLATMTL_OK;
}

static flatmtl_status check_settings(const flatmtl_settings *settings, int32_t num_tasks, flatmtl_error *error) {
  if (!settings) return fm_fail(error, FLATMTL_ERROR_NULL, "settings", -1, -1, NAN);
  flatmtl_status status = fm_check_method(settings->method, settings->options, settings->num_options, num_tasks, error);
  if (status != FLATMTL_OK) return status;
  if ((int)settings->combine < FLATMTL_DECOMPOSED || settings->combine > FLATMTL_EACH)
    return fm_fail(error, FLATMTL_ERROR_NAME, "combine", -1, -1, (double)(int)settings->combine);
  if ((int)settings->family_scale < FLATMTL_SCALE_NONE || settings->family_scale > FLATMTL_SCALE_RMS)
    return fm_fail(error, FLATMTL_ERROR_NAME, "family_scale", -1, -1, (double)(int)settings->family_scale);
  if ((int)settings->norm < FLATMTL_NORM_SEPARATE || settings->norm > FLATMTL_NORM_JOINT)
    return fm_fail(error, FLATMTL_ERROR_NAME, "norm", -1, -1, (double)(int)settings->norm);
  if (!(settings->rho_shared >= 0.0 && settings->rho_shared < INFINITY))
    return fm_fail(error, FLATMTL_ERROR_OPTION, "rho_shared", -1, -1, settings->rho_shared);
  if (!(settings->rho_task >= 0.0 && settings->rho_task < INFINITY))
    return fm_fail(error, FLATMTL_ERROR_OPTION, "rho_task", -1, -1, settings->rho_task);
  if (settings->adaptive && !(settings->eta >= 0.0 && settings->eta < INFINITY))
    return fm_fail(error, FLATMTL_ERROR_OPTION, "eta", -1, -1, settings->eta);
  return fm_check_step_state(settings, num_tasks, error);
}

static int is_flat(const flatmtl_settings *settings) {
  return settings->rho_shared > 0.0 || settings->rho_task > 0.0;
}

/* A vector and rows beside it. */
static flatmtl_status check_against(const flatmtl_vector *params, const flatmtl_rows *rows, int32_t num_rows,
                                    const char *argument, flatmtl_error *error) {
  const flatmtl_rows reference = fm_as_rows(params);
  flatmtl_status status = fm_check_rows(rows, num_rows, argument, error);
  return status == FLATMTL_OK ? fm_check_beside(&reference, rows, rows, argument, error) : status;
}

static flatmtl_status check_copy(const flatmtl_vector *params, const flatmtl_vector *saved, const char *argument,
                                 flatmtl_error *error) {
  flatmtl_status status = fm_check_vector(saved, argument, error);
  if (status != FLATMTL_OK) return status;
  const flatmtl_rows reference = fm_as_rows(params), row = fm_as_rows(saved);
  return fm_check_same_table(&reference, &row, argument, error);
}

static flatmtl_status check_problem(const flatmtl_problem *problem, int flat, flatmtl_error *error) {
  const int32_t k = problem->num_tasks;
  flatmtl_status status = fm_check_vector(&problem->shared, "shared", error);
  if (status == FLATMTL_OK) status = check_copy(&problem->shared, &problem->shared_saved, "shared_saved", error);
  if (status == FLATMTL_OK) status = check_against(&problem->shared, &problem->shared_loss, k, "shared_loss", error);
  if (status == FLATMTL_OK && flat)
    status = check_against(&problem->shared, &problem->shared_perturbed, k, "shared_perturbed", error);
  if (status != FLATMTL_OK) return status;
  if (!problem->own) return fm_fail(error, FLATMTL_ERROR_NULL, "own", -1, -1, NAN);
  if (!problem->own_saved) return fm_fail(error, FLATMTL_ERROR_NULL, "own_saved", -1, -1, NAN);
  if (!problem->own_loss) return fm_fail(error, FLATMTL_ERROR_NULL, "own_loss", -1, -1, NAN);
  if (flat && !problem->own_perturbed) return fm_fail(error, FLATMTL_ERROR_NULL, "own_perturbed", -1, -1, NAN);
  for (int32_t i = 0; i < k; i++) {
    status = fm_check_vector(&problem->own[i], "own", error);
    if (status == FLATMTL_OK) status = check_copy(&problem->own[i], &problem->own_saved[i], "own_saved", error);
    if (status == FLATMTL_OK) status = check_against(&problem->own[i], &problem->own_loss[i], 1, "own_loss", error);
    if (status == FLATMTL_OK && flat)
      status = check_against(&problem->own[i], &problem->own_perturbed[i], 1, "own_perturbed", error);
    if (status != FLATMTL_OK) {
      if (error) error->row = i;
      return status;
    }
  }
  const fm_buffers outputs[] = {{"shared", NULL, &problem->shared, 1},
                                {"shared_saved", NULL, &problem->shared_saved, 1},
                                {"own", NULL, problem->own, k},
                                {"own_saved", NULL, problem->own_saved, k}};
  const fm_buffers inputs[] = {{"shared_loss", &problem->shared_loss, NULL, 1},
                               {"own_loss", problem->own_loss, NULL, k},
                               {"shared_perturbed", &problem->shared_perturbed, NULL, 1},
                               {"own_perturbed", problem->own_perturbed, NULL, k}};
  return fm_check_overlap(outputs, 4, inputs, flat ? 4 : 2, NULL, 0, error);
}

flatmtl_status flatmtl_step_init(void *memory, size_t bytes, const flatmtl_problem *problem,
                                 const flatmtl_settings *settings, flatmtl_step **step, flatmtl_error *error) {
  if (!memory) return fm_fail(error, FLATMTL_ERROR_NULL, "memory", -1, -1, NAN);
  if (!problem) return fm_fail(error, FLATMTL_ERROR_NULL, "problem", -1, -1, NAN);
  if (!step) return fm_fail(error, FLATMTL_ERROR_NULL, "step", -1, -1, NAN);
  size_t need = 0;
  flatmtl_status status = flatmtl_step_size(problem->num_tasks, &need, error);
  if (status != FLATMTL_OK) return status;
  if (bytes < need || (uintptr_t)memory % 64 != 0)
    return fm_fail(error, FLATMTL_ERROR_SIZE, "memory", -1, -1, (double)bytes);
  status = check_settings(settings, problem->num_tasks, error);
  if (status == FLATMTL_OK) status = check_problem(problem, is_flat(settings), error);
  if (status != FLATMTL_OK) return status;

  const size_t k = (size_t)problem->num_tasks;
  flatmtl_step *s = memory;
  double *numbers = (double *)(void *)((char *)memory + rounded(sizeof *s));
  *s = (flatmtl_step){.problem = problem, .settings = settings, .phase = PHASE_NEW, .task = -1};
  double **const vectors[] = {&s->sq_shared,  &s->sq_own,       &s->norms_loss,
                              &s->norms_flat, &s->weights_loss, &s->weights_flat};
  for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++, numbers += k) *vectors[i] = numbers;
  double **const squares[] = {&s->cosine_loss, &s->cosine_flat, &s->direct};
  for (size_t i = 0; i < sizeof squares / sizeof *squares; i++, numbers += k * k) *squares[i] = numbers;
  s->pair = numbers;
  s->visited = (int32_t *)(void *)((char *)memory + need - rounded(k * sizeof(int32_t)));
  *step = s;
  return FLATMTL_OK;
}

/* Error with the row that a one-row call reports replaced by the task. */
static flatmtl_status of_task(flatmtl_status status, int32_t task, const char *argument, flatmtl_error *error) {
  if (status < 0 && error) {
    error->row = task;
    error->argument = argument;
  }
  return status;
}

flatmtl_status flatmtl_step_begin(flatmtl_step *step, const flatmtl_context *context, flatmtl_error *error) {
  if (!step) return fm_fail(error, FLATMTL_ERROR_NULL, "step", -1, -1, NAN);
  if (step->phase == PHASE_PERTURBED) return fm_fail(error, FLATMTL_ERROR_ORDER, "step", step->task, -1, NAN);
  const flatmtl_problem *problem = step->problem;
  const flatmtl_settings *settings = step->settings;
  const flatmtl_rows shared = fm_as_rows(&problem->shared);
  flatmtl_status status = fm_check_context(context, problem->num_tasks, error);
  if (status != FLATMTL_OK) return status;
  step->phase = PHASE_NEW;
  status = flatmtl_sq_norms(context, &problem->shared_loss, settings->adaptive ? &shared : NULL, settings->eta,
                            step->sq_shared, error);
  if (status != FLATMTL_OK) {
    if (error) error->argument = "shared_loss";
    return status;
  }
  for (int32_t i = 0; i < problem->num_tasks; i++) {
    const flatmtl_rows own = fm_as_rows(&problem->own[i]);
    status = flatmtl_sq_norms(context, &problem->own_loss[i], settings->adaptive ? &own : NULL, settings->eta,
                              &step->sq_own[i], error);
    if (status != FLATMTL_OK) return of_task(status, i, "own_loss", error);
  }
  status = flatmtl_copy(context, &problem->shared_saved, &shared, error);
  for (int32_t i = 0; status == FLATMTL_OK && i < problem->num_tasks; i++) {
    const flatmtl_rows own = fm_as_rows(&problem->own[i]);
    status = flatmtl_copy(context, &problem->own_saved[i], &own, error);
  }
  if (status != FLATMTL_OK) return status;
  memset(step->visited, 0, (size_t)problem->num_tasks * sizeof *step->visited);
  step->phase = PHASE_BEGUN;
  step->task = -1;
  return FLATMTL_OK;
}

/* params = saved + scale (t^2) gradient, with one scale for all segments of a row. */
static flatmtl_status move(const flatmtl_step *step, const flatmtl_context *context, const flatmtl_vector *params,
                           const flatmtl_vector *saved, const flatmtl_rows *gradients, int32_t row, double scale,
                           flatmtl_error *error) {
  const flatmtl_rows from = fm_as_rows(saved);
  const flatmtl_rows gradient = {gradients->dtype, 1, gradients->num_segments, gradients->lengths,
                                 gradients->data ? gradients->data + row * gradients->num_segments : NULL};
  return fm_perturb(context, params, &from, &gradient, &scale, 0, step->settings->adaptive, step->settings->eta, error);
}

flatmtl_status flatmtl_step_perturb(flatmtl_step *step, const flatmtl_context *context, int32_t task,
                                    flatmtl_error *error) {
  if (!step) return fm_fail(error, FLATMTL_ERROR_NULL, "step", -1, -1, NAN);
  if (step->phase != PHASE_BEGUN || !is_flat(step->settings))
    return fm_fail(error, FLATMTL_ERROR_ORDER, "step", task, -1, NAN);
  const flatmtl_problem *problem = step->problem;
  if (task < 0 || task >= problem->num_tasks) return fm_fail(error, FLATMTL_ERROR_NUM_TASKS, "task", -1, -1, task);
  flatmtl_status status = fm_check_context(context, problem->num_tasks, error);
  if (status != FLATMTL_OK) return status;
  double shared = sqrt(step->sq_shared[task]), own = sqrt(step->sq_own[task]);
  if (step->settings->norm == FLATMTL_NORM_JOINT) shared = own = sqrt(step->sq_shared[task] + step->sq_own[task]);
  const double shared_scale = shared > 0.0 ? step->settings->rho_shared * (1.0 / shared) : 0.0;
  const double own_scale = own > 0.0 ? step->settings->rho_task * (1.0 / own) : 0.0;
  step->phase = PHASE_PERTURBED;
  step->task = task;
  status =
      move(step, context, &problem->shared, &problem->shared_saved, &problem->shared_loss, task, shared_scale, error);
  if (status == FLATMTL_OK)
    status = move(step, context, &problem->own[task], &problem->own_saved[task], &problem->own_loss[task], 0, own_scale,
                  error);
  if (status == FLATMTL_OK) step->visited[task] = 1;
  return status;
}

flatmtl_status flatmtl_step_restore(flatmtl_step *step, const flatmtl_context *context, flatmtl_error *error) {
  if (!step) return fm_fail(error, FLATMTL_ERROR_NULL, "step", -1, -1, NAN);
  if (step->phase == PHASE_NEW || step->phase == PHASE_FINISHED)
    return fm_fail(error, FLATMTL_ERROR_ORDER, "step", -1, -1, NAN);
  const flatmtl_problem *problem = step->problem;
  const flatmtl_rows saved = fm_as_rows(&problem->shared_saved);
  flatmtl_status status = flatmtl_copy(context, &problem->shared, &saved, error);
  for (int32_t i = 0; status == FLATMTL_OK && i < problem->num_tasks; i++) {
    const flatmtl_rows own = fm_as_rows(&problem->own_saved[i]);
    status = flatmtl_copy(context, &problem->own[i], &own, error);
  }
  if (status == FLATMTL_OK) {
    step->phase = PHASE_BEGUN;
    step->task = -1;
  }
  return status;
}

/* Norms and cosines of the family whose Gramian starts at (offset, offset) of the pair's. */
static void describe(const flatmtl_step *step, int32_t offset, double *norms, double *cosine) {
  const int32_t k = step->problem->num_tasks;
  const size_t width = 2 * (size_t)k;
  for (int32_t i = 0; i < k; i++) norms[i] = sqrt(step->pair[(size_t)(offset + i) * (width + 1)]);
  for (int32_t i = 0; i < k; i++)
    for (int32_t j = 0; j < k; j++) {
      const double value = step->pair[(size_t)(offset + i) * width + (size_t)(offset + j)] / norms[i] / norms[j];
      cosine[(size_t)i * (size_t)k + (size_t)j] = value > 1.0 ? 1.0 : value < -1.0 ? -1.0 : value;
    }
}

static void fill(double *values, size_t n, double value) {
  for (size_t i = 0; i < n; i++) values[i] = value;
}

/* Gramians of the loss family alone, into the pair's upper left corner. */
static flatmtl_status loss_gramian(flatmtl_step *step, const flatmtl_context *context, flatmtl_error *error) {
  const size_t k = (size_t)step->problem->num_tasks;
  flatmtl_status status = flatmtl_gramian(context, &step->problem->shared_loss, step->direct, error);
  fill(step->pair, 4 * k * k, 0.0);
  for (size_t i = 0; i < k; i++) memcpy(step->pair + i * 2 * k, step->direct + i * k, k * sizeof(double));
  return status;
}

flatmtl_status flatmtl_step_finish(flatmtl_step *step, const flatmtl_context *context, flatmtl_error *error) {
  if (!step) return fm_fail(error, FLATMTL_ERROR_NULL, "step", -1, -1, NAN);
  const flatmtl_problem *problem = step->problem;
  const int32_t k = problem->num_tasks;
  const int flat = is_flat(step->settings);
  if (step->phase != PHASE_BEGUN) return fm_fail(error, FLATMTL_ERROR_ORDER, "step", step->task, -1, NAN);
  for (int32_t i = 0; flat && i < k; i++)
    if (!step->visited[i]) return fm_fail(error, FLATMTL_ERROR_ORDER, "step", i, -1, NAN);

  flatmtl_status status = fm_check_context(context, k, error);
  if (status != FLATMTL_OK) return status;
  flatmtl_settings settings = *step->settings;
  step->phase = PHASE_NEW; /* after an error only begin is left */
  if (flat) {
    const int cross = settings.combine == FLATMTL_SECOND || settings.combine == FLATMTL_EACH;
    status = flatmtl_gramian_pair(context, &problem->shared_loss, &problem->shared_perturbed, cross, step->pair, error);
    if (status == FLATMTL_ERROR_NONFINITE && error) {
      error->argument = error->row < k ? "shared_loss" : "shared_perturbed";
      error->row %= k;
    }
    for (int32_t i = 0; status == FLATMTL_OK && i < k; i++) {
      double square;
      status = of_task(flatmtl_sq_norms(context, &problem->own_perturbed[i], NULL, 0.0, &square, error), i,
                       "own_perturbed", error);
    }
    if (status == FLATMTL_OK && settings.combine == FLATMTL_DIRECT)
      status = flatmtl_gramian(context, &problem->shared_perturbed, step->direct, error);
  } else {
    status = loss_gramian(step, context, error);
    if (settings.state) settings.state += fm_step_state_of_loss(&settings, k);
    settings.combine = FLATMTL_DIRECT; /* one call, on the Gramian in step->direct */
  }
  if (status != FLATMTL_OK) return status;
  status = flatmtl_step_weights(context, &settings, k, step->pair, step->direct, step->weights_loss, step->weights_flat,
                                step->family_status, error);
  if (status < 0) return status;
  describe(step, 0, step->norms_loss, step->cosine_loss);
  describe(step, k, step->norms_flat, step->cosine_flat);
  if (!flat) {
    fill(step->norms_flat, (size_t)k, NAN);
    fill(step->weights_flat, (size_t)k, NAN);
    step->family_status[1] = FLATMTL_OK;
    status = step->family_status[0];
  }
  step->phase = PHASE_FINISHED;
  return status;
}

flatmtl_status flatmtl_step_update(flatmtl_step *step, const flatmtl_context *context, const flatmtl_vector *out,
                                   flatmtl_error *error) {
  if (!step) return fm_fail(error, FLATMTL_ERROR_NULL, "step", -1, -1, NAN);
  if (step->phase != PHASE_FINISHED) return fm_fail(error, FLATMTL_ERROR_ORDER, "step", -1, -1, NAN);
  const flatmtl_problem *problem = step->problem;
  if (!is_flat(step->settings)) return flatmtl_combine(context, &problem->shared_loss, step->weights_loss, out, error);
  return flatmtl_combine_pair(context, &problem->shared_loss, &problem->shared_perturbed, step->weights_loss,
                              step->weights_flat, out, error);
}

flatmtl_status flatmtl_step_record(const flatmtl_step *step, flatmtl_record *record, flatmtl_error *error) {
  if (!step) return fm_fail(error, FLATMTL_ERROR_NULL, "step", -1, -1, NAN);
  if (!record) return fm_fail(error, FLATMTL_ERROR_NULL, "record", -1, -1, NAN);
  if (step->phase != PHASE_FINISHED) return fm_fail(error, FLATMTL_ERROR_ORDER, "step", -1, -1, NAN);
  *record = (flatmtl_record){
      .num_tasks = step->problem->num_tasks,
      .norms_loss = step->norms_loss,
      .norms_flat = step->norms_flat,
      .cosine_loss = step->cosine_loss,
      .cosine_flat = step->cosine_flat,
      .weights_loss = step->weights_loss,
      .weights_flat = step->weights_flat,
      .status_loss = step->family_status[0],
      .status_flat = step->family_status[1],
  };
  return FLATMTL_OK;
}
