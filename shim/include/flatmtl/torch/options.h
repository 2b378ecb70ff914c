// options.h - FlatMTLOptions.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/arg.h>
#include <torch/types.h>

#include "aggregator.h"
#include "flatness.h"
#include "protect.h"
#include "weighting.h"

namespace flatmtl {

// Radii of the perturbation, of shared and of own parameters; one number is both.
struct Rho {
  Rho(double both) : shared(both), task(both) {}  // NOLINT(google-explicit-constructor)
  Rho(double shared_rho, double task_rho) : shared(shared_rho), task(task_rho) {}
  double shared, task;
};

// Options of FlatMTL; names, meanings and defaults are those of the Python class.
struct FlatMTLOptions {
  // A name ("cagrad") or an Aggregator.
  TORCH_ARG(Aggregator, aggregator) = "cagrad";
  // A loss weighting in front of the aggregator, a name ("uw") or a Weighting. Alone with aggregator "sum".
  TORCH_ARG(std::optional<Weighting>, weighting);
  // Where the perturbed gradients are taken, a name ("sam") or a Flatness.
  TORCH_ARG(Flatness, flat) = "fmtl";
  // Makes the perturbed passes every so many steps, >= 1: the option of that name of "fmtl" and "looksam".
  TORCH_ARG(std::optional<int64_t>, every);
  // Radius >= 0 of the perturbation, or a pair {shared, task}. 0 is plain gradient aggregation. FlatMTL::set_rho sets
  // it for one parameter group.
  TORCH_ARG(Rho, rho) = 0.05;
  // ASAM (2102.11600): T^2 g / ||T g|| in place of g / ||g||, with T = |theta| + eta. Wants a larger rho.
  TORCH_ARG(bool, adaptive) = false;
  // >= 0. Unset it is 0, and 0.01 with flat "asam".
  TORCH_ARG(std::optional<double>, eta);
  // "separate" (the paper): shared and own parameters move rho each. "joint": one norm a task over both.
  TORCH_ARG(std::string, norm) = "separate";
  // "decomposed" (the paper) A(g) + A(f); "direct" A(s); "second" A(A(g), A(f)); "each" A(r_1 .. r_K). Unset it is the
  // flatness mode's own: "direct" for samo and sgsu, "decomposed" for the others.
  TORCH_ARG(std::optional<std::string>, combine);
  // "rms": a family of gradients is divided by its root mean square norm before A and multiplied afterwards; "none":
  // the raw method (None in Python).
  TORCH_ARG(std::string, family_scale) = "rms";
  // Clips the combined gradient of the shared parameters to this norm, > 0: each family's with combine "decomposed",
  // else the whole.
  TORCH_ARG(std::optional<double>, max_norm);
  // Parameters that are shared, instead of finding them. Every other parameter is own.
  TORCH_ARG(std::optional<std::vector<torch::Tensor>>, shared);
  // Modules (torch::nn or torch::jit) whose buffers are to be protected. C++ has no hook that would find them: name
  // every module with BatchNorm or other buffers that the closure changes, the whole model usually.
  TORCH_ARG(std::vector<ProtectedModule>, modules);
  // With micro-batches, perturb along the gradient of each instead of their mean.
  TORCH_ARG(bool, m_sharpness) = false;
  // Draw the same random numbers (dropout) in every pass of a step.
  TORCH_ARG(bool, replay_rng) = true;
  // "raise" a NonFiniteError, or "skip" the step: everything is put back, .grad is undefined, last().skipped is true.
  TORCH_ARG(std::string, nonfinite) = "raise";
  // Of the methods that draw; >= 0 and below 2^53.
  TORCH_ARG(int64_t, seed) = 0;
  // How Gramians are summed (flatmtl_accumulate in flatmtl.h): "auto", in float32 blocks where many rows are long, or
  // "f64".
  TORCH_ARG(std::string, accumulate) = "auto";
  // torch::kBFloat16 keeps the gradients of float32 parameters in bfloat16 within a step, half of the memory: each is
  // rounded once, as it comes, and is what is measured and combined, in float32 and double as ever.
  TORCH_ARG(std::optional<at::ScalarType>, rows_dtype);

