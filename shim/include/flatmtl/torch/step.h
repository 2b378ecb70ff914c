// step.h - one F-MTL step up to the combined update: losses -> per-task gradients -> Gramians -> weights -> update.
// The order of the paper's Algorithm 1 (arXiv 2211.13723), and of the calls of the C core in the Python package, so
// that both give the same bits. Private.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/types.h>

#include "aggregator_state.h"
#include "options.h"
#include "point.h"
#include "protect.h"
#include "roles.h"
#include "task_state.h"

namespace flatmtl {
namespace detail {

inline torch::Tensor or_zeros(const torch::Tensor &gradient, const torch::Tensor &parameter) {
  return gradient.defined() ? gradient : torch::zeros_like(parameter);
}

// One step. `run` ends with `update` set and the parameters as they were; `rollback` undoes a step that failed.
class Step {
 public:
  // known_tasks: of earlier steps, if there were any.
  Step(std::vector<Parameter> params, const FlatMTLOptions &options, const Roles &roles,
       const std::optional<std::vector<Task>> &known_tasks, const AggregatorState &state, int64_t draw)
      : point_(std::move(params)),
        options_(options),
        roles_(roles),
        known_tasks_(known_tasks),
        state_(state),
        new_state_(state),
        draw_(draw),
        slots_(buffers(options.modules())) {
    for (const auto &p : point_.params()) {
      flat_ = flat_ || p.rho_shared != 0.0 || p.rho_task != 0.0;
      old_grads_.push_back(p.tensor.grad());
      torch::Tensor(p.tensor).mutable_grad().reset();  // so that a backward inside the closure cannot add to it
    }
  }

  void run(const Closure &closure) {
    unperturbed(closure);
    const Snapshot after(slots_);
    find_roles();
    measure();
    if (flat_) {
      for (TaskState *state : present_) perturbed(closure, *state);
      point_.restore();
      after.restore();
    }
    finish();
  }

  // Everything as it was before the step, bit for bit.
  void rollback() {
    point_.rollback();
    if (!passes_.empty()) passes_[0].restore();
    for (size_t i = 0; i < tensors().size(); ++i) torch::Tensor(tensors()[i]).mutable_grad() = old_grads_[i];
  }

  std::vector<Task> tasks() const {
    std::vector<Task> result;
    for (const auto &state : tasks_) result.push_back(state.task);
    return result;
  }

  const std::vector<Parameter> &params() const { return point_.params(); }
  const TaskLosses &losses() const { return losses_; }
  const Record &record() const { return record_; }
  const AggregatorState &new_state() const { return new_state_; }
  const std::unordered_map<Roles::Key, int64_t> &new_roles() const { return new_roles_; }

  // .grad of parameter i after the step.
  const torch::Tensor &gradient(size_t i) const {
    return new_roles_.count(Roles::key(tensors()[i])) ? update_[i] : old_grads_[i];
  }

  // The record of a step that nonfinite "skip" left out.
  Record skipped_record() const {
    Record record = empty_record(tasks_);
    record.skipped = true;
    return record;
  }

 private:
  // -- passes -------------------------------------------------------------------------------------------------------

  // Losses at theta, and g_i, h_i = d loss_i / d (theta, psi_i).
  void unperturbed(const Closure &closure) {
    if (!closure.all) {
      check_closures(closure);
      TaskLosses container;
      if (closure.named) container.kind = TaskLosses::Kind::dict;
      for (const auto &item : closure.each) {
        const TaskClosure &call = item.second;
        const torch::Tensor value = forward([&] { return call(); }, nullptr);
        add_task(item.first, value.defined() ? std::optional<Loss>(read_loss(item.first, value)) : std::nullopt, false,
                 true);
        container.tasks.push_back(item.first);
        container.values.push_back(value);
      }
      losses_ = container;
    } else {
      losses_ = forward([&] { return closure.all(std::nullopt); }, nullptr);
      const auto losses = read_losses(losses_);
      size_t count = losses.size();
      while (count > 0 && !losses[count - 1]) --count;
      for (size_t i = 0; i < losses.size(); ++i)
        add_task(losses_.tasks[i], losses[i], i + 1 < count, losses.size() == 1);
    }
    form_ = describe(losses_);
    for (size_t i = 0; i < losses_.values.size(); ++i)
      if (losses_.values[i].defined()) losses_.values[i] = losses_.values[i].detach();
    if (losses_.tensor.defined()) losses_.tensor = losses_.tensor.detach().clone();
    point_.check_unchanged();
    for (const auto &state : tasks_)
      if (state.loss) check_loss(state.task, state.loss->value, "unperturbed");
    if (known_tasks_ && tasks() != *known_tasks_)
      throw std::runtime_error("closure returned losses of tasks " + text(tasks()) + ", but earlier steps had " +
                               text(*known_tasks_) + " (return None for a task that is absent from a batch)");
  }

