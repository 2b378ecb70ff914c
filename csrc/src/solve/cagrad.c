/* cagrad.c - CAGrad (2110.14048): with b = 1/K, g_0 = g'b, phi = c ||g_0||,
 *   v = argmin over the simplex of v'Gb + phi ||g_v||,  g_v = g'v;  w = (b + phi / ||g_v|| v) / (1 + c^2).
 *
 * phi ||g_v|| is the minimum over t of phi (||g_v||^2 / t + t) / 2, so v also minimises ||g_v||^2 / 2 + t v'Gb for
 * t = ||g_v|| / phi: a quadratic programme whose solution is piecewise linear in t. ||g_v(t)|| - phi t decreases from
 * ||MGDA's point|| >= 0, and its root is found exactly on the piece that holds it. */
#include <stddef.h>

#include "linalg.h"
#include "newton.h"
#include "simplex.h"
#include "solve.h"

enum { MAX_PIECES = 300 };

/* The root of ||p + t q||_C = phi t on a piece, or 0. */
static double root_on_piece(int32_t n, const double *c, const double *p, const double *q, double phi, double *scratch) {
  fm_matvec(n, c, n, q, scratch);
  const double a = fm_dot(n, q, scratch) - phi * phi, b = fm_dot(n, p, scratch);
  const double e = fm_quadratic(n, c, n, p).hi;
  const double discriminant = b * b - a * e;
  if (!(discriminant >= 0.0)) return 0.0;
  const double divisor = sqrt(discriminant) - b;
  return divisor > 0.0 ? e / divisor : 0.0;
}

/* v in y (u'y = 1) and t = ||g_v|| / phi. Returns 0 where the minimum of ||g_v|| is 0 up to rounding. */
static int find(int32_t n, const double *c, const double *u, const double *r, double phi, double *y, double *work,
                double *t_out) {
  double *p = work + FM_SIMPLEX_WORK(n), *q = p + n, *scratch = q + n;
  for (int32_t i = 0; i < n; ++i) y[i] = 0.0;
  if (fm_simplex_minimum(n, c, u, NULL, 0.0, y, work) != FLATMTL_OK) return 0;
  fm_abs_matvec(n, c, n, y, scratch);
  double square = fm_quadratic(n, c, n, y).hi;
  if (!(square > (16.0 + n) * FM_EPS * fm_dot(n, y, scratch))) return 0;
  double low = sqrt(square) / phi, high = INFINITY, t = low;
  for (int32_t piece = 0; piece < MAX_PIECES; ++piece) {
    if (fm_simplex_minimum(n, c, u, r, t, y, work) != FLATMTL_OK) return 0;
    square = fm_quadratic(n, c, n, y).hi;
    if (sqrt(square) >= phi * t) {
      low = t;
    } else {
      high = t;
    }
    fm_simplex_line(n, c, u, r, y, p, q, work);
    double next = root_on_piece(n, c, p, q, phi, scratch);
    if (fabs(next - t) <= 8.0 * FM_EPS * t) break;
    if (!(next >= low && next <= high)) next = high < INFINITY ? 0.5 * (low + high) : 2.0 * t;
    if (next == t) break;
    t = next;
  }
  *t_out = t;
  return 1;
}

flatmtl_status fm_solve_cagrad(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  const double c0 = solve->options[0], divisor = 1.0 + c0 * c0;
  double *c = solve->work, *d = c + (size_t)n * (size_t)n, *u = d + n, *y = u + n, *r = y + n, *work = r + n;
  int32_t *index = (int32_t *)(void *)(work + FM_SIMPLEX_WORK(n) + 3 * (size_t)n);
  for (int32_t i = 0; i < n; ++i) weights[i] = 1.0 / n / divisor;
  const int32_t m = fm_nonzero_cosines(n, solve->gramian, c, d, index, u);
  if (m < n || c0 == 0.0) return FLATMTL_OK; /* with a zero row the minimum of ||g_v|| is 0 */
  /* g_0 in units of the shortest row */
  double shortest = d[0], square = 0.0, terms = 0.0;
  for (int32_t i = 1; i < n; ++i) shortest = fmin(shortest, d[i]);
  for (int32_t i = 0; i < n; ++i) u[i] = shortest / d[i];
  for (int32_t i = 0; i < n; ++i) y[i] = d[i] / shortest / n;
  square = fm_quadratic(n, c, n, y).hi;
  fm_abs_matvec(n, c, n, y, r);
  terms = fm_dot(n, y, r);
  if (!(square > (16.0 + n) * FM_EPS * terms)) return FLATMTL_OK; /* g_0 = 0 */
  for (int32_t i = 0; i < n; ++i) r[i] = fm_dot_dd(n, c + (size_t)i * (size_t)n, y).hi;
  double t, sum = 0.0;
  if (!find(n, c, u, r, c0 * sqrt(square), y, work, &t)) return FLATMTL_OK;
  for (int32_t i = 0; i < n; ++i) sum += y[i] * u[i];
  for (int32_t i = 0; i < n; ++i) weights[i] = (1.0 / n + y[i] * u[i] / (sum * t)) / divisor;
  return FLATMTL_OK;
}
