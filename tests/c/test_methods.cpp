// Weights from the Gramian: closed forms, optimality conditions, scaling, corner cases, every refusal.
#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "weights_support.h"

namespace {

size_t at(int32_t n, int32_t i, int32_t j) {
  return static_cast<size_t>(i) * static_cast<size_t>(n) + static_cast<size_t>(j);
}

// Largest |(Gw)_i - target(i, w_i)| in units of (|G||w|)_i.
double residual(const Vec &g, const Vec &w, const std::function<double(int32_t, double)> &target) {
  const auto n = static_cast<int32_t>(w.size());
  double largest = 0;
  for (int32_t i = 0; i < n; i++) {
    if (g[at(n, i, i)] == 0) continue;
    long double sum = 0, terms = 0;
    for (int32_t j = 0; j < n; j++) {
      const long double term = static_cast<long double>(g[at(n, i, j)]) * w[static_cast<size_t>(j)];
      sum += term;
      terms += std::fabs(term);
    }
    const double size = static_cast<double>(std::fabs(sum - target(i, w[static_cast<size_t>(i)])) / terms);
    if (!(size <= largest)) largest = size;  // NaN too
  }
  return largest;
}

double fair_residual(const Vec &g, const Vec &w, double alpha) {
  return residual(g, w, [&](int32_t, double x) { return std::pow(x, -1 / alpha); });
}

// (Gw)_i / d_i equal, in units of (|G||w|)_i / d_i. The common value is that of the row with the smallest unit.
double imtl_residual(const Vec &g, const Vec &w) {
  const auto n = static_cast<int32_t>(w.size());
  double common = 0, smallest = INFINITY;
  for (int32_t i = 0; i < n; i++) {
    const double d = std::sqrt(g[at(n, i, i)]);
    if (d == 0) continue;
    long double sum = 0, terms = 0;
    for (int32_t j = 0; j < n; j++) {
      const long double term = static_cast<long double>(g[at(n, i, j)]) * w[static_cast<size_t>(j)];
      sum += term;
      terms += std::fabs(term);
    }
    if (static_cast<double>(terms / d) >= smallest) continue;
    smallest = static_cast<double>(terms / d);
    common = static_cast<double>(sum / d);
  }
  return residual(g, w, [&](int32_t i, double) { return common * std::sqrt(g[at(n, i, i)]); });
}

// V diag(values) V' with V orthogonal, its first column along `first`.
Vec with_spectrum(std::mt19937_64 &random, const Vec &values, const Vec &first) {
  const auto n = static_cast<int32_t>(values.size());
  Matrix v = normal_rows(random, n, n);  // rows are the eigenvectors
  for (int32_t i = 0; i < n; i++) v(0, i) = first.empty() ? v(0, i) : first[static_cast<size_t>(i)];
  for (int pass = 0; pass < 2; pass++) {
    for (int32_t k = 0; k < n; k++) {
      for (int32_t l = 0; l < k; l++) {
        double along = 0;
        for (int32_t i = 0; i < n; i++) along += v(k, i) * v(l, i);
        for (int32_t i = 0; i < n; i++) v(k, i) -= along * v(l, i);
      }
      double square = 0;
      for (int32_t i = 0; i < n; i++) square += v(k, i) * v(k, i);
      for (int32_t i = 0; i < n; i++) v(k, i) /= std::sqrt(square);
    }
  }
  Vec g(static_cast<size_t>(n * n));
  for (int32_t i = 0; i < n; i++)
    for (int32_t j = 0; j <= i; j++) {
      double sum = 0;
      for (int32_t k = 0; k < n; k++) sum += values[static_cast<size_t>(k)] * v(k, i) * v(k, j);
      g[at(n, i, j)] = g[at(n, j, i)] = sum;
    }
  return g;
}

void scale_rows(Matrix &a, std::mt19937_64 &random, double decades) {
  std::uniform_real_distribution<double> uniform(-decades, decades);
  for (int32_t i = 0; i < a.rows; i++) {
    const double factor = std::pow(10, uniform(random));
    for (int32_t p = 0; p < a.columns; p++) a(i, p) *= factor;
  }
}

struct Case {
  std::string name;
  Vec g;
};

// Gramians with a solution of Nash-MTL and FairGrad.
std::vector<Case> solvable(std::mt19937_64 &random, int32_t n) {
  std::vector<Case> cases;
  for (int32_t rank : {1, 2, n / 2, n - 1, n, n + 3}) {
    if (rank < 1) continue;
    for (double decades : {0.0, 4.0, 20.0}) {
      Matrix a = normal_rows(random, n, rank);
      point_to_one_side(a);
      scale_rows(a, random, decades);
      cases.push_back({"rank " + std::to_string(rank) + " decades " + std::to_string(decades), gramian(a)});
    }
  }
  Matrix duplicates = normal_rows(random, n, n + 1);
  for (int32_t i = n / 2; i < n; i++)
    for (int32_t p = 0; p <= n; p++) duplicates(i, p) = duplicates(i - n / 2, p);
  cases.push_back({"duplicates", gramian(duplicates)});
  if (n < 2) return cases;
  Vec values(static_cast<size_t>(n));
  for (int32_t i = 0; i < n; i++) values[static_cast<size_t>(i)] = std::pow(10, -12.0 * (n - 1 - i) / (n - 1));
  cases.push_back({"condition 1e12", with_spectrum(random, values, {})});
  cases.push_back({"condition 1e12, nearly stationary", with_spectrum(random, values, Vec(values.size(), 1))});
  return cases;
}

const int32_t SIZES[] = {1, 2, 3, 5, 10, 24, 64};

}  // namespace

