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
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/types.h>

#include "losses.h"
#include "native.h"
#include "options.h"
#include "protect.h"
#include "record.h"
#include "roles.h"

namespace flatmtl {
namespace detail {

using Indices = std::vector<size_t>;

struct Parameter {
  torch::Tensor tensor;
  double rho_shared, rho_task;
  std::string name;
};

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

inline torch::Tensor or_zeros(const torch::Tensor &gradient, const torch::Tensor &parameter) {
  return gradient.defined() ? gradient : torch::zeros_like(parameter);
}

// One step. `run` ends with `update` set and the parameters as they were; `rollback` undoes a step that failed.
class Step {
 public:
  // known_tasks: of earlier steps, if there were any.
  Step(std::vector<Parameter> params, const FlatMTLOptions &options, const Roles &roles,
       const std::optional<std::vector<Task>> &known_tasks, int64_t draw)
      : params_(std::move(params)),
        options_(options),
        roles_(roles),
        known_tasks_(known_tasks),
        draw_(draw),
        slots_(buffers(options.modules())) {
    for (size_t i = 0; i < params_.size(); ++i) {
      const Parameter &p = params_[i];
      tensors_.push_back(p.tensor);
      saved_.push_back(torch::empty_like(p.tensor));
      check_parameter(p, saved_.back());
      flat_ = flat_ || p.rho_shared != 0.0 || p.rho_task != 0.0;
      auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Indices &g) {
        return tensors_[g[0]].scalar_type() == p.tensor.scalar_type();
      });
      if (group == groups_.end()) group = groups_.emplace(groups_.end());
      group->push_back(i);
    }
    copy_all(saved_, tensors_);
    versions_ = versions();
    for (auto &tensor : tensors_) {
      old_grads_.push_back(tensor.grad());
      tensor.mutable_grad().reset();  // so that a backward inside the closure cannot add to it
    }
  }

  void run(const Closure &closure) {
    unperturbed(closure);
    const Snapshot after(slots_);
    find_roles();
    measure();
    if (flat_) {
      for (TaskState *state : present_) perturbed(closure, *state);
      copy_all(tensors_, saved_);
      moved_ = false;
      versions_ = versions();
      after.restore();
    }
    finish();
  }

  // Everything as it was before the step, bit for bit.
  void rollback() {
    if (moved_ || versions() != versions_) copy_all(tensors_, saved_);
    if (!passes_.empty()) passes_[0].restore();
    for (size_t i = 0; i < tensors_.size(); ++i) tensors_[i].mutable_grad() = old_grads_[i];
  }

  std::vector<Task> tasks() const {
    std::vector<Task> result;
    for (const auto &state : tasks_) result.push_back(state.task);
    return result;
  }

  const std::vector<Parameter> &params() const { return params_; }
  const TaskLosses &losses() const { return losses_; }
  const Record &record() const { return record_; }
  const std::unordered_map<Roles::Key, int64_t> &new_roles() const { return new_roles_; }

  // .grad of parameter i after the step.
  const torch::Tensor &gradient(size_t i) const {
    return new_roles_.count(Roles::key(tensors_[i])) ? update_[i] : old_grads_[i];
  }

  // The record of a step that nonfinite "skip" left out.
  Record skipped_record() const {
    Record record = empty_record();
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
    check_unchanged();
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
      Indices all(tensors_.size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = i;
      state.grads = gradients(*loss, all, retain_graph);
    }
    tasks_.push_back(std::move(state));
  }

