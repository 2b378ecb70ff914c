// GradVac, Aligned-MTL, UPGrad, DualProj, ConFIG and NTKMTL: closed forms, optimality conditions component by
// component.
#include <algorithm>

#include "weights_support.h"

namespace {

size_t at(int32_t n, int32_t i, int32_t j) {
  return static_cast<size_t>(i) * static_cast<size_t>(n) + static_cast<size_t>(j);
}

struct Case {
  std::string name;
  Vec g;
};

void scale_rows(Matrix &a, std::mt19937_64 &random, double decades) {
  std::uniform_real_distribution<double> uniform(-decades, decades);
  for (int32_t i = 0; i < a.rows; i++) {
    const double factor = std::pow(10, uniform(random));
    for (int32_t p = 0; p < a.columns; p++) a(i, p) *= factor;
  }
}

// Rows whose Gramian has about this condition: every column 10 to some power.
Matrix conditioned(std::mt19937_64 &random, int32_t n, double condition) {
  Matrix a = normal_rows(random, n, n);
  for (int32_t p = 0; p < n; p++)
    for (int32_t i = 0; i < n; i++) a(i, p) *= std::pow(condition, -0.5 * p / std::max(1, n - 1));
  return a;
}

std::vector<Case> cases(std::mt19937_64 &random, int32_t n) {
  std::vector<Case> all;
  for (int32_t rank : {1, 2, n / 2, n - 1, n, n + 3}) {
    if (rank < 1) continue;
    for (double decades : {0.0, 4.0, 15.0}) {
      Matrix a = normal_rows(random, n, rank);
      scale_rows(a, random, decades);
      all.push_back({"rank " + std::to_string(rank) + " decades " + std::to_string(decades), gramian(a)});
    }
  }
  for (double condition : {1e6, 1e12}) {
    all.push_back({"condition " + std::to_string(condition), gramian(conditioned(random, n, condition))});
  }
  for (double scale : {1e-30, 1e30}) {
    Matrix a = normal_rows(random, n, n + 1);
    for (double &x : a.values) x *= scale;
    all.push_back({"scale " + std::to_string(scale), gramian(a)});
  }
  Matrix twins = normal_rows(random, n, n + 1);  // duplicate and opposite rows
  for (int32_t i = n / 2; i < n; i++)
    for (int32_t p = 0; p <= n; p++) twins(i, p) = (i % 2 ? -1 : 1) * twins(i - n / 2, p);
  all.push_back({"twins", gramian(twins)});
  return all;
}

const int32_t SIZES[] = {1, 2, 3, 5, 10, 24, 64};

struct Sum {
  long double value = 0, terms = 0;
};

Sum inner(const Vec &g, int32_t i, const Vec &w) {
  const auto n = static_cast<int32_t>(w.size());
  Sum sum;
  for (int32_t j = 0; j < n; j++) {
    const long double term = static_cast<long double>(g[at(n, i, j)]) * w[static_cast<size_t>(j)];
    sum.value += term;
    sum.terms += std::fabs(term);
  }
  return sum;
}

// v >= lower, Gv >= 0, and (Gv)_i = 0 where v_i > lower_i: the largest violation, relative to (|G||v|)_i.
double projection_residual(const Vec &g, const Vec &v, const Vec &lower) {
  double worst = 0;
  for (size_t i = 0; i < v.size(); i++) {
    if (v[i] < lower[i]) return INFINITY;
    const Sum sum = inner(g, static_cast<int32_t>(i), v);
    if (sum.terms == 0) continue;
    const auto relative = static_cast<double>(sum.value / sum.terms);
    worst = std::max(worst, v[i] > lower[i] ? std::fabs(relative) : -relative);
  }
  return worst;
}

}  // namespace

TEST_CASE("UPGrad and DualProj: the projections' optimality conditions", "[solve][cone]") {
  std::mt19937_64 random(31);
  for (int32_t n : SIZES) {
    for (const Case &c : cases(random, n)) {
      CAPTURE(n, c.name);
      Vec sum(static_cast<size_t>(n));
      for (int32_t i = 0; i < n; i++) {
        if (n > 24 && i % 9) continue;
        Vec only(static_cast<size_t>(n));
        only[static_cast<size_t>(i)] = 1.0 / n;
        const Solved one = weights_of(FLATMTL_UPGRAD, only, c.g);
        REQUIRE(one.status == FLATMTL_OK);
        CHECK(projection_residual(c.g, one.weights, only) <= 1e-10);
        for (size_t j = 0; j < sum.size(); j++) sum[j] += one.weights[j];
      }
      const Solved all = weights_of(FLATMTL_UPGRAD, {}, c.g);
      REQUIRE(all.status == FLATMTL_OK);
      for (size_t j = 0; j < sum.size() && n <= 24; j++) CHECK(all.weights[j] == Approx(sum[j]).epsilon(1e-13));
      for (int32_t i = 0; i < n; i++) {
        const Sum s = inner(c.g, i, all.weights);
        CHECK(s.value >= -1e-10L * s.terms);
      }
      for (const Vec &preference : {Vec(static_cast<size_t>(n), 1.0 / n), Vec(static_cast<size_t>(n), 3e200)}) {
        const Solved dual = weights_of(FLATMTL_DUALPROJ, preference, c.g);
        REQUIRE(dual.status == FLATMTL_OK);
        CHECK(projection_residual(c.g, dual.weights, preference) <= 1e-10);
      }
    }
  }
}

