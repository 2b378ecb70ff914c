#include "quadprog.h"

/* Accepted residual, relative to (|C| |o+y|)_i */
#define TOLERANCE 0x1p-43

#define real double
#define NAME(x) x##_double
#define FROM(d) (d)
#define FROM_DD(x) ((x).hi)
#define TO_DD(x) fm_dd_make(x, 0.0)
#define HI(x) (x)
#define ADD(x, y) ((x) + (y))
#define SUB(x, y) ((x) - (y))
#define MUL(x, y) ((x) * (y))
#define MULD(x, d) ((x) * (d))
#define DIV(x, y) ((x) / (y))
#define SQRT(x) sqrt(x)
#define ROUNDING 0x1p-51
#define REFINED 0x1p-48
#define MAY_GIVE_UP 1
#include "quadprog_body.h"
#undef real
#undef NAME
#undef FROM
#undef FROM_DD
#undef TO_DD
#undef HI
#undef ADD
#undef SUB
#undef MUL
#undef MULD
#undef DIV
#undef SQRT
#undef ROUNDING
#undef REFINED
#undef MAY_GIVE_UP

#define real fm_dd
#define NAME(x) x##_dd
#define FROM(d) fm_dd_make(d, 0.0)
#define FROM_DD(x) (x)
#define TO_DD(x) (x)
#define HI(x) ((x).hi)
#define ADD(x, y) fm_dd_add(x, y)
#define SUB(x, y) fm_dd_sub(x, y)
#define MUL(x, y) fm_dd_mul(x, y)
#define MULD(x, d) fm_dd_mul_d(x, d)
#define DIV(x, y) fm_dd_div(x, y)
#define SQRT(x) fm_dd_sqrt(x)
#define ROUNDING 0x1p-98
#define REFINED 0x1p-88
#define MAY_GIVE_UP 0
#include "quadprog_body.h"

size_t fm_quadprog_work(int32_t n) {
  return 3 * (size_t)n * n + 16 * (size_t)n;
}

void fm_quadprog_init(fm_quadprog *q, int32_t n, const double *gramian, double *work) {
  size_t m = (size_t)n;
  *q = (fm_quadprog){.n = n};
  q->c = work, work += m * m;
  q->factor = work, work += 2 * m * m;
  q->vectors = work, work += 4 * m;
  q->y_dd = (fm_dd *)work, work += 2 * m;
  q->c_offset = (fm_dd *)work, work += 2 * m;
  q->a = work, work += m;
  q->abs_c_offset = work, work += m;
  q->y = work, work += m;
  q->ray = work, work += m;
  q->scale = work, work += m;
  q->exponents = (int32_t *)work, work += m;
  q->support = (int32_t *)work;
  q->num_zero = fm_equilibrate(n, gramian, q->c, q->exponents);
  int32_t smallest = INT32_MAX;
  for (int32_t i = 0; i < n; ++i) {
    if (q->c[(size_t)i * n + i] > 0.0 && q->exponents[i] < smallest) smallest = q->exponents[i];
  }
  for (int32_t i = 0; i < n; ++i) {
    q->a[i] = q->c[(size_t)i * n + i] > 0.0 ? ldexp(1.0, smallest - q->exponents[i]) : 0.0;
    q->c_offset[i] = fm_dd_make(0.0, 0.0);
    q->abs_c_offset[i] = q->y[i] = 0.0;
  }
}

void fm_quadprog_offset(fm_quadprog *q, const double *offset) {
  fm_abs_matvec(q->n, q->c, q->n, offset, q->abs_c_offset);
  for (int32_t i = 0; i < q->n; ++i) q->c_offset[i] = fm_dot_dd(q->n, q->c + (size_t)i * q->n, offset);
}

static state_double view_double(fm_quadprog *q) {
  return (state_double){q, q->factor, q->y, q->vectors, q->vectors + q->n};
}

static state_dd view_dd(fm_quadprog *q) {
  return (state_dd){q, (fm_dd *)q->factor, q->y_dd, (fm_dd *)q->vectors, (fm_dd *)q->vectors + q->n};
}

fm_quadprog_outcome fm_quadprog_solve(fm_quadprog *q, fm_precision precision) {
  if (precision == FM_DOUBLE) {
    state_double state = view_double(q);
    return solve_double(&state);
  }
  for (int32_t i = 0; i < q->n; ++i) q->y_dd[i] = fm_dd_make(q->y[i], 0.0);
  state_dd state = view_dd(q);
  fm_quadprog_outcome outcome = solve_dd(&state);
  for (int32_t i = 0; i < q->n; ++i) q->y[i] = q->y_dd[i].hi;
  return outcome;
}

void fm_quadprog_path(fm_quadprog *q, fm_precision precision, fm_dd *ycy, fm_dd *ay, fm_dd *as) {
  if (precision == FM_DOUBLE) {
    state_double state = view_double(q);
    path_double(&state, ycy, ay, as);
  } else {
    state_dd state = view_dd(q);
    path_dd(&state, ycy, ay, as);
  }
}
