/* aligned_mtl.c - Aligned-MTL (Senushkin et al., CVPR 2023): the gradients' singular values are made equal.
 *
 * With G = V'LV and r eigenvalues l_1 >= .. >= l_r above the tolerance, B = s^(1/2) V' L^(-1/2) V on those: the rows of
 * B g are orthogonal with square s, BGB = s I on their span. w = B 1, and s = l_r (0), the lower median (1) or the mean
 * (2) of the r. Zero rows are left out. */
#include <math.h>
#include <stddef.h>

#include "eigen.h"
#include "solve.h"

enum { SCALE_LEAST = 0, SCALE_MEDIAN = 1 };

/* The m eigenvalues above the bound, ascending; returns m. */
static int32_t keep(int32_t n, const double *values, double bound, double *kept) {
  int32_t m = 0;
  for (int32_t i = 0; i < n; ++i) {
    if (!(values[i] > bound)) continue;
    int32_t k = m++;
    for (; k > 0 && kept[k - 1] > values[i]; --k) kept[k] = kept[k - 1];
    kept[k] = values[i];
  }
  return m;
}

static double choose_scale(double option, int32_t m, const double *kept) {
  if (option == SCALE_LEAST) return kept[0];
  if (option == SCALE_MEDIAN) return kept[(m - 1) / 2];
  double sum = 0.0;
  for (int32_t i = 0; i < m; ++i) sum += kept[i];
  return sum / m;
}

flatmtl_status fm_solve_aligned_mtl(const fm_solve *solve, double *weights) {
  const int32_t n = solve->num_tasks;
  const size_t square = (size_t)n * (size_t)n;
  double *a = solve->work, *v = a + square, *values = v + square, *kept = values + n, *work = kept + n, *w = work;
  int32_t *index = (int32_t *)(void *)(work + 2 * (size_t)n), m = 0;
  for (int32_t i = 0; i < n; ++i) {
    weights[i] = 0.0;
    if (solve->gramian[(size_t)i * n + i] > 0.0) index[m++] = i;
  }
  if (m == 0) return FLATMTL_PARETO_STATIONARY;
  for (int32_t i = 0; i < m; ++i)
    for (int32_t j = 0; j < m; ++j) a[(size_t)i * m + j] = solve->gramian[(size_t)index[i] * n + index[j]];
  if (!fm_eigen(m, a, v, values, work)) return FLATMTL_ERROR_INTERNAL;
  double largest = 0.0;
  for (int32_t i = 0; i < m; ++i) largest = fmax(largest, values[i]);
  double bound = solve->options[1] * m * largest;
  if (!(bound < largest)) bound = largest * (1.0 - 1e-12); /* the largest always counts */
  const int32_t rank = keep(m, values, bound, kept);
  if (rank == 0) return FLATMTL_ERROR_INTERNAL;
  const double scale = sqrt(choose_scale(solve->options[0], rank, kept));
  for (int32_t j = 0; j < m; ++j) w[j] = 0.0;
  for (int32_t i = 0; i < m; ++i) {
    if (!(values[i] > bound)) continue;
    const double *row = v + (size_t)i * m;
    double sum = 0.0;
    for (int32_t j = 0; j < m; ++j) sum += row[j];
    sum *= scale / sqrt(values[i]);
    for (int32_t j = 0; j < m; ++j) w[j] += sum * row[j];
  }
  for (int32_t j = 0; j < m; ++j) weights[index[j]] = w[j];
  return FLATMTL_OK;
}
