/* quadprog_body.h - the active-set method, included by quadprog.c once for each arithmetic. The includer defines
 *   real                        the number type
 *   NAME(x)                     x with a suffix
 *   FROM(d) HI(x)               from and to double
 *   ADD SUB MUL DIV (x, y)      MULD(x, d): by a double
 *   SQRT(x)
 *   ROUNDING                    relative error of a sum's term
 *   REFINED TOLERANCE           residual to aim at on the support, and the largest accepted
 *   MAY_GIVE_UP                 whether a finer arithmetic follows
 */

/* The factor in the order of the support: L L' = C_SS + kappa a_S a_S'. */
typedef struct NAME(state) {
  fm_quadprog *problem;
  real *l; /* [n * n] */
  real *y; /* [n] */
  real *r; /* [n] gradient */
  real *p; /* [n] direction, by position in the support */
} NAME(state);

static real NAME(entry)(const fm_quadprog *q, int32_t i, int32_t j) {
  double c = q->c[(size_t)i * q->n + j];
  return q->kappa > 0.0 ? ADD(FROM(c), FROM(q->kappa * q->a[i] * q->a[j])) : FROM(c);
}

/* r = C(o+y) + (kappa a'y - mu) a and its scale (|C| |o+y|)_i */
static void NAME(gradient)(NAME(state) * s) {
  const fm_quadprog *q = s->problem;
  const int32_t n = q->n;
  real ay = FROM(0.0);
  for (int32_t i = 0; i < n; ++i) ay = ADD(ay, MULD(s->y[i], q->a[i]));
  const real multiplier = SUB(MULD(ay, q->kappa), FROM_DD(q->mu));
  /* The rounding of kappa a'y - mu, where the two cancel. */
  const double unresolved = q->kappa > 0.0 ? (ROUNDING / TOLERANCE) * fabs(q->mu.hi) : 0.0;
  for (int32_t i = 0; i < n; ++i) {
    s->r[i] = ADD(FROM_DD(q->c_offset[i]), MULD(multiplier, q->a[i]));
    q->scale[i] = q->abs_c_offset[i] + unresolved * q->a[i];
  }
  for (int32_t j = 0; j < n; ++j) {
    const real yj = s->y[j];
    const double yj_hi = HI(yj), *column = q->c + (size_t)j * n;
    if (yj_hi == 0.0) continue;
    real *restrict r = s->r;
    double *restrict scale = q->scale;
    for (int32_t i = 0; i < n; ++i) r[i] = ADD(r[i], MULD(yj, column[i]));
    for (int32_t i = 0; i < n; ++i) scale[i] += fabs(column[i]) * yj_hi;
  }
}

/* x = L^-1 x */
static void NAME(solve_lower)(const NAME(state) * s, real *x) {
  const int32_t n = s->problem->n, size = s->problem->size;
  for (int32_t i = 0; i < size; ++i) {
    const real *row = s->l + (size_t)i * n;
    real sum = x[i];
    for (int32_t j = 0; j < i; ++j) sum = SUB(sum, MUL(row[j], x[j]));
    x[i] = DIV(sum, row[i]);
  }
}

/* x = L^-T x */
static void NAME(solve_upper)(const NAME(state) * s, real *x) {
  const int32_t n = s->problem->n, size = s->problem->size;
  for (int32_t i = size - 1; i >= 0; --i) {
    const real *row = s->l + (size_t)i * n;
    const real xi = x[i] = DIV(x[i], row[i]);
    for (int32_t j = 0; j < i; ++j) x[j] = SUB(x[j], MUL(xi, row[j]));
  }
}

/* The next row of L for index k, written below the factor, without its diagonal entry; returns the pivot: the curvature
 * of the objective along the direction that keeps the gradient on the support. */
static real NAME(next_row)(const NAME(state) * s, int32_t k) {
  const fm_quadprog *q = s->problem;
  real *row = s->l + (size_t)q->size * q->n;
  for (int32_t i = 0; i < q->size; ++i) row[i] = NAME(entry)(q, q->support[i], k);
  NAME(solve_lower)(s, row);
  real pivot = NAME(entry)(q, k, k);
  for (int32_t i = 0; i < q->size; ++i) pivot = SUB(pivot, MUL(row[i], row[i]));
  return pivot;
}

static double NAME(pivot_error)(const fm_quadprog *q, int32_t k) {
  return (q->size + 4) * ROUNDING * HI(NAME(entry)(q, k, k));
}

static void NAME(append)(NAME(state) * s, int32_t k, real pivot) {
  fm_quadprog *q = s->problem;
  s->l[(size_t)q->size * q->n + q->size] = SQRT(pivot);
  q->support[q->size++] = k;
}

