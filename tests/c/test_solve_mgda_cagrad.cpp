// MGDA, CAGrad and the linear algebra under them: closed forms, enumeration of all supports in long double, optimality
// conditions on hard Gramians, and the symmetries of the problem.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "catch.h"
extern "C" {
#include "solve/linalg.h"
#include "solve/solve.h"
}

namespace {

using Real = long double;
using Matrix = std::vector<double>;  // n * n or n

struct Result {
  flatmtl_status status;
  Matrix w;
};

Result solve(fm_solver solver, int n, const Matrix &gramian, double option = 0.4) {
  Matrix work(fm_solve_work(n), std::nan(""));
  Result result{FLATMTL_OK, Matrix(n, std::nan(""))};
  const fm_solve problem = {n, gramian.data(), &option, 0, nullptr, work.data()};
  result.status = solver(&problem, result.w.data());
  return result;
}

Matrix mgda(int n, const Matrix &gramian) {
  const Result result = solve(fm_solve_mgda, n, gramian);
  REQUIRE(result.status == FLATMTL_OK);
  return result.w;
}

Matrix cagrad(int n, const Matrix &gramian, double c) {
  const Result result = solve(fm_solve_cagrad, n, gramian, c);
  REQUIRE(result.status == FLATMTL_OK);
  return result.w;
}

template <class Vector>
std::vector<Real> times(int n, const Matrix &g, const Vector &w, bool absolute = false) {
  std::vector<Real> v(n, 0);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) v[i] += absolute ? std::fabs(Real(g[i * n + j]) * w[j]) : Real(g[i * n + j]) * w[j];
  return v;
}

template <class V, class W>
Real dot(const V &v, const W &w) {
  Real sum = 0;
  for (size_t i = 0; i < v.size(); ++i) sum += Real(v[i]) * w[i];
  return sum;
}

// The largest violation of v_i >= level (equal where x_i > 0), relative to size_i.
template <class X>
double violation(const X &x, const std::vector<Real> &v, Real level, const std::vector<Real> &size) {
  Real worst = 0;
  for (size_t i = 0; i < v.size(); ++i) {
    const Real amount = x[i] > 0 ? std::fabs(v[i] - level) : level - v[i];
    if (x[i] < 0 || !std::isfinite(double(x[i]))) return INFINITY;
    if (amount > worst * size[i]) worst = size[i] > 0 ? amount / size[i] : INFINITY;
  }
  return double(worst);
}

double mgda_residual(int n, const Matrix &g, const Matrix &w) {
  const auto v = times(n, g, w);
  Real sum = 0;
  for (double x : w) sum += x;
  return std::max(violation(w, v, dot(v, w), times(n, g, w, true)), double(std::fabs(sum - 1)));
}

// u = K ((1 + c^2) w - 1/K), u = K phi / ||g_v|| v. Sets *corrected where u is not 0.
double cagrad_residual(int n, const Matrix &g, const Matrix &w, double c, bool *corrected) {
  std::vector<Real> u(n), ones(n, 1), both(n);
  Real sum = 0;
  for (int i = 0; i < n; ++i) {
    u[i] = Real(w[i]) * n * (1 + Real(c) * c) - 1;
    if (std::fabs(u[i]) < 1e-14L) u[i] = 0;  // the rounding of w
    sum += u[i];
    both[i] = 1 + u[i];
  }
  *corrected = sum > 0;
  if (!*corrected) return 0;
  const auto mean = times(n, g, ones), pull = times(n, g, u);
  const Real factor = std::sqrt(Real(c) * c * dot(mean, ones) / dot(pull, u));
  std::vector<Real> v(n);
  for (int i = 0; i < n; ++i) v[i] = mean[i] + factor * pull[i];
  const double radius = double(std::fabs(factor - 1)) * 1e-3;  // 1e-7 in ||u||, which small u are rounded to
  return std::max(violation(u, v, dot(v, u) / sum, times(n, g, both, true)), sum > 1e-3 ? radius : 0.0);
}

Matrix gramian_of(int n, int r, const std::vector<Real> &rows) {
  Matrix g(n * n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      Real sum = 0;
      for (int m = 0; m < r; ++m) sum += rows[i * r + m] * rows[j * r + m];
      g[i * n + j] = double(sum);
    }
  return g;
}

