/* simplex.c - a primal active-set method. For t = 0 it is Wolfe's algorithm for the point of least norm in a polytope
 * (1976), and for t > 0 the same on rows shifted by a vector. */
#include "simplex.h"

#include <stddef.h>
#include <string.h>

#include "linalg.h"

/* Where in work: the matrix first. */
typedef struct pieces {
  double *a;                            /* [n * n] the support's C + uu' */
  double *factor_u, *rhs, *p, *q, *now; /* [n] on the support */
  double *pull, *size, *z;              /* [n] */
  int32_t *index;                       /* [n] of the support */
} pieces;

static pieces cut(int32_t n, double *work) {
  const size_t m = (size_t)n;
  double *v = work + m * m;
  return (pieces){work,      v,         v + m,     v + 2 * m, v + 3 * m,
                  v + 4 * m, v + 5 * m, v + 6 * m, v + 7 * m, (int32_t *)(void *)(v + 8 * m)};
}

/* x = (C + uu')^-1 b on the support, refined: the factorisation is of a slightly larger matrix, so that it exists. */
static void refined_solve(int32_t n, int32_t m, const double *c, const double *u, const pieces *s, const double *b,
                          double *x) {
  memcpy(x, b, (size_t)m * sizeof *x);
  fm_cholesky_solve(m, s->a, m, x);
  for (int round = 0; round < 3; ++round) {
    for (int32_t i = 0; i < m; ++i) {
      const double *row = c + (size_t)s->index[i] * (size_t)n;
      fm_dd sum = fm_dd_make(b[i], 0.0), along = fm_dd_make(0.0, 0.0);
      for (int32_t j = 0; j < m; ++j) {
        sum = fm_dd_sub(sum, fm_two_prod(row[s->index[j]], x[j]));
        along = fm_dd_add(along, fm_two_prod(u[s->index[j]], x[j]));
      }
      sum = fm_dd_sub(sum, fm_dd_mul_d(along, u[s->index[i]]));
      s->z[i] = sum.hi;
    }
    fm_cholesky_solve(m, s->a, m, s->z);
    for (int32_t i = 0; i < m; ++i) x[i] += s->z[i];
  }
}

/* p and q of the minimum p + t q on the m rows of s->index. */
static void affine_minimum(int32_t n, int32_t m, const double *c, const double *u, const double *r, const pieces *s,
                           double *p, double *q) {
  for (int32_t i = 0; i < m; ++i) {
    const int32_t row = s->index[i];
    for (int32_t j = 0; j <= i; ++j)
      s->a[(size_t)i * (size_t)m + (size_t)j] =
          c[(size_t)row * (size_t)n + (size_t)s->index[j]] + u[row] * u[s->index[j]];
    s->a[(size_t)i * (size_t)m + (size_t)i] += 4.0 * m * FM_EPS;
    s->factor_u[i] = u[row];
  }
  fm_cholesky(m, s->a, m); /* the ridge is above the rounding of a semidefinite matrix */
  refined_solve(n, m, c, u, s, s->factor_u, p);
  const double length = fm_dot(m, s->factor_u, p);
  for (int32_t i = 0; i < m; ++i) p[i] /= length;
  if (!r) {
    for (int32_t i = 0; i < m; ++i) q[i] = 0.0;
    return;
  }
  for (int32_t i = 0; i < m; ++i) s->rhs[i] = r[s->index[i]];
  refined_solve(n, m, c, u, s, s->rhs, q);
  const double along = fm_dot(m, s->factor_u, q);
  for (int32_t i = 0; i < m; ++i) q[i] = along * p[i] - q[i];
}

static int32_t support(int32_t n, const double *y, int32_t *index) {
  int32_t m = 0;
  for (int32_t i = 0; i < n; ++i)
    if (y[i] > 0.0) index[m++] = i;
  return m;
}

