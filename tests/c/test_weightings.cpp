// Loss weightings: names, options, checks, and that nothing is written on an error. The formulas are held against the
// reference in tests/python/test_weightings.py.
#include <cfloat>
#include <cmath>
#include <string>
#include <vector>

#include "catch.h"
#include "support.h"

namespace {

const char *const names[] = {"fixed",  "uw",   "dwa",      "rlw",      "si",   "gls",  "stch",
                             "imtl_l", "famo", "gradnorm", "go4align", "slaw", "bmtl", "emtl"};

struct Weighting {
  Weighting(int number, int32_t tasks) : number(static_cast<flatmtl_weighting>(number)), tasks(tasks), context(tasks) {
    int64_t count = 0;
    REQUIRE(flatmtl_weighting_state_size(this->number, tasks, &count, nullptr) == FLATMTL_OK);
    state.assign(static_cast<size_t>(count), 0.0);
    weights.assign(static_cast<size_t>(tasks), -7.0);
  }
  flatmtl_status weigh(const std::vector<double> &losses, const std::vector<double> &norms,
                       const std::vector<double> &options = {}) {
    return flatmtl_loss_weights(context, number, options.data(), static_cast<int32_t>(options.size()), tasks,
                                losses.data(), norms.data(), state.empty() ? nullptr : state.data(), weights.data(),
                                &error);
  }
  flatmtl_status observe(const std::vector<double> &losses, const std::vector<double> &after) {
    return flatmtl_loss_observe(context, number, nullptr, 0, tasks, losses.data(), after.data(),
                                state.empty() ? nullptr : state.data(), &error);
  }

  flatmtl_weighting number;
  int32_t tasks;
  Context context;
  std::vector<double> state, weights;
  flatmtl_error error{};
};

}  // namespace

TEST_CASE("weightings have names, and defaults that pass their own checks") {
  REQUIRE(FLATMTL_NUM_WEIGHTINGS == 14);
  for (int i = 0; i < FLATMTL_NUM_WEIGHTINGS; i++) {
    flatmtl_weighting number = FLATMTL_NUM_WEIGHTINGS;
    REQUIRE(flatmtl_weighting_by_name(names[i], &number, nullptr) == FLATMTL_OK);
    REQUIRE(number == i);
    REQUIRE(std::string(flatmtl_weighting_name(number)) == names[i]);
    REQUIRE(flatmtl_weighting_observes(number) == (number == FLATMTL_WEIGHTING_FAMO));
    int32_t count = 0;
    REQUIRE(flatmtl_weighting_defaults(number, 3, nullptr, &count, nullptr) == FLATMTL_OK);
    std::vector<double> options(static_cast<size_t>(count));
    REQUIRE(flatmtl_weighting_defaults(number, 3, options.data(), &count, nullptr) == FLATMTL_OK);
    Weighting a(i, 3), b(i, 3);
    for (int step = 0; step < 3; step++) {
      REQUIRE(a.weigh({1.0, 2.0, 0.5}, {1.0, 1.0, 3.0}) == FLATMTL_OK);
      REQUIRE(b.weigh({1.0, 2.0, 0.5}, {1.0, 1.0, 3.0}, options) == FLATMTL_OK);
      REQUIRE(a.weights == b.weights);
      REQUIRE(a.observe({1.0, 2.0, 0.5}, {0.5, 1.5, 0.5}) == FLATMTL_OK);
      REQUIRE(b.observe({1.0, 2.0, 0.5}, {0.5, 1.5, 0.5}) == FLATMTL_OK);
      REQUIRE(a.state == b.state);
    }
  }
  REQUIRE(flatmtl_weighting_name(FLATMTL_NUM_WEIGHTINGS) == nullptr);
  flatmtl_weighting number;
  REQUIRE(flatmtl_weighting_by_name("none", &number, nullptr) == FLATMTL_ERROR_NAME);
}

TEST_CASE("an error leaves state and weights as they were, and names the task") {
  for (int i = 0; i < FLATMTL_NUM_WEIGHTINGS; i++) {
    Weighting w(i, 3);
    REQUIRE(w.weigh({1.0, 2.0, 0.5}, {1.0, 1.0, 3.0}) == FLATMTL_OK);
    const auto state = w.state, weights = w.weights;
    REQUIRE(w.weigh({1.0, INFINITY, 0.5}, {1.0, 1.0, 3.0}) == FLATMTL_ERROR_NONFINITE);
    REQUIRE(w.error.row == 1);
    const bool norms = i == FLATMTL_WEIGHTING_GRADNORM || i == FLATMTL_WEIGHTING_EMTL;
    if (norms) {
      REQUIRE(w.weigh({1.0, 2.0, 0.5}, {1.0, 1.0, -3.0}) == FLATMTL_ERROR_OPTION);
      REQUIRE(w.weigh({1.0, 2.0, 0.5}, {1.0, 1.0, NAN}) == FLATMTL_ERROR_NONFINITE);
      REQUIRE(w.error.row == 2);
    }
    REQUIRE(w.weigh({1.0, 2.0, 0.5}, {1.0, 1.0, 3.0}, std::vector<double>(17, 1.0)) == FLATMTL_ERROR_OPTION);
    std::vector<double> options(5, NAN);
    int32_t count = 5;
    REQUIRE(flatmtl_weighting_defaults(w.number, 3, options.data(), &count, nullptr) == FLATMTL_OK);
    options.resize(static_cast<size_t>(count));
    for (auto &option : options) {
      const double before = option;
      for (double bad : {NAN, -INFINITY}) {
        option = bad;
        REQUIRE(w.weigh({1.0, 2.0, 0.5}, {1.0, 1.0, 3.0}, options) == FLATMTL_ERROR_OPTION);
      }
      option = before;
    }
    if (norms) {
      flatmtl_error error{};
      REQUIRE(flatmtl_loss_weights(w.context, w.number, nullptr, 0, 3, weights.data(), nullptr, w.state.data(),
                                   w.weights.data(), &error) == FLATMTL_ERROR_NULL);
      REQUIRE(std::string(error.argument) == "norms");
    }
    if (i == FLATMTL_WEIGHTING_FAMO || i == FLATMTL_WEIGHTING_SI || i == FLATMTL_WEIGHTING_GO4ALIGN) {
      REQUIRE(w.weigh({1.0, 2.0, 0.0}, {1.0, 1.0, 3.0}) == FLATMTL_ERROR_LOSS);
      REQUIRE(w.error.row == 2);
      REQUIRE(w.error.value == 0.0);
    }
    REQUIRE(w.state == state);
    REQUIRE(w.weights == weights);
  }
}