enum Kind {
  PLAIN,
  SHIFTED,
  GRADED,
  ILL,
  DUPLICATES,
  NEAR_DUPLICATES,
  ANTIPODAL,
  NEAR_ANTIPODAL,
  GRADED_ILL,
  SCALED,
  KINDS
};

Matrix random_gramian(std::mt19937_64 &random, int kind, int n, int r) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<Real> rows(n * r);
  for (Real &x : rows) x = normal(random);
  for (int j = 0; j < r; ++j) {
    const Real shift = kind == SHIFTED || kind == GRADED_ILL ? 2 * normal(random) : 0;
    const Real factor = kind == ILL || kind == GRADED_ILL ? std::pow(10.0L, -6 * uniform(random)) : 1;
    for (int i = 0; i < n; ++i) rows[i * r + j] = (rows[i * r + j] + shift) * factor;
  }
  const bool pairs = kind >= DUPLICATES && kind <= NEAR_ANTIPODAL;
  for (int k = 0; pairs && k < 1 + n / 4; ++k) {
    const int i = int(random() % n), j = int(random() % n);
    const bool near = kind == NEAR_DUPLICATES || kind == NEAR_ANTIPODAL;
    const Real distance = near ? std::pow(10.0L, -4 - 8 * uniform(random)) : 0, sign = kind < ANTIPODAL ? 1 : -1;
    for (int m = 0; m < r && i != j; ++m) rows[i * r + m] = sign * rows[j * r + m] + distance * normal(random);
  }
  Real all = kind == SCALED ? std::pow(10.0L, -30 + 60 * uniform(random)) : 1;
  for (int i = 0; i < n; ++i) {
    const Real own = kind == GRADED || kind == GRADED_ILL ? std::pow(10.0L, -10 + 20 * uniform(random)) : 1;
    for (int m = 0; m < r; ++m) rows[i * r + m] *= own * all;
  }
  return gramian_of(n, r, rows);
}

// x of A x = b by Gauss-Jordan elimination; false if A is singular.
bool eliminate(int n, std::vector<Real> a, std::vector<Real> b, std::vector<Real> *x) {
  for (int k = 0; k < n; ++k) {
    int p = k;
    for (int i = k; i < n; ++i)
      if (std::fabs(a[i * n + k]) > std::fabs(a[p * n + k])) p = i;
    if (std::fabs(a[p * n + k]) < 1e-14L) return false;
    for (int j = 0; j < n; ++j) std::swap(a[k * n + j], a[p * n + j]);
    std::swap(b[k], b[p]);
    for (int i = 0; i < n; ++i) {
      const Real f = i == k ? 0 : a[i * n + k] / a[k * n + k];
      for (int j = k; j < n; ++j) a[i * n + j] -= f * a[k * n + j];
      b[i] -= f * b[k];
    }
  }
  x->resize(n);
  for (int i = 0; i < n; ++i) (*x)[i] = b[i] / a[i * n + i];
  return true;
}

// Calls visit(index, x = G_SS^-1 1, z = G_SS^-1 h_S) for every support S with a regular block.
template <class Visit>
void for_each_support(int n, const Matrix &g, const std::vector<Real> &h, Visit visit) {
  for (int mask = 1; mask < 1 << n; ++mask) {
    std::vector<int> index;
    for (int i = 0; i < n; ++i)
      if (mask >> i & 1) index.push_back(i);
    const int m = int(index.size());
    std::vector<Real> block(m * m), right(m), x, z;
    for (int i = 0; i < m; ++i) {
      right[i] = h[index[i]];
      for (int j = 0; j < m; ++j) block[i * m + j] = g[index[i] * n + index[j]];
    }
    if (eliminate(m, block, std::vector<Real>(m, 1), &x) && eliminate(m, block, right, &z)) visit(index, x, z);
  }
}

}  // namespace

TEST_CASE("MGDA of two rows is the clipped projection", "[solve][mgda]") {
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    const Matrix g = random_gramian(random, trial % 2 ? PLAIN : GRADED, 2, 3);
    const Real square = Real(g[0]) - 2 * Real(g[1]) + g[3];
    const Real expected = std::min(Real(1), std::max(Real(0), (g[3] - Real(g[1])) / square));
    const Matrix w = mgda(2, g);
    CHECK(double(std::fabs(w[0] - expected)) <= 1e-14);
    CHECK(double(std::fabs(w[1] - (1 - expected))) <= 1e-14);
  }
}