/* Takes the index at a position out of the support; rotations of columns make the factor triangular again. */
static void NAME(drop)(NAME(state) * s, int32_t position) {
  fm_quadprog *q = s->problem;
  const int32_t n = q->n, size = --q->size;
  s->y[q->support[position]] = FROM(0.0);
  for (int32_t i = position; i < size; ++i) {
    q->support[i] = q->support[i + 1];
    for (int32_t j = 0; j <= i + 1; ++j) s->l[(size_t)i * n + j] = s->l[(size_t)(i + 1) * n + j];
  }
  for (int32_t j = position; j < size; ++j) {
    real *row = s->l + (size_t)j * n;
    const real x = row[j], y = row[j + 1], norm = SQRT(ADD(MUL(x, x), MUL(y, y)));
    if (!(HI(norm) > 0.0)) continue;
    const real cosine = DIV(x, norm), sine = DIV(y, norm);
    row[j] = norm;
    for (int32_t i = j + 1; i < size; ++i) {
      real *other = s->l + (size_t)i * n;
      const real u = other[j], v = other[j + 1];
      other[j] = ADD(MUL(cosine, u), MUL(sine, v));
      other[j + 1] = SUB(MUL(cosine, v), MUL(sine, u));
    }
  }
}

/* Factors the support that came; indices that depend on earlier ones leave it. */
static void NAME(factorize)(NAME(state) * s) {
  fm_quadprog *q = s->problem;
  const int32_t size = q->size;
  q->size = 0;
  for (int32_t i = 0; i < size; ++i) {
    const int32_t k = q->support[i];
    const real pivot = NAME(next_row)(s, k);
    if (HI(pivot) > NAME(pivot_error)(q, k)) {
      NAME(append)(s, k, pivot);
    } else {
      s->y[k] = FROM(0.0);
    }
  }
}

/* The longest step along p that keeps y >= 0 on the support, INFINITY if none; *position: who blocks. */
static real NAME(longest_step)(const NAME(state) * s, int32_t *position) {
  const fm_quadprog *q = s->problem;
  real longest = FROM(INFINITY);
  *position = -1;
  for (int32_t i = 0; i < q->size; ++i) {
    if (!(HI(s->p[i]) < 0.0)) continue;
    const real step = DIV(s->y[q->support[i]], SUB(FROM(0.0), s->p[i]));
    if (*position < 0 || HI(SUB(step, longest)) < 0.0) {
      longest = step;
      *position = i;
    }
  }
  return longest;
}

static void NAME(move)(NAME(state) * s, real step) {
  const fm_quadprog *q = s->problem;
  for (int32_t i = 0; i < q->size; ++i) {
    real *yi = &s->y[q->support[i]];
    *yi = ADD(*yi, MUL(step, s->p[i]));
    if (HI(*yi) < 0.0) *yi = FROM(0.0); /* rounding */
  }
}

/* Brings the gradient on the support to 0 by Newton steps on the factor (iterative refinement), as far as y >= 0
 * allows: an index that blocks leaves. Leaves the gradient at y in r. Returns whether it came below the tolerance. */
static int NAME(refine)(NAME(state) * s) {
  fm_quadprog *q = s->problem;
  double previous = INFINITY;
  for (;;) {
    NAME(gradient)(s);
    double worst = 0.0;
    for (int32_t i = 0; i < q->size; ++i) {
      const int32_t k = q->support[i];
      worst = fmax(worst, fabs(HI(s->r[k])) / q->scale[k]); /* fmax passes over 0 / 0 */
    }
    if (worst <= REFINED) return 1;
    if (!(worst <= 0.5 * previous)) return worst <= TOLERANCE;
    previous = worst;
    for (int32_t i = 0; i < q->size; ++i) s->p[i] = SUB(FROM(0.0), s->r[q->support[i]]);
    NAME(solve_lower)(s, s->p);
    NAME(solve_upper)(s, s->p);
    int32_t blocking;
    const real longest = NAME(longest_step)(s, &blocking);
    if (blocking >= 0 && HI(longest) < 1.0) {
      NAME(move)(s, longest);
      NAME(drop)(s, blocking);
      previous = INFINITY;
    } else {
      NAME(move)(s, FROM(1.0));
    }
  }
}

/* r_k alone */
static real NAME(gradient_at)(const NAME(state) * s, int32_t k) {
  const fm_quadprog *q = s->problem;
  real ay = FROM(0.0), sum = FROM_DD(q->c_offset[k]);
  for (int32_t i = 0; i < q->n; ++i) {
    if (HI(s->y[i]) == 0.0) continue;
    ay = ADD(ay, MULD(s->y[i], q->a[i]));
    sum = ADD(sum, MULD(s->y[i], q->c[(size_t)k * q->n + i]));
  }
  return ADD(sum, MULD(SUB(MULD(ay, q->kappa), FROM_DD(q->mu)), q->a[k]));
}

