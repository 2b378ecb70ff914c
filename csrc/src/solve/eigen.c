#include "eigen.h"

#include <math.h>
#include <stddef.h>

#include "linalg.h"

/* Rotates rows and columns p and q so that a_pq becomes 0. */
static void rotate(int32_t n, double *a, double *v, int32_t p, int32_t q) {
  const size_t m = (size_t)n;
  const double apq = a[p * m + q], theta = (a[q * m + q] - a[p * m + p]) / (2.0 * apq);
  const double t = (theta >= 0.0 ? 1.0 : -1.0) / (fabs(theta) + sqrt(theta * theta + 1.0));
  const double cosine = 1.0 / sqrt(t * t + 1.0), sine = t * cosine;
  for (size_t k = 0; k < m; ++k) {
    const double x = a[k * m + p], y = a[k * m + q];
    a[k * m + p] = cosine * x - sine * y;
    a[k * m + q] = sine * x + cosine * y;
  }
  for (size_t k = 0; k < m; ++k) {
    const double x = a[p * m + k], y = a[q * m + k];
    a[p * m + k] = cosine * x - sine * y;
    a[q * m + k] = sine * x + cosine * y;
  }
  a[p * m + q] = a[q * m + p] = 0.0;
  for (size_t k = 0; k < m; ++k) {
    const double x = v[k * m + p], y = v[k * m + q];
    v[k * m + p] = cosine * x - sine * y;
    v[k * m + q] = sine * x + cosine * y;
  }
}

void fm_eigen(int32_t n, double *a, double *values, double *vectors) {
  const size_t m = (size_t)n;
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < m; ++j) vectors[i * m + j] = i == j;
  for (int sweep = 0; sweep < 60; ++sweep) {
    int rotated = 0;
    for (int32_t p = 0; p < n; ++p)
      for (int32_t q = p + 1; q < n; ++q) {
        const double scale = sqrt(fabs(a[p * m + p])) * sqrt(fabs(a[q * m + q]));
        if (fabs(a[p * m + q]) <= 0.25 * FM_EPS * scale || a[p * m + q] == 0.0) continue;
        rotate(n, a, vectors, p, q);
        rotated = 1;
      }
    if (!rotated) break;
  }
  for (size_t i = 0; i < m; ++i) values[i] = a[i * m + i];
}