TEST_CASE("every method has a name and defaults that it accepts") {
  for (int32_t i = 0; i < FLATMTL_NUM_METHODS; i++) {
    const auto method = static_cast<flatmtl_method>(i);
    const char *name = flatmtl_method_name(method);
    REQUIRE(name != nullptr);
    flatmtl_method found = FLATMTL_SUM;
    CHECK(flatmtl_method_by_name(name, &found, nullptr) == FLATMTL_OK);
    CHECK(found == method);
    int32_t count = -1;
    REQUIRE(flatmtl_method_defaults(method, 3, nullptr, &count, nullptr) == FLATMTL_OK);
    Vec options(static_cast<size_t>(count), NAN);
    REQUIRE(flatmtl_method_defaults(method, 3, options.data(), &count, nullptr) == FLATMTL_OK);
    const Vec g = {2, 1, 0, 1, 3, 1, 0, 1, 4};
    const Solved by_default = weights_of(method, {}, g), spelt_out = weights_of(method, options, g);
    CHECK(by_default.status == FLATMTL_OK);
    CHECK(by_default.weights == spelt_out.weights);
    if (count > 0) {
      int32_t room = count - 1;
      CHECK(flatmtl_method_defaults(method, 3, options.data(), &room, nullptr) == FLATMTL_ERROR_SIZE);
      CHECK(room == count - 1);
    }
  }
  CHECK(flatmtl_method_name(static_cast<flatmtl_method>(-1)) == nullptr);
  CHECK(flatmtl_method_name(FLATMTL_NUM_METHODS) == nullptr);
  flatmtl_method untouched = FLATMTL_MEAN;
  CHECK(flatmtl_method_by_name("nash", &untouched, nullptr) == FLATMTL_ERROR_NAME);
  CHECK(flatmtl_method_by_name(nullptr, &untouched, nullptr) == FLATMTL_ERROR_NULL);
  CHECK(untouched == FLATMTL_MEAN);
}

