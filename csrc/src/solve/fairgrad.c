/* fairgrad.c - FairGrad (Ban and Ji, 2402.15638): the root of G w = w^(-1/alpha), w > 0.
 *
 * With p = 1/alpha, C the cosine matrix, y_i = d_i w_i and s = Cy the equation is s_i y_i = b_i(y_i), with
 * b_i = q_i y_i^(1-p), q_i = d_i^(p-1). It is solved together with a barrier, s_i y_i = b_i + mu, by Newton's method in
 * y and s at once (primal-dual path following): mu starts where the root is that of Nash-MTL but for a factor, and
 * falls to 0. Where the rows have similar lengths this takes one or two steps more than Newton's method alone; where
 * the b_i span many orders of magnitude, Newton's method alone jams.
 *
 * A root exists where Nash-MTL has one. alpha = 2 takes nothing but square roots; other values take exp and log. */
#include <math.h>
#include <stddef.h>

#include "linalg.h"
#include "newton.h"
#include "solve.h"

enum { MAX_ITERATIONS = 2000 };

static const double SMALLEST = 0x1p-900, LARGEST = 0x1p900; /* of everything below; keeps products finite */

typedef struct fairgrad {
  int32_t n;
  double p;
  const double *c;
  double *q;      /* [n] q_i, or its logarithm if p != 1/2 */
  double *y, *s;  /* [n] */
  double *b;      /* [n] b_i(y_i) */
  double *cy, *a; /* [n] Cy and |C|y */
  double *r;      /* [n] logarithm of (b_i + mu) / (s_i y_i), to first order */
  double *e;      /* [n] s - Cy */
  double *slope;  /* [n] -d log(s_i y_i / (b_i + mu)) / d log y_i, less that of s_i */
  double *root;   /* [n] */
  double *work;   /* n * n + n doubles */
  int32_t *permutation;
} fairgrad;

static double clamp(double x) {
  return x < SMALLEST ? SMALLEST : x > LARGEST ? LARGEST : x;
}

/* log x to 1e-7: it shapes steps, never results. */
static double rough_log(double x) {
  int exponent;
  double m = frexp(x, &exponent); /* in [1/2, 1) */
  if (m < 0.7071067811865476) {
    m *= 2.0;
    --exponent;
  }
  double t = (m - 1.0) / (m + 1.0), square = t * t;
  return exponent * 0.6931471805599453 +
         2.0 * t * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0))));
}

static void update_b(const fairgrad *f) {
  for (int32_t i = 0; i < f->n; ++i) {
    f->b[i] = clamp(f->p == 0.5 ? f->q[i] * sqrt(f->y[i]) : exp(f->q[i] + (1.0 - f->p) * log(f->y[i])));
  }
}

/* The solution for all q_i and y_i equal is on the path of y = scale * (Nash point); scale such that no b_i is larger
 * than s_i y_i = scale^2. Returns mu = scale^2. */
static double start(const fairgrad *f, const double *d) {
  double p = f->p, largest = 0.0;
  for (int32_t i = 0; i < f->n; ++i) {
    f->q[i] = p == 0.5 ? 1.0 / sqrt(d[i]) : (p - 1.0) * log(d[i]);
    f->s[i] = 1.0 / f->y[i];
    double b = p == 0.5 ? f->q[i] * sqrt(f->y[i]) : f->q[i] + (1.0 - p) * log(f->y[i]);
    largest = i == 0 ? b : fmax(largest, b);
  }
  /* scale^2 = largest * scale^(1-p). For p = 1/2, largest^(2/3) to a factor of two will do. */
  double scale = p == 0.5 ? ldexp(1.0, (int)nearbyint(2.0 * fm_exponent(largest) / 3.0) + 1) : exp(largest / (1.0 + p));
  scale = clamp(scale);
  for (int32_t i = 0; i < f->n; ++i) {
    f->y[i] = clamp(f->y[i] * scale);
    f->s[i] = clamp(f->s[i] * scale);
  }
  return clamp(scale * scale);
}

/* Writes r and slope for mu; returns the largest |r_i|. */
static double aim(const fairgrad *f, double mu) {
  double largest = 0.0;
  for (int32_t i = 0; i < f->n; ++i) {
    double target = f->b[i] + mu, x = clamp(target / (f->s[i] * f->y[i]));
    /* A decrease is linear in the products, an increase in their logarithms: neither overshoots. */
    f->r[i] = x < 1.0 ? x - 1.0 : rough_log(x);
    f->slope[i] = 1.0 - (1.0 - f->p) * (f->b[i] / target);
    if (f->y[i] > SMALLEST) largest = fmax(largest, fabs(f->r[i]));
  }
  return largest;
}

