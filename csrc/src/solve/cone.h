/* cone.h - projection on the dual cone {u: <g_j, u> >= 0 for all j}, for UPGrad and DualProj. Private. */
#ifndef FLATMTL_CONE_H
#define FLATMTL_CONE_H

#include "flatmtl.h"
#include "quadprog.h"

/* y = argmin (o+y)'C(o+y) over y >= 0, for the offset o >= 0 that is set: SUM_j (o+y)_j g_j / D_j is the projection of
 * SUM_j o_j g_j / D_j. scratch: n doubles. ERROR_INTERNAL if C is not positive semidefinite up to rounding. */
flatmtl_status fm_project(fm_quadprog *problem, double *scratch);

#endif