TEST_CASE("what is refused, and that nothing is written then") {
  const Vec g = {2, 1, 1, 3};
  Context context(2);
  Vec w = {7, 7};
  flatmtl_error error;
  const auto call = [&](flatmtl_method method, const Vec &options, int32_t n = 2) {
    return flatmtl_weights(context, method, options.data(), static_cast<int32_t>(options.size()), n, g.data(), nullptr,
                           w.data(), &error);
  };
  CHECK(call(static_cast<flatmtl_method>(99), {}) == FLATMTL_ERROR_NAME);
  CHECK(call(FLATMTL_SUM, {}, 0) == FLATMTL_ERROR_NUM_TASKS);
  CHECK(call(FLATMTL_SUM, {}, FLATMTL_MAX_TASKS + 1) == FLATMTL_ERROR_NUM_TASKS);
  CHECK(call(FLATMTL_SUM, {1}) == FLATMTL_ERROR_OPTION);
  CHECK(call(FLATMTL_FIXED, {1}) == FLATMTL_ERROR_OPTION);
  CHECK(call(FLATMTL_FIXED, {1, INFINITY}) == FLATMTL_ERROR_OPTION);
  CHECK(error.row == 1);
  for (double c : {-0.1, 1.0, static_cast<double>(NAN)}) CHECK(call(FLATMTL_CAGRAD, {c}) == FLATMTL_ERROR_OPTION);
  for (double a : {0.0, -1.0, static_cast<double>(INFINITY)})
    CHECK(call(FLATMTL_FAIRGRAD, {a}) == FLATMTL_ERROR_OPTION);
  for (double s : {-1.0, 0.5, 0x1p53}) CHECK(call(FLATMTL_PCGRAD, {0, s}) == FLATMTL_ERROR_OPTION);
  CHECK(flatmtl_weights(context, FLATMTL_CAGRAD, nullptr, 1, 2, g.data(), nullptr, w.data(), &error) ==
        FLATMTL_ERROR_NULL);
  CHECK(flatmtl_weights(context, FLATMTL_CAGRAD, nullptr, -1, 2, g.data(), nullptr, w.data(), &error) ==
        FLATMTL_ERROR_SIZE);
  CHECK(flatmtl_weights(nullptr, FLATMTL_SUM, nullptr, 0, 2, g.data(), nullptr, w.data(), &error) ==
        FLATMTL_ERROR_NULL);
  CHECK(flatmtl_weights(context, FLATMTL_SUM, nullptr, 0, 2, nullptr, nullptr, w.data(), &error) == FLATMTL_ERROR_NULL);
  CHECK(flatmtl_weights(context, FLATMTL_SUM, nullptr, 0, 2, g.data(), nullptr, nullptr, &error) == FLATMTL_ERROR_NULL);
  flatmtl_context small = *static_cast<const flatmtl_context *>(context);
  small.workspace_size -= 1;
  CHECK(flatmtl_weights(&small, FLATMTL_SUM, nullptr, 0, 2, g.data(), nullptr, w.data(), &error) == FLATMTL_ERROR_SIZE);
  Vec shared = g;
  CHECK(flatmtl_weights(context, FLATMTL_SUM, nullptr, 0, 2, shared.data(), nullptr, &shared[3], &error) ==
        FLATMTL_ERROR_OVERLAP);
  CHECK(shared == g);
  for (const Named &named : all_methods(2)) {
    Vec bad = g;
    bad[2] = NAN;
    CHECK(weights_of(named.method, named.options, bad, &error).status == FLATMTL_ERROR_NONFINITE);
    CHECK(error.row == 1);
    bad = {INFINITY, 1, 1, 3};
    CHECK(weights_of(named.method, named.options, bad, &error).status == FLATMTL_ERROR_NONFINITE);
    CHECK(error.row == 0);
    bad = {2, NAN, 1, 3};  // the upper triangle is not read
    CHECK(weights_of(named.method, named.options, bad, &error).status == FLATMTL_OK);
  }
  CHECK(w == Vec{7, 7});
}