TEST_CASE("two tasks: closed forms of the projections and of balanced lengths", "[solve]") {
  for (double c : {-0.999, -0.5, -0.1, 0.0, 0.3, 0.9}) {
    for (double d2 : {1e-8, 0.5, 1.0, 3.0, 1e8}) {
      const double d1 = 1.5, g11 = d1 * d1, g22 = d2 * d2, g12 = c * d1 * d2;
      const Vec g = {g11, g12, g12, g22};
      CAPTURE(c, d2);
      const auto check = [&](flatmtl_method method, const Vec &options, double w1, double w2) {
        const Solved solved = weights_of(method, options, g);
        CHECK(solved.status == FLATMTL_OK);
        CHECK(solved.weights[0] == Approx(w1).epsilon(1e-11));
        CHECK(solved.weights[1] == Approx(w2).epsilon(1e-11));
      };
      check(FLATMTL_UPGRAD, {}, 0.5 * (1 - std::min(g12, 0.0) / g11), 0.5 * (1 - std::min(g12, 0.0) / g22));
      check(FLATMTL_UPGRAD, {2, 5}, 2 - 5 * std::min(g12, 0.0) / g11, 5 - 2 * std::min(g12, 0.0) / g22);
      check(FLATMTL_DUALPROJ, {}, std::max(0.5, -0.5 * g12 / g11), std::max(0.5, -0.5 * g12 / g22));
      check(FLATMTL_GRADVAC, {}, 1 - std::min(g12, 0.0) / g11, 1 - std::min(g12, 0.0) / g22);
      const double mean = 0.5 * (g11 + g22);
      check(FLATMTL_NTKMTL, {}, std::sqrt(mean / g11), std::sqrt(mean / g22));
      check(FLATMTL_NTKMTL, {0.75}, std::pow(mean / g11, 0.75), std::pow(mean / g22, 0.75));
      check(FLATMTL_NTKMTL, {0}, 1, 1);
      // Along the bisector u_1 + u_2, as long as the sum of the projections, (d_1 + d_2) (1 + c) / ||u_1 + u_2||.
      const double length = (d1 + d2) * (1 + c) / (2 * (1 + c));
      check(FLATMTL_CONFIG, {}, length / d1, length / d2);
      // (G + sqrt(det) I) / sqrt(tr + 2 sqrt(det)) is the root of G; w = sqrt(l_2) root^-1 1.
      const double det = d1 * d2 * std::sqrt((1 - c) * (1 + c)), trace = g11 + g22;
      const double least = 2 * det * det / (trace + std::sqrt((g11 - g22) * (g11 - g22) + 4 * g12 * g12));
      if (d2 == 1e8 || d2 == 1e-8) continue;  // the smaller eigenvalue is lost in the rounding of the larger
      const double factor = std::sqrt(trace + 2 * det) * std::sqrt(least);
      const double a = g11 + det, b = g22 + det, inverse = 1 / (a * b - g12 * g12);
      check(FLATMTL_ALIGNED_MTL, {0, 0}, factor * (b - g12) * inverse, factor * (a - g12) * inverse);
    }
  }
}

TEST_CASE("one task: the gain of the projections", "[solve]") {
  for (double d : {1e-30, 0.3, 1e30}) {
    for (flatmtl_method method :
         {FLATMTL_GRADVAC, FLATMTL_ALIGNED_MTL, FLATMTL_UPGRAD, FLATMTL_DUALPROJ, FLATMTL_CONFIG, FLATMTL_NTKMTL}) {
      CHECK(weights_of(method, {}, {d * d}).weights[0] == Approx(1).epsilon(1e-15));
    }
  }
}

