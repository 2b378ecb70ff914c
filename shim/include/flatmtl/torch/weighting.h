// weighting.h - which loss weighting, and its options.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "method_options.h"

namespace flatmtl {

// A loss weighting: one of flatmtl.h (flatmtl_weighting, where the equations and papers stand) and its options. The
// step is that of the losses c_i l_i with c held constant. An immutable value; a string converts to one.
//
//   flatmtl::FlatMTLOptions().weighting("uw").aggregator("sum")
//   flatmtl::FlatMTLOptions().weighting(flatmtl::Weighting::dwa(2.0, steps_in_an_epoch))
class Weighting {
 public:
  // A weighting by name with its default options ("fixed" has none: use fixed()).
  Weighting(const char *name) : Weighting(std::string(name)) {}  // NOLINT(google-explicit-constructor)
  Weighting(const std::string &name) : Weighting(name, {}) {     // NOLINT(google-explicit-constructor)
    if (number_ == FLATMTL_WEIGHTING_FIXED)
      throw std::invalid_argument(
          "weighting 'fixed' needs its option 'values', one number a task: FixedWeights([0.5, 2.0])");
  }
  // A weighting by name with options as flatmtl.h lists them; none: the defaults. FAMO's bounds may be left out.
  Weighting(const std::string &name, std::vector<double> options)
      : number_(detail::by_name("weighting", name, flatmtl_weighting_name)), options_(std::move(options)) {}

  // One finite weight >= 0 a task.
  static Weighting fixed(std::vector<double> values) {
    if (values.empty()) throw std::invalid_argument("FixedWeights needs at least one weight");
    for (size_t i = 0; i < values.size(); ++i)
      detail::check_option("FixedWeights", "values[" + std::to_string(i) + "]", values[i],
                           values[i] >= 0.0 && std::isfinite(values[i]), ">= 0 and finite");
    return {"fixed", std::move(values)};
  }
  static Weighting uw(double lr = 0.025, double initial = -0.5) {
    detail::check_positive("UW", "lr", lr);
    detail::check_option("UW", "initial", initial, std::isfinite(initial), "finite");
    return {"uw", {lr, initial}};
  }
  // epoch: steps in one.
  static Weighting dwa(double temperature = 2.0, int64_t epoch = 25) {
    detail::check_positive("DWA", "temperature", temperature);
    return {"dwa", {temperature, detail::checked_integer("DWA", "epoch", epoch, 1)}};
  }
  // seed of the draws, >= 0 and below 2^53; none: the optimizer's.
  static Weighting rlw(std::optional<int64_t> seed = std::nullopt) {
    Weighting result("rlw", {});
    if (seed) result.seed_ = detail::checked_seed(*seed);
    return result;
  }
  static Weighting si() { return {"si", {}}; }
  static Weighting gls() { return {"gls", {}}; }
  // epoch: steps in one; warmup: epochs.
  static Weighting stch(double mu = 1.0, int64_t epoch = 25, int64_t warmup = 4) {
    detail::check_positive("STCH", "mu", mu);
    return {
        "stch",
        {mu, detail::checked_integer("STCH", "epoch", epoch, 1), detail::checked_integer("STCH", "warmup", warmup, 0)}};
  }
  static Weighting imtl_l(double lr = 0.001) {
    detail::check_positive("IMTLL", "lr", lr);
    return {"imtl_l", {lr}};
  }
  // Evaluates the losses once more after the update. min_losses: one lower bound a task; empty: 0 each.
  static Weighting famo(double lr = 0.025, double gamma = 0.01, const std::vector<double> &min_losses = {}) {
    detail::check_positive("FAMO", "lr", lr);
    detail::check_at_least_0("FAMO", "gamma", gamma);
    std::vector<double> options = {lr, gamma};
    for (size_t i = 0; i < min_losses.size(); ++i) {
      detail::check_option("FAMO", "min_losses[" + std::to_string(i) + "]", min_losses[i], std::isfinite(min_losses[i]),
                           "finite");
      options.push_back(min_losses[i]);
    }
    return {"famo", std::move(options)};
  }
  static Weighting gradnorm(double alpha = 1.5, double lr = 0.025) {
    detail::check_at_least_0("GradNorm", "alpha", alpha);
    detail::check_positive("GradNorm", "lr", lr);
    return {"gradnorm", {alpha, lr}};
  }
  static Weighting go4align(double eta = 1e-4, int64_t groups = 1) {
    detail::check_at_least_0("GO4Align", "eta", eta);
    return {"go4align", {eta, detail::checked_integer("GO4Align", "groups", groups, 1)}};
  }
  static Weighting slaw(double beta = 0.99) {
    detail::check_option("SLAW", "beta", beta, beta >= 0.0 && beta < 1.0, "in [0, 1)");
    return {"slaw", {beta}};
  }
  static Weighting bmtl(double temperature = 50.0) {
    detail::check_positive("BMTL", "temperature", temperature);
    return {"bmtl", {temperature}};
  }
  static Weighting emtl(double strength = 1.0) {
    detail::check_at_least_0("EMTL", "strength", strength);
    return {"emtl", {strength}};
  }

  flatmtl_weighting number() const { return number_; }
  std::string name() const { return flatmtl_weighting_name(number_); }
  const std::vector<double> &options() const { return options_; }
  // Whether it learns from the losses after the update, of the same batch.
  bool observes() const { return flatmtl_weighting_observes(number_) != 0; }
  bool needs_norms() const { return number_ == FLATMTL_WEIGHTING_GRADNORM || number_ == FLATMTL_WEIGHTING_EMTL; }

  // The options as the C core takes them in one step; arguments as Aggregator::option_values.
  std::vector<double> option_values(int64_t num_tasks, int64_t seed, int64_t draw,
                                    const std::vector<int64_t> &present) const {
    if (number_ == FLATMTL_WEIGHTING_RLW && options_.empty())
      return {static_cast<double>(seed_.value_or(seed)), static_cast<double>(draw)};
    if (number_ == FLATMTL_WEIGHTING_FIXED)
      return detail::per_task("FixedWeights has ", " values", options_, 0, num_tasks, present);
    if (number_ != FLATMTL_WEIGHTING_FAMO || options_.size() < 2) return options_;
    if (options_.size() > 2) return detail::per_task("FAMO has ", " min_losses", options_, 2, num_tasks, present);
    std::vector<double> values = options_;
    values.resize(2 + present.size(), 0.0);
    return values;
  }

 private:
  flatmtl_weighting number_ = FLATMTL_WEIGHTING_FIXED;
  std::vector<double> options_;
  std::optional<int64_t> seed_;
};

}  // namespace flatmtl
