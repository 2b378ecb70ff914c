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

#include "clip.h"
#include "flatness_modes.h"
#include "protect.h"
#include "record.h"
#include "roles.h"
#include "step_data.h"

namespace flatmtl {
namespace detail {

// One step. `run` ends with `update` set and the parameters as they were; `rollback` undoes a step that failed.
class Step : private StepData {
 public:
  // options: settled. known_tasks: of earlier steps, if there were any.
  Step(std::vector<Parameter> params, Reserve *reserve, const FlatMTLOptions &options_of_step, const Roles &roles,
       const std::optional<std::vector<Task>> &known_tasks, const MethodStates &old, int64_t number)
      : StepData(std::move(params), reserve, options_of_step, old, number),
        roles_(roles),
        known_tasks_(known_tasks),
        slots_(buffers(options.modules())),
        new_roles_(roles.of) {
    for (const torch::Tensor &tensor : tensors()) {
      old_grads_.push_back(tensor.grad());
      torch::Tensor(tensor).mutable_grad().reset();  // so that a backward inside the closure cannot add to it
    }
  }

  void run(const Closure &closure) {
    passes.emplace(closure, point, options, slots_);
    const Micro all = passes->all();
    if (!(options.m_sharpness() && flat) || all.size() == 1) {
      gradients(all);
    } else {
      Means means(all.size());
      point.keep_wide = true;
      for (const size_t m : all) {
        gradients({m});
        for (TaskState &state : tasks) means.add(std::move(state));
      }
      tasks = means.take();
      point.keep_wide = false;
      for (TaskState &state : tasks) {
        point.narrow(&state.grads);
        point.narrow(&state.perturbed);
      }
      find_roles();
      measure();
    }
    update();
  }

  // Everything as it was before the step, bit for bit.
  void rollback() {
    point.rollback();
    if (passes) passes->rollback();
    for (size_t i = 0; i < tensors().size(); ++i) torch::Tensor(tensors()[i]).mutable_grad() = old_grads_[i];
  }

  std::vector<Task> task_names() const {
    std::vector<Task> result;
    for (const auto &state : tasks) result.push_back(state.task);
    return result;
  }

  const std::vector<Parameter> &params() const { return point.params(); }
  const TaskLosses &losses() const { return losses_; }
  const Record &record() const { return record_; }
  const MethodStates &methods() const { return new_states; }
  const std::unordered_map<Roles::Key, int64_t> &new_roles() const { return new_roles_; }

  // .grad of parameter i after the step.
  const torch::Tensor &gradient(size_t i) const {
    return new_roles_.count(Roles::key(tensors()[i])) ? update_[i] : old_grads_[i];
  }

  // Whether `observe` is to be called after the update. If so, what it does not need is given up.
  bool keep_for_observation() {
    if (!options.weighting() || !options.weighting()->observes() || present.empty()) return false;
    for (auto &state : tasks) {
      state.grads.clear();
      state.perturbed.clear();
    }
    new_states = MethodStates();
    old_grads_.clear();
    update_.clear();
    return true;
  }

  // After the update: what the weighting learns from the losses of the same batch, evaluated once more. Random
  // generators and buffers stay as they are.
  WeightingState observe(const WeightingState &state) {
    point.accept();
    const Snapshot before = passes->snapshot();
    std::vector<double> after;
    try {
      after = passes->losses_here(passes->all(), present_at);
    } catch (...) {
      before.restore();
      throw;
    }
    before.restore();
    WeightingCall call(*options.weighting(), state, static_cast<int64_t>(tasks.size()), present_at);
    call.observe(present_losses(), after);
    return call.new_state();
  }

  // The record of a step that nonfinite "skip" left out.
  Record skipped_record() const {
    Record record = empty_record(tasks);
    record.skipped = true;
    return record;
  }

 private:
  // Gradients of some micro-batches: unperturbed, and at points that are perturbed along them.
  void gradients(const Micro &some) {
    micro = some;
    tasks = passes->unperturbed(micro, summed);
    losses_ = passes->losses();
    for (const auto &state : tasks)
      if (state.loss.defined()) check_loss(state.task, state.loss, "unperturbed");
    if (known_tasks_ && task_names() != *known_tasks_)
      throw std::runtime_error("closure returned losses of tasks " + text(task_names()) + ", but earlier steps had " +
                               text(*known_tasks_) + " (return None for a task that is absent from a batch)");
    const Snapshot after = passes->snapshot();
    find_roles();
    measure();
    if (!flat) return;
    perturb(*this);
    if (summed) measure();  // only now the tasks' own gradients are known
    point.restore();
    after.restore();
  }

