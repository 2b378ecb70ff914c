/* quadprog.h - the convex quadratic program behind MGDA, CAGrad, UPGrad and DualProj. Private.
 *
 *   minimise  1/2 (o+y)' C (o+y) + kappa/2 (a'y)^2 - mu a'y   over y >= 0
 *
 * C = D^-1 G D^-1 is the Gramian equilibrated by powers of two (nothing is rounded), a = D^-1 1 divided by its largest
 * entry. Optimal where, with r = C(o+y) + (kappa a'y - mu) a:  y >= 0, r >= 0, y'r = 0.
 *
 * Solved by a primal active-set method on a Cholesky factor of the support, which takes in one index at a time along
 * the direction that keeps the gradient on the support at 0 (Keller 1973; with support and constraint exchanged, Wolfe
 * 1976). Curvature that is not positive up to rounding is followed to the bound it meets, so that singular C, and C
 * that is positive semidefinite up to rounding alone, need no regularisation. The objective falls at every support, so
 * none comes twice. The method runs in double first, and again in double-double from there if the result does not pass.
 */
#ifndef FLATMTL_QUADPROG_H
#define FLATMTL_QUADPROG_H

#include <stddef.h>
#include <stdint.h>

#include "linalg.h"

typedef enum fm_quadprog_outcome {
  FM_QUADPROG_SOLVED = 0,
  FM_QUADPROG_UNDECIDED, /* the arithmetic is too coarse, or the limit of iterations is met; y >= 0 all the same */
  FM_QUADPROG_RAY        /* the objective falls without end, along y + t ray, up to rounding */
} fm_quadprog_outcome;

typedef enum fm_precision { FM_DOUBLE, FM_DOUBLE_DOUBLE } fm_precision;

typedef struct fm_quadprog {
  int32_t n;
  int32_t num_zero;   /* rows with G_ii = 0: they keep y_i = 0 */
  int32_t size;       /* of the support */
  int32_t *exponents; /* [n] D_ii = 2^exponent */
  int32_t *support;   /* [n] indices, in the order of the factor; read at the start, written at the end */
  double *c;          /* [n * n] */
  double *a;          /* [n] 2^(smallest exponent - exponent_i), 0 for zero rows */
  double kappa;       /* a power of two, or 0 */
  fm_dd mu;
  fm_dd *c_offset;      /* [n] C o */
  double *abs_c_offset; /* [n] |C| |o| */
  double *y;            /* [n] solution in FM_DOUBLE; a start if size > 0 */
  fm_dd *y_dd;          /* [n] solution in FM_DOUBLE_DOUBLE */
  double *ray;          /* [n] */
  double *scale;        /* [n] (|C| |o+y|)_i */
  double *factor;       /* [2 n * n] */
  double *vectors;      /* [6 n] */
} fm_quadprog;

/* Doubles of work. */
size_t fm_quadprog_work(int32_t n);

/* Sets C, a and the pointers into work; o = 0, kappa = 0, mu = 0, y = 0, size = 0. */
void fm_quadprog_init(fm_quadprog *problem, int32_t n, const double *gramian, double *work);

/* Sets C o and |C| |o|. */
void fm_quadprog_offset(fm_quadprog *problem, const double *offset);

/* Starts from y and the support (size 0: from y = 0). FM_DOUBLE_DOUBLE starts from y and writes y_dd, and y rounded. */
fm_quadprog_outcome fm_quadprog_solve(fm_quadprog *problem, fm_precision precision);

/* At a solution, how y'Cy depends on mu while the support stays: y(mu + t) = y + t s with C s = a on the support.
 * Gives y'Cy, a'y = s'Cy and a's = s'Cs. kappa must be 0. */
void fm_quadprog_path(fm_quadprog *problem, fm_precision precision, fm_dd *ycy, fm_dd *ay, fm_dd *as);

#endif