/* Newton: (C + slope S/Y) dy = e + s r,  ds = s (r - slope dy / y), cut short of where a y_i or s_i becomes 0. */
static void step(const fairgrad *f) {
  int32_t n = f->n;
  double *x = f->cy;
  for (int32_t i = 0; i < n; ++i) {
    f->root[i] = sqrt(f->y[i] / (f->s[i] * f->slope[i]));
    x[i] = f->root[i] * (f->e[i] + f->s[i] * f->r[i]);
  }
  fm_solve_shifted(n, f->c, f->root, x, f->work, f->permutation, f->work + (size_t)n * n);
  double t = 1.0;
  const double furthest = 0.99;
  for (int32_t i = 0; i < n; ++i) {
    double dy = f->root[i] * x[i] / f->y[i], ds = f->r[i] - f->slope[i] * dy;
    x[i] = dy;
    f->r[i] = ds;
    if (dy * t < -furthest) t = furthest / -dy;
    if (ds * t < -furthest) t = furthest / -ds;
  }
  for (int32_t i = 0; i < n; ++i) {
    f->y[i] = clamp(f->y[i] * (1.0 + t * x[i]));
    f->s[i] = clamp(f->s[i] * (1.0 + t * f->r[i]));
  }
}

/* Largest |(Cy)_i - b_i / y_i| in units of (|C|y)_i; also writes e, where it is more than rounding. A y_i at the bottom
 * of the range has no representable solution and is left out. */
static double measure(const fairgrad *f) {
  double largest = 0.0;
  fm_products(f->n, f->c, f->y, f->cy, f->a);
  for (int32_t i = 0; i < f->n; ++i) {
    double e = f->s[i] - f->cy[i];
    f->e[i] = fabs(e) > 2.0 * f->n * FM_EPS * f->a[i] ? e : 0.0;
    if (f->y[i] > SMALLEST) largest = fmax(largest, fabs(f->cy[i] - f->b[i] / f->y[i]) / f->a[i]);
  }
  return largest;
}

static flatmtl_status follow_path(const fairgrad *f, double mu) {
  const double tolerance = 1e-13 * fmax(1.0, f->p), centred = 0.97, reduction = 1e-3;
  double last_size = INFINITY, size = INFINITY;
  for (int32_t iteration = 0; iteration < MAX_ITERATIONS; ++iteration) {
    update_b(f);
    size = measure(f);
    if (size <= 4.0 * FM_EPS || (size <= tolerance && !(size < 0.1 * last_size))) return FLATMTL_OK;
    last_size = size;
    while (aim(f, mu) <= centred && mu > 0.0) {
      mu *= reduction;
      int negligible = 1;
      for (int32_t i = 0; i < f->n; ++i) negligible = negligible && mu <= 1e-15 * f->y[i] * f->a[i];
      if (negligible || mu < 0x1p-1000) mu = 0.0;
    }
    step(f);
  }
  return size <= 1e-11 * fmax(1.0, f->p) ? FLATMTL_OK : FLATMTL_ERROR_INTERNAL;
}

flatmtl_status fm_solve_fairgrad(const fm_solve *solve, double *weights) {
  int32_t n = solve->num_tasks;
  size_t square = (size_t)n * n;
  double *c = solve->work, *d = c + square, *v = d + n;
  fairgrad f = {.p = 1.0 / solve->options[0], .c = c, .q = v, .y = v + n, .s = v + 2 * n, .b = v + 3 * n};
  f.cy = v + 4 * n, f.a = v + 5 * n, f.r = v + 6 * n, f.e = v + 7 * n, f.slope = v + 8 * n, f.root = v + 9 * n;
  f.work = v + 10 * n;
  int32_t *index = (int32_t *)(void *)(f.work + square + 6 * (size_t)n);
  f.permutation = index + n;
  f.n = fm_nonzero_cosines(n, solve->gramian, c, d, index, f.q);
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  if (f.n == 0) return FLATMTL_PARETO_STATIONARY;
  flatmtl_status status = fm_nash_point(f.n, c, f.y, f.work, f.permutation);
  if (status != FLATMTL_OK) return status;
  if (f.p != 1.0) status = follow_path(&f, start(&f, d));
  if (status != FLATMTL_OK) return status;
  for (int32_t i = 0; i < f.n; ++i) weights[index[i]] = f.y[i] > SMALLEST ? f.y[i] / d[i] : 0.0;
  return FLATMTL_OK;
}
