/* status.h - filling in errors. Private. */
#ifndef FM_STATUS_H
#define FM_STATUS_H

#include <math.h>
#include <stdint.h>

#include "flatmtl.h"

/* Fills *error, if there is one, and returns status. argument is a string literal or NULL; row and segment are -1 and
 * value is NAN where they do not apply. */
flatmtl_status fm_fail(flatmtl_error *error, flatmtl_status status, const char *argument, int64_t row, int64_t segment,
                       double value);

#endif
