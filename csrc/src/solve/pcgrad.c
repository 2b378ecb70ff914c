/* pcgrad.c - PCGrad (Yu et al., 2001.06782), summed over tasks.
 *
 * Every gradient g_i is projected, in a random order of the others, onto the normal plane of each g_j it conflicts with
 * at that moment; always against the original g_j. In coefficients c of the original gradients: with p = (G c)_j < 0,
 * c_j -= p / G_jj. The weights are the sum of the K coefficient vectors. */
#include "solve.h"

/* Counter-based random numbers, so that every rank and every resumption draws the same: a hash of (seed, draw, call,
 * row) starts a SplitMix64 sequence. */
static const uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static uint64_t start_sequence(uint64_t seed, uint64_t draw, uint64_t call, uint64_t row) {
  uint64_t h = mix(seed + GOLDEN);
  h = mix(h ^ (draw + GOLDEN));
  h = mix(h ^ (call + GOLDEN));
  return mix(h ^ (row + GOLDEN));
}

/* Writes the tasks other than row in random order (Fisher-Yates). */
static void shuffle_others(uint64_t sequence, int32_t row, int32_t num_tasks, double *order) {
  int32_t count = 0;
  for (int32_t j = 0; j < num_tasks; ++j) {
    if (j != row) order[count++] = j;
  }
  for (int32_t m = count - 1; m >= 1; --m) {
    sequence += GOLDEN;
    int32_t other = (int32_t)(mix(sequence) % ((uint64_t)m + 1));
    double swapped = order[m];
    order[m] = order[other];
    order[other] = swapped;
  }
}

flatmtl_status fm_solve_pcgrad(const fm_solve *solve, double *weights) {
  int32_t n = solve->num_tasks;
  double *order = solve->work, *c = order + n;
  uint64_t seed = (uint64_t)solve->options[0], draw = (uint64_t)solve->options[1];
  for (int32_t i = 0; i < n; ++i) weights[i] = 0.0;
  for (int32_t row = 0; row < n; ++row) {
    shuffle_others(start_sequence(seed, draw, solve->call, (uint64_t)row), row, n, order);
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