TEST_CASE("one task: the gain of every method") {
  for (double d : {1e-30, 0.3, 1.0, 7.0, 1e30}) {
    const Vec g = {d * d};
    for (flatmtl_method method : {FLATMTL_SUM, FLATMTL_MEAN, FLATMTL_MGDA, FLATMTL_PCGRAD, FLATMTL_IMTL_G}) {
      CHECK(weights_of(method, {}, g).weights[0] == 1);
    }
    CHECK(weights_of(FLATMTL_FIXED, {-2.5}, g).weights[0] == -2.5);
    CHECK(weights_of(FLATMTL_CAGRAD, {0.4}, g).weights[0] == Approx(1.4 / 1.16).epsilon(1e-14));
    CHECK(weights_of(FLATMTL_NASH_MTL, {}, g).weights[0] * d == Approx(1).epsilon(1e-14));
    for (double alpha : {0.5, 1.0, 2.0, 7.0}) {
      const double expected = std::pow(d, -2 * alpha / (1 + alpha));
      CHECK(weights_of(FLATMTL_FAIRGRAD, {alpha}, g).weights[0] == Approx(expected).epsilon(1e-12));
    }
  }
}

TEST_CASE("two tasks: closed forms") {
  for (double c : {-0.999, -0.5, -0.1, 0.0, 0.3, 0.9}) {
    for (double d2 : {1e-8, 0.5, 1.0, 3.0, 1e8}) {
      const double d1 = 1.5, g12 = c * d1 * d2;
      const Vec g = {d1 * d1, g12, g12, d2 * d2};
      CAPTURE(c, d2);
      const auto check = [&](flatmtl_method method, const Vec &options, double w1, double w2) {
        const Solved solved = weights_of(method, options, g);
        CHECK(solved.status == FLATMTL_OK);
        CHECK(solved.weights[0] == Approx(w1).epsilon(1e-12));
        CHECK(solved.weights[1] == Approx(w2).epsilon(1e-12));
      };
      check(FLATMTL_IMTL_G, {}, d2 / (d1 + d2), d1 / (d1 + d2));
      check(FLATMTL_NASH_MTL, {}, 1 / (d1 * std::sqrt(1 + c)), 1 / (d2 * std::sqrt(1 + c)));
      check(FLATMTL_FAIRGRAD, {1}, 1 / (d1 * std::sqrt(1 + c)), 1 / (d2 * std::sqrt(1 + c)));
      check(FLATMTL_PCGRAD, {}, c < 0 ? 1 - g12 / (d1 * d1) : 1, c < 0 ? 1 - g12 / (d2 * d2) : 1);
      const double distance = d1 * d1 + d2 * d2 - 2 * g12;
      const double w1 = d2 * d2 <= g12 ? 0 : d1 * d1 <= g12 ? 1 : (d2 * d2 - g12) / distance;
      const double w2 = d2 * d2 <= g12 ? 1 : d1 * d1 <= g12 ? 0 : (d1 * d1 - g12) / distance;
      check(FLATMTL_MGDA, {}, w1, w2);
    }
  }
}

TEST_CASE("Nash-MTL and FairGrad: the root, component by component") {
  std::mt19937_64 random(1);
  for (int32_t n : SIZES) {
    for (const Case &c : solvable(random, n)) {
      CAPTURE(n, c.name);
      const Solved nash = weights_of(FLATMTL_NASH_MTL, {}, c.g);
      CHECK(nash.status == FLATMTL_OK);
      CHECK(fair_residual(c.g, nash.weights, 1) <= 1e-11);
      CHECK(*std::min_element(nash.weights.begin(), nash.weights.end()) > 0);
      long double square = 0;  // ||update||^2 = K, to rounding relative to the sum of its terms
      long double terms = 0;
      for (int32_t i = 0; i < n; i++)
        for (int32_t j = 0; j < n; j++) {
          const long double term = static_cast<long double>(nash.weights[static_cast<size_t>(i)]) * c.g[at(n, i, j)] *
                                   nash.weights[static_cast<size_t>(j)];
          square += term;
          terms += std::fabs(term);
        }
      CHECK(std::fabs(square - n) <= 1e-11L * terms);
      for (double alpha : {0.5, 1.0, 2.0, 3.0}) {
        const Solved fair = weights_of(FLATMTL_FAIRGRAD, {alpha}, c.g);
        CAPTURE(alpha);
        CHECK(fair.status == FLATMTL_OK);
        CHECK(fair_residual(c.g, fair.weights, alpha) <= 1e-11);
      }
    }
  }
}

