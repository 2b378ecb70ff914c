/* eigen.h - eigenvalues of small symmetric matrices. Private. */
#ifndef FLATMTL_EIGEN_H
#define FLATMTL_EIGEN_H

#include <stdint.h>

/* A = V diag(values) V' by cyclic Jacobi rotations.
 *  a        [n * n], both triangles; overwritten
 *  values   [n], out, in no order
 *  vectors  [n * n], out: column j belongs to values[j] */
void fm_eigen(int32_t n, double *a, double *values, double *vectors);

#endif
