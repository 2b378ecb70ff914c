#include "status.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#define FM_STRING_(x) #x
#define FM_STRING(x) FM_STRING_(x)

flatmtl_status fm_fail(flatmtl_error *error, flatmtl_status status, const char *argument, int64_t row, int64_t segment,
                       double value) {
  if (error) {
    error->status = status;
    error->argument = argument;
    error->row = row;
    error->segment = segment;
    error->value = value;
  }
  return status;
}

static const char *describe(flatmtl_status status) {
  switch (status) {
    case FLATMTL_OK:
      return "no error";
    case FLATMTL_PARETO_STATIONARY:
      return "no finite weights exist, all weights are 0 (Pareto-stationary)";
    case FLATMTL_ERROR_NULL:
      return "is NULL";
    case FLATMTL_ERROR_NUM_TASKS:
      return "the number of tasks or rows is out of range";
    case FLATMTL_ERROR_SIZE:
      return "a length or count is negative, or memory is too small or not aligned to 64 bytes";
    case FLATMTL_ERROR_DTYPE:
      return "the dtype is unknown or differs from that of another argument";
    case FLATMTL_ERROR_MISMATCH:
      return "the segment table or the number of rows differs from that of another argument";
    case FLATMTL_ERROR_OVERLAP:
      return "an output overlaps an input or another output";
    case FLATMTL_ERROR_NAME:
      return "unknown method, mode or instruction set";
    case FLATMTL_ERROR_OPTION:
      return "wrong number of options, or a value out of range";
    case FLATMTL_ERROR_NONFINITE:
      return "Inf or NaN";
    case FLATMTL_ERROR_ORDER:
      return "called out of order";
    case FLATMTL_ERROR_LOSS:
      return "a loss is outside the range that the method is defined for";
    case FLATMTL_ERROR_INTERNAL:
      return "a solve did not reach its tolerance (a bug in flatmtl, please report it)";
  }
  return "unknown status";
}

/* Appends to buffer[*used ..), keeping it NUL-terminated and *used < size. */
static void append(char *buffer, size_t size, size_t *used, const char *format, ...) {
  va_list args;
  va_start(args, format);
  int written = vsnprintf(buffer + *used, size - *used, format, args);
  va_end(args);
  if (written > 0) {
    size_t room = size - *used - 1;
    *used += (size_t)written < room ? (size_t)written : room;
  }
}

flatmtl_status flatmtl_error_message(const flatmtl_error *error, char *buffer, size_t size) {
  if (!error || !buffer) return FLATMTL_ERROR_NULL;
  if (size == 0) return FLATMTL_ERROR_SIZE;
  size_t used = 0;
  buffer[0] = '\0';
  if (error->argument) append(buffer, size, &used, "%s: ", error->argument);
  append(buffer, size, &used, "%s", describe(error->status));
  const char *separator = " (";
  if (error->row >= 0) {
    append(buffer, size, &used, "%srow %" PRId64, separator, error->row);
    separator = ", ";
  }
  if (error->segment >= 0) {
    append(buffer, size, &used, "%ssegment %" PRId64, separator, error->segment);
    separator = ", ";
  }
  /* A NaN value is shown only where it is what is wrong. */
  if (!isnan(error->value) || (error->status == FLATMTL_ERROR_NONFINITE && error->row >= 0)) {
    append(buffer, size, &used, "%svalue %.17g", separator, error->value);
    separator = ", ";
  }
  if (separator[0] == ',') append(buffer, size, &used, ")");
  return FLATMTL_OK;
}

const char *flatmtl_version(void) {
  return FM_STRING(FLATMTL_VERSION_MAJOR) "." FM_STRING(FLATMTL_VERSION_MINOR) "." FM_STRING(FLATMTL_VERSION_PATCH);
}