  // -- roles, norms, weights ----------------------------------------------------------------------------------------

  void find_roles() {
    std::vector<std::vector<Roles::Key>> reached(tasks.size());
    std::vector<bool> hit(tensors().size());
    for (size_t t = 0; t < tasks.size(); ++t)
      for (const size_t i : tasks[t].reached) {
        reached[t].push_back(Roles::key(tensors()[i]));
        hit[i] = true;
      }
    new_roles_ = roles_.grown(reached, std::move(new_roles_));
    const auto is_shared = [&](size_t i) { return new_roles_.at(Roles::key(tensors()[i])) == SHARED; };
    shared.clear();
    for (size_t i = 0; i < hit.size(); ++i)
      if (hit[i] && is_shared(i)) shared.push_back(i);
    for (auto &state : tasks) {
      state.own.clear();
      for (const size_t i : state.reached)
        if (!is_shared(i)) state.own.push_back(i);
    }
  }

  // Norms of the unperturbed gradients; which tasks are present: those with a loss, unless loss and gradient are zero.
  void measure() {
    present.clear();
    present_at.clear();
    for (auto &state : tasks) {
      if (!state.loss.defined()) continue;
      if (!summed) {
        state.sq_shared = sq_norm(point.row(state.grads, shared), shared, options.adaptive());
        state.sq_own = sq_norm(point.row(state.grads, state.own), state.own, options.adaptive());
        check_norm(state.sq_shared + state.sq_own, state.task, "unperturbed");
      }
      if (is_zero(state, summed ? state.perturbed : state.grads)) continue;
      present.push_back(&state);
      present_at.push_back(state.index);
    }
    weigh();
  }

  // Whether the loss and its gradient are zero; false where there are no gradients yet.
  bool is_zero(const TaskState &state, const Row &gradients) {
    if (gradients.empty() || state.loss.item<double>() != 0.0) return false;
    return sq_norm(point.row(gradients, shared), shared, false) == 0.0 &&
           sq_norm(point.row(gradients, state.own), state.own, false) == 0.0;
  }

  // The factors of the losses. Called again in the same step it starts from the state before the step again.
  void weigh() {
    factors.assign(present.size(), 1.0);
    if (!options.weighting() || present.empty()) return;
    const Weighting &weighting = *options.weighting();
    std::vector<double> norms;
    std::vector<Task> names;
    for (const TaskState *state : present) {
      names.push_back(state->task);
      if (weighting.needs_norms()) norms.push_back(std::sqrt(sq_norm(point.row(state->grads, shared), shared, false)));
    }
    WeightingCall call(weighting, states.weighting, static_cast<int64_t>(tasks.size()), present_at);
    factors = call.weights(present_losses(), norms, names, options.seed(), draw);
    new_states.weighting = call.new_state();
  }

  std::vector<double> present_losses() const {
    std::vector<double> losses;
    for (const TaskState *state : present) losses.push_back(state->loss.item<double>());
    return losses;
  }

