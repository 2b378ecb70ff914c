// state.h - FlatMTL's own state in an archive, and loading an optimizer entirely or not at all. Private.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/optim/optimizer.h>
#include <torch/serialize.h>
#include <torch/types.h>

#include "method_states.h"
#include "options.h"
#include "roles.h"
#include "text.h"

namespace flatmtl {
namespace detail {

struct State {
  static constexpr int64_t VERSION = 1;

  int64_t steps = 0, seed = 0;
  std::optional<std::vector<Task>> tasks;
  std::vector<std::optional<int64_t>> roles;    // one a parameter, in the order of the groups
  std::vector<std::vector<int64_t>> shapes;     // the parameters'
  std::vector<std::pair<double, double>> rhos;  // one a group
  std::string aggregator, weighting, flat;      // names; the weighting's is empty without one
  MethodStates methods;                         // what they keep

  void save(torch::serialize::OutputArchive &archive) const {
    archive.write("version", c10::IValue(VERSION));
    archive.write("steps", c10::IValue(steps));
    archive.write("seed", c10::IValue(seed));
    c10::List<std::string> names;
    for (const auto &task : tasks.value_or(std::vector<Task>())) names.push_back(text(task));
    archive.write("num_tasks", c10::IValue(tasks ? static_cast<int64_t>(names.size()) : int64_t{-1}));
    archive.write("tasks", c10::IValue(names));
    c10::List<int64_t> numbers, dims, sizes;
    for (const auto &role : roles) numbers.push_back(role.value_or(UNKNOWN));
    archive.write("roles", c10::IValue(numbers));
    for (const auto &shape : shapes) {
      dims.push_back(static_cast<int64_t>(shape.size()));
      for (const int64_t size : shape) sizes.push_back(size);
    }
    archive.write("dims", c10::IValue(dims));
    archive.write("sizes", c10::IValue(sizes));
    c10::List<double> radii;
    for (const auto &rho : rhos) {
      radii.push_back(rho.first);
      radii.push_back(rho.second);
    }
    archive.write("rho", c10::IValue(radii));
    archive.write("aggregator", c10::IValue(aggregator));
    for (const char *call : CALLS) {
      const auto found = methods.aggregator.calls.find(call);
      c10::List<double> values;
      if (found != methods.aggregator.calls.end())
        for (const double value : found->second) values.push_back(value);
      archive.write(std::string("aggregator_") + call, c10::IValue(values));
    }
    archive.write("weighting", c10::IValue(weighting));
    archive.write("weighting_values", c10::IValue(c10::List<double>(methods.weighting.values)));
    archive.write("flat", c10::IValue(flat));
    methods.flatness.save(archive);
  }

  static State load(torch::serialize::InputArchive &archive) {
    c10::IValue value;
    const bool found = archive.try_read("version", value) && value.isInt();
    if (!found || value.toInt() != VERSION)
      throw std::runtime_error("state_dict['flatmtl'] has version " +
                               (found ? std::to_string(value.toInt()) : std::string("None")) +
                               ", but this flatmtl reads " + std::to_string(VERSION));
    const auto read = [&](const char *key) {
      archive.read(key, value);
      return value;
    };
    State state;
    state.steps = read("steps").toInt();
    state.seed = read("seed").toInt();
    const int64_t num_tasks = read("num_tasks").toInt();
    if (num_tasks >= 0) {
      state.tasks.emplace();
      for (const c10::IValue &name : read("tasks").toList()) state.tasks->push_back(task_of(name.toStringRef()));
    }
    for (const int64_t role : read("roles").toIntVector())
      state.roles.push_back(role == UNKNOWN ? std::nullopt : std::optional<int64_t>(role));
    const auto sizes = read("sizes").toIntVector();
    auto next = sizes.begin();
    for (const int64_t dim : read("dims").toIntVector()) {
      if (dim < 0 || dim > sizes.end() - next) throw std::runtime_error("state_dict['flatmtl'] is damaged");
      state.shapes.emplace_back(next, next + dim);
      next += dim;
    }
    const auto radii = read("rho").toDoubleVector();
    for (size_t g = 0; g + 1 < radii.size(); g += 2) state.rhos.emplace_back(radii[g], radii[g + 1]);
    state.aggregator = read("aggregator").toStringRef();
    for (const char *call : CALLS) {
      const auto values = read((std::string("aggregator_") + call).c_str()).toDoubleVector();
      if (!values.empty()) state.methods.aggregator.calls[call] = values;
    }
    state.weighting = read("weighting").toStringRef();
    state.methods.weighting.values = read("weighting_values").toDoubleVector();
    state.flat = read("flat").toStringRef();
    state.methods.flatness = FlatnessState::load(archive);
    return state;
  }

