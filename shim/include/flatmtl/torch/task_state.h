// task_state.h - what a step knows of each task, and the record that is made of it. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
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

// The mean of gradient rows, parameter by parameter, taken as they come: one row is held, whatever their number. An
// undefined entry, and every entry of an empty row, counts as gradient 0.
class RowMean {
 public:
  // May hold on to entries of the row, but does not write to them: autograd may hand out one tensor twice.
  void add(const Row &row) {
    ++rows_;
    if (row_.size() < row.size()) {
      row_.resize(row.size());
      counts_.resize(row.size());
    }
    for (size_t i = 0; i < row.size(); ++i) {
      if (!row[i].defined()) continue;
      const double share = 1.0 / static_cast<double>(++counts_[i]);
      torch::Tensor &mean = row_[i];
      if (!mean.defined())
        mean = row[i];
      else if (counts_[i] == 2)  // the first mean is a tensor of our own, written to from then on
        mean = torch::lerp(mean, row[i], share);
      else
        mean.lerp_(row[i], share);
    }
  }

  // The mean; empty if every row was. Afterwards this is as it was made.
  Row take() {
    for (size_t i = 0; i < row_.size(); ++i)
      if (row_[i].defined() && counts_[i] != rows_)
        row_[i] = row_[i] * (static_cast<double>(counts_[i]) / static_cast<double>(rows_));
    Row row = std::move(row_);
    *this = RowMean();
    return row;
  }

 private:
  Row row_;                      // means of the entries that there were
  std::vector<int64_t> counts_;  // numbers of them
  int64_t rows_ = 0;
};

// Means of one task's losses and gradients over the parts of the batch where it has a loss, taken as they come.
class TaskMean {
 public:
  void add(const TaskState &part) {
    state_.task = part.task;
    state_.index = part.index;
    if (!part.loss.defined()) return;
    reached_.insert(part.reached.begin(), part.reached.end());
    losses_.push_back(part.loss);
    // Where loss and gradient are zero nothing moves, and there is no perturbed pass.
    perturbed_losses_.push_back(part.perturbed_loss.defined() ? part.perturbed_loss : part.loss);
    perturbed_anywhere_ = perturbed_anywhere_ || part.perturbed_loss.defined();
    grads_.add(part.grads);
    perturbed_.add(part.perturbed);
  }

  TaskState take() {
    state_.reached.assign(reached_.begin(), reached_.end());
    if (!losses_.empty()) {
      state_.loss = torch::stack(losses_).mean();
      if (perturbed_anywhere_) state_.perturbed_loss = torch::stack(perturbed_losses_).mean();
      state_.grads = grads_.take();
      state_.perturbed = perturbed_.take();
    }
    return std::move(state_);
  }

 private:
  TaskState state_;
  std::vector<torch::Tensor> losses_, perturbed_losses_;
  std::set<size_t> reached_;
  bool perturbed_anywhere_ = false;
  RowMean grads_, perturbed_;
};

// The tasks' means over so many parts of the batch. Those over a single part are what that part gave.
class Means {
 public:
  explicit Means(size_t parts) : single_(parts == 1) {}

  // One task in one part.
  void add(TaskState part) {
    if (single_)
      parts_[part.index] = std::move(part);
    else
      means_[part.index].add(part);
  }

  // One a task, in the order of their indices.
  std::vector<TaskState> take() {
    std::vector<TaskState> states;
    for (auto &part : parts_) states.push_back(std::move(part.second));
    for (auto &mean : means_) states.push_back(mean.second.take());
    return states;
  }

 private:
  bool single_;
  std::map<int64_t, TaskState> parts_;
  std::map<int64_t, TaskMean> means_;
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
