// flatness_state.h - what a flatness mode keeps from step to step. Private.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/serialize.h>
#include <torch/types.h>

#include "flatness.h"
#include "native.h"

namespace flatmtl {
namespace detail {

// A value: a step makes a new one, and nobody writes to its tensors. A row has one entry for every parameter of the
// groups, undefined where there is nothing.
struct FlatnessState {
  // fmtl with `every`, looksam: one row a task, v_i, empty before its first perturbed pass. fsam: one, the mean. Empty
  // before the first step.
  std::vector<Row> rows;
  std::vector<int64_t> age;                   // steps since the perturbed pass: fmtl one a task, looksam one
  std::vector<double> norm, orthogonal_norm;  // ||g_i|| then, of fmtl; ||v_i|| of fmtl, ||v|| of looksam

  bool empty() const { return rows.empty(); }

  void save(torch::serialize::OutputArchive &archive) const {
    c10::List<int64_t> lengths, defined;
    c10::List<torch::Tensor> tensors;
    for (const Row &row : rows) {
      lengths.push_back(static_cast<int64_t>(row.size()));
      for (const torch::Tensor &tensor : row) {
        defined.push_back(tensor.defined() ? 1 : 0);
        if (tensor.defined()) tensors.push_back(tensor);
      }
    }
    archive.write("flat_lengths", c10::IValue(lengths));
    archive.write("flat_defined", c10::IValue(defined));
    archive.write("flat_tensors", c10::IValue(tensors));
    archive.write("flat_age", c10::IValue(c10::List<int64_t>(age)));
    archive.write("flat_norm", c10::IValue(c10::List<double>(norm)));
    archive.write("flat_orthogonal_norm", c10::IValue(c10::List<double>(orthogonal_norm)));
  }

  static FlatnessState load(torch::serialize::InputArchive &archive) {
    c10::IValue value;
    const auto read = [&](const char *key) {
      archive.read(key, value);
      return value;
    };
    FlatnessState state;
    const auto lengths = read("flat_lengths").toIntVector(), defined = read("flat_defined").toIntVector();
    const auto tensors = read("flat_tensors").toTensorVector();
    size_t place = 0, next = 0;
    for (const int64_t length : lengths) {
      if (length < 0 || static_cast<size_t>(length) > defined.size() - place) damaged();
      state.rows.emplace_back(static_cast<size_t>(length));
      for (torch::Tensor &entry : state.rows.back()) {
        if (defined[place++] == 0) continue;
        if (next == tensors.size()) damaged();
        entry = tensors[next++];
      }
    }
    if (place != defined.size() || next != tensors.size()) damaged();
    state.age = read("flat_age").toIntVector();
    state.norm = read("flat_norm").toDoubleVector();
    state.orthogonal_norm = read("flat_orthogonal_norm").toDoubleVector();
    return state;
  }

  // std::runtime_error unless this is a state of the mode for so many tasks and these parameters.
  void check(const Flatness &mode, int64_t num_tasks, const std::vector<torch::Tensor> &params) const {
    const std::string what = "state_dict holds " + mode.name() + "'s gradient";
    const bool one = mode.mode() == Flatness::Mode::fsam;
    const auto count = static_cast<int64_t>(rows.size()), wanted = one ? int64_t{1} : num_tasks;
    if (count != wanted)
      throw std::runtime_error(what + "s of " + std::to_string(count) + " tasks, but there are " +
                               std::to_string(wanted));
    for (size_t k = 0; k < rows.size(); ++k) {
      if (rows[k].size() > params.size())
        throw std::runtime_error(what + "s of " + std::to_string(rows[k].size()) + " parameters, not " +
                                 std::to_string(params.size()));
      for (size_t i = 0; i < rows[k].size(); ++i)
        if (rows[k][i].defined() && rows[k][i].sizes() != params[i].sizes())
          throw std::runtime_error(what + " of task " + std::to_string(k) + " and parameter " + std::to_string(i) +
                                   " with shape " + detail::text(rows[k][i].sizes()) + ", but the parameter has " +
                                   detail::text(params[i].sizes()));
    }
    const bool each = mode.mode() == Flatness::Mode::fmtl, looksam = mode.mode() == Flatness::Mode::looksam;
    const size_t numbers = each ? rows.size() : looksam ? 1 : 0;
    if (age.size() != numbers || orthogonal_norm.size() != numbers || norm.size() != (each ? numbers : 0)) damaged();
  }

 private:
  [[noreturn]] static void damaged() { throw std::runtime_error("state_dict['flatmtl'] is damaged"); }
};

}  // namespace detail
}  // namespace flatmtl
