// aggregator.h - which aggregator, and its options.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "method_options.h"

namespace flatmtl {

// An aggregator: a method of flatmtl.h (flatmtl_method, where the equations and papers stand) and its options. An
// immutable value; a string converts to one.
//
//   flatmtl::FlatMTLOptions().aggregator("cagrad")
//   flatmtl::FlatMTLOptions().aggregator(flatmtl::Aggregator::cagrad(0.2))
class Aggregator {
 public:
  // A method by name with its default options ("fixed" has none: use fixed()).
  Aggregator(const char *name) : Aggregator(std::string(name)) {}  // NOLINT(google-explicit-constructor)
  Aggregator(const std::string &name) : Aggregator(name, {}) {     // NOLINT(google-explicit-constructor)
    if (method_ == FLATMTL_FIXED)
      throw std::invalid_argument("aggregator 'fixed' needs its option 'values', one number a task: Fixed([0.5, 2.0])");
  }
  // A method by name with options as flatmtl.h lists them; none: the defaults.
  Aggregator(const std::string &name, std::vector<double> options)
      : method_(detail::by_name("aggregator", name, flatmtl_method_name)), options_(std::move(options)) {}

  static Aggregator sum() { return {"sum", {}}; }
  static Aggregator mean() { return {"mean", {}}; }
  // One finite weight a task.
  static Aggregator fixed(std::vector<double> values) {
    if (values.empty()) throw std::invalid_argument("Fixed needs at least one weight");
    for (size_t i = 0; i < values.size(); ++i)
      detail::check_option("Fixed", "values[" + std::to_string(i) + "]", values[i], std::isfinite(values[i]), "finite");
    return {"fixed", std::move(values)};
  }
  static Aggregator mgda() { return {"mgda", {}}; }
  // seed of the order of projections, >= 0 and below 2^53; none: the optimizer's.
  static Aggregator pcgrad(std::optional<int64_t> seed = std::nullopt) {
    Aggregator result("pcgrad", {});
    if (seed) result.seed_ = detail::checked_seed(*seed);
    return result;
  }
  static Aggregator cagrad(double c = 0.4) {
    detail::check_option("CAGrad", "c", c, c >= 0.0 && c < 1.0, "in [0, 1)");
    return {"cagrad", {c}};
  }
  static Aggregator imtl_g() { return {"imtl_g", {}}; }
  static Aggregator nash_mtl() { return {"nash_mtl", {}}; }
  static Aggregator fairgrad(double alpha = 2.0) {
    detail::check_option("FairGrad", "alpha", alpha, alpha > 0.0 && std::isfinite(alpha), "positive and finite");
    return {"fairgrad", {alpha}};
  }
  // seed as pcgrad's.
  static Aggregator gradvac(double beta = 0.01, std::optional<int64_t> seed = std::nullopt) {
    detail::check_option("GradVac", "beta", beta, beta >= 0.0 && beta <= 1.0, "in [0, 1]");
    Aggregator result("gradvac", {});
    result.beta_ = beta;
    if (seed) result.seed_ = detail::checked_seed(*seed);
    return result;
  }
  // scale: "min", "median" or "rmse".
  static Aggregator aligned_mtl(const std::string &scale = "min", double tolerance = std::ldexp(1.0, -23)) {
    const std::vector<std::string> scales = {"min", "median", "rmse"};
    const auto found = std::find(scales.begin(), scales.end(), scale);
    detail::check_option("AlignedMTL", "scale", detail::quoted(scale), found != scales.end(),
                         "one of 'min', 'median', 'rmse'");
    detail::check_option("AlignedMTL", "tolerance", tolerance, tolerance >= 0.0 && tolerance < 1.0, "in [0, 1)");
    return {"aligned_mtl", {static_cast<double>(found - scales.begin()), tolerance}};
  }
  // preference: one number >= 0 a task; empty: 1/K each.
  static Aggregator upgrad(std::vector<double> preference = {}) {
    return {"upgrad", checked_preference("UPGrad", std::move(preference))};
  }
  static Aggregator dualproj(std::vector<double> preference = {}) {
    return {"dualproj", checked_preference("DualProj", std::move(preference))};
  }
  static Aggregator config() { return {"config", {}}; }
  static Aggregator ntkmtl(double exponent = 0.5) {
    detail::check_option("NTKMTL", "exponent", exponent, exponent >= 0.0 && exponent <= 1.0, "in [0, 1]");
    return {"ntkmtl", {exponent}};
  }

  flatmtl_method method() const { return method_; }
  std::string name() const { return flatmtl_method_name(method_); }
  const std::vector<double> &options() const { return options_; }

  // The options as the C core takes them in one step.
  //  num_tasks  all tasks; present: those that take part
  //  seed, draw  of the optimizer, for methods that draw
  std::vector<double> option_values(int64_t num_tasks, int64_t seed, int64_t draw,
                                    const std::vector<int64_t> &present) const {
    const double used = static_cast<double>(seed_.value_or(seed)), number = static_cast<double>(draw);
    if (method_ == FLATMTL_PCGRAD && options_.empty()) return {used, number};
    if (method_ == FLATMTL_GRADVAC && options_.empty()) return {beta_, used, number};
    if (method_ == FLATMTL_FIXED) return detail::per_task("Fixed has ", " values", options_, 0, num_tasks, present);
    if (options_.empty() || (method_ != FLATMTL_UPGRAD && method_ != FLATMTL_DUALPROJ)) return options_;
    const char *has = method_ == FLATMTL_UPGRAD ? "UPGrad has a preference of " : "DualProj has a preference of ";
    return detail::per_task(has, " values", options_, 0, num_tasks, present);
  }

 private:
  static std::vector<double> checked_preference(const char *cls, std::vector<double> values) {
    for (size_t i = 0; i < values.size(); ++i)
      detail::check_option(cls, "preference[" + std::to_string(i) + "]", values[i],
                           values[i] >= 0.0 && std::isfinite(values[i]), "finite and at least 0");
    return values;
  }

  flatmtl_method method_ = FLATMTL_SUM;
  std::vector<double> options_;
  std::optional<int64_t> seed_;
  double beta_ = 0.01;  // of gradvac
};

}  // namespace flatmtl
