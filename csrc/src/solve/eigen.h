/* eigen.h - eigenvalues and eigenvectors of a symmetric matrix. Private. */
#ifndef FLATMTL_EIGEN_H
#define FLATMTL_EIGEN_H

#include <stdint.h>

/* A = V' diag(values) V, the rows of V orthonormal; values in no order. Backward stable: the result is exact for a
 * matrix within a few units of rounding of the norm of A. Entries below about 1e-140 of the largest are dropped. a [n *
 * n], both triangles, entries of about 1; overwritten v       [n * n], out values  [n], out work    2 n doubles Returns
 * 0 if it does not converge. */
int fm_eigen(int32_t n, double *a, double *v, double *values, double *work);

#endif
