// record.h - what a step did.
#pragma once

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
  torch::Tensor loss_weights;                         // (K,) factors of the losses; 1 without a weighting
  bool pareto_stationary_loss = false, pareto_stationary_flat = false;
  bool skipped = false;
};

}  // namespace flatmtl
