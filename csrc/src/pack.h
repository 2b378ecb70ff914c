/* pack.h - elements of rows as kernels want them: in one piece, F32 or F64, in whole lanes. Private. */
#ifndef FM_PACK_H
#define FM_PACK_H

#include <stddef.h>
#include <stdint.h>

#include "flatmtl.h"
#include "kernels.h"
#include "rows.h"

/* n elements of a row at the cursor into `to`, F64 for rows of F64 and F32 for the rest, padded with zeros to whole
 * lanes. With perturbed, the difference perturbed - rows. */
void fm_pack(const fm_kernels *kernels, const flatmtl_rows *rows, const flatmtl_rows *perturbed, int64_t row,
             fm_cursor cursor, int64_t n, void *to);

/* n elements of a row at the cursor into `to` as they are, padded with zeros to whole lanes. */
void fm_gather(const flatmtl_rows *rows, int64_t row, fm_cursor cursor, int64_t n, void *to);

/* How many of the next n elements can be read where they lie (direct), a multiple of FM_LANES, or else have to be
 * packed before that is so again: a multiple of FM_LANES too, or n. */
int64_t fm_piece(fm_cursor cursor, int64_t n, int *direct);

#endif
