/* newton.h - what the Newton iterations of Nash-MTL and FairGrad share. Private. */
#ifndef FLATMTL_NEWTON_H
#define FLATMTL_NEWTON_H

#include <stdint.h>

#include "flatmtl.h"

/* The cosine matrix of the rows with G_ii > 0, packed.
 *  c      [n * n], out: C = D^-1 G D^-1, [m * m] row-major at its start
 *  d      [n], out: sqrt(G_ii) of the m rows
 *  index  [n], out: their numbers in G
 *  work   n doubles
 * Returns m. */
int32_t fm_nonzero_cosines(int32_t n, const double *gramian, double *c, double *d, int32_t *index, double *work);

/* x = (S C S + I)^-1 x with S = diag(s), C positive semidefinite up to rounding, by Cholesky with pivoting. What
 * remains of C below the rounding errors of the factorisation counts as 0. factor       [n * n], scratch permutation
 * [n], scratch work         n doubles */
void fm_solve_shifted(int32_t n, const double *c, const double *s, double *x, double *factor, int32_t *permutation,
                      double *work);

/* y = Cy and a = |C|y in one pass, for y > 0. */
void fm_products(int32_t n, const double *c, const double *y, double *cy, double *abs_cy);

/* The y > 0 with y_i (Cy)_i = 1 for a cosine matrix C of n rows: Nash-MTL in scaled variables.
 *  y      [n], out; undefined unless OK is returned
 *  work   n * n + 6 n doubles
 *  index  n integers
 * PARETO_STATIONARY: there is a v >= 0, v != 0, with Cv = 0 up to rounding. */
flatmtl_status fm_nash_point(int32_t n, const double *c, double *y, double *work, int32_t *index);

#endif