TEST_CASE("weightings refuse overlapping outputs and a missing state") {
  Context context(4);
  std::vector<double> memory(64, 1.0);
  flatmtl_error error{};
  const auto uw = FLATMTL_WEIGHTING_UW;
  double *at = memory.data();
  REQUIRE(flatmtl_loss_weights(context, uw, nullptr, 0, 4, at, nullptr, nullptr, at + 20, &error) ==
          FLATMTL_ERROR_NULL);
  REQUIRE(std::string(error.argument) == "state");
  REQUIRE(flatmtl_loss_weights(context, uw, nullptr, 0, 4, at, nullptr, at + 3, at + 40, &error) ==
          FLATMTL_ERROR_OVERLAP);
  REQUIRE(flatmtl_loss_weights(context, uw, nullptr, 0, 4, at, nullptr, at + 4, at + 19, &error) ==
          FLATMTL_ERROR_OVERLAP);
  REQUIRE(flatmtl_loss_weights(context, uw, nullptr, 0, 4, at, nullptr, at + 4, at + 3, &error) ==
          FLATMTL_ERROR_OVERLAP);
  REQUIRE(flatmtl_loss_weights(context, uw, nullptr, 0, 0, at, nullptr, at + 4, at + 30, &error) ==
          FLATMTL_ERROR_NUM_TASKS);
  REQUIRE(flatmtl_loss_weights(context, FLATMTL_NUM_WEIGHTINGS, nullptr, 0, 4, at, nullptr, at + 4, at + 30, &error) ==
          FLATMTL_ERROR_NAME);
  for (double value : memory) REQUIRE(value == 1.0);
}

TEST_CASE("weightings stay inside the workspace, whatever the number of tasks") {
  for (int32_t tasks : {1, 2, 3, 7, 64, 200})
    for (int i = 0; i < FLATMTL_NUM_WEIGHTINGS; i++) {
      Weighting w(i, tasks);
      std::vector<double> losses, norms, options;
      for (int32_t k = 0; k < tasks; k++) {
        losses.push_back(1.0 + std::fmod(k * 0.618, 1.0));
        norms.push_back(k == 1 ? 0.0 : 1.0 + k);
      }
      if (i == FLATMTL_WEIGHTING_GO4ALIGN) options = {0.1, 5.0};
      for (int step = 0; step < 3; step++) {
        REQUIRE(w.weigh(losses, norms, options) == FLATMTL_OK);
        for (double c : w.weights) REQUIRE((c >= 0.0 && c <= DBL_MAX));
        REQUIRE(w.observe(losses, losses) == FLATMTL_OK);
      }
    }
}

TEST_CASE("SLAW and Adam's step do not depend on the units of losses and norms, whatever their size") {
  // A power of two changes no bit of ratios; the squares of these losses and norms are beyond the range of doubles.
  const double steps[][3] = {{1.0, 2.0, 0.5}, {1.25, 1.0, 0.75}, {0.5, 1.75, 0.875}, {0.75, 1.5, 0.625}};
  for (int power : {-900, -600, 600, 900}) {
    Weighting slaw(FLATMTL_WEIGHTING_SLAW, 3), slaw_scaled(FLATMTL_WEIGHTING_SLAW, 3);
    Weighting adam(FLATMTL_WEIGHTING_GRADNORM, 3), adam_scaled(FLATMTL_WEIGHTING_GRADNORM, 3);
    for (const auto &step : steps) {
      const std::vector<double> values(step, step + 3);
      std::vector<double> scaled = values;
      for (double &value : scaled) value = std::ldexp(value, power);
      REQUIRE(slaw.weigh(values, {}) == FLATMTL_OK);
      REQUIRE(slaw_scaled.weigh(scaled, {}) == FLATMTL_OK);
      REQUIRE(slaw.weights == slaw_scaled.weights);
      REQUIRE(adam.weigh(values, values) == FLATMTL_OK);
      REQUIRE(adam_scaled.weigh(values, scaled) == FLATMTL_OK);
      REQUIRE(adam.weights == adam_scaled.weights);
    }
    REQUIRE(slaw.weights[0] != slaw.weights[1]);
    REQUIRE(adam.weights[0] != adam.weights[1]);
  }
}
