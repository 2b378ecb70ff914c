/* order.h - random orders of the tasks, for PCGrad and GradVac. Private. */
#ifndef FLATMTL_ORDER_H
#define FLATMTL_ORDER_H

#include "../random.h"

/* Writes the tasks other than row in random order (Fisher-Yates). order has num_tasks - 1 entries. */
static inline void fm_shuffle_others(uint64_t sequence, int32_t row, int32_t num_tasks, double *order) {
  int32_t count = 0;
  for (int32_t j = 0; j < num_tasks; ++j) {
    if (j != row) order[count++] = j;
  }
  for (int32_t m = count - 1; m >= 1; --m) {
    sequence += FM_GOLDEN;
    int32_t other = (int32_t)(fm_mix(sequence) % ((uint64_t)m + 1));
    double swapped = order[m];
    order[m] = order[other];
    order[other] = swapped;
  }
}

#endif
