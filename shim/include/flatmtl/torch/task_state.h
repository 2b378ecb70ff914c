// task_state.h - what a step knows of each task, and the record that is made of it. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "losses.h"
#include "point.h"
#include "record.h"

namespace flatmtl {
namespace detail {

struct TaskState {
  Task task;
  std::optional<Loss> loss;
  Row grads;             // one a parameter, undefined where not reached; empty without a loss
  Indices own;           // its own parameters
  Row own_perturbed;     // t_i
  Row shared_perturbed;  // s_i
  size_t pass = 0;       // which unperturbed pass it came from
  torch::Tensor perturbed_loss;
  double sq_shared = 0.0, sq_own = 0.0;  // squared norms, ASAM-weighted if adaptive
};

inline torch::Tensor undefined(at::IntArrayRef sizes) {
  return torch::full(sizes, std::nan(""), torch::kDouble);
}

// `values` at the positions `at`, NaN elsewhere.
inline torch::Tensor spread(const torch::Tensor &values, const std::vector<int64_t> &at, int64_t total) {
  torch::Tensor out = undefined({total});
  if (!at.empty()) out.index_put_({torch::tensor(at)}, values);
  return out;
}

// A record that knows the losses alone.
inline Record empty_record(const std::vector<TaskState> &tasks) {
  const auto total = static_cast<int64_t>(tasks.size());
  Record record;
  std::vector<double> values;
  std::vector<int64_t> with_loss;
  for (int64_t i = 0; i < total; ++i) {
    const TaskState &state = tasks[static_cast<size_t>(i)];
    record.tasks.push_back(state.task);
    if (!state.loss) continue;
    with_loss.push_back(i);
    values.push_back(state.loss->value.item<double>());
  }
  record.losses = spread(torch::tensor(values, torch::kDouble), with_loss, total);
  for (auto *vector : {&record.perturbed_losses, &record.sharpness, &record.norms_loss, &record.norms_flat,
                       &record.weights_loss, &record.weights_flat})
    *vector = undefined({total});
  record.cosine_loss = undefined({total, total});
  record.cosine_flat = undefined({total, total});
  return record;
}

inline void add_perturbed(Record *record, const std::vector<TaskState> &tasks, const std::vector<int64_t> &present) {
  std::vector<double> values;
  for (const int64_t i : present) values.push_back(tasks[static_cast<size_t>(i)].perturbed_loss.item<double>());
  record->perturbed_losses = spread(torch::tensor(values, torch::kDouble), present, static_cast<int64_t>(tasks.size()));
  record->sharpness = record->perturbed_losses - record->losses;
}

// A family of gradients of the tasks that are present: Gramian (K, K) and weights.
struct Family {
  torch::Tensor gramian;
  const std::vector<double> &weights;
};

inline void add_family(torch::Tensor *norms, torch::Tensor *cosine, torch::Tensor *weights, const Family &family,
                       const std::vector<int64_t> &present) {
  const int64_t total = norms->size(0);
  const torch::Tensor length = family.gramian.diagonal().sqrt(), index = torch::tensor(present);
  *norms = spread(length, present, total);
  // NaN where a norm is 0.
  cosine->index_put_({index.unsqueeze(1), index}, (family.gramian / (length.unsqueeze(1) * length)).clamp(-1.0, 1.0));
  *weights = spread(torch::tensor(family.weights, torch::kDouble), present, total);
}

}  // namespace detail
}  // namespace flatmtl
