/* pseudo.h - what IMTL-G and ConFIG share: solutions with a cosine matrix C, n x n, unit diagonal. Private. */
#ifndef FLATMTL_PSEUDO_H
#define FLATMTL_PSEUDO_H

#include <stdint.h>

/* Solves Cx = 1 by Cholesky with refinement; 0 if C is singular up to rounding. factor [n * n] and r [n] are scratch.
 */
int fm_solve_ones(int32_t n, const double *c, double *factor, double *x, double *r);

/* w = (D C D)^+ d for a C that is singular; 0 if that is 0.
 *
 * C = L L' with L of full column rank r, so D C D = B B' with B = D L, and (B B')^+ d = B (B'B)^-2 B'd = Q R^-T R^-1
 * Q'd with B = QR by Householder's reflections, rows in the order of their lengths and columns pivoted: that way short
 * rows keep their relative accuracy beside long ones (Cox and Higham 1998).
 *
 * c is overwritten; b [n * n], permutation [2 n] and scratch [4 n] are scratch. */
int fm_solve_deficient(int32_t n, double *c, const double *d, double *w, double *b, int32_t *permutation,
                       double *scratch);

#endif
