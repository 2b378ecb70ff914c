// passes.h - evaluations of the user's closure within one step: losses and per-task gradients, at theta and at
// perturbed points. Private.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include "losses.h"
#include "options.h"
#include "point.h"
#include "protect.h"
#include "task_state.h"

namespace flatmtl {
namespace detail {

inline void check_norm(double square, const Task &task, const char *pass) {
  if (!std::isfinite(square))
    throw NonFiniteError(task, pass, "the gradient", square > 0.0 ? std::sqrt(square) : square);
}

inline void check_loss(const Task &task, const torch::Tensor &loss, const char *pass) {
  const double value = loss.item<double>();
  if (!std::isfinite(value)) throw NonFiniteError(task, pass, "the loss", value);
}

// Autocast's cache, within an outer autocast, holds the parameters cast at another point.
struct FreshAutocast {
  FreshAutocast() { at::autocast::clear_cache(); }
  ~FreshAutocast() { at::autocast::clear_cache(); }
  FreshAutocast(const FreshAutocast &) = delete;
  FreshAutocast &operator=(const FreshAutocast &) = delete;
};

using Micro = std::vector<size_t>;  // numbers of micro-batches

class Passes {
 public:
  // The closure is copied, all else is by reference.
  Passes(const Closure &closure, Point &point, const FlatMTLOptions &options,
         const std::vector<ProtectedModule::Slot> &slots)
      : closure_(closure), point_(point), options_(options), slots_(slots) {}

  // Losses at theta, and g_i, h_i = d loss_i / d (theta, psi_i): means over the micro-batches, not checked for Inf and
  // NaN.
  std::vector<TaskState> unperturbed(const Micro &micro) {
    std::vector<std::vector<TaskState>> parts;
    for (const size_t m : micro) parts.push_back(unperturbed(m));
    point_.check_unchanged();
    return mean(parts);
  }

  // Fills `perturbed` and `perturbed_loss` with s_i, t_i where the parameters stand. index: of the task.
  void perturbed(const Micro &micro, TaskState *state, size_t index) {
    const Indices reached = state->reached();
    std::vector<std::vector<TaskState>> parts;
    for (const size_t m : micro) parts.push_back({perturbed(m, *state, index, reached)});
    point_.check_unchanged();
    const TaskState found = mean(parts)[0];
    state->perturbed_loss = found.loss;
    state->perturbed.resize(point_.tensors().size());
    for (const size_t i : reached)
      state->perturbed[i] = !found.grads.empty() && found.grads[i].defined() ? found.grads[i] : point_.zeros(i);
    check_loss(state->task, found.loss, "perturbed");
    const Row own = point_.row(state->perturbed, state->own);
    check_norm(point_.sq_norm(own, state->own, false, 0.0), state->task, "perturbed");
  }

  // The losses alone, as doubles, of the tasks with these places, where the parameters stand: means over the
  // micro-batches of forwards without graphs.
  std::vector<double> losses_here(const std::vector<int64_t> &at) {
    std::vector<std::vector<torch::Tensor>> values(at.size());
    for (const Forward &forward : forwards_) {
      std::vector<size_t> wanted;  // places in `at`
      for (size_t k = 0; k < at.size(); ++k)
        if (forward.has(static_cast<size_t>(at[k]))) wanted.push_back(k);
      if (wanted.empty()) continue;
      std::vector<size_t> tasks;
      for (const size_t k : wanted) tasks.push_back(static_cast<size_t>(at[k]));
      const auto losses = again(forward, tasks, false);
      for (size_t k = 0; k < wanted.size(); ++k) values[wanted[k]].push_back(losses[k].value);
    }
    point_.check_unchanged();
    std::vector<double> means;
    for (const auto &found : values) means.push_back(torch::stack(found).mean().item<double>());
    return means;
  }

  // The unperturbed losses, detached: means over the micro-batches so far.
  TaskLosses losses() const { return mean_losses(containers_); }

  // Random state and module buffers as they are now.
  Snapshot snapshot() const { return Snapshot(slots_); }
  // As they were before the first call.
  void rollback() const {
    if (!forwards_.empty()) forwards_[0].start.restore();
  }

 private:
  // One call of a closure in the unperturbed pass, with all that is needed to make it again at another point.
  struct Forward {
    size_t micro, place;  // place: of the closure, if there is one a task
    Snapshot start;
    std::vector<size_t> tasks;  // those whose losses came from it

    bool has(size_t task) const { return std::find(tasks.begin(), tasks.end(), task) != tasks.end(); }
  };

  std::vector<TaskState> unperturbed(size_t m) {
    TaskLosses container;
    std::vector<TaskState> states;
    if (!closure_.all) {
      if (closure_.named) container.kind = TaskLosses::Kind::dict;
      for (size_t i = 0; i < closure_.each.size(); ++i) {
        const Task &task = closure_.each[i].first;
        forwards_.push_back({m, i, snapshot(), {}});
        const torch::Tensor value = call([&] { return closure_.each[i].second(m); });
        const auto loss = value.defined() ? std::optional<Loss>(read_loss(task, value)) : std::nullopt;
        states.push_back(differentiated(task, i, loss, false, true));
        container.tasks.push_back(task);
        container.values.push_back(value);
      }
    } else {
      forwards_.push_back({m, 0, snapshot(), {}});
      container = call([&] { return closure_.all(m, std::nullopt); });
      const auto losses = read_losses(container);
      size_t count = losses.size();
      while (count > 0 && !losses[count - 1]) --count;
      for (size_t i = 0; i < losses.size(); ++i)
        states.push_back(differentiated(container.tasks[i], i, losses[i], i + 1 < count, losses.size() == 1));
    }
    check_form(container, "another micro-batch");
    tasks_ = container.tasks;
    for (auto &value : container.values)
      if (value.defined()) value = value.detach();
    if (container.tensor.defined()) container.tensor = container.tensor.detach().clone();
    containers_.push_back(std::move(container));
    return states;
  }

