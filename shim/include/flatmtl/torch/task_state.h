// task_state.h - what a step knows of each task, and the record that is made of it. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "point.h"
#include "record.h"

namespace flatmtl {
namespace detail {

// Rows have one tensor a parameter, undefined where the loss does not reach it. Both are means over micro-batches.
struct TaskState {
  Task task;
  int64_t index = 0;                     // among all tasks
  torch::Tensor loss;                    // 0-d, detached; undefined if the task is absent
  Row grads;                             // g_i and h_i; empty without a loss, and where their sum alone is needed
  Row perturbed;                         // s_i and t_i; empty before the perturbed passes
  torch::Tensor perturbed_loss;          // undefined before them, and where an earlier flat gradient is reused
  Indices reached;                       // the parameters that the loss reaches
  Indices own;                           // those that are its own
  bool reused = false;                   // whether `perturbed` was made from an earlier step's
  double sq_shared = 0.0, sq_own = 0.0;  // squared norms of g_i and h_i, ASAM-weighted if adaptive
};

// The places of the gradients that there are.
inline Indices defined(const Row &grads) {
  Indices result;
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].defined()) result.push_back(i);
  return result;
}

// The mean of those that are defined; undefined if none is.
inline torch::Tensor mean_of_defined(const std::vector<torch::Tensor> &values) {
  std::vector<torch::Tensor> found;
  for (const auto &value : values)
    if (value.defined()) found.push_back(value);
  return found.empty() ? torch::Tensor() : torch::stack(found).mean();
}

// The mean, parameter by parameter; a loss that does not reach one in some part has gradient 0 there.
inline Row mean_row(const std::vector<Row> &rows) {
  if (rows.size() == 1) return rows[0];
  const auto count = static_cast<int64_t>(rows.size());
  Row out;
  for (const Row &row : rows) {
    if (out.size() < row.size()) out.resize(row.size());
    for (size_t i = 0; i < row.size(); ++i) {
      if (!row[i].defined()) continue;
      if (out[i].defined())
        out[i].add_(row[i], 1.0 / static_cast<double>(count));
      else
        out[i] = row[i] / count;  // not in place: autograd may hand out one tensor twice
    }
  }
  return out;
}

// Means of losses and gradients over parts of the batch, each task's over the parts where it has a loss.
inline std::vector<TaskState> mean(const std::vector<std::vector<TaskState>> &parts) {
  if (parts.size() == 1) return parts[0];
  std::vector<TaskState> means;
  for (size_t t = 0; t < parts[0].size(); ++t) {
    std::vector<torch::Tensor> losses, perturbed_losses;
    std::vector<Row> grads, perturbed;
    std::set<size_t> reached;
    bool perturbed_anywhere = false;
    for (const auto &part : parts) {
      if (!part[t].loss.defined()) continue;
      reached.insert(part[t].reached.begin(), part[t].reached.end());
      losses.push_back(part[t].loss);
      // Where loss and gradient are zero nothing moves, and there is no perturbed pass.
      perturbed_losses.push_back(part[t].perturbed_loss.defined() ? part[t].perturbed_loss : part[t].loss);
      perturbed_anywhere = perturbed_anywhere || part[t].perturbed_loss.defined();
      grads.push_back(part[t].grads);
      perturbed.push_back(part[t].perturbed);
    }
    TaskState state;
    state.task = parts[0][t].task;
    state.index = parts[0][t].index;
    state.reached.assign(reached.begin(), reached.end());
    if (!losses.empty()) {
      state.loss = mean_of_defined(losses);
      if (perturbed_anywhere) state.perturbed_loss = mean_of_defined(perturbed_losses);
      state.grads = mean_row(grads);
      state.perturbed = mean_row(perturbed);
    }
    means.push_back(std::move(state));
  }
  return means;
}

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
    if (!state.loss.defined()) continue;
    with_loss.push_back(i);
    values.push_back(state.loss.item<double>());
  }
  record.losses = spread(torch::tensor(values, torch::kDouble), with_loss, total);
  for (auto *vector : {&record.perturbed_losses, &record.sharpness, &record.norms_loss, &record.norms_flat,
                       &record.weights_loss, &record.weights_flat, &record.loss_weights})
    *vector = undefined({total});
  record.cosine_loss = undefined({total, total});
  record.cosine_flat = undefined({total, total});
  return record;
}

inline void add_perturbed(Record *record, const std::vector<TaskState> &tasks, const std::vector<int64_t> &present) {
  std::vector<double> values;
  for (const int64_t i : present) {
    const torch::Tensor &loss = tasks[static_cast<size_t>(i)].perturbed_loss;
    values.push_back(loss.defined() ? loss.item<double>() : std::nan(""));
  }
  record->perturbed_losses = spread(torch::tensor(values, torch::kDouble), present, static_cast<int64_t>(tasks.size()));
  record->sharpness = record->perturbed_losses - record->losses;
}

// A family of gradients of the tasks that are present: Gramian (K, K) and weights. `apart` is false where the rows of
// the families were never known one by one; their norms and cosines are then NaN.
struct Family {
  torch::Tensor gramian;
  const std::vector<double> &weights;
  bool apart = true;
};

inline void add_family(torch::Tensor *norms, torch::Tensor *cosine, torch::Tensor *weights, const Family &family,
                       const std::vector<int64_t> &present) {
  const int64_t total = norms->size(0);
  const torch::Tensor squares = family.gramian.diagonal().clamp_min(0.0), index = torch::tensor(present);
  const torch::Tensor length = family.apart ? squares.sqrt() : undefined(squares.sizes());
  *norms = spread(length, present, total);
  // NaN where a norm is 0.
  cosine->index_put_({index.unsqueeze(1), index}, (family.gramian / (length.unsqueeze(1) * length)).clamp(-1.0, 1.0));
  *weights = spread(torch::tensor(family.weights, torch::kDouble), present, total);
}

}  // namespace detail
}  // namespace flatmtl
