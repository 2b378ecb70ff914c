// Both families' weights against the same computation on explicit vectors, for every method, combination and scale.
#include "weights_support.h"

namespace {

// A of the rows of m, with the weights from the library's plain solve. `call` numbers the draws.
struct Aggregator {
  Named named;
  bool rms;
  flatmtl_status worst = FLATMTL_OK;

  Vec operator()(const Matrix &m, bool two_rows) {
    Vec g = gramian(m), w;
    if (rms) {
      double trace = 0;
      for (int32_t i = 0; i < m.rows; i++) trace += g[static_cast<size_t>(i * m.rows + i)];
      for (double &x : g) x = trace > 0 ? x / (trace / m.rows) : x;
    }
    if (two_rows && named.method == FLATMTL_FIXED) {
      w = {1, 1};
    } else {
      const Solved solved = weights_of(named.method, named.options, g);
      REQUIRE(solved.status >= 0);
      worst = std::max(worst, solved.status);
      w = solved.weights;
    }
    Vec update(static_cast<size_t>(m.columns));
    for (int32_t i = 0; i < m.rows; i++)
      for (int32_t p = 0; p < m.columns; p++) update[static_cast<size_t>(p)] += w[static_cast<size_t>(i)] * m(i, p);
    return update;
  }
};

Matrix stack(const std::vector<Vec> &rows) {
  Matrix m(static_cast<int32_t>(rows.size()), static_cast<int32_t>(rows[0].size()));
  for (int32_t i = 0; i < m.rows; i++)
    for (int32_t p = 0; p < m.columns; p++) m(i, p) = rows[static_cast<size_t>(i)][static_cast<size_t>(p)];
  return m;
}

Vec row(const Matrix &m, int32_t i) {
  return Vec(m.values.begin() + i * m.columns, m.values.begin() + (i + 1) * m.columns);
}

Vec expected_update(Aggregator &aggregate, flatmtl_combination combine, const Matrix &g, const Matrix &f) {
  std::vector<Vec> results;
  switch (combine) {
    case FLATMTL_DIRECT: {
      Matrix s = g;
      for (size_t k = 0; k < s.values.size(); k++) s.values[k] += f.values[k];
      return aggregate(s, false);
    }
    case FLATMTL_SECOND:
      results = {aggregate(g, false), aggregate(f, false)};
      return aggregate(stack(results), true);
    case FLATMTL_EACH:
      for (int32_t i = 0; i < g.rows; i++) results.push_back(aggregate(stack({row(g, i), row(f, i)}), true));
      return aggregate(stack(results), false);
    default: {
      Vec sum = aggregate(g, false), flat = aggregate(f, false);
      for (size_t p = 0; p < sum.size(); p++) sum[p] += flat[p];
      return sum;
    }
  }
}

struct Result {
  flatmtl_status status;
  Vec loss, flat;
  flatmtl_status families[2];
};

// With a fresh state where the settings need one and have none.
Result step_weights(flatmtl_settings settings, const Matrix &g, const Matrix &f, flatmtl_error *error = nullptr) {
  const int32_t n = g.rows;
  int64_t count = 0;
  REQUIRE(flatmtl_step_state_size(&settings, n, &count, nullptr) == FLATMTL_OK);
  Vec fresh(static_cast<size_t>(count));
  if (!settings.state) settings.state = fresh.data();
  Matrix pair(2 * n, g.columns), s = g;
  std::copy(g.values.begin(), g.values.end(), pair.values.begin());
  std::copy(f.values.begin(), f.values.end(), pair.values.begin() + static_cast<long>(g.values.size()));
  for (size_t k = 0; k < s.values.size(); k++) s.values[k] += f.values[k];
  Context context(n);
  Result r{FLATMTL_OK, Vec(static_cast<size_t>(n), NAN), Vec(static_cast<size_t>(n), NAN), {FLATMTL_OK, FLATMTL_OK}};
  r.status = flatmtl_step_weights(context, &settings, n, gramian(pair).data(),
                                  settings.combine == FLATMTL_DIRECT ? gramian(s).data() : nullptr, r.loss.data(),
                                  r.flat.data(), r.families, error);
  return r;
}

flatmtl_settings settings_for(const Named &named, flatmtl_combination combine, flatmtl_family_scale scale) {
  flatmtl_settings settings;
  REQUIRE(flatmtl_settings_default(&settings, nullptr) == FLATMTL_OK);
  settings.method = named.method;
  settings.options = named.options.data();
  settings.num_options = static_cast<int32_t>(named.options.size());
  settings.combine = combine;
  settings.family_scale = scale;
  return settings;
}

Vec update_of(const Result &r, const Matrix &g, const Matrix &f) {
  Vec update(static_cast<size_t>(g.columns));
  for (int32_t i = 0; i < g.rows; i++)
    for (int32_t p = 0; p < g.columns; p++)
      update[static_cast<size_t>(p)] +=
          r.loss[static_cast<size_t>(i)] * g(i, p) + r.flat[static_cast<size_t>(i)] * f(i, p);
  return update;
}

const flatmtl_combination COMBINATIONS[] = {FLATMTL_DECOMPOSED, FLATMTL_DIRECT, FLATMTL_SECOND, FLATMTL_EACH};

}  // namespace