  // The state of a task whose loss came from the last forward, with its gradients.
  TaskState differentiated(const Task &task, size_t index, const std::optional<Loss> &loss, bool retain_graph,
                           bool alone) {
    TaskState state;
    state.task = task;
    if (!loss) return state;
    if (!(loss->separable || alone) && !options_.shared())
      throw std::runtime_error(
          "loss of task " + text(task) +
          " is an element of a vector computed as a whole, so the graph does not tell which parameters it reaches. "
          "Return the losses as separate scalars (or torch.stack of them), or name the shared parameters: "
          "FlatMTL(..., shared=...)");
    forwards_.back().tasks.push_back(index);
    Indices all(point_.tensors().size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    state.loss = loss->value;
    state.grads = gradients(*loss, all, retain_graph);
    return state;
  }

  // The loss of one task and its gradients in one micro-batch, made again where the parameters stand.
  TaskState perturbed(size_t m, const TaskState &state, size_t index, const Indices &reached) {
    TaskState found;
    found.task = state.task;
    for (const Forward &forward : forwards_) {
      if (forward.micro != m || !forward.has(index)) continue;
      const Loss loss = again(forward, {index}, true)[0];
      const Row grads = gradients(loss, reached, false);
      found.loss = loss.value;
      found.grads.resize(point_.tensors().size());
      for (size_t k = 0; k < reached.size(); ++k) found.grads[reached[k]] = grads[k];
    }
    return found;
  }

  // The losses of the tasks with these places in one forward, made again from where it started.
  std::vector<Loss> again(const Forward &forward, const std::vector<size_t> &wanted, bool grad) {
    forward.start.restore(options_.replay_rng());
    const std::optional<Task> task = wanted.size() == 1 ? std::optional<Task>(tasks_[wanted[0]]) : std::nullopt;
    if (!closure_.all) {
      const torch::Tensor value = call([&] { return closure_.each[forward.place].second(forward.micro); }, grad);
      if (!value.defined())
        throw std::runtime_error("closure of task " + text(*task) + " returned None in the perturbed pass only");
      return {read_loss(*task, value, grad)};
    }
    const TaskLosses value = call([&] { return closure_.all(forward.micro, task); }, grad);
    if (task && closure_.takes_task && value.tensor.defined() && value.tensor.dim() == 0)
      return {read_loss(*task, value.tensor, grad)};
    check_form(value, "a perturbed pass");
    const auto losses = read_losses(value, grad);
    std::vector<Loss> found;
    for (const size_t i : wanted) {
      if (!losses[i])
        throw std::runtime_error("loss of task " + text(tasks_[i]) + " is None in the perturbed pass only");
      found.push_back(*losses[i]);
    }
    return found;
  }

  template <typename F>
  static std::invoke_result_t<F &> call(F function, bool grad = true) {
    const FreshAutocast fresh;
    torch::AutoGradMode grad_mode(grad);
    return function();
  }

  void check_form(const TaskLosses &container, const char *where) {
    const std::string form = describe(container);
    if (!form_.empty() && form != form_)
      throw std::runtime_error("closure returned " + form_ + " in the unperturbed pass, but " + form + " in " + where);
    form_ = form;
  }

  // d loss / d tensors()[indices], in the layout of the parameters; undefined where not reached.
  Row gradients(const Loss &loss, const Indices &indices, bool retain_graph) const {
    if (indices.empty()) return {};
    const auto &meta = loss.edge.function->input_metadata(loss.edge.input_nr);
    const auto shape = shape_at(loss.edge).value_or(std::vector<int64_t>());
    const torch::Tensor root = at::empty(shape, meta.options()), seed = at::full(shape, 1.0, meta.options());
    torch::autograd::impl::set_gradient_edge(root, loss.edge);
    Row found = torch::autograd::grad({root}, at(point_.tensors(), indices), {seed}, retain_graph,
                                      /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t k = 0; k < found.size(); ++k) {
      const torch::Tensor &parameter = point_.tensors()[indices[k]];
      if (!found[k].defined()) continue;
      if (found[k].layout() != torch::kStrided)
        throw std::runtime_error("gradient of parameter " + point_.params()[indices[k]].name +
                                 " is sparse; dense gradients are required");
      if (found[k].strides() != parameter.strides()) found[k] = torch::empty_like(parameter).copy_(found[k]);
    }
    return found;
  }

  const Closure closure_;
  Point &point_;
  const FlatMTLOptions &options_;
  const std::vector<ProtectedModule::Slot> &slots_;
  std::vector<Forward> forwards_;
  std::vector<Task> tasks_;  // all of them
  std::vector<TaskLosses> containers_;
  std::string form_;
};

}  // namespace detail
}  // namespace flatmtl