  // Throws unless this state is one of an optimizer with these parameters, groups, tasks and options.
  void check(const std::vector<torch::Tensor> &params, size_t num_groups, const std::optional<std::vector<Task>> &now,
             const FlatMTLOptions &options) const {
    if (roles.size() != params.size() || shapes.size() != params.size())
      throw std::runtime_error("state_dict['flatmtl']['roles'] is for " + std::to_string(roles.size()) +
                               " parameters, but the optimizer has " + std::to_string(params.size()));
    if (rhos.size() != num_groups)
      throw std::runtime_error("state_dict['flatmtl'] is for " + std::to_string(rhos.size()) +
                               " parameter groups, but the optimizer has " + std::to_string(num_groups));
    for (size_t i = 0; i < params.size(); ++i)
      if (params[i].sizes() != c10::IntArrayRef(shapes[i]))
        throw std::runtime_error("state_dict['flatmtl']: parameter " + std::to_string(i) + " has shape " +
                                 text(c10::IntArrayRef(shapes[i])) + ", but the optimizer's has shape " +
                                 text(params[i].sizes()));
    if (tasks && now && tasks->size() != now->size())
      throw std::runtime_error("state_dict has " + std::to_string(tasks->size()) + " tasks, but the optimizer has " +
                               std::to_string(now->size()));
    const int64_t num_tasks = tasks ? static_cast<int64_t>(tasks->size()) : 0;
    if (!methods.weighting.values.empty()) {
      check_name("weighting", weighting, options.weighting() ? options.weighting()->name() : "");
      methods.weighting.check(*options.weighting(), num_tasks);
    }
    if (!methods.flatness.empty()) {
      check_name("flat", flat, options.flat().name());
      methods.flatness.check(options.flat(), num_tasks, params);
    }
    if (!methods.aggregator.calls.empty()) {
      check_name("aggregator", aggregator, options.aggregator().name());
      methods.aggregator.check(options.aggregator().method(), num_tasks);
    }
  }

 private:
  static constexpr int64_t UNKNOWN = -2;
  static constexpr const char *CALLS[] = {"loss", "flat", "both", "pairs"};

  static void check_name(const std::string &kind, const std::string &saved, const std::string &now) {
    if (saved != now)
      throw std::runtime_error("state_dict holds the state of " + kind + " " + quoted(saved) +
                               ", but the optimizer has " + (now.empty() ? "None" : quoted(now)));
  }

  // The inverse of text().
  static Task task_of(const std::string &written) {
    if (!written.empty() && written[0] == '\'') return written.substr(1, written.size() - 2);
    return static_cast<int64_t>(std::stoll(written));
  }
};

// optimizer.load(archive), or, if that throws, the optimizer as it was. State of parameters for which the archive has
// none is dropped: torch would keep it.
inline void load_all_or_nothing(torch::optim::Optimizer &optimizer, torch::serialize::InputArchive &archive) {
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> options;
  for (auto &group : optimizer.param_groups()) options.push_back(group.options().clone());
  auto state = std::move(optimizer.state());
  optimizer.state().clear();
  try {
    optimizer.load(archive);
  } catch (...) {
    optimizer.state() = std::move(state);
    for (size_t g = 0; g < options.size(); ++g) optimizer.param_groups()[g].set_options(std::move(options[g]));
    throw;
  }
}

}  // namespace detail
}  // namespace flatmtl