 public:
  // These options with flat, eta and combine as they come out. std::invalid_argument for one out of range, naming it.
  FlatMTLOptions settled() const;
};

namespace detail {

inline void check_rho(const Rho &rho, const std::string &what) {
  const auto valid = [](double r) { return r >= 0.0 && std::isfinite(r); };
  if (valid(rho.shared) && valid(rho.task)) return;
  const std::string shared = text(rho.shared), task = text(rho.task);
  throw std::invalid_argument("Invalid " + what + ": " + (shared == task ? shared : "(" + shared + ", " + task + ")") +
                              " (expected a finite number >= 0, or a pair (shared, task) of them)");
}

// The place of value in choices: the number of the C core's enum.
inline int choice(const char *name, const std::string &value, const std::vector<std::string> &choices) {
  std::string expected;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] == value) return static_cast<int>(i);
    expected += (i ? ", " : "") + quoted(choices[i]);
  }
  throw std::invalid_argument(std::string("Invalid ") + name + ": " + quoted(value) + " (expected one of " + expected +
                              ")");
}

inline void check_rows_dtype(std::optional<at::ScalarType> dtype) {
  if (!dtype || *dtype == at::kBFloat16) return;
  const char *why = *dtype == at::kHalf ? "; float16 holds nothing above 65504 and rounds to multiples of 6e-8, too "
                                          "little for gradients"
                                        : "";
  throw std::invalid_argument("Invalid rows_dtype: " + text(*dtype) + " (expected None or torch.bfloat16" + why + ")");
}

inline flatmtl_norm norm_number(const std::string &name) {
  return static_cast<flatmtl_norm>(choice("norm", name, {"separate", "joint"}));
}

inline flatmtl_combination combine_number(const std::string &name) {
  return static_cast<flatmtl_combination>(choice("combine", name, {"decomposed", "direct", "second", "each"}));
}

inline flatmtl_family_scale family_scale_number(const std::string &name) {
  return static_cast<flatmtl_family_scale>(choice("family_scale", name, {"none", "rms"}));
}

inline flatmtl_accumulate accumulate_number(const std::string &name) {
  return static_cast<flatmtl_accumulate>(choice("accumulate", name, {"auto", "f64"}));
}

}  // namespace detail

inline FlatMTLOptions FlatMTLOptions::settled() const {
  detail::check_rho(rho_, "rho");
  if (eta_ && !(*eta_ >= 0.0 && std::isfinite(*eta_)))
    throw std::invalid_argument("Invalid eta: " + detail::text(*eta_) + " (expected a finite number >= 0)");
  FlatMTLOptions result = *this;
  if (every_) result.flat_ = flat_.with_every(*every_);
  const bool asam = result.flat_.mode() == Flatness::Mode::asam;
  result.adaptive_ = adaptive_ || asam;
  result.eta_ = eta_.value_or(asam ? 0.01 : 0.0);
  result.combine_ = combine_.value_or(result.flat_.default_combine());
  detail::norm_number(norm_);
  detail::combine_number(*result.combine_);
  detail::family_scale_number(family_scale_);
  if (max_norm_ && !(*max_norm_ > 0.0 && std::isfinite(*max_norm_)))
    throw std::invalid_argument("Invalid max_norm: " + detail::text(*max_norm_) +
                                " (expected None or a finite number > 0)");
  detail::choice("nonfinite", nonfinite_, {"raise", "skip"});
  if (seed_ < 0 || seed_ >= int64_t{1} << 53)
    throw std::invalid_argument("Invalid seed: " + std::to_string(seed_) + " (expected an integer in [0, 2^53))");
  detail::accumulate_number(accumulate_);
  detail::check_rows_dtype(rows_dtype_);
  if (m_sharpness_ && result.flat_.has_state())
    throw std::invalid_argument("m_sharpness=True: flatness mode " + result.flat_.text() +
                                " keeps gradients of whole steps");
  return result;
}

}  // namespace flatmtl
