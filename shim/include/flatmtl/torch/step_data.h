// step_data.h - what a step knows while it runs, and how the parameters are moved. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "method_states.h"
#include "options.h"
#include "passes.h"
#include "task_state.h"

namespace flatmtl {
namespace detail {

struct StepData {
  // options: settled. old: of the methods, as earlier steps left them; kept by reference. number: of the step.
  StepData(std::vector<Parameter> params, Reserve *reserve, const FlatMTLOptions &options_of_step,
           const MethodStates &old, int64_t number)
      : options(options_of_step),
        point(std::move(params), reserve, accumulate_number(options_of_step.accumulate()),
              options_of_step.rows_dtype()),
        states(old),
        new_states(old),
        draw(number),
        flat(!options.flat().uses_rho()) {
    for (const auto &p : point.params()) flat = flat || p.rho_shared != 0.0 || p.rho_task != 0.0;
    summed = flat && !options.flat().needs_task_gradients(*options.combine()) && !options.weighting();
  }

  const FlatMTLOptions options;
  Point point;
  const MethodStates &states;
  MethodStates new_states;
  const int64_t draw;
  bool flat;    // whether there are perturbed passes
  bool summed;  // whether the unperturbed pass gives the gradient of the sum of the losses alone

  std::optional<Passes> passes;
  Micro micro;                       // the micro-batches at work
  std::vector<TaskState> tasks;      // all of them
  std::vector<TaskState *> present;  // those that take part
  std::vector<int64_t> present_at;   // their places
  std::vector<double> factors;       // of their losses; 1 without a weighting
  Indices shared;                    // the shared parameters that a loss of this step reaches

  const Parameter &param(size_t i) const { return point.params()[i]; }

  // Squared norm of a row, ASAM-weighted if `adaptive`.
  double sq_norm(const Row &row, const Indices &indices, bool adaptive) const {
    return point.sq_norm(row, indices, adaptive, *options.eta());
  }

  // SUM_i c_i (g_i, h_i) with the losses' factors c: one tensor for every one of `shared` and then of `own`, which is
  // filled with the own parameters of all tasks. Not to be written to.
  Row summed_gradient(Indices *own) {
    std::set<size_t> found;
    for (const TaskState *state : present) found.insert(state->own.begin(), state->own.end());
    own->assign(found.begin(), found.end());
    const Indices indices = joined(shared, *own);
    Row row;
    if (summed && !present.empty()) {
      row = point.row(passes->sum(), indices);
    } else if (present.size() == 1 && !options.weighting()) {
      row = point.row(present[0]->grads, indices);
    } else if (present.empty()) {
      for (const size_t i : indices) row.push_back(point.zeros(i));
    } else {
      std::vector<Row> rows;
      for (const TaskState *state : present) rows.push_back(point.row(state->grads, indices));
      for (const size_t i : indices) row.push_back(torch::empty_like(point.tensors()[i]));
      point.combine(row, indices, rows, {}, factors, {});
    }
    check_norm(sq_norm(row, indices, false), "sum of the losses", "unperturbed");
    return row;
  }

  // Parameters to (theta + rho g_i/||g_i||, psi_i + rho h_i/||h_i||): Algorithm 1, step 2.
  void move_along(const TaskState &state) {
    move(point.row(state.grads, joined(shared, state.own)), state.own, state.sq_shared, state.sq_own);
  }

  // Parameters to saved + rho row/||row||, or its ASAM form. row: one tensor for every one of `shared` and then of
  // `own`; sq_shared, sq_own: squared norms of its two parts (`sq_norm`). With norm "separate" each part moves on its
  // own sphere, with "joint" both on one. A part with norm 0 stays.
  void move(const Row &row, const Indices &own, double sq_shared, double sq_own) {
    double shared_scale = std::sqrt(sq_shared), own_scale = std::sqrt(sq_own);
    if (options.norm() == "joint") shared_scale = own_scale = std::sqrt(sq_shared + sq_own);
    shared_scale = shared_scale != 0.0 ? 1.0 / shared_scale : 0.0;
    own_scale = own_scale != 0.0 ? 1.0 / own_scale : 0.0;
    std::vector<double> scales;
    for (const size_t i : shared) scales.push_back(param(i).rho_shared * shared_scale);
    for (const size_t i : own) scales.push_back(param(i).rho_task * own_scale);
    point.move(joined(shared, own), row, scales, options.adaptive(), *options.eta());
  }

  static Indices joined(Indices first, const Indices &second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
  }
};

}  // namespace detail
}  // namespace flatmtl
