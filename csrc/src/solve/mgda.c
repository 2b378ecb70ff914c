/* mgda.c - MGDA (Desideri 2012; 1810.04650): w = argmin w'Gw over the simplex, the point of least norm of a polytope.
 *
 * Adding kappa 11' to G changes w'Gw by a constant on the simplex, and makes the constraint SUM w = 1 a matter of scale
 * (Wolfe 1976): w is proportional to the minimum of w'(G + kappa 11')w / 2 - 1'w over w >= 0. */
#include "mgda.h"

#include "solve.h"

enum { MAX_RISES = 64 };

/* y_i = D_ii w_i, scaled to a'y = 1, which is SUM w = 1 in units of the shortest row. Returns the violation of the
 * optimality conditions relative to (|G| w)_i, with slack for the rounding of w'Gw if asked for. */
static double violation(const fm_quadprog *q, const double *y, double slack) {
  const int32_t n = q->n;
  const double square = fm_quadratic(n, q->c, n, y).hi;
  fm_abs_matvec(n, q->c, n, y, q->scale);
  const double rounding = slack * fm_dot(n, y, q->scale);
  double worst = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    const fm_dd pull = fm_dot_dd(n, q->c + (size_t)i * n, y);
    const double r = fm_dd_sub(pull, fm_two_prod(square, q->a[i])).hi;
    const double size = q->scale[i] + rounding * q->a[i], amount = y[i] > 0.0 ? fabs(r) : -r;
    if (amount > worst * size) worst = size > 0.0 ? amount / size : INFINITY;
  }
  return worst;
}

static void normalize(fm_quadprog *q) {
  const double sum = fm_dot_dd(q->n, q->a, q->y).hi;
  for (int32_t i = 0; i < q->n; ++i) q->y[i] /= sum;
}

flatmtl_status fm_least_norm(fm_quadprog *q) {
  const int32_t n = q->n;
  q->kappa = 1.0;
  q->mu = fm_dd_make(1.0, 0.0);
  q->size = 0;
  for (int32_t i = 0; i < n; ++i) q->y[i] = 0.0;
  fm_quadprog_outcome outcome = fm_quadprog_solve(q, FM_DOUBLE);
  if (outcome == FM_QUADPROG_SOLVED) {
    normalize(q);
    if (violation(q, q->y, 0.0) <= FM_ACCEPTED) return FLATMTL_OK;
  }
  q->size = 0;
  for (int32_t i = 0; i < n; ++i) {
    if (outcome != FM_QUADPROG_SOLVED) q->y[i] = 0.0;
    if (q->y[i] > 0.0) q->support[q->size++] = i;
  }
  for (int32_t rises = 0; rises < MAX_RISES; ++rises) {
    outcome = fm_quadprog_solve(q, FM_DOUBLE_DOUBLE);
    if (outcome != FM_QUADPROG_RAY) break;
    /* The minimum is 0 up to rounding, and kappa too small to bound the rows that make it so. */
    double along = 0.0, length = 0.0;
    for (int32_t i = 0; i < n; ++i) {
      along += q->a[i] * q->ray[i];
      length += fabs(q->ray[i]);
    }
    if (!(along > 0.0)) break;
    const int32_t rise = fm_exponent(length / along);
    q->kappa = fmax(q->kappa * 16.0, rise < 250 ? ldexp(1.0, 2 * rise) : 0x1p500);
    q->size = 0;
    for (int32_t i = 0; i < n; ++i) {
      q->y[i] = q->ray[i] / along / q->kappa;
      if (q->y[i] > 0.0) q->support[q->size++] = i;
    }
  }
  double sum = fm_dot_dd(n, q->a, q->y).hi;
  if (outcome == FM_QUADPROG_RAY || !(sum > 0.0)) {
    for (int32_t i = 0; i < n; ++i) q->y[i] = q->ray[i];
    sum = fm_dot_dd(n, q->a, q->y).hi;
  }
  if (!(sum > 0.0)) return FLATMTL_ERROR_INTERNAL;
  normalize(q);
  return violation(q, q->y, 0x1p-40) <= 1e-9 ? FLATMTL_OK : FLATMTL_ERROR_INTERNAL;
}

flatmtl_status fm_solve_mgda(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  fm_quadprog q;
  fm_quadprog_init(&q, n, solve->gramian, solve->work);
  if (q.num_zero > 0) { /* the zero rows are the minimum */
    for (int32_t i = 0; i < n; ++i) weights[i] = q.a[i] > 0.0 ? 0.0 : 1.0 / q.num_zero;
    return FLATMTL_OK;
  }
  const flatmtl_status status = fm_least_norm(&q);
  if (status != FLATMTL_OK) return status;
  for (int32_t i = 0; i < n; ++i) weights[i] = q.y[i] * q.a[i];
  return FLATMTL_OK;
}
