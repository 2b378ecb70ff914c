// step.h - one F-MTL step up to the combined update: losses -> per-task gradients -> Gramians -> weights -> update.
// The order of the paper's Algorithm 1 (arXiv 2211.13723), and of the calls of the C core in the Python package, so
// that both give the same bits. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "aggregator_state.h"
#include "clip.h"
#include "options.h"
#include "passes.h"
#include "protect.h"
#include "record.h"
#include "roles.h"
#include "task_state.h"
#include "weighting_state.h"

namespace flatmtl {
namespace detail {

// One step. `run` ends with `update` set and the parameters as they were; `rollback` undoes a step that failed.
class Step {
 public:
  // known_tasks: of earlier steps, if there were any.
  Step(std::vector<Parameter> params, const FlatMTLOptions &options, const Roles &roles,
       const std::optional<std::vector<Task>> &known_tasks, const AggregatorState &state,
       const WeightingState &weighting_state, int64_t draw)
      : point_(std::move(params)),
        options_(options),
        roles_(roles),
        known_tasks_(known_tasks),
        state_(state),
        new_state_(state),
        weighting_state_(weighting_state),
        new_weighting_state_(weighting_state),
        draw_(draw),
        slots_(buffers(options.modules())),
        new_roles_(roles.of) {
    for (const auto &p : point_.params()) {
      flat_ = flat_ || p.rho_shared != 0.0 || p.rho_task != 0.0;
      old_grads_.push_back(p.tensor.grad());
      torch::Tensor(p.tensor).mutable_grad().reset();  // so that a backward inside the closure cannot add to it
    }
  }

  void run(const Closure &closure) {
    passes_.emplace(closure, point_, options_, slots_);
    Micro all(closure.batches);
    for (size_t m = 0; m < all.size(); ++m) all[m] = m;
    if (!(options_.m_sharpness() && flat_) || all.size() == 1) {
      gradients(all);
    } else {
      std::vector<std::vector<TaskState>> parts;
      for (const size_t m : all) {
        gradients({m});
        parts.push_back(tasks_);
      }
      tasks_ = mean(parts);
      find_roles();
      measure();
    }
    finish();
  }

