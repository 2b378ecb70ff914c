#include "eigen.h"

#include <math.h>
#include <stddef.h>

#include "linalg.h"

enum { MAX_SWEEPS = 80 };

/* T = Q'AQ tridiagonal by Householder's reflections, V = Q'. values and off [n] are the diagonal of T and what stands
 * beside it. */
static void tridiagonalize(int32_t n, double *a, double *v, double *values, double *off, double *u) {
  for (int32_t i = 0; i < n; ++i)
    for (int32_t j = 0; j < n; ++j) v[(size_t)i * n + j] = i == j ? 1.0 : 0.0;
  for (int32_t k = 0; k + 1 < n; ++k) {
    double *x = a + (size_t)k * n, square = 0.0; /* by symmetry column k */
    for (int32_t i = k + 1; i < n; ++i) square += x[i] * x[i];
    off[k] = 0.0;
    if (!(square > 1e-280)) continue;
    const double beside = -copysign(sqrt(square), x[k + 1]);
    off[k] = beside;
    x[k + 1] -= beside;
    const double factor = 1.0 / (sqrt(square) * fabs(x[k + 1])); /* 2 / x'x */
    double half = 0.0;
    for (int32_t i = k + 1; i < n; ++i) {
      const double *row = a + (size_t)i * n;
      double sum = 0.0;
      for (int32_t j = k + 1; j < n; ++j) sum += row[j] * x[j];
      u[i] = factor * sum;
      half += u[i] * x[i];
    }
    half *= 0.5 * factor;
    for (int32_t i = k + 1; i < n; ++i) u[i] -= half * x[i];
    for (int32_t i = k + 1; i < n; ++i) {
      double *row = a + (size_t)i * n;
      const double xi = x[i], ui = u[i];
      for (int32_t j = k + 1; j < n; ++j) row[j] -= xi * u[j] + ui * x[j];
    }
    for (int32_t j = 0; j < n; ++j) u[j] = 0.0;
    for (int32_t i = k + 1; i < n; ++i) {
      const double *row = v + (size_t)i * n, xi = factor * x[i];
      for (int32_t j = 0; j < n; ++j) u[j] += xi * row[j];
    }
    for (int32_t i = k + 1; i < n; ++i) {
      double *row = v + (size_t)i * n;
      const double xi = x[i];
      for (int32_t j = 0; j < n; ++j) row[j] -= xi * u[j];
    }
  }
  for (int32_t i = 0; i < n; ++i) values[i] = a[(size_t)i * n + i];
  off[n - 1] = 0.0;
}

/* One sweep of the QL method with an implicit shift over the block first .. last of T. */
static void sweep(int32_t n, double *v, double *values, double *off, int32_t first, int32_t last) {
  const double ratio = (values[first + 1] - values[first]) / (2.0 * off[first]);
  const double root = sqrt(ratio * ratio + 1.0);
  double g = values[last] - values[first] + off[first] / (ratio + copysign(root, ratio));
  double s = 1.0, c = 1.0, p = 0.0;
  for (int32_t i = last - 1; i >= first; --i) {
    const double f = s * off[i], b = c * off[i], r = sqrt(f * f + g * g);
    off[i + 1] = r;
    if (!(r > 0.0)) { /* the block falls apart here */
      values[i + 1] -= p;
      off[last] = 0.0;
      return;
    }
    s = f / r;
    c = g / r;
    g = values[i + 1] - p;
    const double moved = (values[i] - g) * s + 2.0 * c * b;
    p = s * moved;
    values[i + 1] = g + p;
    g = c * moved - b;
    double *restrict low = v + (size_t)i * n, *restrict high = low + n;
    for (int32_t k = 0; k < n; ++k) {
      const double x = low[k], y = high[k];
      high[k] = s * x + c * y;
      low[k] = c * x - s * y;
    }
  }
  values[first] -= p;
  off[first] = g;
  off[last] = 0.0;
}

int fm_eigen(int32_t n, double *a, double *v, double *values, double *work) {
  double *off = work, size = 0.0;
  tridiagonalize(n, a, v, values, off, work + n);
  for (int32_t i = 0; i < n; ++i) size = fmax(size, fabs(values[i]) + fabs(off[i]));
  for (int32_t first = 0; first < n; ++first) {
    for (int32_t sweeps = 0;; ++sweeps) {
      int32_t last = first;
      while (last + 1 < n && fabs(off[last]) > 0.5 * FM_EPS * size) ++last;
      if (last == first) break;
      if (sweeps == MAX_SWEEPS) return 0;
      sweep(n, v, values, off, first, last);
    }
  }
  return 1;
}