  // d loss / d tensors_[indices], in the layout of the parameters; undefined where not reached.
  Row gradients(const Loss &loss, const Indices &indices, bool retain_graph) const {
    if (indices.empty()) return {};
    const auto &meta = loss.edge.function->input_metadata(loss.edge.input_nr);
    const auto shape = shape_at(loss.edge).value_or(std::vector<int64_t>());
    const torch::Tensor root = at::empty(shape, meta.options()), seed = at::full(shape, 1.0, meta.options());
    torch::autograd::impl::set_gradient_edge(root, loss.edge);
    Row found = torch::autograd::grad({root}, at(tensors_, indices), {seed}, retain_graph, /*create_graph=*/false,
                                      /*allow_unused=*/true);
    for (size_t k = 0; k < found.size(); ++k) {
      const torch::Tensor &parameter = tensors_[indices[k]];
      if (!found[k].defined()) continue;
      if (found[k].layout() != torch::kStrided)
        throw std::runtime_error("gradient of parameter " + params_[indices[k]].name +
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
    moved_ = true;
    for (const auto &group : groups_) {
      Indices chosen;
      std::vector<double> scales;
      for (size_t k = 0; k < moved.size(); ++k) {
        const size_t i = moved[k];
        if (!std::binary_search(group.begin(), group.end(), i)) continue;
        chosen.push_back(i);
        scales.push_back(k < shared_.size() ? params_[i].rho_shared * shared_scale : params_[i].rho_task * own_scale);
      }
      detail::perturb(at(tensors_, chosen), at(saved_, chosen), rows(state, chosen), scales, options_.adaptive(),
                      options_.eta());
    }
    versions_ = versions();
    const Loss loss = perturbed_loss(closure, state);
    check_unchanged();
    Indices reached;
    for (const size_t i : moved)
      if (state.grads[i].defined()) reached.push_back(i);
    const Row found = gradients(loss, reached, false);
    Row grads(tensors_.size());
    for (size_t k = 0; k < reached.size(); ++k) grads[reached[k]] = found[k];
    state.perturbed_loss = loss.value;
    check_loss(state.task, loss.value, "perturbed");
    for (const size_t i : state.own) state.own_perturbed.push_back(or_zeros(grads[i], tensors_[i]));
    check_norm(sq_norm(state.own_perturbed, state.own, false), state.task, "perturbed");
    for (const size_t i : shared_)
      state.shared_perturbed.push_back(state.grads[i].defined() ? or_zeros(grads[i], tensors_[i]) : zeros(i));
    copy_some(tensors_, saved_, state.own);  // the shared ones are overwritten by the next perturbation
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
                               " in a perturbed one");
    const auto loss = read_losses(value)[index];
    if (!loss) throw std::runtime_error("loss of task " + text(state.task) + " is None in the perturbed pass only");
    return *loss;
  }

  // -- roles, norms, weights ----------------------------------------------------------------------------------------

  void find_roles() {
    std::vector<std::vector<Roles::Key>> reached(tasks_.size());
    std::vector<bool> hit(tensors_.size());
    for (size_t t = 0; t < tasks_.size(); ++t)
      for (size_t i = 0; i < tasks_[t].grads.size(); ++i) {
        if (!tasks_[t].grads[i].defined()) continue;
        reached[t].push_back(Roles::key(tensors_[i]));
        hit[i] = true;
      }
    new_roles_ = roles_.grown(reached);
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!hit[i]) continue;
      if (new_roles_.at(Roles::key(tensors_[i])) == SHARED) {
        shared_.push_back(i);
        continue;
      }
      for (auto &state : tasks_)
        if (!state.grads.empty() && state.grads[i].defined()) state.own.push_back(i);
    }
  }

  // Norms of the unperturbed gradients; which tasks are present.
  void measure() {
    zeros_.resize(tensors_.size());
    for (auto &state : tasks_) {
      if (!state.loss) continue;
      const Row shared = rows(state, shared_), own = rows(state, state.own);
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
    torch::Tensor pair = torch::zeros({2 * count, 2 * count}, torch::kDouble);
    std::vector<double> weights_loss(present_.size(), std::nan("")), weights_flat = weights_loss;
    flatmtl_status status[2] = {FLATMTL_OK, FLATMTL_OK};
    if (!shared_.empty() && count > 0) {
      torch::Tensor direct = gramians(&pair);
      const std::vector<double> options =
          options_.aggregator().option_values(static_cast<int64_t>(tasks_.size()), options_.seed(), draw_, present_at_);
      Context context("step_weights", count);
      flatmtl_error error{};
      flatmtl_settings settings;
      check("step_weights", flatmtl_settings_default(&settings, &error), error);
      settings.method = options_.aggregator().method();
      settings.options = options.data();
      settings.num_options = static_cast<int32_t>(options.size());
      settings.combine = flat_ ? combine_number(options_.combine()) : FLATMTL_DECOMPOSED;
      settings.family_scale = family_scale_number(options_.family_scale());
      check("step_weights",
            flatmtl_step_weights(context.get(), &settings, static_cast<int32_t>(count), doubles(pair),
                                 direct.defined() ? doubles(direct) : nullptr, weights_loss.data(), weights_flat.data(),
                                 status, &error),
            error);
      if (!flat_) weights_flat.assign(present_.size(), std::nan(""));
    }
    combine(weights_loss, weights_flat);
    record_ = make_record(pair, weights_loss, weights_flat, status);
  }

  // Fills `pair`, the Gramian of (g, f); returns that of s for combine "direct".
  torch::Tensor gramians(torch::Tensor *pair) {
    const auto count = static_cast<int64_t>(present_.size());
    torch::Tensor direct;
    if (flat_ && options_.combine() == "direct") direct = torch::zeros({count, count}, torch::kDouble);
    for (const auto &group : groups_) {
      const Indices chosen = places(shared_, group);
      if (chosen.empty()) continue;
      const auto loss = loss_rows(chosen);
      if (!flat_) {
        pair->slice(0, 0, count).slice(1, 0, count).add_(gramian(loss));
        continue;
      }
      const auto perturbed = perturbed_rows(chosen);
      pair->add_(gramian_pair(loss, perturbed));
      if (direct.defined()) direct.add_(gramian(perturbed));
    }
    const auto values = pair->accessor<double, 2>();
    for (int64_t i = 0; i < count; ++i) {
      check_norm(values[i][i], present_[static_cast<size_t>(i)]->task, "unperturbed");
      check_norm(values[count + i][count + i], present_[static_cast<size_t>(i)]->task, "perturbed");
    }
    return direct;
  }

  // The update: SUM a_i g_i + b_i f_i for shared parameters, t_i for own ones. Takes over the saved copies.
  void combine(const std::vector<double> &weights_loss, const std::vector<double> &weights_flat) {
    update_.resize(tensors_.size());
    if (present_.empty()) return;
    for (const auto &group : groups_) {
      const Indices chosen = places(shared_, group);
      if (chosen.empty()) continue;
      Row target;
      for (const size_t k : chosen) target.push_back(saved_[shared_[k]]);
      if (flat_)
        combine_pair(target, loss_rows(chosen), perturbed_rows(chosen), weights_loss, weights_flat);
      else
        detail::combine(target, loss_rows(chosen), weights_loss);
      for (const size_t k : chosen) update_[shared_[k]] = saved_[shared_[k]];
    }
    for (const TaskState *state : present_)
      for (size_t k = 0; k < state->own.size(); ++k) {
        const size_t i = state->own[k];
        const torch::Tensor &gradient = flat_ ? state->own_perturbed[k] : state->grads[i];
        if (update_[i].defined())  // only with shared(): an own parameter that several losses reach
          saved_[i].add_(gradient);
        else
          update_[i] = saved_[i].copy_(gradient);
      }
  }

  // -- the record ---------------------------------------------------------------------------------------------------

  Record empty_record() const {
    const auto total = static_cast<int64_t>(tasks_.size());
    Record record;
    record.tasks = tasks();
    std::vector<double> values;
    std::vector<int64_t> with_loss;
    for (int64_t i = 0; i < total; ++i)
      if (const auto &loss = tasks_[static_cast<size_t>(i)].loss) {
        with_loss.push_back(i);
        values.push_back(loss->value.item<double>());
      }
    record.losses = spread(torch::tensor(values, torch::kDouble), with_loss, total);
    for (auto *vector : {&record.perturbed_losses, &record.sharpness, &record.norms_loss, &record.norms_flat,
                         &record.weights_loss, &record.weights_flat})
      *vector = undefined({total});
    record.cosine_loss = undefined({total, total});
    record.cosine_flat = undefined({total, total});
    return record;
  }

  // pair: the Gramian (2K x 2K) of the present tasks' (g, f).
  Record make_record(const torch::Tensor &pair, const std::vector<double> &weights_loss,
                     const std::vector<double> &weights_flat, const flatmtl_status *status) const {
    const auto count = static_cast<int64_t>(present_.size()), total = static_cast<int64_t>(tasks_.size());
    Record record = empty_record();
    if (flat_) {
      std::vector<double> values;
      for (const TaskState *state : present_) values.push_back(state->perturbed_loss.item<double>());
      record.perturbed_losses = spread(torch::tensor(values, torch::kDouble), present_at_, total);
      record.sharpness = record.perturbed_losses - record.losses;
    }
    if (shared_.empty() || count == 0) return record;
    const torch::Tensor index = torch::tensor(present_at_);
    const auto describe_family = [&](int64_t offset, const std::vector<double> &weights, torch::Tensor *norms_out,
                                     torch::Tensor *cosine_out, torch::Tensor *weights_out) {
      const torch::Tensor gramian = pair.slice(0, offset, offset + count).slice(1, offset, offset + count);
      const torch::Tensor norms = gramian.diagonal().sqrt();
      const torch::Tensor cosine = (gramian / (norms.unsqueeze(1) * norms)).clamp(-1.0, 1.0);  // NaN if a norm is 0
      *norms_out = spread(norms, present_at_, total);
      cosine_out->index_put_({index.unsqueeze(1), index}, cosine);
      *weights_out = spread(torch::tensor(weights, torch::kDouble), present_at_, total);
    };
    describe_family(0, weights_loss, &record.norms_loss, &record.cosine_loss, &record.weights_loss);
    record.pareto_stationary_loss = status[0] == FLATMTL_PARETO_STATIONARY;
    if (flat_) {
      describe_family(count, weights_flat, &record.norms_flat, &record.cosine_flat, &record.weights_flat);
      record.pareto_stationary_flat = status[1] == FLATMTL_PARETO_STATIONARY;
    }
    return record;
  }

  // -- small things -------------------------------------------------------------------------------------------------

  static void check_parameter(const Parameter &p, const torch::Tensor &copy) {
    const std::string what = "parameter " + p.name + " is ";
    if (!p.tensor.is_floating_point())
      throw std::invalid_argument(what + text(p.tensor.scalar_type()) +
                                  "; only real floating-point ones are supported");
    if (!p.tensor.is_cpu())
      throw std::invalid_argument(what + "on " + p.tensor.device().str() +
                                  "; the C++ optimizer works on the CPU alone");
    if (core_dtype(p.tensor.scalar_type()) < 0)
      throw std::invalid_argument(what + text(p.tensor.scalar_type()) +
                                  "; float32, float64, bfloat16 and float16 work");
    if (p.tensor.layout() != torch::kStrided || p.tensor.strides() != copy.strides())
      throw std::invalid_argument(what + "not dense: its elements do not fill one block of memory");
  }

  static Row at(const Row &row, const Indices &indices) {
    Row result;
    for (const size_t i : indices) result.push_back(row[i]);
    return result;
  }

  // The places in `list` of those that are in the (sorted) group.
  static Indices places(const Indices &list, const Indices &group) {
    Indices result;
    for (size_t k = 0; k < list.size(); ++k)
      if (std::binary_search(group.begin(), group.end(), list[k])) result.push_back(k);
    return result;
  }

  void copy_all(const Row &to, const Row &from) const {
    for (const auto &group : groups_) detail::copy(at(to, group), at(from, group));
  }

  void copy_some(const Row &to, const Row &from, const Indices &indices) const {
    for (const auto &group : groups_) {
      Indices chosen;
      for (const size_t k : places(indices, group)) chosen.push_back(indices[k]);
      if (!chosen.empty()) detail::copy(at(to, chosen), at(from, chosen));
    }
  }

  Row rows(const TaskState &state, const Indices &indices) {
    Row result;
    for (const size_t i : indices) result.push_back(state.grads[i].defined() ? state.grads[i] : zeros(i));
    return result;
  }

  // g and s of the present tasks, at the places `chosen` of the shared parameters.
  std::vector<Row> loss_rows(const Indices &chosen) {
    Indices indices;
    for (const size_t k : chosen) indices.push_back(shared_[k]);
    std::vector<Row> result;
    for (const TaskState *state : present_) result.push_back(rows(*state, indices));
    return result;
  }

  std::vector<Row> perturbed_rows(const Indices &chosen) const {
    std::vector<Row> result;
    for (const TaskState *state : present_) result.push_back(at(state->shared_perturbed, chosen));
    return result;
  }

  const torch::Tensor &zeros(size_t i) {
    if (!zeros_[i].defined()) zeros_[i] = torch::zeros_like(tensors_[i]);
    return zeros_[i];
  }

  // Squared norm of a row over all groups.
  double sq_norm(const Row &row, const Indices &indices, bool adaptive) const {
    double total = 0.0;
    for (const auto &group : groups_) {
      const Indices chosen = places(indices, group);
      if (chosen.empty()) continue;
      Row params;
      for (const size_t k : chosen)
        if (adaptive) params.push_back(saved_[indices[k]]);
      total += detail::sq_norm(at(row, chosen), params, options_.eta());
    }
    return total;
  }

  using Versions = std::vector<std::pair<int64_t, const void *>>;
  Versions versions() const {
    Versions result;
    for (const auto &tensor : tensors_)
      result.emplace_back(static_cast<int64_t>(tensor._version()), tensor.const_data_ptr());
    return result;
  }

  void check_unchanged() const {
    const auto now = versions();
    for (size_t i = 0; i < now.size(); ++i)
      if (now[i] != versions_[i])
        throw std::runtime_error("parameter " + params_[i].name + " was changed in place by the closure");
  }

  static void check_norm(double square, const Task &task, const char *pass) {
    if (!std::isfinite(square))
      throw NonFiniteError(task, pass, "the gradient", square > 0.0 ? std::sqrt(square) : square);
  }

  static void check_loss(const Task &task, const torch::Tensor &loss, const char *pass) {
    const double value = loss.item<double>();
    if (!std::isfinite(value)) throw NonFiniteError(task, pass, "the loss", value);
  }

  std::vector<Parameter> params_;
  const FlatMTLOptions &options_;
  const Roles &roles_;
  const std::optional<std::vector<Task>> &known_tasks_;
  int64_t draw_;
  std::vector<ProtectedModule::Slot> slots_;
  bool flat_ = false, moved_ = false;
  Row tensors_, saved_, old_grads_, update_, zeros_;
  std::vector<Indices> groups_;  // of one dtype each
  Versions versions_;
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
