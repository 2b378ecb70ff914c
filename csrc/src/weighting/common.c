/* common.c - softmax and Adam. */
#include <float.h>
#include <math.h>

#include "weighting.h"

size_t fm_weighting_work(int32_t num_tasks) {
  const size_t n = (size_t)num_tasks;
  return n * n + 16 * n;
}

void fm_softmax(int32_t n, const double *x, double total, double *out) {
  double largest = x[0], sum = 0.0;
  for (int32_t i = 1; i < n; i++) largest = fmax(largest, x[i]);
  for (int32_t i = 0; i < n; i++) {
    out[i] = exp(x[i] - largest);
    sum += out[i];
  }
  for (int32_t i = 0; i < n; i++) out[i] = total * (out[i] / sum);
}

double fm_adam(double gradient, double lr, double count, double *moment, double *root) {
  const double beta1 = 0.9, beta2 = 0.999;
  gradient = fm_clamp(gradient, 0x1p1000);
  *moment = beta1 * *moment + (1.0 - beta1) * gradient;
  *root = fm_hypot(sqrt(beta2) * *root, sqrt(1.0 - beta2) * gradient);
  if (*root == 0.0) return 0.0;
  return lr * ((*moment / *root) * (sqrt(1.0 - pow(beta2, count)) / (1.0 - pow(beta1, count))));
}