TEST_CASE("step weights: every method, combination and scale against explicit vectors") {
  std::mt19937_64 random(11);
  for (int32_t n : {1, 2, 3, 6}) {
    const Matrix g = normal_rows(random, n, 2 * n + 5);
    Matrix f = normal_rows(random, n, 2 * n + 5);
    for (double &x : f.values) x *= 1e-4;
    for (const Named &named : all_methods(n)) {
      // These draw afresh in every call, which the plain solve cannot; up to two tasks there is nothing to draw.
      if ((named.method == FLATMTL_PCGRAD || named.method == FLATMTL_GRADVAC) && n > 2) continue;
      for (flatmtl_combination combine : COMBINATIONS) {
        for (flatmtl_family_scale scale : {FLATMTL_SCALE_NONE, FLATMTL_SCALE_RMS}) {
          CAPTURE(n, flatmtl_method_name(named.method), combine, scale);
          const Result r = step_weights(settings_for(named, combine, scale), g, f);
          Aggregator aggregate{named, scale == FLATMTL_SCALE_RMS};
          const Vec expected = expected_update(aggregate, combine, g, f), update = update_of(r, g, f);
          CHECK(r.status == aggregate.worst);
          double largest = 0;
          for (double x : expected) largest = std::max(largest, std::fabs(x));
          double difference = 0;
          for (size_t p = 0; p < update.size(); p++)
            difference = std::max(difference, std::fabs(update[p] - expected[p]));
          CHECK(difference <= 1e-9 * largest);
        }
      }
    }
  }
}

TEST_CASE("rms family scale: the flat family's weights do not depend on its size") {
  std::mt19937_64 random(12);
  const Matrix g = normal_rows(random, 4, 9), f = normal_rows(random, 4, 9);
  for (const Named &named : all_methods(4)) {
    const flatmtl_settings settings = settings_for(named, FLATMTL_DECOMPOSED, FLATMTL_SCALE_RMS);
    const Result r = step_weights(settings, g, f);
    for (double c : {1e-30, 1e-6, 1e30}) {
      Matrix scaled = f;
      for (double &x : scaled.values) x *= c;
      const Result other = step_weights(settings, g, scaled);
      for (size_t i = 0; i < 4; i++) {
        CAPTURE(flatmtl_method_name(named.method), c);
        CHECK(other.flat[i] == Approx(r.flat[i]).epsilon(1e-9));
        CHECK(other.loss[i] == r.loss[i]);
      }
    }
  }
}

TEST_CASE("PCGrad draws afresh in every call of a step") {
  std::mt19937_64 random(13);
  Matrix g = normal_rows(random, 12, 13);
  const Named named = {FLATMTL_PCGRAD, {1, 2}, 1};
  const Result r = step_weights(settings_for(named, FLATMTL_DECOMPOSED, FLATMTL_SCALE_RMS), g, g);
  CHECK(r.loss == weights_of(FLATMTL_PCGRAD, named.options, gramian(g)).weights);
  CHECK(r.flat != r.loss);
  const Result again = step_weights(settings_for(named, FLATMTL_DECOMPOSED, FLATMTL_SCALE_RMS), g, g);
  CHECK(again.flat == r.flat);
  const Result next =
      step_weights(settings_for({FLATMTL_PCGRAD, {1, 3}, 1}, FLATMTL_DECOMPOSED, FLATMTL_SCALE_RMS), g, g);
  CHECK(next.loss != r.loss);
}

