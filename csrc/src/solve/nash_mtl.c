/* nash_mtl.c - Nash-MTL (Navon et al., 2202.01017): the root of G w = 1/w, w > 0.
 *
 * With C the cosine matrix and y_i = d_i w_i the equation is y_i (Cy)_i = 1, whatever the lengths of the rows; its root
 * is the minimum of the strictly convex, self-concordant y'Cy / 2 - SUM log y_i. Newton's method in relative steps z,
 * y <- y (1 + t z), with an exact line search converges from anywhere: (Y C Y + I) z = 1 - Y C y.
 *
 * A finite minimum exists unless some v >= 0 has v'Cv = 0. Then the iterates themselves become such a v, which is what
 * is tested: y'Cy no more than the rounding of its terms. */
#include <math.h>
#include <stddef.h>

#include "linalg.h"
#include "newton.h"
#include "solve.h"

enum { MAX_ITERATIONS = 300 };

/* Minimises a t + b t^2 / 2 - SUM log(1 + t z_i) over t > 0, roughly: to a tenth of t. */
static double line_search(int32_t n, const double *z, double a, double b, double t) {
  const double farthest = 1e8;
  double smallest = 0.0;
  for (int32_t i = 0; i < n; ++i) smallest = fmin(smallest, z[i]);
  double low = 0.0, high = smallest < -1.0 / farthest ? (1.0 - 1e-7) / -smallest : farthest;
  for (int32_t iteration = 0; iteration < 40; ++iteration) {
    double slope = a + b * t, curvature = b;
    for (int32_t i = 0; i < n; ++i) {
      double quotient = z[i] / (1.0 + t * z[i]);
      slope -= quotient;
      curvature += quotient * quotient;
    }
    if (slope < 0.0) {
      low = t;
    } else {
      high = t;
    }
    double next = t - slope / curvature;
    if (!(next > low && next < high)) { /* bisect: by ratio where the interval spans several */
      double from = fmax(low, 1e-3);
      next = high > 4.0 * from ? sqrt(from * high) : 0.5 * (low + high);
    }
    double change = fabs(next - t);
    t = next;
    if (change <= 0.1 * t) break;
  }
  return t;
}

flatmtl_status fm_nash_point(int32_t n, const double *c, double *y, double *work, int32_t *index) {
  double *factor = work, *cy = work + (size_t)n * n, *abs_cy = cy + n, *r = abs_cy + n, *z = r + n, *move = z + n;
  const double tolerance = 1e-13, rounding = (16.0 + n) * FM_EPS;
  for (int32_t i = 0; i < n; ++i) y[i] = 1.0;
  double last_size = INFINITY;
  for (int32_t iteration = 0; iteration < MAX_ITERATIONS; ++iteration) {
    fm_products(n, c, y, cy, abs_cy);
    double square = fm_dot(n, y, cy), terms = fm_dot(n, y, abs_cy);
    if (!(square > rounding * terms)) return FLATMTL_PARETO_STATIONARY;
    if (iteration == 0) { /* the best multiple of 1 */
      double scale = sqrt(n / square);
      for (int32_t i = 0; i < n; ++i) {
        y[i] *= scale;
        cy[i] *= scale;
        abs_cy[i] *= scale;
      }
    }
    double size = 0.0; /* largest residual in units of y_i (|C|y)_i */
    for (int32_t i = 0; i < n; ++i) {
      z[i] = r[i] = 1.0 - y[i] * cy[i];
      size = fmax(size, fabs(r[i]) / (y[i] * abs_cy[i]));
    }
    /* One step beyond the tolerance where it still helps: quadratic convergence then leaves nothing but rounding. */
    if (size <= 4.0 * FM_EPS || (size <= tolerance && !(size < 0.1 * last_size))) return FLATMTL_OK;
    last_size = size;
    fm_solve_shifted(n, c, y, z, factor, index, move);
    double decrement = fm_dot(n, r, z), t = 1.0; /* lambda^2 */
    if (decrement > 0.05) {
      for (int32_t i = 0; i < n; ++i) move[i] = y[i] * z[i];
      double a = fm_dot(n, cy, move);
      fm_products(n, c, move, cy, abs_cy);
      t = line_search(n, z, a, fm_dot(n, move, cy), 1.0 / (1.0 + sqrt(decrement)));
    }
    for (int32_t i = 0; i < n; ++i) y[i] *= 1.0 + t * z[i];
  }
  return last_size <= 1e-11 ? FLATMTL_OK : FLATMTL_ERROR_INTERNAL;
}

flatmtl_status fm_solve_nash_mtl(const fm_solve *solve, double *weights) {
  int32_t n = solve->num_tasks;
  size_t square = (size_t)n * n;
  double *c = solve->work, *d = c + square, *y = d + n, *work = y + n;
  int32_t *index = (int32_t *)(void *)(work + square + 6 * (size_t)n), *scratch = index + n;
  int32_t m = fm_nonzero_cosines(n, solve->gramian, c, d, index, y);
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  if (m == 0) return FLATMTL_PARETO_STATIONARY;
  flatmtl_status status = fm_nash_point(m, c, y, work, scratch);
  if (status != FLATMTL_OK) return status;
  for (int32_t i = 0; i < m; ++i) weights[index[i]] = y[i] / d[i];
  return FLATMTL_OK;
}
