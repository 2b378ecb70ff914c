/* mgda.h - the point of least norm, which CAGrad asks for too. Private. */
#ifndef FLATMTL_MGDA_H
#define FLATMTL_MGDA_H

#include "flatmtl.h"
#include "quadprog.h"

/* Optimality residual that a solve in double may leave before it is done again in double-double. */
#define FM_ACCEPTED 1e-11

/* y = argmin y'Cy over y >= 0, a'y = 1. Sets kappa, mu and the support; no row is zero and no offset is set.
 * ERROR_INTERNAL if the residual is above 1e-9: C is not positive semidefinite up to rounding. */
flatmtl_status fm_least_norm(fm_quadprog *problem);

#endif
