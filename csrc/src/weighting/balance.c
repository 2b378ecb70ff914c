/* balance.c - weightings that even out what the tasks contribute: GradNorm, SLAW, EMTL. */
#include <float.h>
#include <math.h>

#include "weighting.h"

/* GradNorm (1711.02257): n_i = w_i ||g_i|| towards mean(n) r_i^alpha, r_i = (l_i / l_i(0)) / mean; one step of Adam
 * along ||g_i|| sign(n_i - target_i), then SUM w = K. */
void fm_weigh_gradnorm(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double alpha = call->options[0], lr = call->options[1], smallest = 1e-6;
  double *count = call->state, *initial = count + n, *w = initial + n, *moment = w + n, *root = moment + n;
  double *rate = call->work, mean_rate = 0.0, mean_norm = 0.0, sum = 0.0;
  for (int32_t i = 0; i < n; i++) {
    if (count[i] == 0.0) {
      initial[i] = call->losses[i];
      w[i] = 1.0;
    }
    count[i] += 1.0;
    sum += w[i];
  }
  for (int32_t i = 0; i < n; i++) {
    w[i] *= n / sum; /* other tasks may be present than the last time */
    weights[i] = w[i];
    rate[i] = fmin(call->losses[i] / initial[i], DBL_MAX);
    mean_rate += rate[i] / n;
    mean_norm += w[i] * call->norms[i] / n;
  }
  sum = 0.0;
  for (int32_t i = 0; i < n; i++) {
    const double gap = w[i] * call->norms[i] - mean_norm * pow(rate[i] / mean_rate, alpha);
    const double gradient = gap > 0.0 ? call->norms[i] : gap < 0.0 ? -call->norms[i] : 0.0;
    w[i] = fmax(w[i] - fm_adam(gradient, lr, count[i], &moment[i], &root[i]), smallest);
    sum += w[i];
  }
  for (int32_t i = 0; i < n; i++) w[i] *= n / sum;
}

/* SLAW (2109.08218): w_i = K (1 / s_i) / SUM_j 1 / s_j, s_i the standard deviation of the loss by moving averages. The
 * mean and the deviation are updated directly: E[l^2] - E[l]^2 cancels. A task seen for the first time, or whose loss
 * was always 0, gets 1. */
void fm_weigh_slaw(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double beta = call->options[0], least = 1e-6; /* of |mean|: a constant loss */
  double *count = call->state, *mean = count + n, *deviation = mean + n, *s = call->work;
  double smallest = INFINITY, sum = 0.0;
  int32_t known = 0;
  for (int32_t i = 0; i < n; i++) {
    s[i] = 0.0;
    if (count[i] == 0.0) {
      mean[i] = call->losses[i];
    } else {
      const double change = call->losses[i] - mean[i];
      mean[i] += (1.0 - beta) * change;
      deviation[i] = fmin(sqrt(beta) * fm_hypot(deviation[i], sqrt(1.0 - beta) * fm_clamp(change, DBL_MAX)), DBL_MAX);
      s[i] = fmax(deviation[i], least * fabs(mean[i]));
    }
    count[i] = 1.0;
    if (s[i] == 0.0) continue;
    known++;
    smallest = fmin(smallest, s[i]);
  }
  for (int32_t i = 0; i < n; i++) sum += s[i] > 0.0 ? smallest / s[i] : 0.0;
  for (int32_t i = 0; i < n; i++) weights[i] = s[i] > 0.0 ? known * (smallest / s[i] / sum) : 1.0;
}

/* EMTL (2306.09373, reconstructed): argmin ||w - 1||^2 + (lambda / K) SUM_i (w_i r_i - mean(w r))^2 subject to
 * SUM w = K, r_i = (l_i / ||g_i||) / mean. With A = D - (lambda / K^2) r r', D = I + (lambda / K) diag(r^2), w is K
 * A^-1 1 / (1' A^-1 1); A^-1 by Sherman and Morrison, whose divisor 1 - (lambda / K^2) r' D^-1 r is the mean of 1/D_ii:
 * nothing cancels and w > 0. A zero gradient gets 1 and takes no part. */
void fm_weigh_emtl(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  double *r = call->work, longest = 0.0, largest_loss = 0.0, largest = 0.0, mean = 0.0;
  int32_t k = 0;
  for (int32_t i = 0; i < n; i++) {
    longest = fmax(longest, call->norms[i]);
    largest_loss = fmax(largest_loss, call->losses[i]);
  }
  for (int32_t i = 0; i < n; i++) {
    r[i] = 0.0;
    if (call->norms[i] == 0.0) continue;
    r[i] = fmax(fmin((call->losses[i] / largest_loss) / (call->norms[i] / longest), DBL_MAX), DBL_MIN);
    largest = fmax(largest, r[i]);
    k++;
  }
  for (int32_t i = 0; i < n; i++) mean += call->norms[i] > 0.0 ? r[i] / largest / k : 0.0;
  const double ratio = k > 0 ? call->options[0] / k : 0.0;
  double inverse = 0.0, along = 0.0, sum = 0.0; /* mean of 1 / D, r' D^-1 1, 1' A^-1 1 */
  for (int32_t i = 0; i < n; i++) {
    if (call->norms[i] == 0.0) continue;
    r[i] = r[i] / largest / mean;
    const double d = 1.0 + ratio * r[i] * r[i];
    inverse += 1.0 / d / k;
    along += r[i] / d;
  }
  for (int32_t i = 0; i < n; i++) {
    weights[i] = 1.0;
    if (call->norms[i] == 0.0) continue;
    weights[i] = (1.0 + ratio / k * r[i] * along / inverse) / (1.0 + ratio * r[i] * r[i]);
    sum += weights[i];
  }
  for (int32_t i = 0; i < n; i++)
    if (call->norms[i] > 0.0) weights[i] *= k / sum;
}