  // Everything as it was before the step, bit for bit.
  void rollback() {
    point_.rollback();
    if (passes_) passes_->rollback();
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
  const WeightingState &new_weighting_state() const { return new_weighting_state_; }
  const std::unordered_map<Roles::Key, int64_t> &new_roles() const { return new_roles_; }

  // .grad of parameter i after the step.
  const torch::Tensor &gradient(size_t i) const {
    return new_roles_.count(Roles::key(tensors()[i])) ? update_[i] : old_grads_[i];
  }

  // Whether `observe` is to be called after the update. If so, what it does not need is given up.
  bool keep_for_observation() {
    if (!options_.weighting() || !options_.weighting()->observes() || present_.empty()) return false;
    for (auto &state : tasks_) {
      state.grads.clear();
      state.perturbed.clear();
    }
    old_grads_.clear();
    update_.clear();
    return true;
  }

  // After the update: what the weighting learns from the losses of the same batch, evaluated once more. Random
  // generators and buffers stay as they are.
  WeightingState observe(const WeightingState &state) {
    point_.accept();
    const Snapshot before = passes_->snapshot();
    std::vector<double> after;
    try {
      after = passes_->losses_here(present_at_);
    } catch (...) {
      before.restore();
      throw;
    }
    before.restore();
    WeightingCall call(*options_.weighting(), state, static_cast<int64_t>(tasks_.size()), present_at_);
    call.observe(present_losses(), after);
    return call.new_state();
  }

  // The record of a step that nonfinite "skip" left out.
  Record skipped_record() const {
    Record record = empty_record(tasks_);
    record.skipped = true;
    return record;
  }

 private:
  // Gradients of some micro-batches: unperturbed, and at points that are perturbed along them.
  void gradients(const Micro &micro) {
    tasks_ = passes_->unperturbed(micro);
    losses_ = passes_->losses();
    for (const auto &state : tasks_)
      if (state.loss.defined()) check_loss(state.task, state.loss, "unperturbed");
    if (known_tasks_ && tasks() != *known_tasks_)
      throw std::runtime_error("closure returned losses of tasks " + text(tasks()) + ", but earlier steps had " +
                               text(*known_tasks_) + " (return None for a task that is absent from a batch)");
    const Snapshot after = passes_->snapshot();
    find_roles();
    measure();
    if (!flat_) return;
    for (size_t k = 0; k < present_.size(); ++k) {
      move_along(*present_[k]);
      passes_->perturbed(micro, present_[k], static_cast<size_t>(present_at_[k]));
      point_.restore(present_[k]->own);  // the shared ones are overwritten by the next move
    }
    point_.restore();
    after.restore();
  }

  // Parameters to (theta + eps_shared_i, psi_i + eps_own_i). Algorithm 1, step 2.
  void move_along(const TaskState &state) {
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
    new_roles_ = roles_.grown(reached, std::move(new_roles_));
    shared_.clear();
    for (auto &state : tasks_) state.own.clear();
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
    present_.clear();
    present_at_.clear();
    for (auto &state : tasks_) {
      if (!state.loss.defined()) continue;
      const Row shared = point_.row(state.grads, shared_), own = point_.row(state.grads, state.own);
      state.sq_shared = sq_norm(shared, shared_, options_.adaptive());
      state.sq_own = sq_norm(own, state.own, options_.adaptive());
      check_norm(state.sq_shared + state.sq_own, state.task, "unperturbed");
      const bool absent = state.loss.item<double>() == 0.0 && sq_norm(shared, shared_, false) == 0.0;
      if (absent && sq_norm(own, state.own, false) == 0.0) continue;
      present_.push_back(&state);
      present_at_.push_back(&state - tasks_.data());
    }
    weigh();
  }

  // The factors of the losses. Called again in the same step it starts from the state before the step again.
  void weigh() {
    factors_.assign(present_.size(), 1.0);
    if (!options_.weighting() || present_.empty()) return;
    const Weighting &weighting = *options_.weighting();
    std::vector<double> norms;
    std::vector<Task> names;
    for (const TaskState *state : present_) {
      names.push_back(state->task);
      if (weighting.needs_norms())
        norms.push_back(std::sqrt(sq_norm(point_.row(state->grads, shared_), shared_, false)));
    }
    WeightingCall call(weighting, weighting_state_, static_cast<int64_t>(tasks_.size()), present_at_);
    factors_ = call.weights(present_losses(), norms, names, options_.seed(), draw_);
    new_weighting_state_ = call.new_state();
  }

  std::vector<double> present_losses() const {
    std::vector<double> losses;
    for (const TaskState *state : present_) losses.push_back(state->loss.item<double>());
    return losses;
  }

  // Gramians of both families, their weights, and the combined update.
  void finish() {
    const auto count = static_cast<int64_t>(present_.size());
    std::vector<Row> loss, moved;
    for (const TaskState *state : present_) {
      loss.push_back(point_.row(state->grads, shared_));
      if (flat_) moved.push_back(point_.row(state->perturbed, shared_));
    }
    torch::Tensor pair = torch::zeros({2 * count, 2 * count}, torch::kDouble), direct;
    std::vector<double> weights_loss(present_.size(), std::nan("")), weights_flat = weights_loss;
    flatmtl_status status[2] = {FLATMTL_OK, FLATMTL_OK};
    if (!shared_.empty() && count > 0) {
      std::tie(pair, direct) = gramians(loss, moved);
      if (options_.weighting()) {
        const torch::Tensor c = torch::tensor(factors_, torch::kDouble);
        pair = pair * torch::outer(c.repeat(2), c.repeat(2));
        if (direct.defined()) direct = direct * torch::outer(c, c);
      }
      weights(pair, direct, &weights_loss, &weights_flat, status);
      if (options_.max_norm()) {
        const bool families = !flat_ || options_.combine() == "decomposed";
        clip(&weights_loss, &weights_flat, pair, direct, *options_.max_norm(), families);
      }
      if (!flat_) weights_flat.assign(present_.size(), std::nan(""));
    }
    combine(loss, moved, weights_loss, weights_flat);
    record_ = empty_record(tasks_);
    record_.loss_weights = spread(torch::tensor(factors_, torch::kDouble), present_at_, record_.losses.size(0));
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

  // The update, with the losses' factors c: SUM c_i (a_i g_i + b_i f_i) for shared parameters, c_i t_i for own ones.
  // Takes over the saved copies.
  void combine(const std::vector<Row> &loss, const std::vector<Row> &moved, std::vector<double> weights_loss,
               std::vector<double> weights_flat) {
    Row &out = point_.saved();
    update_.resize(tensors().size());
    if (present_.empty()) return;
    for (size_t k = 0; k < factors_.size(); ++k) {
      weights_loss[k] *= factors_[k];
      weights_flat[k] *= factors_[k];
    }
    if (!shared_.empty()) point_.combine(shared_, loss, moved, weights_loss, weights_flat);
    for (const size_t i : shared_) update_[i] = out[i];
    for (size_t k = 0; k < present_.size(); ++k)
      for (const size_t i : present_[k]->own) {
        const Row &row = flat_ ? present_[k]->perturbed : present_[k]->grads;
        torch::Tensor gradient = row[i].defined() ? row[i] : point_.zeros(i);
        if (factors_[k] != 1.0) gradient = gradient * factors_[k];
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

  Point point_;
  const FlatMTLOptions options_;
  const Roles &roles_;
  const std::optional<std::vector<Task>> &known_tasks_;
  const AggregatorState &state_;
  AggregatorState new_state_;
  const WeightingState weighting_state_;
  WeightingState new_weighting_state_;
  int64_t draw_;
  std::vector<ProtectedModule::Slot> slots_;
  std::unordered_map<Roles::Key, int64_t> new_roles_;
  bool flat_ = false;
  Row old_grads_, update_;
  std::optional<Passes> passes_;
  std::vector<TaskState> tasks_;
  std::vector<TaskState *> present_;
  std::vector<int64_t> present_at_;
  std::vector<double> factors_;  // of the losses of the present tasks
  Indices shared_;
  TaskLosses losses_;
  Record record_;
};

}  // namespace detail
}  // namespace flatmtl