TEST_CASE("FairGrad between rows sixty decades apart, and with other alpha") {
  std::mt19937_64 random(2);
  for (int32_t n : {3, 8, 40}) {
    for (int repeat = 0; repeat < 4; repeat++) {
      Matrix a = normal_rows(random, n, n + 3);
      scale_rows(a, random, 30);
      const Solved extreme = weights_of(FLATMTL_FAIRGRAD, {2}, gramian(a));
      CHECK(extreme.status == FLATMTL_OK);
      CHECK(fair_residual(gramian(a), extreme.weights, 2) <= 1e-11);
      Matrix b = normal_rows(random, n, n + 3);
      scale_rows(b, random, 8);
      for (double alpha : {0.05, 0.1, 5.0, 10.0}) {
        const Solved fair = weights_of(FLATMTL_FAIRGRAD, {alpha}, gramian(b));
        CAPTURE(n, alpha);
        CHECK(fair.status == FLATMTL_OK);
        CHECK(fair_residual(gramian(b), fair.weights, alpha) <= 1e-10);
      }
    }
  }
}

TEST_CASE("IMTL-G: equal projections, weights that sum to 1, the pseudo-inverse where the Gramian is singular") {
  std::mt19937_64 random(3);
  for (int32_t n : SIZES) {
    for (double decades : {0.0, 4.0, 20.0}) {
      Matrix full = normal_rows(random, n, n + 2);
      scale_rows(full, random, decades);
      // Rank r with equal inner products with e_0: d lies in the range of G.
      for (int32_t rank : {1, 2, n / 2, n + 2}) {
        if (rank < 1) continue;
        Matrix a = normal_rows(random, n, rank);
        for (int32_t i = 0; i < n; i++) {
          double square = 0;
          for (int32_t p = 1; p < rank; p++) square += a(i, p) * a(i, p);
          for (int32_t p = 1; p < rank; p++) a(i, p) *= 0.8 / std::sqrt(square);
          a(i, 0) = 0.6;
        }
        scale_rows(a, random, decades);
        const Vec g = gramian(a);
        const Solved solved = weights_of(FLATMTL_IMTL_G, {}, g);
        CAPTURE(n, decades, rank);
        CHECK(solved.status == FLATMTL_OK);
        CHECK(imtl_residual(g, solved.weights) <= 1e-11);
        double sum = 0, size = 0;
        for (double w : solved.weights) {
          sum += w;
          size += std::fabs(w);
        }
        CHECK(std::fabs(sum - 1) <= 1e-13 * size);
      }
      const Vec g = gramian(full);
      CHECK(imtl_residual(g, weights_of(FLATMTL_IMTL_G, {}, g).weights) <= 1e-11);
    }
  }
  // Rank 1, g_i = a_i u with a > 0: w = a / SUM a.
  const Vec a = {1, 2, 5};
  Vec g;
  for (double x : a)
    for (double y : a) g.push_back(x * y);
  const Solved solved = weights_of(FLATMTL_IMTL_G, {}, g);
  for (size_t i = 0; i < 3; i++) CHECK(solved.weights[i] == Approx(a[i] / 8).epsilon(1e-13));
}