  // Gramians of both families, their weights, and the combined update.
  void update() {
    const auto count = static_cast<int64_t>(present.size());
    std::vector<Row> loss, moved;
    for (const TaskState *state : present) {
      if (!summed) loss.push_back(point.row(state->grads, shared));
      if (flat) moved.push_back(point.row(state->perturbed, shared));
    }
    torch::Tensor pair = torch::zeros({2 * count, 2 * count}, torch::kDouble), direct;
    std::vector<double> weights_loss(present.size(), std::nan("")), weights_flat = weights_loss;
    flatmtl_status status[2] = {FLATMTL_OK, FLATMTL_OK};
    std::pair<double, double> pq = {0.0, 1.0};
    if (count > 0) {
      std::tie(pair, direct) = gramians(loss, moved);
      if (options.weighting()) {
        const torch::Tensor c = torch::tensor(factors, torch::kDouble);
        pair = pair * torch::outer(c.repeat(2), c.repeat(2));
        if (direct.defined()) direct = direct * torch::outer(c, c);
      }
      if (const auto changed = flat ? transform(*this, pair) : std::nullopt) {
        pq = *changed;
        pair = transformed(pair, pq);
        if (direct.defined()) direct = sum_of_families(pair);
      }
    }
    if (!shared.empty() && count > 0) {
      weights(pair, direct, &weights_loss, &weights_flat, status);
      if (options.max_norm()) {
        const bool families = !flat || *options.combine() == "decomposed";
        clip(&weights_loss, &weights_flat, pair, direct, *options.max_norm(), families);
      }
      if (!flat) weights_flat.assign(present.size(), std::nan(""));
    }
    combine(loss, moved, weights_loss, weights_flat, pq);
    make_record(pair, weights_loss, weights_flat, status);
    if (flat && count > 0) finish(*this, pair);
  }

  // Weights of both families. Without perturbed passes there is one call of A, of the loss family.
  void weights(torch::Tensor &pair, torch::Tensor direct, std::vector<double> *loss, std::vector<double> *flat_weights,
               flatmtl_status *status) {
    const Aggregator &aggregator = options.aggregator();
    const auto count = static_cast<int64_t>(present.size()), total = static_cast<int64_t>(tasks.size());
    const std::vector<double> values = aggregator.option_values(total, options.seed(), draw, present_at);
    if (!flat) direct = pair.slice(0, 0, count).slice(1, 0, count).contiguous();
    Context context("step_weights", count);
    flatmtl_error error{};
    flatmtl_settings settings;
    check("step_weights", flatmtl_settings_default(&settings, &error), error);
    settings.method = aggregator.method();
    settings.options = values.data();
    settings.num_options = static_cast<int32_t>(values.size());
    settings.combine = flat ? combine_number(*options.combine()) : FLATMTL_DIRECT;
    settings.family_scale = family_scale_number(options.family_scale());
    std::vector<double> state = states.aggregator.gather(settings.method, settings.combine, total, present_at);
    settings.state = state.empty() ? nullptr : state.data();
    check("step_weights",
          flatmtl_step_weights(context.get(), &settings, static_cast<int32_t>(count), doubles(pair),
                               direct.defined() ? doubles(direct) : nullptr, loss->data(), flat_weights->data(), status,
                               &error),
          error);
    if (!state.empty())
      new_states.aggregator = states.aggregator.scatter(settings.method, settings.combine, total, present_at, state);
  }

  // The Gramian of (g, f), and that of s for combine "direct". <g_i, f_j> is 0 where nothing looks at it.
  std::pair<torch::Tensor, torch::Tensor> gramians(const std::vector<Row> &loss, const std::vector<Row> &moved) const {
    const auto count = static_cast<int64_t>(present.size());
    torch::Tensor pair = torch::zeros({2 * count, 2 * count}, torch::kDouble), direct;
    if (!flat)
      pair.slice(0, 0, count).slice(1, 0, count).copy_(point.gramian(loss, shared));
    else if (!summed)
      pair = point.gramian_pair(loss, moved, shared, needs_cross_products(*this));
    if (flat && *options.combine() == "direct") direct = point.gramian(moved, shared);
    const torch::Tensor squares =
        summed ? torch::cat({pair.diagonal().slice(0, 0, count), direct.diagonal()}) : pair.diagonal();
    const auto values = squares.accessor<double, 1>();
    for (int64_t i = 0; i < count; ++i) {
      check_norm(values[i], present[static_cast<size_t>(i)]->task, "unperturbed");
      check_norm(values[count + i], present[static_cast<size_t>(i)]->task, "perturbed");
    }
    return {pair, direct};
  }

  // Gramian of (g_i, p g_i + q f_i) from that of (g, f).
  static torch::Tensor transformed(const torch::Tensor &pair, const std::pair<double, double> &pq) {
    const int64_t count = pair.size(0) / 2;
    const torch::Tensor ones = torch::ones({count}, torch::kDouble);
    torch::Tensor t = torch::zeros_like(pair);
    t.slice(0, 0, count).slice(1, 0, count).copy_(torch::eye(count, torch::kDouble));
    t.slice(0, count).slice(1, 0, count).copy_((ones * pq.first).diag());
    t.slice(0, count).slice(1, count).copy_((ones * pq.second).diag());
    return t.matmul(pair).matmul(t.t());
  }