  // Runs a closure: from where RNG and buffers stand, or, in a perturbed pass, from `start`.
  template <typename F>
  std::invoke_result_t<F &> forward(F call, const Snapshot *start) {
    if (start)
      start->restore(options_.replay_rng());
    else
      passes_.emplace_back(slots_);
    torch::AutoGradMode enable_grad(true);
    return call();
  }

  void add_task(const Task &task, const std::optional<Loss> &loss, bool retain_graph, bool alone) {
    TaskState state;
    state.task = task;
    state.loss = loss;
    state.pass = passes_.size() - 1;
    if (loss) {
      if (!(loss->separable || alone) && !roles_.fixed)
        throw std::runtime_error(
            "loss of task " + text(task) +
            " is an element of a vector computed as a whole, so the graph does not tell which parameters it reaches. "
            "Return the losses as separate scalars (or torch.stack of them), or name the shared parameters: "
            "FlatMTL(..., shared=...)");
      Indices all(tensors().size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = i;
      state.grads = gradients(*loss, all, retain_graph);
    }
    tasks_.push_back(std::move(state));
  }

  // d loss / d tensors()[indices], in the layout of the parameters; undefined where not reached.
  Row gradients(const Loss &loss, const Indices &indices, bool retain_graph) const {
    if (indices.empty()) return {};
    const auto &meta = loss.edge.function->input_metadata(loss.edge.input_nr);
    const auto shape = shape_at(loss.edge).value_or(std::vector<int64_t>());
    const torch::Tensor root = at::empty(shape, meta.options()), seed = at::full(shape, 1.0, meta.options());
    torch::autograd::impl::set_gradient_edge(root, loss.edge);
    Row found = torch::autograd::grad({root}, at(tensors(), indices), {seed}, retain_graph, /*create_graph=*/false,
                                      /*allow_unused=*/true);
    for (size_t k = 0; k < found.size(); ++k) {
      const torch::Tensor &parameter = tensors()[indices[k]];
      if (!found[k].defined()) continue;
      if (found[k].layout() != torch::kStrided)
        throw std::runtime_error("gradient of parameter " + params()[indices[k]].name +
                                 " is sparse; dense gradients are required");
      if (found[k].strides() != parameter.strides()) found[k] = torch::empty_like(parameter).copy_(found[k]);
    }
    return found;
  }

  // s_i, t_i: the gradients at (theta + eps_shared_i, psi_i + eps_own_i). Algorithm 1, steps 2 and 3.
  void perturbed(const Closure &closure, TaskState &state) {
    Indices moved = shared_;
    moved.insert(moved.end(), state.own.begin(), state.own.end());
    double shared_scale = std::sqrt(state.sq_shared), own_scale = std::sqrt(state.sq_own);
    if (options_.norm() == "joint") shared_scale = own_scale = std::sqrt(state.sq_shared + state.sq_own);
    shared_scale = shared_scale != 0.0 ? 1.0 / shared_scale : 0.0;
    own_scale = own_scale != 0.0 ? 1.0 / own_scale : 0.0;
    std::vector<double> scales;
    for (const size_t i : shared_) scales.push_back(params()[i].rho_shared * shared_scale);
    for (const size_t i : state.own) scales.push_back(params()[i].rho_task * own_scale);
    point_.move(moved, point_.row(state.grads, moved), scales, options_.adaptive(), options_.eta());
    const Loss loss = perturbed_loss(closure, state);
    point_.check_unchanged();
    Indices reached;
    for (const size_t i : moved)
      if (state.grads[i].defined()) reached.push_back(i);
    const Row found = gradients(loss, reached, false);
    Row grads(tensors().size());
    for (size_t k = 0; k < reached.size(); ++k) grads[reached[k]] = found[k];
    state.perturbed_loss = loss.value;
    check_loss(state.task, loss.value, "perturbed");
    for (const size_t i : state.own) state.own_perturbed.push_back(or_zeros(grads[i], tensors()[i]));
    check_norm(sq_norm(state.own_perturbed, state.own, false), state.task, "perturbed");
    for (const size_t i : shared_)
      state.shared_perturbed.push_back(state.grads[i].defined() ? or_zeros(grads[i], tensors()[i]) : point_.zeros(i));
    point_.restore(state.own);  // the shared ones are overwritten by the next perturbation
  }

  Loss perturbed_loss(const Closure &closure, const TaskState &state) {
    const Snapshot &start = passes_[state.pass];
    const size_t index = static_cast<size_t>(&state - tasks_.data());
    if (!closure.all) {
      const TaskClosure &call = closure.each[index].second;
      const torch::Tensor value = forward([&] { return call(); }, &start);
      if (!value.defined())
        throw std::runtime_error("closure of task " + text(state.task) + " returned None in the perturbed pass only");
      return read_loss(state.task, value);
    }
    const TaskLosses value = forward([&] { return closure.all(state.task); }, &start);
    if (closure.takes_task && value.tensor.defined() && value.tensor.dim() == 0)
      return read_loss(state.task, value.tensor);
    const std::string form = describe(value);
    if (form != form_)
      throw std::runtime_error("closure returned " + form_ + " in the unperturbed pass, but " + form +
                               " in a perturbed pass");
    const auto loss = read_losses(value)[index];
    if (!loss) throw std::runtime_error("loss of task " + text(state.task) + " is None in the perturbed pass only");
    return *loss;
  }

  // -- roles, norms, weights ----------------------------------------------------------------------------------------

  void find_roles() {
    std::vector<std::vector<Roles::Key>> reached(tasks_.size());
    std::vector<bool> hit(tensors().size());
    for (size_t t = 0; t < tasks_.size(); ++t)
      for (size_t i = 0; i < tasks_[t].grads.size(); ++i) {
        if (!tasks_[t].grads[i].defined()) continue;
        reached[t].push_back(Roles::key(tensors()[i]));
        hit[i] = true;
      }
    new_roles_ = roles_.grown(reached);
    for (size_t i = 0; i < tensors().size(); ++i) {
      if (!hit[i]) continue;
      if (new_roles_.at(Roles::key(tensors()[i])) == SHARED) {
        shared_.push_back(i);
        continue;
      }
      for (auto &state : tasks_)
        if (!state.grads.empty() && state.grads[i].defined()) state.own.push_back(i);
    }
  }

  // Norms of the unperturbed gradients; which tasks are present.
  void measure() {
    for (auto &state : tasks_) {
      if (!state.loss) continue;
      const Row shared = point_.row(state.grads, shared_), own = point_.row(state.grads, state.own);
      state.sq_shared = sq_norm(shared, shared_, options_.adaptive());
      state.sq_own = sq_norm(own, state.own, options_.adaptive());
      check_norm(state.sq_shared + state.sq_own, state.task, "unperturbed");
      const bool absent = state.loss->value.item<double>() == 0.0 && sq_norm(shared, shared_, false) == 0.0;
      if (absent && sq_norm(own, state.own, false) == 0.0) continue;
      present_.push_back(&state);
      present_at_.push_back(&state - tasks_.data());
    }
  }

  // Gramians of both families, their weights, and the combined update.
  void finish() {
    const auto count = static_cast<int64_t>(present_.size());
    std::vector<Row> loss, moved;
    for (const TaskState *state : present_) {
      loss.push_back(point_.row(state->grads, shared_));
      if (flat_) moved.push_back(state->shared_perturbed);
    }
    torch::Tensor pair = torch::zeros({2 * count, 2 * count}, torch::kDouble), direct;
    std::vector<double> weights_loss(present_.size(), std::nan("")), weights_flat = weights_loss;
    flatmtl_status status[2] = {FLATMTL_OK, FLATMTL_OK};
    if (!shared_.empty() && count > 0) {
      std::tie(pair, direct) = gramians(loss, moved);
      weights(pair, direct, &weights_loss, &weights_flat, status);
      if (!flat_) weights_flat.assign(present_.size(), std::nan(""));
    }
    combine(loss, moved, weights_loss, weights_flat);
    record_ = empty_record(tasks_);
    if (flat_) add_perturbed(&record_, tasks_, present_at_);
    if (shared_.empty() || count == 0) return;
    const Family loss_family{pair.slice(0, 0, count).slice(1, 0, count), weights_loss};
    add_family(&record_.norms_loss, &record_.cosine_loss, &record_.weights_loss, loss_family, present_at_);
    record_.pareto_stationary_loss = status[0] == FLATMTL_PARETO_STATIONARY;
    if (!flat_) return;
    const Family flat_family{pair.slice(0, count).slice(1, count), weights_flat};
    add_family(&record_.norms_flat, &record_.cosine_flat, &record_.weights_flat, flat_family, present_at_);
    record_.pareto_stationary_flat = status[1] == FLATMTL_PARETO_STATIONARY;
  }

  // Weights of both families. Without perturbed passes there is one call of A, of the loss family.
  void weights(torch::Tensor &pair, torch::Tensor direct, std::vector<double> *loss, std::vector<double> *flat,
               flatmtl_status *status) {
    const Aggregator &aggregator = options_.aggregator();
    const auto count = static_cast<int64_t>(present_.size()), tasks = static_cast<int64_t>(tasks_.size());
    const std::vector<double> options = aggregator.option_values(tasks, options_.seed(), draw_, present_at_);
    if (!flat_) direct = pair.slice(0, 0, count).slice(1, 0, count).contiguous();
    Context context("step_weights", count);
    flatmtl_error error{};
    flatmtl_settings settings;
    check("step_weights", flatmtl_settings_default(&settings, &error), error);
    settings.method = aggregator.method();
    settings.options = options.data();
    settings.num_options = static_cast<int32_t>(options.size());
    settings.combine = flat_ ? combine_number(options_.combine()) : FLATMTL_DIRECT;
    settings.family_scale = family_scale_number(options_.family_scale());
    std::vector<double> state = state_.gather(settings.method, settings.combine, tasks, present_at_);
    settings.state = state.empty() ? nullptr : state.data();
    check(
        "step_weights",
        flatmtl_step_weights(context.get(), &settings, static_cast<int32_t>(count), doubles(pair),
                             direct.defined() ? doubles(direct) : nullptr, loss->data(), flat->data(), status, &error),
        error);
    if (!state.empty()) new_state_ = state_.scatter(settings.method, settings.combine, tasks, present_at_, state);
  }

  // The Gramian of (g, f), and that of s for combine "direct".
  std::pair<torch::Tensor, torch::Tensor> gramians(const std::vector<Row> &loss, const std::vector<Row> &moved) const {
    const auto count = static_cast<int64_t>(present_.size());
    torch::Tensor pair, direct;
    if (flat_) {
      pair = point_.gramian_pair(loss, moved, shared_);
      if (options_.combine() == "direct") direct = point_.gramian(moved, shared_);
    } else {
      pair = torch::zeros({2 * count, 2 * count}, torch::kDouble);
      pair.slice(0, 0, count).slice(1, 0, count).copy_(point_.gramian(loss, shared_));
    }
    const auto values = pair.accessor<double, 2>();
    for (int64_t i = 0; i < count; ++i) {
      check_norm(values[i][i], present_[static_cast<size_t>(i)]->task, "unperturbed");
      check_norm(values[count + i][count + i], present_[static_cast<size_t>(i)]->task, "perturbed");
    }
    return {pair, direct};
  }

  // The update: SUM a_i g_i + b_i f_i for shared parameters, t_i for own ones. Takes over the saved copies.
  void combine(const std::vector<Row> &loss, const std::vector<Row> &moved, const std::vector<double> &weights_loss,
               const std::vector<double> &weights_flat) {
    Row &out = point_.saved();
    update_.resize(tensors().size());
    if (present_.empty()) return;
    if (!shared_.empty()) point_.combine(shared_, loss, moved, weights_loss, weights_flat);
    for (const size_t i : shared_) update_[i] = out[i];
    for (const TaskState *state : present_)
      for (size_t k = 0; k < state->own.size(); ++k) {
        const size_t i = state->own[k];
        const torch::Tensor &gradient = flat_ ? state->own_perturbed[k] : state->grads[i];
        if (update_[i].defined())  // only with shared(): an own parameter that several losses reach
          out[i].add_(gradient);
        else
          update_[i] = out[i].copy_(gradient);
      }
  }

  // -- small things -------------------------------------------------------------------------------------------------

  const Row &tensors() const { return point_.tensors(); }

  double sq_norm(const Row &row, const Indices &indices, bool adaptive) const {
    return point_.sq_norm(row, indices, adaptive, options_.eta());
  }

  static void check_norm(double square, const Task &task, const char *pass) {
    if (!std::isfinite(square))
      throw NonFiniteError(task, pass, "the gradient", square > 0.0 ? std::sqrt(square) : square);
  }

  static void check_loss(const Task &task, const torch::Tensor &loss, const char *pass) {
    const double value = loss.item<double>();
    if (!std::isfinite(value)) throw NonFiniteError(task, pass, "the loss", value);
  }

  Point point_;
  const FlatMTLOptions &options_;
  const Roles &roles_;
  const std::optional<std::vector<Task>> &known_tasks_;
  const AggregatorState &state_;
  AggregatorState new_state_;
  int64_t draw_;
  std::vector<ProtectedModule::Slot> slots_;
  bool flat_ = false;
  Row old_grads_, update_;
  std::vector<Snapshot> passes_;
  std::vector<TaskState> tasks_;
  std::vector<TaskState *> present_;
  std::vector<int64_t> present_at_;
  Indices shared_;
  std::unordered_map<Roles::Key, int64_t> new_roles_;
  TaskLosses losses_;
  std::string form_;
  Record record_;
};

}  // namespace detail
}  // namespace flatmtl