TEST_CASE("PCGrad against projections of explicit vectors") {
  const auto mix = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  };
  const uint64_t golden = 0x9E3779B97F4A7C15u;
  std::mt19937_64 random(4);
  for (int32_t n : {2, 3, 7, 20}) {
    for (uint64_t draw : {0u, 1u, 1000u}) {
      const uint64_t seed = 12345;
      const Matrix rows = normal_rows(random, n, n + 1);
      Vec expected(static_cast<size_t>(n + 1));
      for (int32_t i = 0; i < n; i++) {
        uint64_t h = mix(seed + golden);
        h = mix(h ^ (draw + golden));
        h = mix(h ^ (0 + golden));
        h = mix(h ^ (static_cast<uint64_t>(i) + golden));
        std::vector<int32_t> order;
        for (int32_t j = 0; j < n; j++)
          if (j != i) order.push_back(j);
        uint64_t drawn = 0;
        for (size_t m = order.size() - 1; m >= 1 && m < order.size(); m--)
          std::swap(order[m], order[mix(h + ++drawn * golden) % (m + 1)]);
        Vec v;
        for (int32_t p = 0; p <= n; p++) v.push_back(rows(i, p));
        for (int32_t j : order) {
          double along = 0, square = 0;
          for (int32_t p = 0; p <= n; p++) {
            along += v[static_cast<size_t>(p)] * rows(j, p);
            square += rows(j, p) * rows(j, p);
          }
          for (int32_t p = 0; p <= n && along < 0; p++) v[static_cast<size_t>(p)] -= along / square * rows(j, p);
        }
        for (int32_t p = 0; p <= n; p++) expected[static_cast<size_t>(p)] += v[static_cast<size_t>(p)];
      }
      const Solved solved =
          weights_of(FLATMTL_PCGRAD, {static_cast<double>(seed), static_cast<double>(draw)}, gramian(rows));
      for (int32_t p = 0; p <= n; p++) {
        double update = 0;
        for (int32_t i = 0; i < n; i++) update += solved.weights[static_cast<size_t>(i)] * rows(i, p);
        CHECK(update == Approx(expected[static_cast<size_t>(p)]).margin(1e-11));
      }
    }
  }
}

TEST_CASE("no finite solution: all weights 0 and the status") {
  std::mt19937_64 random(5);
  for (int32_t n : {2, 3, 5, 10, 40, 64}) {
    for (double decades : {0.0, 6.0}) {
      Matrix a = normal_rows(random, n, n + 2);
      for (int32_t p = 0; p < n + 2; p++) {
        a(n - 1, p) = 0;
        for (int32_t i = 0; i + 1 < n; i++) a(n - 1, p) -= a(i, p);
      }
      scale_rows(a, random, decades);
      for (const Named &named :
           {Named{FLATMTL_NASH_MTL, {}, 0}, {FLATMTL_FAIRGRAD, {2}, 0}, {FLATMTL_FAIRGRAD, {0.3}, 0}}) {
        const Solved solved = weights_of(named.method, named.options, gramian(a));
        CAPTURE(n, decades);
        CHECK(solved.status == FLATMTL_PARETO_STATIONARY);
        CHECK(solved.weights == Vec(static_cast<size_t>(n)));
      }
    }
  }
  const Vec antipodal = {2, -2, -2, 2};
  for (flatmtl_method method : {FLATMTL_NASH_MTL, FLATMTL_FAIRGRAD, FLATMTL_IMTL_G}) {
    CHECK(weights_of(method, {}, antipodal).status == FLATMTL_PARETO_STATIONARY);
    const Solved nothing = weights_of(method, {}, Vec(9));
    CHECK(nothing.status == FLATMTL_PARETO_STATIONARY);
    CHECK(nothing.weights == Vec(3));
  }
}

TEST_CASE("a zero row changes nothing for the others, where its weight is 0") {
  std::mt19937_64 random(6);
  const Matrix a = normal_rows(random, 4, 6);
  Matrix with_zero(5, 6);
  for (int32_t i = 0; i < 4; i++)
    for (int32_t p = 0; p < 6; p++) with_zero(i < 2 ? i : i + 1, p) = a(i, p);
  for (const Named &named : {Named{FLATMTL_IMTL_G, {}, 0}, {FLATMTL_NASH_MTL, {}, 0}, {FLATMTL_FAIRGRAD, {2}, 0}}) {
    const Vec w = weights_of(named.method, named.options, gramian(a)).weights;
    CHECK(weights_of(named.method, named.options, gramian(with_zero)).weights == Vec{w[0], w[1], 0, w[2], w[3]});
  }
}