  // Gramian of g_i + f_i from that of (g, f).
  static torch::Tensor sum_of_families(const torch::Tensor &pair) {
    const int64_t count = pair.size(0) / 2;
    const torch::Tensor above = pair.slice(0, 0, count), cross = above.slice(1, count);
    return above.slice(1, 0, count) + cross + cross.t() + pair.slice(0, count).slice(1, count);
  }

  // The update, with the losses' factors c: SUM c_i (a_i g_i + b_i (p g_i + q f_i)) for shared parameters, or
  // SUM c_i a_i s_i where the g_i are not apart; c_i (h_i + p h_i + q (t_i - h_i)) for own ones. Takes over the saved
  // copies.
  void combine(const std::vector<Row> &loss, const std::vector<Row> &moved, std::vector<double> a,
               std::vector<double> b, const std::pair<double, double> &pq) {
    Row &out = point.saved();
    update_.resize(tensors().size());
    if (present.empty()) return;
    const auto [p, q] = pq;
    for (size_t k = 0; k < factors.size(); ++k) {
      a[k] = (flat && !summed ? a[k] + times(b[k], p) : a[k]) * factors[k];
      b[k] = b[k] * q * factors[k];
    }
    if (!shared.empty())
      point.combine(at(out, shared), shared, summed ? moved : loss, summed ? std::vector<Row>() : moved, a, b);
    for (const size_t i : shared) update_[i] = out[i];
    for (size_t k = 0; k < present.size(); ++k)
      for (const size_t i : present[k]->own) {
        torch::Tensor gradient = point.wide(i, own_update(*present[k], i, p, q));
        if (factors[k] != 1.0) gradient = gradient * factors[k];
        if (update_[i].defined())  // only with shared(): an own parameter that several losses reach
          out[i].add_(gradient);
        else
          update_[i] = out[i].copy_(gradient);
      }
  }

  // h_i, or h_i + p h_i + q (t_i - h_i): t_i itself where p = 0 and q = 1.
  torch::Tensor own_update(const TaskState &state, size_t i, double p, double q) {
    if (!flat) return state.grads[i];
    const torch::Tensor t = state.perturbed[i].defined() ? state.perturbed[i] : point.zeros(i);
    return p == 0.0 && q == 1.0 ? t : point.wide(i, state.grads[i]) * (1.0 + p - q) + point.wide(i, t) * q;
  }

  void make_record(const torch::Tensor &pair, const std::vector<double> &weights_loss,
                   const std::vector<double> &weights_flat, const flatmtl_status *status) {
    const auto count = static_cast<int64_t>(present.size());
    record_ = empty_record(tasks);
    record_.loss_weights = spread(torch::tensor(factors, torch::kDouble), present_at, record_.losses.size(0));
    if (flat) add_perturbed(&record_, tasks, present_at);
    if (shared.empty() || count == 0) return;
    const Family loss_family{pair.slice(0, 0, count).slice(1, 0, count), weights_loss, !summed};
    add_family(&record_.norms_loss, &record_.cosine_loss, &record_.weights_loss, loss_family, present_at);
    record_.pareto_stationary_loss = status[0] == FLATMTL_PARETO_STATIONARY;
    if (!flat) return;
    const Family flat_family{pair.slice(0, count).slice(1, count), weights_flat, !summed};
    add_family(&record_.norms_flat, &record_.cosine_flat, &record_.weights_flat, flat_family, present_at);
    record_.pareto_stationary_flat = status[1] == FLATMTL_PARETO_STATIONARY;
  }

  const Row &tensors() const { return point.tensors(); }

  const Roles &roles_;
  const std::optional<std::vector<Task>> &known_tasks_;
  std::vector<ProtectedModule::Slot> slots_;
  std::unordered_map<Roles::Key, int64_t> new_roles_;
  Row old_grads_, update_;
  TaskLosses losses_;
  Record record_;
};

}  // namespace detail
}  // namespace flatmtl