TEST_CASE("ConFIG: equal cosines, and the length of the projections' sum", "[solve]") {
  std::mt19937_64 random(32);
  for (int32_t n : SIZES) {
    for (double condition : {1.0, 1e6, 1e12}) {
      for (double decades : {0.0, 4.0, 15.0}) {
        Matrix a = condition == 1 ? normal_rows(random, n, n + 3) : conditioned(random, n, condition);
        scale_rows(a, random, decades);
        const Vec g = gramian(a);
        const Solved solved = weights_of(FLATMTL_CONFIG, {}, g);
        CAPTURE(n, condition, decades);
        REQUIRE(solved.status == FLATMTL_OK);
        // The cosine from the row where rounding says least about it.
        long double common = 0, least = INFINITY, total = 0, total_terms = 0, square = 0, square_terms = 0;
        for (int32_t i = 0; i < n; i++) {
          const long double d = std::sqrt(static_cast<long double>(g[at(n, i, i)]));
          const Sum s = inner(g, i, solved.weights);
          if (s.terms / d < least) {
            least = s.terms / d;
            common = s.value / d;
          }
          total += s.value;
          total_terms += s.terms;
          square += s.value * solved.weights[static_cast<size_t>(i)];
          square_terms += s.terms * std::fabs(solved.weights[static_cast<size_t>(i)]);
        }
        for (int32_t i = 0; i < n; i++) {
          const Sum s = inner(g, i, solved.weights);
          const long double d = std::sqrt(static_cast<long double>(g[at(n, i, i)]));
          CHECK(std::fabs(s.value - common * d) <= 1e-10L * s.terms);
        }
        // ||u|| = SUM <g_i, u> / ||u||
        CHECK(std::fabs(total - square) <= 1e-10L * (total_terms + square_terms));
      }
    }
  }
}

TEST_CASE("Aligned-MTL: BGB = s I on the span, B found by turning rows around", "[solve]") {
  std::mt19937_64 random(33);
  for (int32_t n : {1, 2, 3, 5, 10, 24, 64}) {
    for (int32_t rank : {1, n / 2, n - 1, n}) {
      if (rank < 1) continue;
      for (double condition : {1.0, 1e6, 1e12}) {
        Matrix a = normal_rows(random, n, rank);
        for (int32_t i = 0; i < n; i++)
          for (int32_t p = 0; p < rank; p++) a(i, p) *= std::pow(condition, -0.5 * p / std::max(1, rank - 1));
        const Vec g = gramian(a);
        CAPTURE(n, rank, condition);
        // With row k turned around, S G S has S B S: the weights are S B S 1. So B e_k = (B 1 - S w) / 2.
        const Vec options = {0, 0x1p-50};
        const Vec whole = weights_of(FLATMTL_ALIGNED_MTL, options, g).weights;
        Matrix b(n, n);
        for (int32_t k = 0; k < n; k++) {
          Vec turned = g;
          for (int32_t i = 0; i < n; i++)
            if (i != k) turned[at(n, i, k)] = turned[at(n, k, i)] = -turned[at(n, i, k)];
          const Vec w = weights_of(FLATMTL_ALIGNED_MTL, options, turned).weights;
          for (int32_t i = 0; i < n; i++)
            b(i, k) = 0.5 * (whole[static_cast<size_t>(i)] - (i == k ? -1 : 1) * w[static_cast<size_t>(i)]);
        }
        // M = BGB / s: with P the projection on the span, M = P: MM = M, and trace M = rank. s = trace(BGB) / rank.
        Matrix gb(n, n), m(n, n);
        double trace = 0, largest = 0, size = 0;
        for (int32_t i = 0; i < n; i++)
          for (int32_t k = 0; k < n; k++) {
            for (int32_t j = 0; j < n; j++) gb(i, k) += g[at(n, i, j)] * b(j, k);
            largest = std::max(largest, std::fabs(g[at(n, i, k)]));
            size = std::max(size, std::fabs(b(i, k)));
          }
        for (int32_t i = 0; i < n; i++)
          for (int32_t k = 0; k < n; k++)
            for (int32_t j = 0; j < n; j++) m(i, k) += b(i, j) * gb(j, k);
        for (int32_t i = 0; i < n; i++) trace += m(i, i);
        const double s = trace / rank, error = 1e-10 * n * size * size * largest;
        CHECK(s > 0);
        for (int32_t i = 0; i < n; i++)
          for (int32_t k = 0; k < n; k++) {
            double twice = 0;
            for (int32_t j = 0; j < n; j++) twice += m(i, j) * m(j, k) / s;
            CHECK(std::fabs(twice - m(i, k)) <= error * (1 + std::fabs(m(i, k)) / s));
          }
      }
    }
  }
  // The scales: orthogonal rows of squares 1, 4, 9, 100; w_i = sqrt(s / G_ii).
  const Vec g = {1, 0, 0, 0, 0, 4, 0, 0, 0, 0, 9, 0, 0, 0, 0, 100};
  const double scale[] = {1, 4, 28.5}, squares[] = {1, 4, 9, 100};
  for (int option = 0; option < 3; option++) {
    const Vec w = weights_of(FLATMTL_ALIGNED_MTL, {static_cast<double>(option), 0}, g).weights;
    for (size_t i = 0; i < 4; i++) CHECK(w[i] == Approx(std::sqrt(scale[option] / squares[i])).epsilon(1e-14));
  }
  // Eigenvalues below the tolerance, here 0.02 * 4 * 100, count nowhere.
  const Vec cut = weights_of(FLATMTL_ALIGNED_MTL, {0, 0.02}, g).weights;
  CHECK(cut[0] == 0);
  CHECK(cut[1] == 0);
  CHECK(cut[2] == Approx(1));
  CHECK(cut[3] == Approx(0.3));
}

