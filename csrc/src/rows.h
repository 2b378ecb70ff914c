/* rows.h - vectors in pieces: argument checks, a cursor over the segments, the partition among threads. Private. */
#ifndef FM_ROWS_H
#define FM_ROWS_H

#include <stddef.h>
#include <stdint.h>

#include "flatmtl.h"
#include "status.h"

/* Bytes of an element; 0 if the dtype is unknown. */
size_t fm_dtype_size(flatmtl_dtype dtype);

/* A vector as one row. */
flatmtl_rows fm_as_rows(const flatmtl_vector *vector);

/* Length of the rows; the table has been checked. */
int64_t fm_total_length(const flatmtl_rows *rows);

/* ------------------------------------------------------------------------------------------------------------------
 * Checks. Each returns OK or fills error, naming argument.
 */

/* Pointers, dtype, counts and lengths of rows; num_rows must be `rows_wanted`, or anything from 1 to FLATMTL_MAX_TASKS
 * if that is 0. */
flatmtl_status fm_check_rows(const flatmtl_rows *rows, int32_t rows_wanted, const char *argument, flatmtl_error *error);

flatmtl_status fm_check_vector(const flatmtl_vector *vector, const char *argument, flatmtl_error *error);

/* dtype and segment table of rows equal those of reference; both have been checked. */
flatmtl_status fm_check_same_table(const flatmtl_rows *reference, const flatmtl_rows *rows, const char *argument,
                                   flatmtl_error *error);

/* Rows beside a vector, both checked: the table is one, and the dtype too unless the vector is F32 and the rows are
 * BF16 or F16. The error is about `named`, which is one of the two. */
flatmtl_status fm_check_beside(const flatmtl_rows *vector, const flatmtl_rows *rows, const flatmtl_rows *named,
                               const char *argument, flatmtl_error *error);

/* values[n] is not NULL and finite; the error's row is the index. */
flatmtl_status fm_check_finite(const double *values, int64_t n, const char *argument, flatmtl_error *error);

/* context and a workspace for num_tasks tasks. */
flatmtl_status fm_check_context(const flatmtl_context *context, int32_t num_tasks, flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Overlap
 */

/* `count` structs of type flatmtl_rows or flatmtl_vector, contiguous in memory. */
typedef struct fm_buffers {
  const char *argument;
  const flatmtl_rows *rows;      /* either these */
  const flatmtl_vector *vectors; /* or these */
  int64_t count;
} fm_buffers;

/* No two segments of outputs overlap, and none overlaps a segment of inputs. O((m + n) log m) for m segments of outputs
 * and n of inputs, in passes of as many output segments as the scratch memory holds. The error names the buffer, row
 * and segment that overlaps an output. scratch may be NULL. */
flatmtl_status fm_check_overlap(const fm_buffers *outputs, int num_outputs, const fm_buffers *inputs, int num_inputs,
                                void *scratch, size_t scratch_size, flatmtl_error *error);

/* [begin, begin + bytes) overlaps no segment of rows. */
flatmtl_status fm_check_outside(const void *begin, size_t bytes, const flatmtl_rows *rows, const char *argument,
                                flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Cursor: a position in the concatenation of the segments
 */

/* segment is the first with elements left, num_segments at the end. */
typedef struct fm_cursor {
  const int64_t *lengths;
  int64_t num_segments;
  int64_t segment;
  int64_t offset;
} fm_cursor;

/* O(num_segments). */
fm_cursor fm_cursor_at(const flatmtl_rows *rows, int64_t position);

/* Elements left in the current segment, 0 at the end. */
static inline int64_t fm_cursor_room(const fm_cursor *cursor) {
  return cursor->segment < cursor->num_segments ? cursor->lengths[cursor->segment] - cursor->offset : 0;
}

/* n may be more than the current segment has left. */
static inline void fm_cursor_advance(fm_cursor *cursor, int64_t n) {
  cursor->offset += n;
  while (cursor->segment < cursor->num_segments && cursor->offset >= cursor->lengths[cursor->segment]) {
    cursor->offset -= cursor->lengths[cursor->segment];
    cursor->segment++;
  }
}

static inline const char *fm_row_at(const flatmtl_rows *rows, int64_t row, const fm_cursor *cursor, size_t size) {
  return (const char *)rows->data[row * rows->num_segments + cursor->segment] + (size_t)cursor->offset * size;
}

/* flatmtl_perturb with scale[segment * scale_stride]. */
flatmtl_status fm_perturb(const flatmtl_context *context, const flatmtl_vector *params, const flatmtl_rows *saved,
                          const flatmtl_rows *gradient, const double *scale, int64_t scale_stride, int adaptive,
                          double eta, flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Threads
 */

/* fn over [0, n), in parallel if the context can and there is more than one grain. */
void fm_parallel(const flatmtl_context *context, int64_t n, int64_t grain, flatmtl_range_fn fn, void *arg);

#endif
