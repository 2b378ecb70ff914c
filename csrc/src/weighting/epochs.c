/* epochs.c - weightings that compare averages over epochs, counted in steps of each task: DWA, STCH. */
#include <float.h>
#include <math.h>

#include "weighting.h"

/* DWA (1803.10704): w = K softmax(r / T), r_i the ratio of the task's mean losses in its last two complete epochs, 1
 * before there are two. */
void fm_weigh_dwa(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double temperature = call->options[0], epoch = call->options[1];
  double *count = call->state, *mean = count + n, *last = mean + n, *previous = last + n, *epochs = previous + n;
  double largest = 0.0;
  for (int32_t i = 0; i < n; i++) {
    double ratio = 1.0;
    if (epochs[i] >= 2.0 && last[i] != previous[i]) ratio = fmin(last[i] / previous[i], DBL_MAX);
    weights[i] = ratio;
    largest = fmax(largest, ratio);
  }
  for (int32_t i = 0; i < n; i++) weights[i] = (weights[i] - largest) / temperature;
  fm_softmax(n, weights, n, weights);
  for (int32_t i = 0; i < n; i++) {
    count[i] += 1.0;
    mean[i] += (call->losses[i] - mean[i]) / count[i];
    if (count[i] < epoch) continue;
    previous[i] = last[i];
    last[i] = mean[i];
    epochs[i] = fmin(epochs[i] + 1.0, 2.0);
    count[i] = mean[i] = 0.0;
  }
}

/* STCH (2402.19078): after `warmup` epochs of SUM log l, and one more in which the nadir z_i = mean l_i is taken, K mu
 * log SUM exp(log(l_i / z_i) / mu). */
void fm_weigh_stch(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double mu = call->options[0], epoch = call->options[1], warmup = call->options[2] * epoch;
  double *count = call->state, *nadir = count + n, *ratio = call->work;
  double largest = -INFINITY;
  int32_t ready = 0;
  for (int32_t i = 0; i < n; i++) {
    ratio[i] = -INFINITY;
    if (count[i] < warmup + epoch) continue;
    ready++;
    ratio[i] = log(call->losses[i]) - log(nadir[i]);
    largest = fmax(largest, ratio[i]);
  }
  if (ready > 0) {
    for (int32_t i = 0; i < n; i++) weights[i] = ratio[i] == -INFINITY ? -INFINITY : (ratio[i] - largest) / mu;
    fm_softmax(n, weights, ready, weights);
  }
  for (int32_t i = 0; i < n; i++) {
    weights[i] = (ratio[i] == -INFINITY ? 1.0 : weights[i]) / call->losses[i];
    if (count[i] >= warmup && count[i] < warmup + epoch)
      nadir[i] += (call->losses[i] - nadir[i]) / (count[i] - warmup + 1.0);
    if (count[i] < warmup + epoch) count[i] += 1.0;
  }
}