TEST_CASE("MGDA agrees with the enumeration of all supports", "[solve][mgda]") {
  std::mt19937_64 random(2);
  for (int trial = 0; trial < 300; ++trial) {
    const int n = 1 + trial % 6;
    const Matrix g = random_gramian(random, trial % 2 ? PLAIN : SHIFTED, n, n + 2), w = mgda(n, g);
    Real best = INFINITY;
    std::vector<Real> expected(n);
    for_each_support(n, g, std::vector<Real>(n, 0), [&](const auto &index, const auto &x, const auto &) {
      Real sum = 0, smallest = 0;
      for (Real value : x) sum += value, smallest = std::min(smallest, value);
      if (smallest < 0 || 1 / sum >= best) return;
      best = 1 / sum;
      std::fill(expected.begin(), expected.end(), Real(0));
      for (size_t i = 0; i < index.size(); ++i) expected[index[i]] = x[i] / sum;
    });
    CHECK(double(std::fabs(dot(times(n, g, w), w) / best - 1)) <= 1e-13);
    for (int i = 0; i < n; ++i) CHECK(double(std::fabs(w[i] - expected[i])) <= 1e-9);
  }
}

TEST_CASE("CAGrad agrees with the enumeration of all supports", "[solve][cagrad]") {
  std::mt19937_64 random(3);
  int compared = 0;
  for (int trial = 0; trial < 300; ++trial) {
    const int n = 1 + trial % 6;
    const double c = trial % 5 == 0 ? 0.9 : 0.4;
    const Matrix g = random_gramian(random, trial % 2 ? PLAIN : SHIFTED, n, n + 2), w = cagrad(n, g, c);
    const std::vector<Real> ones(n, 1), mean = times(n, g, ones);
    const Real target = Real(c) * c * dot(mean, ones);
    for_each_support(n, g, mean, [&](const auto &index, const auto &x, const auto &z) {
      // u = mu x - z with u'Gu = target, a quadratic equation in mu
      Real xx = 0, xz = 0, zz = 0;
      for (size_t i = 0; i < index.size(); ++i) xx += x[i], xz += z[i], zz += z[i] * mean[index[i]];
      const Real discriminant = xz * xz - xx * (zz - target);
      if (discriminant < 0) return;
      for (int sign = -1; sign <= 1; sign += 2) {
        const Real mu = (xz + sign * std::sqrt(discriminant)) / xx;
        std::vector<Real> u(n, 0), both(n, 1);
        for (size_t i = 0; i < index.size(); ++i) both[index[i]] += u[index[i]] = mu * x[i] - z[i];
        if (violation(u, times(n, g, both), mu, times(n, g, both, true)) > 1e-12) continue;
        for (int i = 0; i < n; ++i)
          CHECK(double(w[i]) == Approx(double(both[i] / (n * (1 + Real(c) * c)))).epsilon(1e-9));
        ++compared;
      }
    });
  }
  CHECK(compared >= 300);
}

TEST_CASE("MGDA and CAGrad meet their optimality conditions on hard Gramians", "[solve][mgda][cagrad]") {
  std::mt19937_64 random(4);
  int corrected = 0;
  for (int trial = 0; trial < 1500; ++trial) {
    const int kind = trial % KINDS, n = 1 + int(random() % (trial % 3 == 0 ? 64 : trial % 3 == 1 ? 12 : 4));
    const int r = 1 + int(random() % (n + 2));
    const double c = trial % 4 == 0 ? 0.9 : trial % 4 == 1 ? 0.1 : 0.4;
    const Matrix g = random_gramian(random, kind, n, r);
    INFO("trial " << trial << " kind " << kind << " K " << n << " rank " << r << " c " << c);
    CHECK(mgda_residual(n, g, mgda(n, g)) <= 1e-10);
    bool with_correction = false;
    CHECK(cagrad_residual(n, g, cagrad(n, g, c), c, &with_correction) <= 1e-10);
    corrected += with_correction;
  }
  CHECK(corrected >= 700);
}

