// clip.h - max_norm: combined gradients of a norm that is bounded, by their weights. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/types.h>

namespace flatmtl {
namespace detail {

// What brings the combination of rows with these weights and this Gramian to a norm of max_norm at most.
inline double clip_factor(const torch::Tensor &weights, const torch::Tensor &gramian, double max_norm) {
  const double square = weights.matmul(gramian).matmul(weights).item<double>();
  return square > std::pow(max_norm, 2.0) ? max_norm / std::sqrt(square) : 1.0;
}

// Clips each family (`families`), or the whole update. pair: Gramian of (g, f); direct: of s, if that is what is
// combined, else undefined.
inline void clip(std::vector<double> *loss, std::vector<double> *flat, const torch::Tensor &pair,
                 const torch::Tensor &direct, double max_norm, bool families) {
  const auto count = static_cast<int64_t>(loss->size());
  const torch::Tensor a = torch::tensor(*loss, torch::kDouble), b = torch::tensor(*flat, torch::kDouble);
  double loss_factor = 1.0, flat_factor = 1.0;
  if (families) {
    loss_factor = clip_factor(a, pair.slice(0, 0, count).slice(1, 0, count), max_norm);
    flat_factor = clip_factor(b, pair.slice(0, count).slice(1, count), max_norm);
  } else {
    loss_factor = direct.defined() ? clip_factor(a, direct, max_norm) : clip_factor(torch::cat({a, b}), pair, max_norm);
    flat_factor = loss_factor;
  }
  for (double &weight : *loss) weight *= loss_factor;
  for (double &weight : *flat) weight *= flat_factor;
}

}  // namespace detail
}  // namespace flatmtl