TEST_CASE("GradVac: with fresh targets it is PCGrad; two tasks get the target cosine", "[solve][gradvac]") {
  std::mt19937_64 random(34);
  for (int32_t n : {1, 2, 3, 7, 20}) {
    Matrix a = normal_rows(random, n, n + 1);
    scale_rows(a, random, 3);
    const Vec pc = weights_of(FLATMTL_PCGRAD, {5, 6}, gramian(a)).weights;
    const Vec vac = weights_of(FLATMTL_GRADVAC, {0.3, 5, 6}, gramian(a)).weights;
    for (size_t i = 0; i < pc.size(); i++) CHECK(vac[i] == Approx(pc[i]).epsilon(1e-10));
  }
  for (double c : {-1.0, -0.9, 0.0, 0.3, 0.8}) {
    for (double t : {-0.5, 0.0, 0.5, 0.95}) {
      for (double d2 : {1e-5, 1.0, 1e5}) {
        const double d1 = 2, beta = 0.25;
        const Vec g = {d1 * d1, c * d1 * d2, c * d1 * d2, d2 * d2};
        Vec state = {0, t, -1, 0};  // g_2 is left as it is
        const Vec w = weights_of(FLATMTL_GRADVAC, {beta, 0, 0}, g, nullptr, &state).weights;
        CAPTURE(c, t, d2);
        const double x = w[0], y = w[1] - 1;  // g_1' = x g_1 + y g_2
        CHECK(x == 1);
        const double along = c * d1 + y * d2, square = d1 * d1 + 2 * y * c * d1 * d2 + y * y * d2 * d2;
        if (c < t && c > -1) CHECK(along / std::sqrt(square) == Approx(t).margin(1e-10));
        if (c >= t) CHECK(std::fabs(y) * d2 <= 1e-12);
        CHECK(state[1] == Approx(t + beta * (c - t)).margin(1e-14));
        CHECK(state[2] == Approx(-1 + beta * (c + 1)).margin(1e-14));
        CHECK(state[0] == 0);
      }
    }
  }
}

