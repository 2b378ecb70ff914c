// record.h - what a step did.
#pragma once

#include <cmath>
#include <vector>

#include <torch/types.h>

#include "text.h"

namespace flatmtl {

// The last step, over all K tasks. Tensors are CPU float64; NaN where undefined (absent tasks, rho = 0, no shared
// parameter).
struct Record {
  std::vector<Task> tasks;
  torch::Tensor losses, perturbed_losses, sharpness;  // (K,); sharpness = perturbed_losses - losses
  torch::Tensor norms_loss, norms_flat;               // (K,) ||g_i|| and ||f_i||
  torch::Tensor cosine_loss, cosine_flat;             // (K, K)
  torch::Tensor weights_loss, weights_flat;           // (K,)
  bool pareto_stationary_loss = false, pareto_stationary_flat = false;
  bool skipped = false;
};

namespace detail {

inline torch::Tensor undefined(at::IntArrayRef sizes) {
  return torch::full(sizes, std::nan(""), torch::kDouble);
}

// `values` at the positions `at`, NaN elsewhere.
inline torch::Tensor spread(const torch::Tensor &values, const std::vector<int64_t> &at, int64_t total) {
  torch::Tensor out = undefined({total});
  if (!at.empty()) out.index_put_({torch::tensor(at)}, values);
  return out;
}

}  // namespace detail
}  // namespace flatmtl
