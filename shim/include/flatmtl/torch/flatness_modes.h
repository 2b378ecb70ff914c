// flatness_modes.h - the perturbed passes of the flatness modes, what they make of the flat gradients, and what they
// keep. The order of operations is that of python/flatmtl/flatness, so that both give the same bits. Private.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/types.h>

#include "step_data.h"

namespace flatmtl {
namespace detail {

// a b, rounded: a compiler that is told to could fuse it with an addition, which Python does not do.
inline double times(double a, double b) {
  const volatile double product = a * b;
  return product;
}

inline double option(const StepData &step, const char *name) {
  return step.options.flat().option(name).value();
}

// -- inner products ---------------------------------------------------------------------------------------------------

struct Products {
  double gg, gf, ff;  // <g, g>, <g, f>, <f, f>
};

// Those of the own parameters of a present task, h_i and t_i - h_i.
inline Products own_products(StepData &step, size_t k) {
  const TaskState &state = *step.present[k];
  if (state.own.empty()) return {0.0, 0.0, 0.0};
  const Row h = step.point.row(state.grads, state.own), t = step.point.row(state.perturbed, state.own);
  const double factor = step.factors[k];
  const torch::Tensor pair = step.point.gramian_pair({h}, {t}, state.own) * (factor * factor);
  return {pair[0][0].item<double>(), pair[0][1].item<double>(), pair[1][1].item<double>()};
}

// Gramian of (h, t - h) between different tasks, of the own parameters that several losses reach, which there are with
// shared() only; undefined without.
inline torch::Tensor common_products(StepData &step) {
  std::map<size_t, int> reached;
  for (const TaskState *state : step.present)
    for (const size_t i : state->own) ++reached[i];
  Indices common;
  for (const auto &[i, times] : reached)
    if (times > 1) common.push_back(i);
  if (common.empty()) return {};
  std::vector<Row> rows, perturbed;
  for (const TaskState *state : step.present) {
    rows.push_back(step.point.row(state->grads, common));
    perturbed.push_back(step.point.row(state->perturbed, common));
  }
  const torch::Tensor c = torch::tensor(step.factors, torch::kDouble).repeat(2);
  const torch::Tensor between = 1.0 - torch::eye(static_cast<int64_t>(rows.size()), torch::kDouble).repeat({2, 2});
  return step.point.gramian_pair(rows, perturbed, common) * torch::outer(c, c) * between;
}

// Those of the sums g and f over the present tasks, shared and own parameters together.
inline Products sums(StepData &step, torch::Tensor pair) {
  const auto count = static_cast<int64_t>(step.present.size());
  const torch::Tensor common = common_products(step);
  if (common.defined()) pair = pair + common;
  const torch::Tensor left = pair.slice(0, 0, count), below = pair.slice(0, count);
  Products result{left.slice(1, 0, count).sum().item<double>(), left.slice(1, count).sum().item<double>(),
                  below.slice(1, count).sum().item<double>()};
  for (size_t k = 0; k < step.present.size(); ++k) {
    const Products own = own_products(step, k);
    result = {result.gg + own.gg, result.gf + own.gf, result.ff + own.ff};
  }
  return result;
}

// The norm of the component of f that is orthogonal to g.
inline double orthogonal_norm(const Products &x) {
  return std::sqrt(x.gg > 0.0 ? std::max(x.ff - x.gf * x.gf / x.gg, 0.0) : x.ff);
}

// -- rows that are kept -----------------------------------------------------------------------------------------------

// A row, one tensor a parameter of the step, as a state keeps it.
inline Row stored(const StepData &step, const Row &row) {
  Row out(step.point.params().back().index + 1);
  for (size_t i = 0; i < row.size(); ++i) out[step.param(i).index] = row[i];
  return out;
}

// A kept row for the parameters of this step, in their dtypes and layouts; undefined where it has nothing.
inline Row recalled(const StepData &step, const Row &row) {
  Row out(step.point.params().size());
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t place = step.param(i).index;
    if (place >= row.size() || !row[place].defined()) continue;
    const torch::Tensor &like = step.point.tensors()[i];
    out[i] = row[place].to(like.scalar_type());
    if (out[i].strides() != like.strides()) out[i] = torch::empty_like(like).copy_(out[i]);
  }
  return out;
}

// s_i = g_i + factor v_i, in place of a perturbed pass.
inline void reuse(StepData &step, TaskState *state, const Row &orthogonal, double factor) {
  const Row v = recalled(step, orthogonal);
  state->reused = true;
  state->perturbed.assign(v.size(), torch::Tensor());
  for (const size_t i : state->reached)
    state->perturbed[i] = v[i].defined()
                              ? step.point.narrow(i, torch::add(step.point.wide(i, state->grads[i]), v[i], factor))
                              : state->grads[i];
}

// factor (s_i - c g_i), in the dtype of the rows.
inline Row orthogonal(const StepData &step, const TaskState &state, double c, double factor = 1.0) {
  Row out(step.point.params().size());
  for (const size_t i : state.reached) {
    const torch::Tensor g = step.point.wide(i, state.grads[i]), s = step.point.wide(i, state.perturbed[i]);
    const torch::Tensor v = torch::sub(s, g, c);
    out[i] = step.point.narrow(i, factor == 1.0 ? v : v * factor);
  }
  return out;
}

// -- F-MTL ------------------------------------------------------------------------------------------------------------

// ||(g_i, h_i)||
inline double norm(StepData &step, const TaskState &state) {
  return std::sqrt(step.sq_norm(step.point.row(state.grads, step.shared), step.shared, false) +
                   step.sq_norm(step.point.row(state.grads, state.own), state.own, false));
}

inline void perturb_fmtl(StepData &step) {
  const FlatnessState &old = step.states.flatness;
  const Flatness &mode = step.options.flat();
  for (TaskState *state : step.present) {
    const auto k = static_cast<size_t>(state->index);
    if (mode.every() > 1 && !old.empty() && !old.rows[k].empty() && old.age[k] < mode.every()) {
      const auto alpha = mode.option("alpha");
      const double last = alpha ? old.orthogonal_norm[k] : old.norm[k];
      const double scale = last > 0.0 ? norm(step, *state) / last : 0.0;
      reuse(step, state, old.rows[k], alpha.value_or(1.0) * scale);
      continue;
    }
    step.move_along(*state);
    step.passes->perturbed(step.micro, {state});
    step.point.restore(state->own);  // the shared ones are overwritten by the next task's move
  }
}

inline void finish_fmtl(StepData &step, const torch::Tensor &pair) {
  if (step.options.flat().every() == 1) return;
  FlatnessState state = step.states.flatness;
  const size_t total = step.tasks.size(), count = step.present.size();
  if (state.empty()) {
    state.rows.resize(total);
    state.age.resize(total);
    state.norm.resize(total);
    state.orthogonal_norm.resize(total);
  }
  const auto value = [&](size_t i, size_t j) {
    return pair[static_cast<int64_t>(i)][static_cast<int64_t>(j)].item<double>();
  };
  for (size_t i = 0; i < count; ++i) {
    const TaskState &task = *step.present[i];
    const auto k = static_cast<size_t>(task.index);
    const double factor = step.factors[i];
    if (task.reused) {
      ++state.age[k];
      continue;
    }
    if (factor == 0.0) {  // of a weighting: the task has no part in the products, so the next step passes anew
      state.age[k] = step.options.flat().every();
      continue;
    }
    const Products own = own_products(step, i);
    const Products x = {own.gg + value(i, i), own.gf + value(i, count + i), own.ff + value(count + i, count + i)};
    state.age[k] = 1;
    state.rows[k] = stored(step, orthogonal(step, task, x.gg > 0.0 ? 1.0 + x.gf / x.gg : 0.0));
    state.norm[k] = std::sqrt(x.gg) / factor;
    state.orthogonal_norm[k] = orthogonal_norm(x) / factor;
  }
  step.new_states.flatness = state;
}

// -- SAM on the sum of the losses -------------------------------------------------------------------------------------

// The parameters that no task of this step reaches but such whose loss is zero, and whose gradient is too. Where a
// single backward gives the gradient of all tasks, `present` does not tell yet who is absent.
inline std::set<size_t> fsam_absent(const StepData &step, const Indices &indices, const Row &row) {
  std::set<size_t> reached, absent;
  for (const TaskState *state : step.present)
    if (state->loss.item<double>() != 0.0) reached.insert(state->reached.begin(), state->reached.end());
  for (size_t k = 0; k < indices.size(); ++k)
    if (reached.count(indices[k]) == 0 && step.sq_norm({row[k]}, {indices[k]}, false) == 0.0) absent.insert(indices[k]);
  return absent;
}

// FSAM's direction g - sigma m, and the new mean m.
inline Row fsam_direction(StepData &step, const Row &row, const Indices &own) {
  const Indices indices = StepData::joined(step.shared, own);
  const std::set<size_t> absent = fsam_absent(step, indices, row);
  if (absent.size() == indices.size()) return row;  // nothing is known of the gradient
  const FlatnessState &old = step.states.flatness;
  Row mean = recalled(step, old.empty() ? Row() : old.rows[0]), direction;
  for (size_t k = 0; k < indices.size(); ++k) {
    const torch::Tensor g = step.point.wide(indices[k], row[k]);
    torch::Tensor &m = mean[indices[k]];
    const bool keep = absent.count(indices[k]) > 0;
    direction.push_back(keep || !m.defined() ? g : torch::sub(g, m, option(step, "sigma")));
    if (!keep) m = m.defined() ? torch::lerp(g, m, option(step, "lmbda")) : g.clone();
  }
  step.new_states.flatness = {{stored(step, mean)}, {}, {}, {}};
  return direction;
}

inline void perturb_sam(StepData &step) {
  Indices own;
  Row row = step.summed_gradient(&own);
  if (step.options.flat().mode() == Flatness::Mode::fsam) row = fsam_direction(step, row, own);
  const auto middle = row.begin() + static_cast<std::ptrdiff_t>(step.shared.size());
  const double sq_shared = step.sq_norm(Row(row.begin(), middle), step.shared, step.options.adaptive());
  step.move(row, own, sq_shared, step.sq_norm(Row(middle, row.end()), own, step.options.adaptive()));
  row.clear();  // memory of a gradient
  step.passes->perturbed(step.micro, step.present);
}

inline void perturb_looksam(StepData &step) {
  const FlatnessState &old = step.states.flatness;
  bool pass = old.empty() || old.age[0] >= step.options.flat().every();
  for (const TaskState *state : step.present) pass = pass || old.rows[static_cast<size_t>(state->index)].empty();
  if (pass) {
    perturb_sam(step);
    return;
  }
  Indices own;
  const Row row = step.summed_gradient(&own);
  const double norm = std::sqrt(step.sq_norm(row, StepData::joined(step.shared, own), false));
  const double last = old.orthogonal_norm[0], factor = last > 0.0 ? option(step, "alpha") * norm / last : 0.0;
  for (size_t k = 0; k < step.present.size(); ++k) {
    const double c = step.factors[k];
    reuse(step, step.present[k], old.rows[static_cast<size_t>(step.present[k]->index)], c != 0.0 ? factor / c : 0.0);
  }
}

inline void finish_looksam(StepData &step, const torch::Tensor &pair) {
  bool reused = !step.states.flatness.empty();
  for (const TaskState *state : step.present) reused = reused && state->reused;
  if (reused) {
    ++step.new_states.flatness.age[0];
    return;
  }
  const Products x = sums(step, pair);
  FlatnessState state;
  state.rows.resize(step.tasks.size());
  for (size_t k = 0; k < step.present.size(); ++k) {
    const TaskState &task = *step.present[k];
    const Row row = orthogonal(step, task, x.gg > 0.0 ? 1.0 + x.gf / x.gg : 0.0, step.factors[k]);
    state.rows[static_cast<size_t>(task.index)] = stored(step, row);
  }
  state.age = {1};
  state.orthogonal_norm = {orthogonal_norm(x)};
  step.new_states.flatness = state;
}

// -- SAMO and SGSU ----------------------------------------------------------------------------------------------------

// A generator seeded by three numbers, as python/flatmtl/_random.py does it (SplitMix64 over them).
inline at::Generator generator(int64_t seed, int64_t draw, int64_t task) {
  uint64_t state = 0;
  for (const int64_t number : {seed, draw, task}) {
    state = (state ^ static_cast<uint64_t>(number)) + 0x9E3779B97F4A7C15u;
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
    state = (state ^ state >> 27) * 0x94D049BB133111EBu;
    state ^= state >> 31;
  }
  return at::detail::createCPUGenerator(state >> 1);
}

// SAMO's q_i, one tensor a shared parameter. g: the sum's gradient, norms: those of its tensors.
inline Row samo_direction(StepData &step, const TaskState &state, const Row &g, const std::vector<double> &norms) {
  const double alpha = option(step, "alpha"), mu = option(step, "mu");
  if (alpha == 1.0) return g;
  const at::Generator draws = generator(step.options.seed(), step.draw, state.index);
  Row z;
  for (const size_t i : step.shared) {
    const torch::Tensor &like = step.point.tensors()[i];
    const auto options = torch::TensorOptions().dtype(like.scalar_type());
    z.push_back(torch::empty_like(like).copy_(torch::randn(like.sizes(), draws, options)));
  }
  double losses[2];
  for (const int side : {0, 1}) {
    step.point.move(step.shared, z, std::vector<double>(z.size(), side == 0 ? mu : -mu), false, 0.0);
    losses[side] = step.passes->losses_here(step.micro, {state.index})[0];
  }
  const double rise = losses[0] - losses[1], sign = rise > 0.0 ? 1.0 : rise < 0.0 ? -1.0 : 0.0;
  for (size_t k = 0; k < z.size(); ++k) {
    const double length = std::sqrt(step.point.sq_norm({z[k]}, {step.shared[k]}, false, 0.0));
    const double scale = length > 0.0 ? (1.0 - alpha) * sign * norms[k] / length : 0.0;
    z[k] = z[k].mul(scale).add_(g[k], alpha);  // mul_ of a number rounds it to the dtype first, Python's does not
  }
  return z;
}

inline void perturb_samo(StepData &step) {
  Indices own;
  const Row row = step.summed_gradient(&own);
  const Row g(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(step.shared.size()));
  Row own_gradients(step.point.params().size());
  for (size_t k = 0; k < own.size(); ++k) own_gradients[own[k]] = row[g.size() + k];
  std::vector<double> norms;
  for (size_t k = 0; k < g.size(); ++k)
    norms.push_back(std::sqrt(step.point.sq_norm({g[k]}, {step.shared[k]}, false, 0.0)));
  for (TaskState *state : step.present) {
    Row direction = samo_direction(step, *state, g, norms);
    Row h = at(own_gradients, state->own);
    if (option(step, "alpha") != 1.0)  // the direction is then wide
      for (size_t k = 0; k < h.size(); ++k) h[k] = step.point.wide(state->own[k], h[k]);
    const double sq_shared = step.sq_norm(direction, step.shared, step.options.adaptive());
    const double sq_own = step.sq_norm(h, state->own, step.options.adaptive());
    direction.insert(direction.end(), h.begin(), h.end());
    step.move(direction, state->own, sq_shared, sq_own);
    step.passes->perturbed(step.micro, {state});
    step.point.restore(state->own);
  }
}

inline void perturb_sgsu(StepData &step) {
  for (size_t k = 0; k < step.present.size(); ++k) {
    // with a weighting that of the loss c_i l_i
    const std::vector<double> scales(step.shared.size(), -option(step, "inner_lr") * step.factors[k]);
    step.point.move(step.shared, step.point.row(step.present[k]->grads, step.shared), scales, false, 0.0);
    step.passes->perturbed(step.micro, {step.present[k]});
  }
}

// -- what a step calls ------------------------------------------------------------------------------------------------

// The perturbed passes over the micro-batches `step.micro`: fills `perturbed` of every present task. May leave the
// parameters moved.
inline void perturb(StepData &step) {
  switch (step.options.flat().mode()) {
    case Flatness::Mode::fmtl:
      return perturb_fmtl(step);
    case Flatness::Mode::sam:
    case Flatness::Mode::asam:
    case Flatness::Mode::gsam:
    case Flatness::Mode::wsam:
    case Flatness::Mode::fsam:
      return perturb_sam(step);
    case Flatness::Mode::looksam:
      return perturb_looksam(step);
    case Flatness::Mode::samo:
      return perturb_samo(step);
    case Flatness::Mode::sgsu:
      return perturb_sgsu(step);
  }
}

// Coefficients p, q, the same for all tasks, of the flat gradients p g_i + q f_i that take the place of f_i. pair: the
// Gramian of (g, f).
inline std::optional<std::pair<double, double>> transform(StepData &step, const torch::Tensor &pair) {
  if (step.options.flat().mode() == Flatness::Mode::wsam) {
    const double gamma = option(step, "gamma");
    return std::make_pair(0.0, gamma / (1.0 - gamma));
  }
  if (step.options.flat().mode() != Flatness::Mode::gsam) return std::nullopt;
  const double alpha = option(step, "alpha");
  const Products x = sums(step, pair);
  const double ss = x.gg + 2.0 * x.gf + x.ff;
  const double lack = ss > 0.0 ? (x.gf + x.ff) / ss : 0.0;  // 1 - c = <f, s>/<s, s>
  return std::make_pair(-alpha * lack, 1.0 + times(alpha, 1.0 - lack));
}

// Whether the combination, transform or finish look at the <g_i, f_j>.
inline bool needs_cross_products(const StepData &step) {
  const std::string &combine = *step.options.combine();
  const Flatness &flat = step.options.flat();
  if (combine == "second" || combine == "each") return true;
  switch (flat.mode()) {
    case Flatness::Mode::fmtl:
      return flat.every() > 1;
    case Flatness::Mode::gsam:
    case Flatness::Mode::wsam:
    case Flatness::Mode::looksam:
      return true;
    default:
      return false;
  }
}

// Called last: what the mode keeps.
inline void finish(StepData &step, const torch::Tensor &pair) {
  if (step.options.flat().mode() == Flatness::Mode::fmtl) finish_fmtl(step, pair);
  if (step.options.flat().mode() == Flatness::Mode::looksam) finish_looksam(step, pair);
}

}  // namespace detail
}  // namespace flatmtl
