/* Overlap of buffers, without allocation: the outputs' segments are sorted by address, a batch at a time, and every
 * other segment is looked up among them. */
#include "rows.h"

typedef struct span {
  uintptr_t begin, end;
} span;

enum { LOCAL_SPANS = 256 };

/* One segment after another of a list of buffers; empty segments are left out. */
typedef struct walk {
  const fm_buffers *buffers;
  int num_buffers;
  int buffer;
  int64_t item, row, segment; /* the next one */
  int at_buffer;              /* where the last span came from */
  int64_t at_row, at_segment;
} walk;

static walk walk_start(const fm_buffers *buffers, int num_buffers) {
  walk w = {buffers, num_buffers, 0, 0, 0, 0, 0, 0, 0};
  return w;
}

static int walk_next(walk *w, span *next) {
  for (; w->buffer < w->num_buffers; w->buffer++, w->item = 0) {
    const fm_buffers *b = &w->buffers[w->buffer];
    for (; w->item < b->count; w->item++, w->row = 0) {
      const flatmtl_rows rows = b->rows ? b->rows[w->item] : fm_as_rows(&b->vectors[w->item]);
      const size_t size = fm_dtype_size(rows.dtype);
      /* A table without segments may be all zero, its number of rows too. */
      for (; rows.num_segments > 0 && w->row < rows.num_rows; w->row++, w->segment = 0) {
        while (w->segment < rows.num_segments) {
          const int64_t t = w->segment++;
          if (rows.lengths[t] == 0) continue;
          next->begin = (uintptr_t)rows.data[w->row * rows.num_segments + t];
          next->end = next->begin + (uintptr_t)rows.lengths[t] * size;
          w->at_buffer = w->buffer;
          w->at_row = b->count > 1 ? w->item : w->row;
          w->at_segment = t;
          return 1;
        }
      }
    }
  }
  return 0;
}

static flatmtl_status overlap_at(const walk *w, flatmtl_error *error) {
  return fm_fail(error, FLATMTL_ERROR_OVERLAP, w->buffers[w->at_buffer].argument, w->at_row, w->at_segment, NAN);
}

/* Shell sort: in place, no recursion, and fast where the order is nearly right, as allocators leave it. */
static void sort(span *spans, int64_t n) {
  int64_t gap = 1, sorted = 1;
  while (sorted < n && spans[sorted - 1].begin <= spans[sorted].begin) sorted++;
  if (sorted >= n) return;
  while (gap < n / 9) gap = 3 * gap + 1;
  for (; gap > 0; gap /= 3)
    for (int64_t i = gap; i < n; i++) {
      const span moving = spans[i];
      int64_t j = i;
      for (; j >= gap && spans[j - gap].begin > moving.begin; j -= gap) spans[j] = spans[j - gap];
      spans[j] = moving;
    }
}

/* Among disjoint sorted spans. `near` is where the last query was answered: the next one usually belongs there, or one
 * further, as most vectors lie in memory in the same order. */
static int hits(const span *spans, int64_t n, span query, int64_t *near) {
  for (int64_t at = *near; at < n && at < *near + 2; at++)
    if ((at == 0 || spans[at].begin < query.end) && (at + 1 == n || spans[at + 1].begin >= query.end)) {
      *near = at;
      return spans[at].begin < query.end && query.begin < spans[at].end;
    }
  const span *base = spans;
  while (n > 1) {
    const int64_t half = n / 2;
    base = base[half].begin < query.end ? base + half : base;
    n -= half;
  }
  *near = base - spans;
  return base->begin < query.end && query.begin < base->end;
}

flatmtl_status fm_check_overlap(const fm_buffers *outputs, int num_outputs, const fm_buffers *inputs, int num_inputs,
                                void *scratch, size_t scratch_size, flatmtl_error *error) {
  span local[LOCAL_SPANS];
  span *batch = local;
  int64_t room = LOCAL_SPANS;
  if (scratch && scratch_size / sizeof(span) > LOCAL_SPANS) {
    batch = scratch;
    room = (int64_t)(scratch_size / sizeof(span));
  }
  walk first = walk_start(outputs, num_outputs);
  for (;;) {
    int64_t n = 0;
    while (n < room && walk_next(&first, &batch[n])) n++;
    if (n == 0) return FLATMTL_OK;
    sort(batch, n);
    for (int64_t i = 1; i < n; i++)
      if (batch[i - 1].end > batch[i].begin) {
        /* Sorting has lost whose it is: find it. */
        walk w = walk_start(outputs, num_outputs);
        span other;
        while (walk_next(&w, &other) && other.begin != batch[i].begin) continue;
        return overlap_at(&w, error);
      }
    span other;
    int64_t near = 0;
    for (walk rest = first; walk_next(&rest, &other);)
      if (hits(batch, n, other, &near)) return overlap_at(&rest, error);
    for (walk in = walk_start(inputs, num_inputs); walk_next(&in, &other);)
      if (hits(batch, n, other, &near)) return overlap_at(&in, error);
  }
}

flatmtl_status fm_check_outside(const void *begin, size_t bytes, const flatmtl_rows *rows, const char *argument,
                                flatmtl_error *error) {
  const span output = {(uintptr_t)begin, (uintptr_t)begin + bytes};
  const fm_buffers buffers = {argument, rows, NULL, 1};
  walk w = walk_start(&buffers, 1);
  for (span s; walk_next(&w, &s);)
    if (output.begin < s.end && s.begin < output.end) return overlap_at(&w, error);
  return FLATMTL_OK;
}
