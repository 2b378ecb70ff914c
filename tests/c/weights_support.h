// Gramians with known rows, and what an aggregator's weights have to satisfy.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "catch.h"
#include "flatmtl.h"
#include "support.h"

using Vec = std::vector<double>;

// K rows of P numbers.
struct Matrix {
  Matrix(int32_t rows, int32_t columns) : rows(rows), columns(columns), values(static_cast<size_t>(rows * columns)) {}
  double &operator()(int32_t i, int32_t j) { return values[static_cast<size_t>(i * columns + j)]; }
  double operator()(int32_t i, int32_t j) const { return values[static_cast<size_t>(i * columns + j)]; }
  int32_t rows, columns;
  Vec values;
};

inline Matrix normal_rows(std::mt19937_64 &random, int32_t rows, int32_t columns) {
  std::normal_distribution<double> normal;
  Matrix a(rows, columns);
  for (double &x : a.values) x = normal(random);
  return a;
}

// Every row gets an inner product > 0 with one direction: no non-negative combination vanishes.
inline void point_to_one_side(Matrix &a) {
  for (int32_t i = 0; i < a.rows; i++) a(i, 0) = std::fabs(a(i, 0)) + 0.1;
}

inline Vec gramian(const Matrix &a) {
  Vec g(static_cast<size_t>(a.rows * a.rows));
  for (int32_t i = 0; i < a.rows; i++)
    for (int32_t j = 0; j < a.rows; j++) {
      double sum = 0;
      for (int32_t p = 0; p < a.columns; p++) sum += a(i, p) * a(j, p);
      g[static_cast<size_t>(i * a.rows + j)] = sum;
    }
  return g;
}

struct Solved {
  flatmtl_status status;
  Vec weights;
};

// state: NULL for a fresh one.
inline Solved weights_of(flatmtl_method method, const Vec &options, const Vec &g, flatmtl_error *error = nullptr,
                         Vec *state = nullptr) {
  const auto n = static_cast<int32_t>(std::lround(std::sqrt(static_cast<double>(g.size()))));
  Context context(n);
  Solved solved{FLATMTL_OK, Vec(static_cast<size_t>(n), NAN)};
  int64_t count = 0;
  if (flatmtl_state_size(method, n, &count, error) != FLATMTL_OK) std::abort();
  Vec fresh(static_cast<size_t>(count));
  if (!state) state = &fresh;
  solved.status = flatmtl_weights(context, method, options.data(), static_cast<int32_t>(options.size()), n, g.data(),
                                  state->data(), solved.weights.data(), error);
  return solved;
}

struct Named {
  flatmtl_method method;
  Vec options;
  double degree;
};

// Every method, with its degree.
inline std::vector<Named> all_methods(int32_t n) {
  Vec fixed;
  for (int32_t i = 0; i < n; i++) fixed.push_back(0.5 + i);
  return {{FLATMTL_SUM, {}, 1},
          {FLATMTL_MEAN, {}, 1},
          {FLATMTL_FIXED, fixed, 1},
          {FLATMTL_MGDA, {}, 1},
          {FLATMTL_PCGRAD, {3, 17}, 1},
          {FLATMTL_CAGRAD, {0.4}, 1},
          {FLATMTL_IMTL_G, {}, 1},
          {FLATMTL_NASH_MTL, {}, 0},
          {FLATMTL_FAIRGRAD, {2}, -1.0 / 3},
          {FLATMTL_FAIRGRAD, {0.5}, 1.0 / 3},
          {FLATMTL_FAIRGRAD, {1}, 0},
          {FLATMTL_GRADVAC, {0.5, 3, 17}, 1},
          {FLATMTL_ALIGNED_MTL, {0, 0x1p-23}, 1},
          {FLATMTL_ALIGNED_MTL, {1, 0x1p-23}, 1},
          {FLATMTL_ALIGNED_MTL, {2, 0x1p-52}, 1},
          {FLATMTL_UPGRAD, {}, 1},
          {FLATMTL_DUALPROJ, {}, 1},
          {FLATMTL_CONFIG, {}, 1},
          {FLATMTL_NTKMTL, {0.5}, 1},
          {FLATMTL_NTKMTL, {0.75}, 1}};
}
