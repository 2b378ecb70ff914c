// point.h - the parameters of a step, a copy of their values, and the arithmetic on lists of them. Private.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "native.h"
#include "reserve.h"

namespace flatmtl {
namespace detail {

using Indices = std::vector<size_t>;  // of parameters

struct Parameter {
  torch::Tensor tensor;
  double rho_shared, rho_task;
  std::string name;
  size_t index;  // among all parameters of the groups, those that need no gradient too
};

inline Row at(const Row &row, const Indices &places) {
  Row result;
  for (const size_t k : places) result.push_back(row[k]);
  return result;
}

inline std::vector<Row> at(const std::vector<Row> &rows, const Indices &places) {
  std::vector<Row> result;
  for (const Row &row : rows) result.push_back(at(row, places));
  return result;
}

// Where the parameters stand: at theta, or moved to a perturbed point. Rows have one tensor for each of some indices;
// what is summed over parameters is summed over groups of one dtype, as in the Python package. With rows_dtype rows of
// gradients of float32 parameters are kept in that dtype (`narrow`), unless `keep_wide` puts it off.
class Point {
 public:
  // accumulate: how Gramians are summed.
  Point(std::vector<Parameter> params, Reserve *reserve, flatmtl_accumulate accumulate,
        std::optional<at::ScalarType> rows_dtype)
      : params_(std::move(params)), accumulate_(accumulate), rows_dtype_(rows_dtype) {
    for (size_t i = 0; i < params_.size(); ++i) {
      const torch::Tensor &tensor = params_[i].tensor;
      tensors_.push_back(tensor);
      saved_.push_back(reserve->empty_like(i, tensor));
      check_parameter(params_[i], saved_.back());
      auto group = std::find_if(groups_.begin(), groups_.end(),
                                [&](const Indices &g) { return tensors_[g[0]].scalar_type() == tensor.scalar_type(); });
      if (group == groups_.end()) group = groups_.emplace(groups_.end());
      group->push_back(i);
    }
    zeros_.resize(tensors_.size());
    copy(saved_, tensors_);
    versions_ = versions();
  }

  const std::vector<Parameter> &params() const { return params_; }
  const Row &tensors() const { return tensors_; }
  Row &saved() { return saved_; }

  // Parameter i = saved + scale T^2 row, for the indices; row and scales have one entry an index.
  void move(const Indices &indices, const Row &row, const std::vector<double> &scales, bool adaptive, double eta) {
    moved_ = true;
    for (const auto &group : groups_) {
      const Indices chosen = places(indices, group);
      if (chosen.empty()) continue;
      Indices parameters;
      std::vector<double> factors;
      for (const size_t k : chosen) {
        parameters.push_back(indices[k]);
        factors.push_back(scales[k]);
      }
      perturb(at(tensors_, parameters), at(saved_, parameters), at(row, chosen), factors, adaptive, eta);
    }
    versions_ = versions();
  }

  // Takes the parameters' values as they are now for those of nobody's doing.
  void accept() { versions_ = versions(); }
  // Puts all parameters back, bit for bit.
  void restore() {
    copy(tensors_, saved_);
    versions_ = versions();
    moved_ = false;
  }
  // Puts some back, of a point that another move follows.
  void restore(const Indices &indices) {
    for (const auto &group : groups_) {
      Indices parameters;
      for (const size_t k : places(indices, group)) parameters.push_back(indices[k]);
      if (!parameters.empty()) detail::copy(at(tensors_, parameters), at(saved_, parameters));
    }
    versions_ = versions();
  }
  // As restore, where something may have gone wrong anywhere.
  void rollback() {
    if (moved_ || versions() != versions_) copy(tensors_, saved_);
  }

  // Throws if somebody else wrote to a parameter since the last move or restore.
  void check_unchanged() const {
    const auto now = versions();
    for (size_t i = 0; i < now.size(); ++i)
      if (now[i] != versions_[i])
        throw std::runtime_error("parameter " + params_[i].name + " was changed in place by the closure");
  }

  // The gradients (one a parameter) at the indices, zeros where there is none.
  Row row(const Row &gradients, const Indices &indices) {
    Row result;
    for (const size_t i : indices) result.push_back(gradients[i].defined() ? gradients[i] : zeros(i));
    return result;
  }

  // Zeros like a row at parameter i; not to be written to.
  const torch::Tensor &zeros(size_t i) {
    if (!zeros_[i].defined() || zeros_[i].scalar_type() != row_dtype(i))
      zeros_[i] = torch::zeros_like(tensors_[i], row_dtype(i));
    return zeros_[i];
  }