/* The index out of the support with the steepest descent, -1 if none descends by more than rounding. */
static int32_t NAME(entering)(const NAME(state) * s) {
  const fm_quadprog *q = s->problem;
  int32_t best = -1;
  for (int32_t i = 0; i < q->n; ++i) {
    const double r = HI(s->r[i]);
    if (r < -TOLERANCE * q->scale[i] && HI(s->y[i]) == 0.0 && (best < 0 || r < HI(s->r[best]))) best = i;
  }
  return best;
}

/* Raises y_k from 0 until the gradient at k vanishes, dropping what blocks on the way. The gradient on the support is 0
 * before and after. */
static fm_quadprog_outcome NAME(enter)(NAME(state) * s, int32_t k) {
  fm_quadprog *q = s->problem;
  real rk = s->r[k];
  for (;;) {
    const real pivot = NAME(next_row)(s, k);
    const real *row = s->l + (size_t)q->size * q->n;
    for (int32_t i = 0; i < q->size; ++i) s->p[i] = SUB(FROM(0.0), row[i]);
    NAME(solve_upper)(s, s->p);
    int32_t blocking;
    const real longest = NAME(longest_step)(s, &blocking);
    const double error = NAME(pivot_error)(q, k);
    const int curved = HI(pivot) > error;
    real newton = curved ? DIV(SUB(FROM(0.0), rk), pivot) : FROM(INFINITY);
    if (curved && HI(newton) < 0.0) newton = FROM(0.0);
    if (!curved && blocking < 0) {
      for (int32_t i = 0; i < q->n; ++i) q->ray[i] = 0.0;
      for (int32_t i = 0; i < q->size; ++i) q->ray[q->support[i]] = HI(s->p[i]);
      q->ray[k] = 1.0;
      return FM_QUADPROG_RAY;
    }
    /* Whether the step is blocked must not hang on the rounding of the pivot. */
    if (!curved && !(HI(longest) * 2.0 * error <= -HI(rk)) && MAY_GIVE_UP) return FM_QUADPROG_UNDECIDED;
    const int blocked = blocking >= 0 && (!curved || HI(SUB(longest, newton)) < 0.0);
    const real step = blocked ? longest : newton;
    NAME(move)(s, step);
    s->y[k] = ADD(s->y[k], step);
    if (!blocked) {
      NAME(append)(s, k, pivot);
      return FM_QUADPROG_SOLVED;
    }
    NAME(drop)(s, blocking);
    rk = NAME(gradient_at)(s, k);
  }
}

static fm_quadprog_outcome NAME(solve)(NAME(state) * s) {
  fm_quadprog *q = s->problem;
  NAME(factorize)(s);
  for (int32_t round = 0; round < 20 * q->n + 100; ++round) {
    if (!NAME(refine)(s)) return FM_QUADPROG_UNDECIDED;
    const int32_t k = NAME(entering)(s);
    if (k < 0) return FM_QUADPROG_SOLVED;
    const fm_quadprog_outcome outcome = NAME(enter)(s, k);
    if (outcome != FM_QUADPROG_SOLVED) return outcome;
  }
  return FM_QUADPROG_UNDECIDED;
}

/* See fm_quadprog_path. */
static void NAME(path)(NAME(state) * s, fm_dd *ycy, fm_dd *ay, fm_dd *as) {
  const fm_quadprog *q = s->problem;
  real sum_ycy = FROM(0.0), sum_ay = FROM(0.0), sum_as = FROM(0.0);
  for (int32_t i = 0; i < q->size; ++i) {
    const int32_t k = q->support[i];
    real cy = FROM(0.0);
    for (int32_t j = 0; j < q->size; ++j) {
      const int32_t m = q->support[j];
      cy = ADD(cy, MULD(s->y[m], q->c[(size_t)k * q->n + m]));
    }
    sum_ycy = ADD(sum_ycy, MUL(s->y[k], cy));
    sum_ay = ADD(sum_ay, MULD(s->y[k], q->a[k]));
    s->p[i] = FROM(q->a[k]);
  }
  NAME(solve_lower)(s, s->p);
  for (int32_t i = 0; i < q->size; ++i) sum_as = ADD(sum_as, MUL(s->p[i], s->p[i]));
  *ycy = TO_DD(sum_ycy);
  *ay = TO_DD(sum_ay);
  *as = TO_DD(sum_as);
}
