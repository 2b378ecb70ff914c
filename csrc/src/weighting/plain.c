/* plain.c - weightings without state: fixed, RLW, SI, GLS, BMTL. */
#include <math.h>
#include <string.h>

#include "../random.h"
#include "weighting.h"

void fm_weigh_fixed(const fm_weighting_call *call, double *weights) {
  memcpy(weights, call->options, (size_t)call->num_tasks * sizeof(double));
}

/* softmax of independent standard normal numbers (2111.10603), by Box and Muller. */
void fm_weigh_rlw(const fm_weighting_call *call, double *weights) {
  const double two_pi = 6.283185307179586;
  const uint64_t seed = (uint64_t)call->options[0], draw = (uint64_t)call->options[1];
  for (int32_t i = 0; i < call->num_tasks; i++) {
    const uint64_t start = fm_start_sequence(seed, draw, 0, (uint64_t)i);
    const double u = 0.5 + 0.5 * fm_signed_unit(fm_mix(start + FM_GOLDEN));
    const double angle = two_pi * (0.5 + 0.5 * fm_signed_unit(fm_mix(start + 2 * FM_GOLDEN)));
    weights[i] = sqrt(-2.0 * log(u)) * cos(angle);
  }
  fm_softmax(call->num_tasks, weights, 1.0, weights);
}

void fm_weigh_si(const fm_weighting_call *call, double *weights) {
  for (int32_t i = 0; i < call->num_tasks; i++) weights[i] = 1.0 / call->losses[i];
}

/* The gradient of (PROD l)^(1/K): the geometric mean over K l_i. */
void fm_weigh_gls(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  double mean = 0.0;
  for (int32_t i = 0; i < n; i++) mean += log(call->losses[i]) / n;
  for (int32_t i = 0; i < n; i++) weights[i] = exp(mean - log(call->losses[i])) / n;
}

/* The gradient of SUM exp(l_i / T), divided by its mean weight. */
void fm_weigh_bmtl(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  double largest = call->losses[0];
  for (int32_t i = 1; i < n; i++) largest = fmax(largest, call->losses[i]);
  for (int32_t i = 0; i < n; i++) weights[i] = (call->losses[i] - largest) / call->options[0];
  fm_softmax(n, weights, n, weights);
}
