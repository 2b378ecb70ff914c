#include "pseudo.h"

#include <stddef.h>
#include <string.h>

#include "linalg.h"

int fm_solve_ones(int32_t n, const double *c, double *factor, double *x, double *r) {
  memcpy(factor, c, (size_t)n * n * sizeof *c);
  if (fm_cholesky(n, factor, n) < n) return 0;
  for (int32_t i = 0; i < n; ++i) {
    double pivot = factor[(size_t)i * n + i];
    if (pivot * pivot <= 8.0 * n * FM_EPS) return 0;
    x[i] = 0.0;
  }
  for (int round = 0; round < 5; ++round) {
    for (int32_t i = 0; i < n; ++i) r[i] = 1.0;
    fm_residual(n, c, n, x, r, r);
    fm_cholesky_solve(n, factor, n, r);
    for (int32_t i = 0; i < n; ++i) x[i] += r[i];
  }
  return 1;
}

/* x <- (I - tau v v') x; v is vk in row k and column k of b below it; the entries of x are `step` apart. */
static void reflect(int32_t n, const double *b, int32_t stride, int32_t k, double vk, double tau, double *x,
                    int32_t step) {
  double sum = vk * x[(size_t)k * step];
  for (int32_t i = k + 1; i < n; ++i) sum += b[(size_t)i * stride + k] * x[(size_t)i * step];
  sum *= tau;
  x[(size_t)k * step] -= sum * vk;
  for (int32_t i = k + 1; i < n; ++i) x[(size_t)i * step] -= sum * b[(size_t)i * stride + k];
}

/* B [n * rank] <- reflections below the diagonal and R above it. */
static void factor_qr(int32_t n, int32_t rank, double *b, int32_t stride, double *diagonal, double *vk, double *tau) {
  for (int32_t k = 0; k < rank; ++k) {
    int32_t pivot = k;
    double longest = -1.0;
    for (int32_t j = k; j < rank; ++j) {
      double square = 0.0;
      for (int32_t i = k; i < n; ++i) square += b[(size_t)i * stride + j] * b[(size_t)i * stride + j];
      if (square > longest) {
        longest = square;
        pivot = j;
      }
    }
    for (int32_t i = 0; i < n && pivot != k; ++i) {
      double *row = b + (size_t)i * stride, t = row[k];
      row[k] = row[pivot];
      row[pivot] = t;
    }
    double head = b[(size_t)k * stride + k];
    diagonal[k] = -copysign(sqrt(longest), head);
    vk[k] = head - diagonal[k];
    /* v'v = 2 |diagonal| |vk| */
    tau[k] = longest > 0.0 ? 1.0 / (fabs(diagonal[k]) * fabs(vk[k])) : 0.0;
    for (int32_t j = k + 1; j < rank; ++j) reflect(n, b, stride, k, vk[k], tau[k], b + j, stride);
  }
}

/* x <- B (B'B)^-2 B' x. Returns 0 if B'x is no more than rounding. scratch: 3 n. */
static int apply_pseudo(int32_t n, int32_t rank, double *b, int32_t stride, double *x, double *scratch) {
  double *diagonal = scratch, *vk = diagonal + n, *tau = vk + n, before = 0.0, after = 0.0;
  factor_qr(n, rank, b, stride, diagonal, vk, tau);
  for (int32_t i = 0; i < n; ++i) before += x[i] * x[i];
  for (int32_t k = 0; k < rank; ++k) reflect(n, b, stride, k, vk[k], tau[k], x, 1);
  for (int32_t k = 0; k < rank; ++k) after += x[k] * x[k];
  if (!(sqrt(after) > 16.0 * n * FM_EPS * sqrt(before))) return 0;
  for (int32_t k = rank - 1; k >= 0; --k) { /* R^-1 */
    for (int32_t j = k + 1; j < rank; ++j) x[k] -= b[(size_t)k * stride + j] * x[j];
    x[k] /= diagonal[k];
  }
  for (int32_t k = 0; k < rank; ++k) { /* R^-T */
    for (int32_t j = 0; j < k; ++j) x[k] -= b[(size_t)j * stride + k] * x[j];
    x[k] /= diagonal[k];
  }
  for (int32_t i = rank; i < n; ++i) x[i] = 0.0;
  for (int32_t k = rank - 1; k >= 0; --k) reflect(n, b, stride, k, vk[k], tau[k], x, 1);
  return 1;
}

int fm_solve_deficient(int32_t n, double *c, const double *d, double *w, double *b, int32_t *permutation,
                       double *scratch) {
  int32_t rank = fm_cholesky_pivoted(n, c, n, 8.0 * n * FM_EPS, permutation), *order = permutation + n;
  for (int32_t i = 0; i < n; ++i) { /* insertion sort: the longest row first */
    int32_t k = i;
    for (; k > 0 && d[permutation[order[k - 1]]] < d[permutation[i]]; --k) order[k] = order[k - 1];
    order[k] = i;
  }
  double *x = scratch;
  for (int32_t k = 0; k < n; ++k) {
    int32_t i = order[k];
    x[k] = d[permutation[i]];
    for (int32_t j = 0; j < rank; ++j) b[(size_t)k * n + j] = j <= i ? x[k] * c[(size_t)i * n + j] : 0.0;
  }
  if (!apply_pseudo(n, rank, b, n, x, scratch + n)) return 0;
  for (int32_t k = 0; k < n; ++k) w[permutation[order[k]]] = x[k];
  return 1;
}
