#include "pack.h"

#include <string.h>

enum { FM_LEAST_DIRECT = 64 }; /* shorter pieces of segments are packed */

void fm_gather(const flatmtl_rows *rows, int64_t row, fm_cursor cursor, int64_t n, void *to) {
  const size_t size = fm_dtype_size(rows->dtype);
  char *out = to;
  for (int64_t done = 0; done < n;) {
    const int64_t room = fm_cursor_room(&cursor), take = room < n - done ? room : n - done;
    memcpy(out, fm_row_at(rows, row, &cursor, size), (size_t)take * size);
    fm_cursor_advance(&cursor, take);
    out += (size_t)take * size;
    done += take;
  }
  if (n % FM_LANES != 0) memset(out, 0, (size_t)(FM_LANES - n % FM_LANES) * size);
}

void fm_pack(const fm_kernels *kernels, const flatmtl_rows *rows, const flatmtl_rows *perturbed, int64_t row,
             fm_cursor cursor, int64_t n, void *to) {
  const flatmtl_dtype dtype = rows->dtype;
  const size_t size = fm_dtype_size(dtype), wide = dtype == FLATMTL_F64 ? 8 : 4;
  if (!perturbed && size == wide) {
    fm_gather(rows, row, cursor, n, to);
    return;
  }
  char *out = to;
  for (int64_t done = 0; done < n;) {
    const int64_t room = fm_cursor_room(&cursor), take = room < n - done ? room : n - done;
    const void *g = fm_row_at(rows, row, &cursor, size);
    const void *s = perturbed ? fm_row_at(perturbed, row, &cursor, size) : NULL;
    float *narrow = (float *)(void *)out;
    switch (dtype) {
      case FLATMTL_F32:
        kernels->diff_f32(s, g, take, narrow);
        break;
      case FLATMTL_F64:
        kernels->diff_f64(s, g, take, (double *)(void *)out);
        break;
      case FLATMTL_BF16:
        if (s) {
          kernels->diff_bf16(s, g, take, narrow);
        } else {
          kernels->widen_bf16(g, take, narrow);
        }
        break;
      case FLATMTL_F16:
        if (s) {
          kernels->diff_f16(s, g, take, narrow);
        } else {
          kernels->widen_f16(g, take, narrow);
        }
        break;
    }
    fm_cursor_advance(&cursor, take);
    out += (size_t)take * wide;
    done += take;
  }
  if (n % FM_LANES != 0) memset(out, 0, (size_t)(FM_LANES - n % FM_LANES) * wide);
}

int64_t fm_piece(fm_cursor cursor, int64_t n, int *direct) {
  int64_t length = 0;
  while (length < n) {
    const int64_t room = fm_cursor_room(&cursor), left = n - length, take = room < left ? room : left;
    const int64_t skip = (FM_LANES - length % FM_LANES) % FM_LANES; /* to whole lanes */
    const int64_t whole = (take - skip) / FM_LANES * FM_LANES;
    if (take > skip && (whole >= FM_LEAST_DIRECT || whole == left)) {
      *direct = length == 0;
      return length == 0 ? whole : length + skip;
    }
    length += take;
    fm_cursor_advance(&cursor, take);
  }
  *direct = 0;
  return n;
}