void fm_simplex_line(int32_t n, const double *c, const double *u, const double *r, const double *y, double *p,
                     double *q, double *work) {
  const pieces s = cut(n, work);
  const int32_t m = support(n, y, s.index);
  affine_minimum(n, m, c, u, r, &s, s.p, s.q);
  for (int32_t i = 0; i < n; ++i) p[i] = q[i] = 0.0;
  for (int32_t i = 0; i < m; ++i) {
    p[s.index[i]] = s.p[i];
    q[s.index[i]] = s.q[i];
  }
}

/* The row outside the support that most violates (Cy + t r)_i >= lambda u_i, relative to the rounding of its terms; n
 * if none does. */
static int32_t find_entering(int32_t n, const double *c, const double *u, const double *r, double t, const double *y,
                             const pieces *s) {
  double lambda = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    const double *row = c + (size_t)i * (size_t)n;
    fm_dd sum = r ? fm_two_prod(t, r[i]) : fm_dd_make(0.0, 0.0);
    double size = fabs(sum.hi);
    for (int32_t j = 0; j < n; ++j) {
      if (!(y[j] > 0.0)) continue;
      sum = fm_dd_add(sum, fm_two_prod(row[j], y[j]));
      size += fabs(row[j] * y[j]);
    }
    s->pull[i] = sum.hi;
    s->size[i] = size;
    lambda += y[i] * sum.hi;
  }
  int32_t entering = n;
  double worst = -1e-13;
  for (int32_t i = 0; i < n; ++i) {
    if (y[i] > 0.0) continue;
    const double violation = (s->pull[i] - lambda * u[i]) / (s->size[i] + fabs(lambda * u[i]));
    if (violation < worst) {
      worst = violation;
      entering = i;
    }
  }
  return entering;
}

flatmtl_status fm_simplex_minimum(int32_t n, const double *c, const double *u, const double *r, double t, double *y,
                                  double *work) {
  const pieces s = cut(n, work);
  int32_t first = 0;
  for (int32_t i = 1; i < n; ++i)
    if (u[i] > u[first]) first = i; /* the shortest row */
  if (support(n, y, s.index) == 0) y[first] = 1.0 / u[first];
  for (int32_t step = 0; step < 20 * n + 100; ++step) {
    const int32_t entering = find_entering(n, c, u, r, t, y, &s);
    if (entering == n && step > 0) return FLATMTL_OK;
    int32_t m = support(n, y, s.index);
    if (entering < n) s.index[m++] = entering;
    for (int32_t i = 0; i < m; ++i) s.now[i] = y[s.index[i]];
    while (m > 0) {
      affine_minimum(n, m, c, u, r, &s, s.p, s.q);
      double reach = 1.0; /* of the way to the minimum on the support, before an entry turns negative */
      for (int32_t i = 0; i < m; ++i) {
        s.p[i] += t * s.q[i];
        if (s.p[i] <= 0.0) reach = fmin(reach, s.now[i] / (s.now[i] - s.p[i]));
      }
      int32_t kept = 0, dropped = 0;
      for (int32_t i = 0; i < m; ++i) {
        const double value = reach < 1.0 ? s.now[i] + reach * (s.p[i] - s.now[i]) : s.p[i];
        const int leaves = s.p[i] <= 0.0 && (value <= 0.0 || s.now[i] / (s.now[i] - s.p[i]) <= reach);
        dropped += leaves;
        if (leaves) continue;
        s.index[kept] = s.index[i];
        s.now[kept++] = value;
      }
      if (kept == 0) break; /* rounding alone */
      m = kept;
      if (!dropped) break;
    }
    memset(y, 0, (size_t)n * sizeof *y);
    for (int32_t i = 0; i < m; ++i) y[s.index[i]] = s.now[i];
    if (entering < n && !(y[entering] > 0.0)) return FLATMTL_OK; /* it entered by rounding alone */
  }
  return FLATMTL_ERROR_INTERNAL;
}