TEST_CASE("homogeneous of the stated degree over sixty decades") {
  std::mt19937_64 random(7);
  for (int32_t n : {1, 2, 5, 12}) {
    const Vec g = gramian(normal_rows(random, n, n + 2));
    for (const Named &named : all_methods(n)) {
      const Vec w = weights_of(named.method, named.options, g).weights;
      for (double c : {1e-30, 1e-6, 3.0, 0x1p30, 1e30}) {
        Vec scaled = g;
        for (double &x : scaled) x *= c * c;
        const Solved solved = weights_of(named.method, named.options, scaled);
        CAPTURE(n, flatmtl_method_name(named.method), c);
        REQUIRE(solved.status == FLATMTL_OK);
        const double factor = std::pow(c, named.degree - 1);
        double largest = 0;
        for (double x : w) largest = std::max(largest, std::fabs(x));
        for (size_t i = 0; i < w.size(); i++) CHECK(solved.weights[i] / factor == Approx(w[i]).margin(1e-9 * largest));
      }
    }
  }
}

TEST_CASE("permuting the tasks permutes the weights") {
  std::mt19937_64 random(8);
  for (int32_t n : {2, 5, 16}) {
    const Matrix a = normal_rows(random, n, n + 4);
    std::vector<int32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    Matrix b(n, n + 4);
    for (int32_t i = 0; i < n; i++)
      for (int32_t p = 0; p < n + 4; p++) b(i, p) = a(order[static_cast<size_t>(i)], p);
    for (const Named &named : all_methods(n)) {
      if (named.method == FLATMTL_PCGRAD || named.method == FLATMTL_GRADVAC || named.method == FLATMTL_FIXED)
        continue;  // depend on the order
      const Vec w = weights_of(named.method, named.options, gramian(a)).weights;
      const Vec permuted = weights_of(named.method, named.options, gramian(b)).weights;
      for (size_t i = 0; i < permuted.size(); i++)
        CHECK(permuted[i] == Approx(w[static_cast<size_t>(order[i])]).epsilon(1e-9).margin(1e-12));
    }
  }
}

TEST_CASE("any finite matrix: finite weights, the same twice") {
  std::mt19937_64 random(9);
  const double special[] = {0.0,  -0.0, 5e-324, 1e-310, 1e-200, -1e-160, 1e-30,  1.0,
                            -1.0, 2.0,  3.0,    -3.0,   1e30,   1e160,   -1e200, 1.7e308};
  for (int repeat = 0; repeat < 3000; repeat++) {
    const auto n = static_cast<int32_t>(1 + random() % 6);
    Vec g(static_cast<size_t>(n * n));
    if (repeat % 2) {
      for (double &x : g) x = special[random() % 16];
    } else {  // a Gramian of rows of those lengths
      Matrix a = normal_rows(random, n, static_cast<int32_t>(1 + random() % 4));
      scale_rows(a, random, repeat % 4 ? 30 : 5);
      g = gramian(a);
    }
    if (std::any_of(g.begin(), g.end(), [](double x) { return !std::isfinite(x); })) continue;
    for (const Named &named : all_methods(n)) {
      const Solved first = weights_of(named.method, named.options, g),
                   second = weights_of(named.method, named.options, g);
      CAPTURE(flatmtl_method_name(named.method), g, first.status);
      CHECK(first.status == second.status);
      if (first.status < 0) {  // an indefinite matrix is no Gramian
        CHECK(first.status == FLATMTL_ERROR_INTERNAL);
        CHECK(repeat % 2 == 1);
        continue;
      }
      CHECK(std::all_of(first.weights.begin(), first.weights.end(), [](double x) { return std::isfinite(x); }));
      CHECK(first.weights == second.weights);
    }
  }
}
