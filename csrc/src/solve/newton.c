#include "newton.h"

#include <stddef.h>

#include "linalg.h"

int32_t fm_nonzero_cosines(int32_t n, const double *gramian, double *c, double *d, int32_t *index, double *work) {
  int32_t m = n - fm_cosines(n, gramian, c, work);
  for (int32_t i = 0, k = 0; i < n; ++i) {
    if (!(work[i] > 0.0)) continue;
    d[k] = work[i];
    index[k++] = i;
  }
  if (m < n) { /* packing moves entries towards the start only */
    for (int32_t i = 0; i < m; ++i) {
      for (int32_t j = 0; j < m; ++j) c[(size_t)i * m + j] = c[(size_t)index[i] * n + index[j]];
    }
  }
  return m;
}

void fm_products(int32_t n, const double *c, const double *y, double *cy, double *abs_cy) {
  for (int32_t i = 0; i < n; ++i) {
    const double *row = c + (size_t)i * n;
    double sum = 0.0, terms = 0.0;
    for (int32_t j = 0; j < n; ++j) {
      double term = row[j] * y[j];
      sum += term;
      terms += fabs(term);
    }
    cy[i] = sum;
    abs_cy[i] = terms;
  }
}

/* Swaps rows and columns p > k of a symmetric matrix of which the lower triangle is kept. */
static void swap_symmetric(int32_t n, double *a, int32_t k, int32_t p) {
  double *row_k = a + (size_t)k * n, *row_p = a + (size_t)p * n;
  for (int32_t j = 0; j < k; ++j) {
    double t = row_k[j];
    row_k[j] = row_p[j];
    row_p[j] = t;
  }
  for (int32_t j = k + 1; j < p; ++j) {
    double t = a[(size_t)j * n + k];
    a[(size_t)j * n + k] = row_p[j];
    row_p[j] = t;
  }
  for (int32_t i = p + 1; i < n; ++i) {
    double t = a[(size_t)i * n + k];
    a[(size_t)i * n + k] = a[(size_t)i * n + p];
    a[(size_t)i * n + p] = t;
  }
  double t = row_k[k];
  row_k[k] = row_p[p];
  row_p[p] = t;
}

/* The first row from k on with the largest remaining diagonal entry that is more than rounding, or n. */
static int32_t find_pivot(int32_t n, const double *a, int32_t k, const double *noise) {
  int32_t pivot = n;
  for (int32_t i = k; i < n; ++i) {
    double diagonal = a[(size_t)i * n + i];
    if (diagonal > noise[i] && (pivot == n || diagonal > a[(size_t)pivot * n + pivot])) pivot = i;
  }
  return pivot;
}

void fm_solve_shifted(int32_t n, const double *c, const double *s, double *x, double *factor, int32_t *permutation,
                      double *work) {
  double *noise = work;
  for (int32_t i = 0; i < n; ++i) {
    double *row = factor + (size_t)i * n;
    for (int32_t j = 0; j <= i; ++j) row[j] = s[i] * c[(size_t)i * n + j] * s[j];
    noise[i] = 4.0 * n * FM_EPS * row[i];
    permutation[i] = i;
  }
  /* Column k of the factor is formed, then the lower triangle to the right of it updated. */
  for (int32_t k = 0; k < n; ++k) {
    int32_t pivot = find_pivot(n, factor, k, noise);
    if (pivot == n) { /* what remains is the identity */
      for (int32_t i = k; i < n; ++i) {
        for (int32_t j = k; j < i; ++j) factor[(size_t)i * n + j] = 0.0;
        factor[(size_t)i * n + i] = 1.0;
      }
      break;
    }
    if (pivot != k) {
      swap_symmetric(n, factor, k, pivot);
      double t = noise[k], xk = x[k];
      noise[k] = noise[pivot];
      noise[pivot] = t;
      x[k] = x[pivot];
      x[pivot] = xk;
      int32_t number = permutation[k];
      permutation[k] = permutation[pivot];
      permutation[pivot] = number;
    }
    double root = sqrt(factor[(size_t)k * n + k] + 1.0);
    factor[(size_t)k * n + k] = root;
    for (int32_t i = k + 1; i < n; ++i) factor[(size_t)i * n + k] /= root;
    for (int32_t i = k + 1; i < n; ++i) {
      double *row = factor + (size_t)i * n, l = row[k];
      for (int32_t j = k + 1; j <= i; ++j) row[j] -= l * factor[(size_t)j * n + k];
    }
  }
  fm_cholesky_solve(n, factor, n, x);
  for (int32_t i = 0; i < n; ++i) work[permutation[i]] = x[i];
  for (int32_t i = 0; i < n; ++i) x[i] = work[i];
}
