/* go4align.c - GO4Align (2404.06486): tasks in groups of like risk, one weight a group. */
#include <float.h>
#include <math.h>

#include "weighting.h"

/* order[0 .. n) by values, ascending; equal ones by index. */
static void sort(int32_t n, const double *values, double *order) {
  for (int32_t i = 0; i < n; i++) {
    int32_t j = i;
    for (; j > 0 && values[(int32_t)order[j - 1]] > values[i]; j--) order[j] = order[j - 1];
    order[j] = i;
  }
}

/* The exact k-means clustering of n sorted numbers into at most `groups` runs, by dynamic programming: begin[m * n + i]
 * is where the last of m + 1 runs over x_0 .. x_i begins. The sum of squares of a run is built up element by element
 * (Welford), so that nothing cancels. */
static void cluster(int32_t n, const double *x, int32_t groups, double *begin, double *cost, double *before) {
  for (int32_t m = 0; m < groups; m++) {
    for (int32_t i = 0; i < n; i++) before[i] = cost[i];
    for (int32_t i = 0; i < n; i++) {
      double mean = 0.0, squares = 0.0, best = INFINITY;
      for (int32_t j = i; j >= 0; j--) { /* the run x_j .. x_i */
        const double change = x[j] - mean;
        mean += change / (i - j + 1);
        squares += change * (x[j] - mean);
        if (m == 0 && j > 0) continue;
        const double total = squares + (m == 0 || j == 0 ? 0.0 : before[j - 1]);
        if (total < best) {
          best = total;
          begin[(size_t)m * (size_t)n + (size_t)i] = j;
        }
      }
      cost[i] = best;
    }
  }
}

void fm_weigh_go4align(const fm_weighting_call *call, double *weights) {
  const int32_t n = call->num_tasks;
  const double eta = call->options[0];
  const int32_t groups = call->options[1] < n ? (int32_t)call->options[1] : n;
  double *log_q = call->state, *risk = call->work, *order = risk + n, *x = order + n, *cost = x + n;
  double *before = cost + n, *begin = before + n;
  double largest = 0.0, sum = 0.0, highest = 0.0;
  for (int32_t i = 0; i < n; i++) {
    largest = fmax(largest, call->losses[i]);
    log_q[i] = fmax(log_q[i] - eta * call->losses[i], -1e300);
  }
  for (int32_t i = 0; i < n; i++) sum += call->losses[i] / largest;
  fm_softmax(n, log_q, 1.0, risk);
  for (int32_t i = 0; i < n; i++) {
    risk[i] = fmin(risk[i] * (sum / (call->losses[i] / largest)), DBL_MAX);
    highest = fmax(highest, risk[i]);
  }
  sort(n, risk, order);
  for (int32_t i = 0; i < n; i++) x[i] = risk[(int32_t)order[i]] / highest;
  cluster(n, x, groups, begin, cost, before);
  int32_t end = n;
  for (int32_t m = groups - 1; end > 0; m--) {
    const int32_t first = (int32_t)begin[(size_t)m * (size_t)n + (size_t)(end - 1)];
    double mean = 0.0;
    for (int32_t i = first; i < end; i++) mean += (x[i] - mean) / (i - first + 1);
    for (int32_t i = first; i < end; i++) weights[(int32_t)order[i]] = mean * highest;
    end = first;
  }
}
