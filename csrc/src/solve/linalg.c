#include "linalg.h"

#include <stddef.h>

double fm_dot(int32_t n, const double *x, const double *y) {
  double sum = 0.0;
  for (int32_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

/* Sums of exact products: the error terms are gathered apart (Ogita, Rump, Oishi 2005). */
fm_dd fm_dot_dd(int32_t n, const double *x, const double *y) {
  fm_dd sum = fm_dd_make(0.0, 0.0);
  for (int32_t i = 0; i < n; ++i) sum = fm_dd_add(sum, fm_two_prod(x[i], y[i]));
  return sum;
}

void fm_abs_matvec(int32_t n, const double *a, int32_t lda, const double *x, double *y) {
  for (int32_t i = 0; i < n; ++i) {
    const double *row = a + (size_t)i * lda;
    double sum = 0.0;
    for (int32_t j = 0; j < n; ++j) sum += fabs(row[j] * x[j]);
    y[i] = sum;
  }
}

void fm_residual(int32_t n, const double *a, int32_t lda, const double *x, const double *b, double *r) {
  for (int32_t i = 0; i < n; ++i) {
    fm_dd product = fm_dot_dd(n, a + (size_t)i * lda, x);
    r[i] = fm_dd_sub(fm_dd_make(b ? b[i] : 0.0, 0.0), product).hi;
  }
}

fm_dd fm_quadratic(int32_t n, const double *a, int32_t lda, const double *x) {
  fm_dd sum = fm_dd_make(0.0, 0.0);
  for (int32_t i = 0; i < n; ++i) {
    sum = fm_dd_add(sum, fm_dd_mul_d(fm_dot_dd(n, a + (size_t)i * lda, x), x[i]));
  }
  return sum;
}

int32_t fm_cholesky(int32_t n, double *a, int32_t lda) {
  for (int32_t i = 0; i < n; ++i) {
    double *row = a + (size_t)i * lda;
    for (int32_t j = 0; j < i; ++j) {
      const double *other = a + (size_t)j * lda;
      row[j] = (row[j] - fm_dot(j, row, other)) / other[j];
    }
    double pivot = row[i] - fm_dot(i, row, row);
    if (!(pivot > 0.0)) return i;
    row[i] = sqrt(pivot);
  }
  return n;
}

static void swap_rows_and_columns(int32_t n, double *a, int32_t lda, int32_t p, int32_t q) {
  for (int32_t j = 0; j < n; ++j) {
    double t = a[(size_t)p * lda + j];
    a[(size_t)p * lda + j] = a[(size_t)q * lda + j];
    a[(size_t)q * lda + j] = t;
  }
  for (int32_t i = 0; i < n; ++i) {
    double *row = a + (size_t)i * lda, t = row[p];
    row[p] = row[q];
    row[q] = t;
  }
}

/* Right-looking: after k steps the trailing block holds the Schur complement, both triangles. */
int32_t fm_cholesky_pivoted(int32_t n, double *a, int32_t lda, double tolerance, int32_t *permutation) {
  double largest = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    permutation[i] = i;
    largest = fmax(largest, a[(size_t)i * lda + i]);
  }
  for (int32_t k = 0; k < n; ++k) {
    int32_t p = k;
    for (int32_t i = k + 1; i < n; ++i) {
      if (a[(size_t)i * lda + i] > a[(size_t)p * lda + p]) p = i;
    }
    double pivot = a[(size_t)p * lda + p];
    if (!(pivot > tolerance * largest) || !(pivot > 0.0)) return k;
    if (p != k) {
      /* Columns < k of both rows hold L and move along; rows < k of both columns are the strict upper triangle. */
      swap_rows_and_columns(n, a, lda, k, p);
      int32_t t = permutation[k];
      permutation[k] = permutation[p];
      permutation[p] = t;
    }
    double root = sqrt(pivot);
    a[(size_t)k * lda + k] = root;
    for (int32_t i = k + 1; i < n; ++i) a[(size_t)i * lda + k] /= root;
    for (int32_t i = k + 1; i < n; ++i) {
      double *row = a + (size_t)i * lda, factor = row[k];
      for (int32_t j = k + 1; j < n; ++j) row[j] -= factor * a[(size_t)j * lda + k];
    }
  }
  return n;
}

void fm_solve_lower(int32_t n, const double *l, int32_t lda, double *x) {
  for (int32_t i = 0; i < n; ++i) {
    const double *row = l + (size_t)i * lda;
    x[i] = (x[i] - fm_dot(i, row, x)) / row[i];
  }
}

void fm_solve_lower_transposed(int32_t n, const double *l, int32_t lda, double *x) {
  for (int32_t i = n - 1; i >= 0; --i) {
    const double *row = l + (size_t)i * lda;
    double xi = x[i] / row[i];
    x[i] = xi;
    for (int32_t j = 0; j < i; ++j) x[j] -= xi * row[j];
  }
}

void fm_cholesky_solve(int32_t n, const double *l, int32_t lda, double *x) {
  fm_solve_lower(n, l, lda, x);
  fm_solve_lower_transposed(n, l, lda, x);
}

int32_t fm_exponent(double x) {
  int exponent;
  frexp(x, &exponent); /* |x| in [2^(exponent-1), 2^exponent) */
  return (int32_t)exponent - 1;
}

/* floor(e / 2) */
static int32_t half(int32_t e) {
  return (e - (e & 1)) / 2;
}

int32_t fm_equilibrate(int32_t n, const double *gramian, double *c, int32_t *exponents) {
  int32_t num_zero = 0;
  for (int32_t i = 0; i < n; ++i) {
    double diagonal = gramian[(size_t)i * n + i];
    exponents[i] = diagonal > 0.0 ? half(fm_exponent(diagonal)) : 0;
    num_zero += !(diagonal > 0.0);
  }
  for (int32_t i = 0; i < n; ++i) {
    int zero_row = !(gramian[(size_t)i * n + i] > 0.0);
    for (int32_t j = 0; j < n; ++j) {
      double value = gramian[(size_t)i * n + j];
      if (zero_row || !(gramian[(size_t)j * n + j] > 0.0)) {
        value = 0.0;
      } else {
        value = ldexp(value, -(exponents[i] + exponents[j]));
        value = value > 4.0 ? 4.0 : value < -4.0 ? -4.0 : value;
      }
      c[(size_t)i * n + j] = value;
    }
  }
  return num_zero;
}

int32_t fm_cosines(int32_t n, const double *gramian, double *c, double *d) {
  int32_t num_zero = 0;
  for (int32_t i = 0; i < n; ++i) {
    double diagonal = gramian[(size_t)i * n + i];
    d[i] = diagonal > 0.0 ? sqrt(diagonal) : 0.0;
    num_zero += !(diagonal > 0.0);
  }
  for (int32_t i = 0; i < n; ++i) {
    for (int32_t j = 0; j < n; ++j) {
      double value = 0.0;
      if (d[i] > 0.0 && d[j] > 0.0) {
        /* The larger divisor last: the first quotient cannot overflow. */
        double large = fmax(d[i], d[j]), small = fmin(d[i], d[j]);
        value = i == j ? 1.0 : gramian[(size_t)i * n + j] / large / small;
        value = value > 1.0 ? 1.0 : value < -1.0 ? -1.0 : value;
      }
      c[(size_t)i * n + j] = value;
    }
  }
  return num_zero;
}
