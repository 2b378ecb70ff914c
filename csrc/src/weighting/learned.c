/* learned.c - weightings with parameters of their own, learned by Adam beside the model: UW, IMTL-L, FAMO. */
#include <math.h>

#include "weighting.h"

/* UW (1705.07115): SUM exp(-s_i) l_i / 2 + s_i / 2, minimised over s too. */
void fm_weigh_uw(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double lr = call->options[0], initial = call->options[1];
  double *count = call->state, *s = count + n, *moment = s + n, *root = moment + n;
  for (int32_t i = 0; i < n; i++) {
    if (count[i] == 0.0) s[i] = initial;
    weights[i] = 0.5 * exp(-s[i]);
    count[i] += 1.0;
    s[i] -= fm_adam(0.5 - weights[i] * call->losses[i], lr, count[i], &moment[i], &root[i]);
  }
}

/* IMTL-L (IMTL, ICLR 2021): SUM exp(s_i) l_i - s_i, minimised over s too. */
void fm_weigh_imtl_l(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  double *count = call->state, *s = count + n, *moment = s + n, *root = moment + n;
  for (int32_t i = 0; i < n; i++) {
    weights[i] = exp(s[i]);
    count[i] += 1.0;
    s[i] -= fm_adam(weights[i] * call->losses[i] - 1.0, call->options[0], count[i], &moment[i], &root[i]);
  }
}

/* FAMO (2306.03792): z = softmax(xi), weights proportional to z_i / (l_i - m_i), of sum 1. */
void fm_weigh_famo(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double *floors = call->options + 2;
  double *xi = call->state + n;
  for (int32_t i = 0; i < n; i++) weights[i] = xi[i] - log(call->losses[i] - floors[i]);
  fm_softmax(n, weights, 1.0, weights);
}

/* One step of Adam on xi along J_softmax' delta + gamma xi, delta_i = log (l_i - m_i) before less after. A task whose
 * loss has fallen to m_i or below counts as one whose distance has shrunk by 2^-52; one without a finite loss takes no
 * part. */
void fm_observe_famo(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double lr = call->options[0], gamma = call->options[1], *floors = call->options + 2;
  double *count = call->state, *xi = count + n, *moment = xi + n, *root = moment + n;
  double *z = call->work, *delta = z + n, mean = 0.0, mass = 0.0, largest = 0.0;
  (void)weights;
  fm_softmax(n, xi, 1.0, z);
  for (int32_t i = 0; i < n; i++) {
    const double before = call->losses[i] - floors[i], after = call->after[i] - floors[i];
    delta[i] = NAN;
    if (!isfinite(after)) continue;
    delta[i] = log(before) - log(fmax(after, 0x1p-52 * before));
    mean += z[i] * delta[i];
    mass += z[i];
    largest = fmax(largest, fabs(log(before)) + fabs(delta[i]));
  }
  if (mass > 0.0) mean /= mass;
  for (int32_t i = 0; i < n; i++) {
    if (isnan(delta[i])) continue;
    count[i] += 1.0;
    /* What is left of equal rates is rounding: Adam would make a step of it. */
    const double ahead = fabs(delta[i] - mean) > 0x1p-48 * largest ? delta[i] - mean : 0.0;
    xi[i] -= fm_adam(z[i] * ahead + gamma * xi[i], lr, count[i], &moment[i], &root[i]);
  }
}