TEST_CASE("Weights of MGDA and CAGrad do not depend on the scale of the rows", "[solve][mgda][cagrad]") {
  std::mt19937_64 random(5);
  for (int trial = 0; trial < 60; ++trial) {
    const int n = 2 + trial % 9;
    const Matrix g = random_gramian(random, trial % 2 ? PLAIN : SHIFTED, n, n + 4);
    const Matrix v = mgda(n, g), w = cagrad(n, g, 0.4);
    for (double factor : {std::ldexp(1.0, -200), std::ldexp(1.0, 188), std::ldexp(1.0, 2)}) {
      Matrix scaled = g;
      for (double &x : scaled) x *= factor;
      CHECK(mgda(n, scaled) == v);
      CHECK(cagrad(n, scaled, 0.4) == w);
    }
    for (double factor : {1e-60, 3e-7, 1e60}) {
      Matrix scaled = g;
      for (double &x : scaled) x *= factor;
      const Matrix v2 = mgda(n, scaled), w2 = cagrad(n, scaled, 0.4);
      for (int i = 0; i < n; ++i) {
        CHECK(std::fabs(v2[i] - v[i]) <= 1e-12);
        CHECK(std::fabs(w2[i] - w[i]) <= 1e-12 * (1 + std::fabs(w[i])));
      }
    }
  }
}

TEST_CASE("The updates of MGDA and CAGrad do not depend on the order of the tasks", "[solve][mgda][cagrad]") {
  std::mt19937_64 random(6);
  for (int trial = 0; trial < 60; ++trial) {
    const int n = 2 + trial % 9;
    const Matrix g = random_gramian(random, trial % 2 ? DUPLICATES : PLAIN, n, n / 2 + 1);
    std::vector<int> order(n);
    for (int i = 0; i < n; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    Matrix permuted(n * n);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) permuted[i * n + j] = g[order[i] * n + order[j]];
    for (fm_solver solver : {fm_solve_mgda, fm_solve_cagrad}) {
      const Matrix w = solve(solver, n, g).w, p = solve(solver, n, permuted).w;
      Matrix difference = w;  // as weights of the rows; its length in gradient space must vanish
      for (int i = 0; i < n; ++i) difference[order[i]] -= p[i];
      const Real size = dot(times(n, g, w, true), w);
      CHECK(double(dot(times(n, g, difference), difference) / size) <= 1e-18);
    }
  }
}

TEST_CASE("Special rows of MGDA and CAGrad", "[solve][mgda][cagrad]") {
  CHECK(mgda(1, {7.0}) == Matrix{1.0});
  CHECK(mgda(1, {0.0}) == Matrix{1.0});
  CHECK(cagrad(1, {7.0}, 0.4)[0] == Approx(1.4 / 1.16).epsilon(1e-15));
  CHECK(cagrad(1, {0.0}, 0.4)[0] == Approx(1 / 1.16).epsilon(1e-15));
  // zero rows are the minimum and share the weight
  CHECK(mgda(4, {0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 3}) == Matrix{0.5, 0.0, 0.5, 0.0});
  for (double w : cagrad(2, {0, 0, 0, 1}, 0.5)) CHECK(w == 0.5 / 1.25);
  // antipodal rows: the minimum of w'Gw is 0
  const Matrix antipodal = {1, -3, -3, 9};
  CHECK(mgda(2, antipodal)[0] == Approx(0.75).epsilon(1e-14));
  for (double w : cagrad(2, antipodal, 0.5)) CHECK(w == 0.5 / 1.25);
  // the same, long, beside a short row at a right angle: w = (0, 3/4, 1/4), whatever the ratio of lengths
  for (double length : {1e-3, 1e-6, 1e-10, 1e-14}) {
    const Matrix w = mgda(3, {length * length, 0, 0, 0, 1e16, -3e16, 0, -3e16, 9e16});
    CHECK(w[0] <= 1e-12);
    CHECK(w[1] == Approx(0.75).epsilon(1e-12));
  }
  // duplicate rows, orthogonal rows
  const Matrix same = mgda(2, {4, 4, 4, 4});
  CHECK(same[0] + same[1] == Approx(1.0).epsilon(1e-15));
  const Matrix orthogonal = mgda(3, {1, 0, 0, 0, 2, 0, 0, 0, 4});
  CHECK(orthogonal[0] == Approx(4.0 / 7).epsilon(1e-15));
  CHECK(orthogonal[2] == Approx(1.0 / 7).epsilon(1e-15));
  // c = 0 is the mean
  for (double w : cagrad(3, {1, 0, 0, 0, 2, 0, 0, 0, 4}, 0.0)) CHECK(w == 1.0 / 3);
}

