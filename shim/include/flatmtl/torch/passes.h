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
  // NaN. With `summed` one backward gives the gradient of the sum of the losses alone, to be found in `sum`, and what
  // each loss reaches is read from its graph.
  std::vector<TaskState> unperturbed(const Micro &micro, bool summed) {
    Means means(micro.size()), sums(micro.size());
    narrow_at_once_ = micro.size() == 1 && !summed;  // else sums and means are still to be taken
    for (const size_t m : micro) {
      TaskState total;
      unperturbed(m, &means, summed ? &total : nullptr);
      if (summed) sums.add(std::move(total));
    }
    point_.check_unchanged();
    if (summed) sum_ = sums.take()[0].grads;
    std::vector<TaskState> states = means.take();
    point_.narrow(&sum_);
    for (TaskState &state : states) point_.narrow(&state.grads);
    return states;
  }

  // One gradient a parameter; empty if no loss was there.
  const Row &sum() const { return sum_; }

  // Fills `perturbed` and `perturbed_loss` of the states with s_i, t_i where the parameters stand. One closure for all
  // tasks is called once a micro-batch, whatever the number of states.
  void perturbed(const Micro &micro, const std::vector<TaskState *> &states) {
    Means taken(micro.size());
    narrow_at_once_ = micro.size() == 1;
    for (const size_t m : micro) perturbed(m, states, &taken);
    point_.check_unchanged();
    std::vector<TaskState> means = taken.take();  // in the order of the states, which is that of their indices
    for (size_t k = 0; k < states.size(); ++k) {
      TaskState &state = *states[k];
      Row &grads = means[k].grads;
      point_.narrow(&grads);
      state.perturbed_loss = means[k].loss;
      state.perturbed.assign(point_.tensors().size(), torch::Tensor());
      for (const size_t i : state.reached)
        state.perturbed[i] = !grads.empty() && grads[i].defined() ? grads[i] : point_.zeros(i);
      grads.clear();
    }
    for (const TaskState *state : states) check_loss(state->task, state->perturbed_loss, "perturbed");
    for (const TaskState *state : states) {
      const Row own = point_.row(state->perturbed, state->own);
      check_norm(point_.sq_norm(own, state->own, false, 0.0), state->task, "perturbed");
    }
  }

  // The losses alone, as doubles, of the tasks with these places, where the parameters stand: means over the
  // micro-batches of forwards without graphs.
  std::vector<double> losses_here(const Micro &micro, const std::vector<int64_t> &at) {
    std::vector<std::vector<torch::Tensor>> values(at.size());
    for (const Forward &forward : forwards_) {
      const std::vector<size_t> wanted = places(forward, at), tasks = of(at, wanted);
      if (wanted.empty() || std::find(micro.begin(), micro.end(), forward.micro) == micro.end()) continue;
      const auto losses = again(forward, tasks, false);
      for (size_t k = 0; k < wanted.size(); ++k) values[wanted[k]].push_back(losses[k].value);
    }
    point_.check_unchanged();
    std::vector<double> means;
    for (const auto &found : values) means.push_back(torch::stack(found).mean().item<double>());
    return means;
  }

  // The numbers of all micro-batches.
  Micro all() const {
    Micro result(closure_.batches);
    for (size_t m = 0; m < result.size(); ++m) result[m] = m;
    return result;
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

  // Which of the tasks have losses from a forward, as places in the list of them.
  static std::vector<size_t> places(const Forward &forward, const std::vector<int64_t> &tasks) {
    std::vector<size_t> found;
    for (size_t k = 0; k < tasks.size(); ++k)
      if (forward.has(static_cast<size_t>(tasks[k]))) found.push_back(k);
    return found;
  }
  static std::vector<size_t> of(const std::vector<int64_t> &tasks, const std::vector<size_t> &places) {
    std::vector<size_t> result;
    for (const size_t k : places) result.push_back(static_cast<size_t>(tasks[k]));
    return result;
  }

  // total, if there is one, takes the gradient of the sum of the losses, and the states none.
  void unperturbed(size_t m, Means *means, TaskState *total) {
    TaskLosses container;
    std::vector<TaskState> states;
    if (!closure_.all) {
      if (closure_.named) container.kind = TaskLosses::Kind::dict;
      for (size_t i = 0; i < closure_.each.size(); ++i) {
        const Task &task = closure_.each[i].first;
        forwards_.push_back({m, i, snapshot(), {}});
        const torch::Tensor value = call([&] { return closure_.each[i].second(m); });
        const auto loss = value.defined() ? std::optional<Loss>(read_loss(task, value)) : std::nullopt;
        states.push_back(state_of(task, i, loss, true));
        differentiate({loss}, &states.back(), means, total);
        container.tasks.push_back(task);
        container.values.push_back(value);
      }
    } else {
      forwards_.push_back({m, 0, snapshot(), {}});
      container = call([&] { return closure_.all(m, std::nullopt); });
      const auto losses = read_losses(container);
      for (size_t i = 0; i < losses.size(); ++i)
        states.push_back(state_of(container.tasks[i], i, losses[i], losses.size() == 1));
      differentiate(losses, states.data(), means, total);
    }
    check_form(container, "another micro-batch");
    tasks_ = container.tasks;
    for (auto &value : container.values)
      if (value.defined()) value = value.detach();
    if (container.tensor.defined()) container.tensor = container.tensor.detach().clone();
    containers_.push_back(std::move(container));
  }

  // The state of a task whose loss came from the last forward.
  TaskState state_of(const Task &task, size_t index, const std::optional<Loss> &loss, bool alone) {
    TaskState state;
    state.task = task;
    state.index = static_cast<int64_t>(index);
    if (!loss) return state;
    if (!(loss->separable || alone) && !options_.shared())
      throw std::runtime_error(
          "loss of task " + text(task) +
          " is an element of a vector computed as a whole, so the graph does not tell which parameters it reaches. "
          "Return the losses as separate scalars (or torch.stack of them), or name the shared parameters: "
          "FlatMTL(..., shared=...)");
    forwards_.back().tasks.push_back(index);
    state.loss = loss->value;
    return state;
  }

  // The gradients of the losses of one forward, one a state, each to the means at once, so that rows of one micro-batch
  // do not pile up; or, if total is given, of their sum, added to it. The states are moved from.
  void differentiate(const std::vector<std::optional<Loss>> &losses, TaskState *states, Means *means,
                     TaskState *total) const {
    Indices all(point_.tensors().size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    std::vector<Loss> found;
    std::vector<TaskState *> with_loss;
    for (size_t i = 0; i < losses.size(); ++i) {
      if (!losses[i]) {
        means->add(std::move(states[i]));
        continue;
      }
      found.push_back(*losses[i]);
      with_loss.push_back(states + i);
    }
    if (found.empty()) return;
    if (!total) {
      for (size_t k = 0; k < found.size(); ++k) {
        with_loss[k]->grads = gradients({found[k]}, all, k + 1 < found.size());
        with_loss[k]->reached = defined(with_loss[k]->grads);
        means->add(std::move(*with_loss[k]));
      }
      return;
    }
    for (size_t k = 0; k < found.size(); ++k) {
      const auto reached = leaves(found[k].edge);
      for (const size_t i : all)
        if (reached.count(point_.tensors()[i].unsafeGetTensorImpl())) with_loss[k]->reached.push_back(i);
      means->add(std::move(*with_loss[k]));
    }
    const Row grads = gradients(found, all, false);
    total->loss = found[0].value.to(torch::kDouble);  // says that there are gradients
    total->grads.resize(all.size());
    for (const size_t i : all) {
      torch::Tensor &sum = total->grads[i];
      if (grads[i].defined()) sum = sum.defined() ? sum + grads[i] : grads[i];
    }
  }

  // Losses and gradients of the states' tasks in one micro-batch, made again where the parameters stand.
  void perturbed(size_t m, const std::vector<TaskState *> &states, Means *means) {
    std::vector<TaskState> found(states.size());
    std::vector<bool> done(states.size(), false);
    std::vector<int64_t> at;
    for (size_t k = 0; k < states.size(); ++k) {
      found[k].task = states[k]->task;
      found[k].index = states[k]->index;
      at.push_back(states[k]->index);
    }
    for (const Forward &forward : forwards_) {
      const std::vector<size_t> wanted = places(forward, at), tasks = of(at, wanted);
      if (wanted.empty() || forward.micro != m) continue;
      const auto losses = again(forward, tasks, true);
      for (size_t j = 0; j < wanted.size(); ++j) {
        const Indices &reached = states[wanted[j]]->reached;
        const Row grads = gradients({losses[j]}, reached, j + 1 < wanted.size());
        TaskState &state = found[wanted[j]];
        state.loss = losses[j].value;
        state.grads.resize(point_.tensors().size());
        for (size_t k = 0; k < reached.size(); ++k) state.grads[reached[k]] = grads[k];
        done[wanted[j]] = true;
        means->add(std::move(state));
      }
    }
    for (size_t k = 0; k < found.size(); ++k)  // those that are absent from this micro-batch
      if (!done[k]) means->add(std::move(found[k]));
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

  // d (sum of the losses) / d tensors()[indices], in the layout of the parameters, narrowed if that is the time for it;
  // undefined where not reached.
  Row gradients(const std::vector<Loss> &losses, const Indices &indices, bool retain_graph) const {
    if (indices.empty()) return {};
    std::vector<torch::Tensor> roots, seeds;
    for (const Loss &loss : losses) {
      const auto &meta = loss.edge.function->input_metadata(loss.edge.input_nr);
      const auto shape = shape_at(loss.edge).value_or(std::vector<int64_t>());
      roots.push_back(at::empty(shape, meta.options()));
      seeds.push_back(at::full(shape, 1.0, meta.options()));
      torch::autograd::impl::set_gradient_edge(roots.back(), loss.edge);
    }
    Row rooms(indices.size());
    for (size_t k = 0; k < indices.size() && narrow_at_once_; ++k) rooms[k] = point_.room(indices[k]);
    Row found = torch::autograd::grad(roots, at(point_.tensors(), indices), seeds, retain_graph,
                                      /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t k = 0; k < found.size(); ++k) {
      const torch::Tensor &parameter = point_.tensors()[indices[k]];
      if (!found[k].defined()) continue;
      if (found[k].layout() != torch::kStrided)
        throw std::runtime_error("gradient of parameter " + point_.params()[indices[k]].name +
                                 " is sparse; dense gradients are required");
      if (rooms[k].defined())
        found[k] = rooms[k].copy_(found[k]);
      else if (found[k].strides() != parameter.strides())
        found[k] = torch::empty_like(parameter).copy_(found[k]);
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
  Row sum_;
  bool narrow_at_once_ = false;
};

}  // namespace detail
}  // namespace flatmtl
