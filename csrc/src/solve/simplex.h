/* simplex.h - quadratic programmes over the simplex, for MGDA and CAGrad. Private. */
#ifndef FLATMTL_SIMPLEX_H
#define FLATMTL_SIMPLEX_H

#include <stdint.h>

#include "flatmtl.h"

/* minimise y'Cy / 2 + t r'y subject to u'y = 1, y >= 0, with C the cosine matrix of n rows without zeros, u > 0 with a
 * largest entry of 1, t >= 0, and r in the range of C (inner products of a vector with the unit rows).
 *  y        [n], in: a feasible start, or all 0; out: the minimum
 *  work     fm_simplex_work(n) doubles, shared by the calls below
 * ERROR_INTERNAL if the steps did not come to an end. */
flatmtl_status fm_simplex_minimum(int32_t n, const double *c, const double *u, const double *r, double t, double *y,
                                  double *work);

/* On the support of y, that is with the other entries 0 and without y >= 0, the minimum is p + t q for every t. */
void fm_simplex_line(int32_t n, const double *c, const double *u, const double *r, const double *y, double *p,
                     double *q, double *work);

#define FM_SIMPLEX_WORK(n) ((size_t)(n) * (size_t)(n) + 10 * (size_t)(n))

#endif