TEST_CASE("MGDA and CAGrad are finite and repeatable on any finite Gramian", "[solve][mgda][cagrad]") {
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 1000; ++trial) {
    const int n = 1 + int(random() % 9);
    Matrix g(n * n);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j <= i; ++j) {
        double x = trial % 3 == 0   ? double(int(random() % 3)) - 1
                   : trial % 3 == 1 ? 1 + 1e-15 * normal(random)
                                    : normal(random);
        g[i * n + j] = g[j * n + i] = i == j ? std::fabs(x) : x;
      }
    for (fm_solver solver : {fm_solve_mgda, fm_solve_cagrad}) {
      const Result first = solve(solver, n, g), second = solve(solver, n, g);
      CHECK(first.status == second.status);
      if (trial % 3 == 1) CHECK(first.status == FLATMTL_OK);  // semidefinite up to rounding
      if (first.status != FLATMTL_OK) continue;
      CHECK(first.w == second.w);
      for (double w : first.w) CHECK(std::isfinite(w));
    }
  }
}

TEST_CASE("Double-double arithmetic and exact residuals", "[solve][linalg]") {
  std::mt19937_64 random(8);
  std::uniform_int_distribution<int64_t> integer(-(int64_t(1) << 53), int64_t(1) << 53);
  for (int trial = 0; trial < 1000; ++trial) {
    const int64_t a = integer(random), b = integer(random);
    const fm_dd p = fm_two_prod(double(a), double(b));
    __extension__ typedef __int128 Wide;
    CHECK((Wide(p.hi) + Wide(p.lo) == Wide(a) * b));
  }
  // 1 + 2^-60 - 1 - 2^-60 and the like, lost in double
  const double x[] = {1.0, 0x1p-60, -1.0, 0x1p-70}, y[] = {1.0, 1.0, 1.0, 1.0};
  CHECK(fm_dot(4, x, y) == 0x1p-70);
  CHECK(fm_dot_dd(4, x, y).hi == 0x1p-60 + 0x1p-70);
  const fm_dd third = fm_dd_div(fm_dd_make(1.0, 0.0), fm_dd_make(3.0, 0.0));
  CHECK(std::fabs(fm_dd_sub(fm_dd_mul_d(third, 3.0), fm_dd_make(1.0, 0.0)).hi) <= 0x1p-102);
  const fm_dd root = fm_dd_sqrt(fm_dd_make(2.0, 0.0));
  CHECK(std::fabs(fm_dd_sub(fm_dd_mul(root, root), fm_dd_make(2.0, 0.0)).hi) <= 0x1p-101);
}

TEST_CASE("Cholesky, pivoted Cholesky and equilibration", "[solve][linalg]") {
  std::mt19937_64 random(9);
  for (int trial = 0; trial < 50; ++trial) {
    const int n = 1 + trial % 12, r = 1 + int(random() % n);
    const Matrix full = random_gramian(random, PLAIN, n, n + 5), low = random_gramian(random, PLAIN, n, r);
    Matrix l = full, x(n, 1.0);
    CHECK(fm_cholesky(n, l.data(), n) == n);
    fm_cholesky_solve(n, l.data(), n, x.data());
    const auto back = times(n, full, x);
    for (int i = 0; i < n; ++i) CHECK(double(back[i]) == Approx(1.0).epsilon(1e-9));
    Matrix p = low;
    std::vector<int32_t> order(n);
    CHECK(fm_cholesky_pivoted(n, p.data(), n, 1e-12, order.data()) == r);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int k = 0; k < r && k <= std::min(i, j); ++k) sum += p[i * n + k] * p[j * n + k];
        CHECK(std::fabs(sum - low[order[i] * n + order[j]]) <= 1e-11);
      }
    const Matrix graded = random_gramian(random, GRADED, n, n);
    Matrix c(n * n);
    std::vector<int32_t> exponents(n);
    CHECK(fm_equilibrate(n, graded.data(), c.data(), exponents.data()) == 0);
    for (int i = 0; i < n; ++i) {
      CHECK((c[i * n + i] >= 1.0 && c[i * n + i] < 4.0));
      for (int j = 0; j < n; ++j) CHECK(std::ldexp(c[i * n + j], exponents[i] + exponents[j]) == graded[i * n + j]);
    }
  }
}