  // Memory for a gradient of parameter i where it will be rounded, else undefined. To be taken before the backward that
  // gives it: taken after it, what the allocator has of the wide gradients is left in holes between the rows.
  torch::Tensor room(size_t i) const {
    const at::ScalarType dtype = row_dtype(i);
    return dtype == tensors_[i].scalar_type() ? torch::Tensor() : torch::empty_like(tensors_[i], dtype);
  }
  // A gradient of parameter i as rows are kept: rounded once, to nearest, where they are narrower.
  torch::Tensor narrow(size_t i, const torch::Tensor &gradient) const { return gradient.to(row_dtype(i)); }
  // The same for each entry of a row that has one a parameter, one after another, so that what is wide is freed.
  void narrow(Row *row) const {
    for (size_t i = 0; i < row->size(); ++i)
      if ((*row)[i].defined()) (*row)[i] = narrow(i, (*row)[i]);
  }
  // A gradient of parameter i in the dtype of the parameter, to compute with.
  torch::Tensor wide(size_t i, const torch::Tensor &gradient) const { return gradient.to(tensors_[i].scalar_type()); }

  bool keep_wide = false;  // while means are still to be taken

  // Squared norm of a row; with `adaptive` that of (|saved| + eta) row.
  double sq_norm(const Row &row, const Indices &indices, bool adaptive, double eta) const {
    double total = 0.0;
    for (const auto &group : groups_) {
      const Indices chosen = places(indices, group);
      if (chosen.empty()) continue;
      Row params;
      for (const size_t k : chosen)
        if (adaptive) params.push_back(saved_[indices[k]]);
      total += detail::sq_norm(at(row, chosen), params, eta);
    }
    return total;
  }

  torch::Tensor gramian(const std::vector<Row> &rows, const Indices &indices) const {
    const auto count = static_cast<int64_t>(rows.size());
    torch::Tensor total = torch::zeros({count, count}, torch::kDouble);
    for (const auto &group : groups_) {
      const Indices chosen = places(indices, group);
      if (!chosen.empty()) total.add_(detail::gramian(at(rows, chosen), accumulate_));
    }
    return total;
  }

  // <g_i, f_j> = 0 without `cross`.
  torch::Tensor gramian_pair(const std::vector<Row> &loss_rows, const std::vector<Row> &perturbed_rows,
                             const Indices &indices, bool cross = true) const {
    const auto count = static_cast<int64_t>(loss_rows.size());
    torch::Tensor total = torch::zeros({2 * count, 2 * count}, torch::kDouble);
    for (const auto &group : groups_) {
      const Indices chosen = places(indices, group);
      if (!chosen.empty())
        total.add_(detail::gramian_pair(at(loss_rows, chosen), at(perturbed_rows, chosen), accumulate_, cross));
    }
    return total;
  }

  // out = SUM a_i g_i, and + b_i (s_i - g_i) if there are perturbed rows. out: one tensor an index.
  void combine(const Row &out, const Indices &indices, const std::vector<Row> &loss_rows,
               const std::vector<Row> &perturbed_rows, const std::vector<double> &loss_weights,
               const std::vector<double> &flat_weights) const {
    for (const auto &group : groups_) {
      const Indices chosen = places(indices, group);
      if (chosen.empty()) continue;
      const Row target = at(out, chosen);
      if (perturbed_rows.empty())
        detail::combine(target, at(loss_rows, chosen), loss_weights);
      else
        combine_pair(target, at(loss_rows, chosen), at(perturbed_rows, chosen), loss_weights, flat_weights);
    }
  }

 private:
  at::ScalarType row_dtype(size_t i) const {
    const at::ScalarType dtype = tensors_[i].scalar_type();
    return dtype == at::kFloat && !keep_wide ? rows_dtype_.value_or(dtype) : dtype;
  }

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

  // The places in `indices` of those that are in the (sorted) group.
  static Indices places(const Indices &indices, const Indices &group) {
    Indices result;
    for (size_t k = 0; k < indices.size(); ++k)
      if (std::binary_search(group.begin(), group.end(), indices[k])) result.push_back(k);
    return result;
  }

  void copy(const Row &to, const Row &from) const {
    for (const auto &group : groups_) detail::copy(at(to, group), at(from, group));
  }

  using Versions = std::vector<std::pair<int64_t, const void *>>;
  Versions versions() const {
    Versions result;
    for (const auto &tensor : tensors_)
      result.emplace_back(static_cast<int64_t>(tensor._version()), tensor.const_data_ptr());
    return result;
  }

  std::vector<Parameter> params_;
  flatmtl_accumulate accumulate_;
  std::optional<at::ScalarType> rows_dtype_;
  Row tensors_, saved_, zeros_;
  std::vector<Indices> groups_;  // of one dtype each
  Versions versions_;
  bool moved_ = false;
};

}  // namespace detail
}  // namespace flatmtl
