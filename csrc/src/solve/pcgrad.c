/* pcgrad.c - PCGrad (Yu et al., 2001.06782), summed over tasks.
 *
 * Every gradient g_i is projected, in a random order of the others, onto the normal plane of each g_j it conflicts with
 * at that moment; always against the original g_j. In coefficients c of the original gradients: with p = (G c)_j < 0,
 * c_j -= p / G_jj. The weights are the sum of the K coefficient vectors. */
#include "order.h"
#include "solve.h"

flatmtl_status fm_solve_pcgrad(const fm_solve *solve, double *weights) {
  int32_t n = solve->num_tasks;
  double *order = solve->work, *c = order + n;
  uint64_t seed = (uint64_t)solve->options[0], draw = (uint64_t)solve->options[1];
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  for (int32_t row = 0; row < n; ++row) {
    fm_shuffle_others(fm_start_sequence(seed, draw, solve->call, (uint64_t)row), row, n, order);
    for (int32_t j = 0; j < n; ++j) c[j] = j == row ? 1.0 : 0.0;
    for (int32_t k = 0; k < n - 1; ++k) {
      int32_t j = (int32_t)order[k];
      const double *gramian_row = solve->gramian + (size_t)j * n;
      double product = 0.0;
      for (int32_t i = 0; i < n; ++i) product += gramian_row[i] * c[i];
      if (product < 0.0 && gramian_row[j] > 0.0) c[j] -= product / gramian_row[j];
    }
    for (int32_t j = 0; j < n; ++j) weights[j] += c[j];
  }
  return FLATMTL_OK;
}