TEST_CASE("families of zeros: finite weights, and the status of the family concerned") {
  std::mt19937_64 random(14);
  Matrix g = normal_rows(random, 3, 5), zero(3, 5);
  point_to_one_side(g);
  for (const Named &named : all_methods(3)) {
    for (flatmtl_combination combine : COMBINATIONS) {
      for (flatmtl_family_scale scale : {FLATMTL_SCALE_NONE, FLATMTL_SCALE_RMS}) {
        CAPTURE(flatmtl_method_name(named.method), combine, scale);
        const bool solves = named.method == FLATMTL_IMTL_G || named.method == FLATMTL_ALIGNED_MTL ||
                            named.method == FLATMTL_CONFIG || named.method == FLATMTL_NTKMTL || named.degree != 1;
        const flatmtl_settings settings = settings_for(named, combine, scale);
        const Result flat = step_weights(settings, g, zero), both = step_weights(settings, zero, zero);
        for (const Result &r : {flat, both}) {
          REQUIRE(r.status >= 0);
          for (size_t i = 0; i < 3; i++) {
            CHECK(std::isfinite(r.loss[i]));
            CHECK(std::isfinite(r.flat[i]));
          }
        }
        CHECK(both.status == (solves ? FLATMTL_PARETO_STATIONARY : FLATMTL_OK));
        if (combine == FLATMTL_DECOMPOSED) {
          CHECK(flat.families[0] == FLATMTL_OK);
          CHECK(flat.families[1] == both.status);
        }
      }
    }
  }
}

TEST_CASE("step weights: what is refused, and that nothing is written then") {
  std::mt19937_64 random(15);
  const int32_t n = 3;
  const Vec pair = gramian(normal_rows(random, 2 * n, 9)), perturbed = gramian(normal_rows(random, n, 9));
  Context context(n);
  Vec loss(3, 7), flat(3, 7);
  flatmtl_status families[2] = {FLATMTL_OK, FLATMTL_OK};
  flatmtl_error error;
  flatmtl_settings settings = settings_for({FLATMTL_MEAN, {}, 1}, FLATMTL_DECOMPOSED, FLATMTL_SCALE_RMS);
  const auto call = [&](const double *gramian_pair, const double *s, double *a, double *b) {
    return flatmtl_step_weights(context, &settings, n, gramian_pair, s, a, b, families, &error);
  };
  CHECK(call(nullptr, nullptr, loss.data(), flat.data()) == FLATMTL_ERROR_NULL);
  CHECK(call(pair.data(), nullptr, nullptr, flat.data()) == FLATMTL_ERROR_NULL);
  CHECK(call(pair.data(), nullptr, loss.data(), nullptr) == FLATMTL_ERROR_NULL);
  CHECK(call(pair.data(), nullptr, loss.data(), loss.data() + 1) == FLATMTL_ERROR_OVERLAP);
  CHECK(flatmtl_step_weights(context, nullptr, n, pair.data(), nullptr, loss.data(), flat.data(), families, &error) ==
        FLATMTL_ERROR_NULL);
  CHECK(flatmtl_step_weights(nullptr, &settings, n, pair.data(), nullptr, loss.data(), flat.data(), families, &error) ==
        FLATMTL_ERROR_NULL);
  settings.combine = FLATMTL_DIRECT;
  CHECK(call(pair.data(), nullptr, loss.data(), flat.data()) == FLATMTL_ERROR_NULL);
  Vec bad = perturbed;
  bad[7] = INFINITY;
  CHECK(call(pair.data(), bad.data(), loss.data(), flat.data()) == FLATMTL_ERROR_NONFINITE);
  CHECK(error.row == 2);
  settings.combine = FLATMTL_EACH;
  bad = pair;
  bad[4 * 6 + 1] = NAN;
  CHECK(call(bad.data(), nullptr, loss.data(), flat.data()) == FLATMTL_ERROR_NONFINITE);
  CHECK(error.row == 4);
  settings.combine = static_cast<flatmtl_combination>(4);
  CHECK(call(pair.data(), nullptr, loss.data(), flat.data()) == FLATMTL_ERROR_NAME);
  settings.combine = FLATMTL_DECOMPOSED;
  settings.family_scale = static_cast<flatmtl_family_scale>(2);
  CHECK(call(pair.data(), nullptr, loss.data(), flat.data()) == FLATMTL_ERROR_NAME);
  settings.family_scale = FLATMTL_SCALE_RMS;
  settings.method = static_cast<flatmtl_method>(77);
  CHECK(call(pair.data(), nullptr, loss.data(), flat.data()) == FLATMTL_ERROR_NAME);
  CHECK(loss == Vec(3, 7));
  CHECK(flat == Vec(3, 7));
}
