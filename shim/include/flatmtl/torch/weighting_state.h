// weighting_state.h - calls of a loss weighting within a step, and what it keeps from step to step. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "native.h"
#include "weighting.h"

namespace flatmtl {
namespace detail {

// A value: a step makes a new one. v vectors with one number a task, one after another; empty before the first step.
struct WeightingState {
  std::vector<double> values;

  // How many numbers a state for so many tasks has.
  static size_t length(const Weighting &weighting, int64_t num_tasks) {
    if (num_tasks == 0) return 0;
    int64_t count = 0;
    flatmtl_error error{};
    detail::check("weighting_state_size",
                  flatmtl_weighting_state_size(weighting.number(), static_cast<int32_t>(num_tasks), &count, &error),
                  error);
    return static_cast<size_t>(count);
  }

  // std::runtime_error unless this is a state of the weighting for so many tasks.
  void check(const Weighting &weighting, int64_t num_tasks) const {
    const size_t expected = length(weighting, num_tasks);
    bool fits = values.size() == expected;
    for (const double value : values) fits = fits && std::isfinite(value);
    if (!fits)
      throw std::runtime_error("state_dict holds a state of weighting " + quoted(weighting.name()) + " that is not " +
                               std::to_string(expected) + " float64 numbers, for " + std::to_string(num_tasks) +
                               " tasks");
  }
};

// The tasks of one step that are present, and what a weighting keeps of them.
class WeightingCall {
 public:
  // at: places of the present tasks, one or more of num_tasks. tasks: their names.
  WeightingCall(const Weighting &weighting, const WeightingState &state, int64_t num_tasks, std::vector<int64_t> at)
      : weighting_(weighting), state_(state), num_tasks_(static_cast<size_t>(num_tasks)), at_(std::move(at)) {
    state_.values.resize(WeightingState::length(weighting, num_tasks));
    for (const size_t i : places()) part_.push_back(state_.values[i]);
  }

  // c of the present tasks. norms may be empty where the weighting does not need them.
  std::vector<double> weights(const std::vector<double> &losses, const std::vector<double> &norms,
                              const std::vector<Task> &tasks, int64_t seed, int64_t draw) {
    const auto options = weighting_.option_values(static_cast<int64_t>(num_tasks_), seed, draw, at_);
    std::vector<double> c(at_.size());
    const Context context("loss_weights", static_cast<int64_t>(at_.size()));
    flatmtl_error error{};
    const flatmtl_status status =
        flatmtl_loss_weights(context.get(), weighting_.number(), options.data(), static_cast<int32_t>(options.size()),
                             static_cast<int32_t>(at_.size()), losses.data(), norms.empty() ? nullptr : norms.data(),
                             state(), c.data(), &error);
    if (status == FLATMTL_ERROR_LOSS) throw std::runtime_error(refusal(tasks, options, error));
    detail::check("loss_weights", status, error);
    return c;
  }

  // Learns from the losses of the same batch before and after the update.
  void observe(const std::vector<double> &losses, const std::vector<double> &after) {
    const auto options = weighting_.option_values(static_cast<int64_t>(num_tasks_), 0, 0, at_);
    const Context context("loss_observe", static_cast<int64_t>(at_.size()));
    flatmtl_error error{};
    detail::check(
        "loss_observe",
        flatmtl_loss_observe(context.get(), weighting_.number(), options.data(), static_cast<int32_t>(options.size()),
                             static_cast<int32_t>(at_.size()), losses.data(), after.data(), state(), &error),
        error);
  }

  // What the state has become; that of absent tasks is as it was.
  WeightingState new_state() const {
    WeightingState result = state_;
    size_t next = 0;
    for (const size_t i : places()) result.values[i] = part_[next++];
    return result;
  }

 private:
  double *state() { return part_.empty() ? nullptr : part_.data(); }

  std::vector<size_t> places() const {
    std::vector<size_t> result;
    for (size_t first = 0; first < state_.values.size(); first += num_tasks_)
      for (const int64_t i : at_) result.push_back(first + static_cast<size_t>(i));
    return result;
  }

  // Of a loss that the weighting is not defined for.
  std::string refusal(const std::vector<Task> &tasks, const std::vector<double> &options,
                      const flatmtl_error &error) const {
    const std::string what = "weighting " + quoted(weighting_.name()) + " needs losses ",
                      that = ", but that of task " + text(tasks[static_cast<size_t>(error.row)]) + " is " +
                             text(error.value);
    if (weighting_.number() != FLATMTL_WEIGHTING_FAMO)
      return what + (weighting_.number() == FLATMTL_WEIGHTING_DWA ? ">= 0" : "> 0") + that + "; nothing was changed";
    const double floor = options.empty() ? 0.0 : options[2 + static_cast<size_t>(error.row)];
    return what + "above their lower bound" + that + ", its bound " + text(floor) +
           " (min_losses); nothing was changed";
  }

  const Weighting &weighting_;
  WeightingState state_;
  size_t num_tasks_;
  std::vector<int64_t> at_;
  std::vector<double> part_;
};

}  // namespace detail
}  // namespace flatmtl