TEST_CASE("GradVac: rows that vanish leave the targets, and errors leave the state", "[solve][gradvac]") {
  // Row 1 is 0; rows 0 and 2 are opposite.
  const Vec g = {1, 0, -2, 0, 0, 0, -2, 0, 4};
  Vec state = {0, 0.1, 0, 0.2, 0, 0.3, 0, 0.4, 0};
  const Solved solved = weights_of(FLATMTL_GRADVAC, {0.5, 0, 0}, g, nullptr, &state);
  CHECK(solved.status == FLATMTL_OK);
  CHECK(state == Vec{0, 0.1, -0.5, 0.2, 0, 0.3, -0.5, 0.4, 0});
  CHECK(solved.weights[1] == 1);
  Vec ones(9, 1.0);  // duplicates, and targets of 1: finite, and nothing is added
  const Vec same = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  const Vec w = weights_of(FLATMTL_GRADVAC, {}, same, nullptr, &ones).weights;
  for (double x : w) CHECK(x == 1);
  CHECK(ones == Vec(9, 1.0));

  // g_0' vanishes when it meets the opposite g_1; the target to g_2 then stays, if g_2 comes after g_1.
  int after = 0;
  for (int draw = 0; draw < 20; draw++) {
    Vec targets = {0, 0, -0.5, 0, 0, 0, 0, 0, 0};
    const Vec corner = {1, -2, 0, -2, 4, 0, 0, 0, 1};
    const Vec turned =
        weights_of(FLATMTL_GRADVAC, {0.5, 0, static_cast<double>(draw)}, corner, nullptr, &targets).weights;
    CHECK(turned == Vec{1.0 + 2, 1.0 + 0.5, 1.0});  // g_0' = g_1' = 0, g_2' = g_2
    CHECK((targets[2] == -0.5 || targets[2] == -0.25));
    after += targets[2] == -0.5;
  }
  CHECK(after > 2);
  CHECK(after < 18);

  flatmtl_error error;
  Vec bad = g;
  bad[6] = NAN;
  const Vec before = state;
  CHECK(weights_of(FLATMTL_GRADVAC, {}, bad, &error, &state).status == FLATMTL_ERROR_NONFINITE);
  CHECK(state == before);
  for (double value : {1.5, -2.0, static_cast<double>(NAN)}) {
    Vec wrong = before;
    wrong[5] = value;
    CHECK(weights_of(FLATMTL_GRADVAC, {}, g, &error, &wrong).status == FLATMTL_ERROR_OPTION);
    CHECK(error.row == 1);
    CHECK(std::string(error.argument) == "state");
  }
  Context context(3);
  Vec out(3, 7);
  CHECK(flatmtl_weights(context, FLATMTL_GRADVAC, nullptr, 0, 3, g.data(), nullptr, out.data(), &error) ==
        FLATMTL_ERROR_NULL);
  CHECK(flatmtl_weights(context, FLATMTL_GRADVAC, nullptr, 0, 3, g.data(), state.data(), &state[3], &error) ==
        FLATMTL_ERROR_OVERLAP);
  Vec shared = g;
  CHECK(flatmtl_weights(context, FLATMTL_GRADVAC, nullptr, 0, 3, shared.data(), shared.data(), out.data(), &error) ==
        FLATMTL_ERROR_OVERLAP);
  CHECK(out == Vec(3, 7));
  int64_t count = -1;
  CHECK(flatmtl_state_size(FLATMTL_GRADVAC, 3, &count, nullptr) == FLATMTL_OK);
  CHECK(count == 9);
  CHECK(flatmtl_state_size(FLATMTL_MGDA, 3, &count, nullptr) == FLATMTL_OK);
  CHECK(count == 0);
  CHECK(flatmtl_state_size(FLATMTL_GRADVAC, 0, &count, nullptr) == FLATMTL_ERROR_NUM_TASKS);
  CHECK(flatmtl_state_size(FLATMTL_GRADVAC, 3, nullptr, nullptr) == FLATMTL_ERROR_NULL);
}

TEST_CASE("zero rows change nothing for the others", "[solve]") {
  std::mt19937_64 random(35);
  const Matrix a = normal_rows(random, 4, 6);
  Matrix with_zero(5, 6);
  for (int32_t i = 0; i < 4; i++)
    for (int32_t p = 0; p < 6; p++) with_zero(i < 2 ? i : i + 1, p) = a(i, p);
  const double quarter = 0.25;
  const Vec four(4, quarter), five(5, quarter);
  for (const auto &[method, options, longer, weight] :
       {std::tuple<flatmtl_method, Vec, Vec, double>{FLATMTL_ALIGNED_MTL, {}, {}, 0},
        {FLATMTL_CONFIG, {}, {}, 0},
        {FLATMTL_NTKMTL, {}, {}, 0},
        {FLATMTL_UPGRAD, four, five, quarter},
        {FLATMTL_DUALPROJ, four, five, quarter}}) {
    const Vec w = weights_of(method, options, gramian(a)).weights;
    CAPTURE(flatmtl_method_name(method));
    const Vec z = weights_of(method, longer, gramian(with_zero)).weights;
    CHECK(z == Vec{w[0], w[1], weight, w[2], w[3]});
  }
  for (flatmtl_method method : {FLATMTL_ALIGNED_MTL, FLATMTL_CONFIG, FLATMTL_NTKMTL}) {
    const Solved nothing = weights_of(method, {}, Vec(9));
    CHECK(nothing.status == FLATMTL_PARETO_STATIONARY);
    CHECK(nothing.weights == Vec(3));
  }
  const Vec antipodal = {2, -2, -2, 2};
  CHECK(weights_of(FLATMTL_CONFIG, {}, antipodal).status == FLATMTL_PARETO_STATIONARY);
  const Vec up = weights_of(FLATMTL_UPGRAD, {}, antipodal).weights;
  CHECK(up[0] == up[1]);  // the update is 0
  const Vec aligned = weights_of(FLATMTL_ALIGNED_MTL, {}, antipodal).weights;
  CHECK(std::fabs(aligned[0] - aligned[1]) <= 1e-15);
}
