/* gradvac.c - GradVac (Wang et al., 2010.05874), at the granularity of the whole model, summed over tasks.
 *
 * As PCGrad, but every g_i is turned towards each g_j, in random order, up to a target cosine t_ij instead of 0: with
 * phi = cos(g_i', g_j) < t_ij, the g_j is added that makes it t_ij. t_ij is a running mean of the phi seen, from 0.
 *
 * In y_k = c_k d_k / d_i, C the cosine matrix: g_i' / d_i has the square y'Cy and inner products (Cy)_j with unit rows.
 * A g_i' that has vanished, and a zero row, has no cosine: nothing is added, and t stays. */
#include <math.h>

#include "linalg.h"
#include "order.h"
#include "solve.h"

/* Targets nearer to 1 are taken as this: at 1 itself infinitely much of g_j would be added. */
static const double LARGEST_TARGET = 1.0 - 1e-6;

static double cut(double x, double bound) {
  return x > bound ? bound : x < -bound ? -bound : x;
}

/* y = the coefficients of g_i' / d_i in unit rows; t is row i of the targets. u [n] is scratch. */
static void turn(int32_t n, const double *c, const double *d, int32_t i, const double *order, double beta, double *t,
                 double *y, double *u) {
  for (int32_t k = 0; k < n; ++k) {
    y[k] = k == i ? 1.0 : 0.0;
    u[k] = c[(size_t)i * n + k];
  }
  for (int32_t position = 0; position < n - 1; ++position) {
    const int32_t j = (int32_t)order[position];
    if (!(d[j] > 0.0)) continue;
    double square = 0.0, size = 0.0;
    for (int32_t k = 0; k < n; ++k) {
      square += y[k] * u[k];
      size += fabs(y[k]);
    }
    if (!(square > 4.0 * n * FM_EPS * size * size)) return; /* rounding is all that is left */
    const double norm = sqrt(square), phi = cut(u[j] / norm, 1.0), target = fmin(t[j], LARGEST_TARGET);
    if (phi < target) {
      const double sine = sqrt((1.0 - target) * (1.0 + target));
      const double added = norm * (target / sine * sqrt((1.0 - phi) * (1.0 + phi)) - phi);
      y[j] += added;
      for (int32_t k = 0; k < n; ++k) u[k] += added * c[(size_t)j * n + k];
    }
    t[j] = cut(t[j] + beta * (phi - t[j]), 1.0);
  }
}

flatmtl_status fm_solve_gradvac(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  double *c = solve->work, *d = c + (size_t)n * n, *order = d + n, *y = order + n, *u = y + n;
  const double beta = solve->options[0];
  const uint64_t seed = (uint64_t)solve->options[1], draw = (uint64_t)solve->options[2];
  fm_cosines(n, solve->gramian, c, d);
  for (int32_t i = 0; i < n; ++i) weights[i] = d[i] > 0.0 ? 0.0 : 1.0;
  for (int32_t i = 0; i < n; ++i) {
    if (!(d[i] > 0.0)) continue;
    fm_shuffle_others(fm_start_sequence(seed, draw, solve->call, (uint64_t)i), i, n, order);
    turn(n, c, d, i, order, beta, solve->state + (size_t)i * n, y, u);
    for (int32_t j = 0; j < n; ++j) {
      if (y[j] != 0.0) weights[j] += j == i ? y[j] : y[j] * (d[i] / d[j]);
    }
  }
  return FLATMTL_OK;
}
