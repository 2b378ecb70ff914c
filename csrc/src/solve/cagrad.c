/* cagrad.c - CAGrad (2110.14048): with b = 1/K, g_0 = g'b, phi = c ||g_0||,
 *   v = argmin over the simplex of v'Gb + phi ||g_v||,  g_v = g'v;  w = (b + phi / ||g_v|| v) / (1 + c^2).
 *
 * With u = phi / ||g_v|| v >= 0, the optimality conditions are G(b + u) >= mu 1, equal where u_i > 0, and u'Gu = phi^2.
 * For a given mu that is a quadratic program, whose solution is piecewise linear in mu and whose u'Gu rises with mu,
 * piecewise quadratic: the root is found by Newton's method on the pieces, each solved for in closed form. Everything
 * below is times K: o = D 1, y = D K u. */
#include "mgda.h"
#include "solve.h"

enum { MAX_PIECES = 200 };

/* The mu at which y'Cy = target, starting from mu, y and the support. Returns whether it was found. */
static int find_root(fm_quadprog *q, fm_precision precision, double target) {
  const double accepted = precision == FM_DOUBLE ? 0x1p-48 : 0x1p-64;
  fm_dd low = q->mu, high = q->mu;
  int bracketed = 0;
  for (int piece = 0; piece < MAX_PIECES; ++piece) {
    if (fm_quadprog_solve(q, precision) != FM_QUADPROG_SOLVED) return 0;
    fm_dd ycy, ay, as;
    fm_quadprog_path(q, precision, &ycy, &ay, &as);
    const fm_dd missing = fm_dd_sub(fm_dd_make(target, 0.0), ycy);
    if (fabs(missing.hi) <= accepted * target) return 1;
    if (missing.hi > 0.0) {
      if (fm_dd_sub(q->mu, low).hi > 0.0) low = q->mu;
    } else {
      high = q->mu;
      bracketed = 1;
    }
    /* The root t of y'Cy + 2 t a'y + t^2 a's = target on this piece. */
    const fm_dd discriminant = fm_dd_add(fm_dd_mul(ay, ay), fm_dd_mul(as, missing));
    const fm_dd divisor = fm_dd_add(ay, fm_dd_sqrt(discriminant));
    fm_dd next = q->mu;
    if (discriminant.hi >= 0.0 && divisor.hi > 0.0) next = fm_dd_add(q->mu, fm_dd_div(missing, divisor));
    const int inside = fm_dd_sub(next, low).hi > 0.0 && (!bracketed || fm_dd_sub(high, next).hi > 0.0);
    if (!inside) {
      if (!bracketed) return 0;
      next = fm_dd_mul_d(fm_dd_add(low, high), 0.5);
    }
    if (next.hi == q->mu.hi && next.lo == q->mu.lo) return 1;
    if (precision == FM_DOUBLE && fabs(fm_dd_sub(next, q->mu).hi) <= FM_EPS * fabs(q->mu.hi)) return 1;
    q->mu = next;
  }
  return 0;
}

/* y >= 0 is scaled to y'Cy = target. Returns the violation of the optimality conditions, relative to
 * (|C| (o + y))_i. */
static double finish(fm_quadprog *q, double target) {
  const int32_t n = q->n;
  const double square = fm_quadratic(n, q->c, n, q->y).hi;
  if (!(square > 0.0)) return INFINITY;
  const double factor = sqrt(target / square);
  for (int32_t i = 0; i < n; ++i) q->y[i] *= factor;
  fm_abs_matvec(n, q->c, n, q->y, q->scale);
  double worst = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    const fm_dd pull = fm_dd_add(q->c_offset[i], fm_dot_dd(n, q->c + (size_t)i * n, q->y));
    const double r = fm_dd_sub(pull, fm_dd_mul_d(q->mu, q->a[i])).hi;
    const double size = q->scale[i] + q->abs_c_offset[i], amount = q->y[i] > 0.0 ? fabs(r) : -r;
    if (amount > worst * size) worst = size > 0.0 ? amount / size : INFINITY;
  }
  return worst;
}

/* From the piece that holds no row but the first to bind: there mu is too large, if anything. */
static void start(fm_quadprog *q) {
  int32_t first = -1;
  fm_dd mu = fm_dd_make(0.0, 0.0);
  for (int32_t i = 0; i < q->n; ++i) {
    q->y[i] = 0.0;
    const fm_dd candidate = fm_dd_div(q->c_offset[i], fm_dd_make(q->a[i], 0.0));
    if (first < 0 || fm_dd_sub(candidate, mu).hi < 0.0) {
      mu = candidate;
      first = i;
    }
  }
  q->mu = mu;
  q->support[0] = first;
  q->size = 1;
}

/* Leaves D K u in y. Returns 0 if the correction is to be left out. */
static int correction(fm_quadprog *q, double c, double *offset, flatmtl_status *status) {
  const int32_t n = q->n;
  const double rounding = 4.0 * n * FM_EPS;
  if ((*status = fm_least_norm(q)) != FLATMTL_OK) return 0;
  double terms = 0.0;
  for (int32_t i = 0; i < n; ++i) terms += q->y[i] * sqrt(q->c[(size_t)i * n + i]);
  if (!(fm_quadratic(n, q->c, n, q->y).hi > rounding * terms * terms)) return 0;
  q->kappa = 0.0;
  fm_quadprog_offset(q, offset);
  const double target = c * c * fm_quadratic(n, q->c, n, offset).hi;
  if (!(target > 0x1p-900)) return 0;
  start(q);
  if (find_root(q, FM_DOUBLE, target) && finish(q, target) <= FM_ACCEPTED) return 1;
  start(q);
  if (!find_root(q, FM_DOUBLE_DOUBLE, target) || !(finish(q, target) <= 1e-9)) *status = FLATMTL_ERROR_INTERNAL;
  return 1;
}

flatmtl_status fm_solve_cagrad(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  const double c = solve->options[0], divisor = n * (1.0 + c * c);
  fm_quadprog q;
  fm_quadprog_init(&q, n, solve->gramian, solve->work);
  double *offset = solve->work + fm_quadprog_work(n); /* in units of the longest row */
  int32_t largest = q.exponents[0];
  for (int32_t i = 1; i < n; ++i) largest = q.exponents[i] > largest ? q.exponents[i] : largest;
  for (int32_t i = 0; i < n; ++i) offset[i] = ldexp(1.0, q.exponents[i] - largest);
  flatmtl_status status = FLATMTL_OK;
  const int corrected = q.num_zero == 0 && c > 0.0 && correction(&q, c, offset, &status);
  if (status != FLATMTL_OK) return status;
  for (int32_t i = 0; i < n; ++i) weights[i] = (1.0 + (corrected ? q.y[i] / offset[i] : 0.0)) / divisor;
  return FLATMTL_OK;
}
