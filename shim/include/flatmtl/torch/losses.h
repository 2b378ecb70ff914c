// losses.h - checks of what a closure returned, and the edge of the graph where each loss's gradient starts. Private.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/types.h>

#include "closures.h"

namespace flatmtl {
namespace detail {

using torch::autograd::Edge;

// One task's loss. separable is false for an element of a vector that was computed as a whole: the graph then does not
// tell which parameters this element reaches.
struct Loss {
  Task task;
  torch::Tensor value;
  Edge edge;
  bool separable = true;
};

inline std::string node_name(const Edge &edge) {
  const std::string name = edge.function->name();
  const size_t colons = name.rfind("::");
  return colons == std::string::npos ? name : name.substr(colons + 2);
}

// Shape of the tensor at an edge, where autograd says.
inline std::optional<std::vector<int64_t>> shape_at(const Edge &edge) {
  const auto &meta = edge.function->input_metadata(edge.input_nr);
  if (meta.was_default_constructed() || meta.is_nested_tensor()) return std::nullopt;
  std::vector<int64_t> shape;
  for (const auto &size : meta.shape_as_dim_vector()) {
    const auto known = size.maybe_as_int();
    if (!known) return std::nullopt;
    shape.push_back(*known);
  }
  return shape;
}

inline std::optional<int64_t> numel_at(const Edge &edge) {
  const auto shape = shape_at(edge);
  if (!shape) return std::nullopt;
  int64_t numel = 1;
  for (const int64_t size : *shape) numel *= size;
  return numel;
}

// Edges to the inputs of a node; empty if one of them needs no gradient.
inline std::vector<Edge> inputs_of(const Edge &edge) {
  const auto &edges = edge.function->next_edges();
  for (const auto &input : edges)
    if (!input.is_valid()) return {};
  return {edges.begin(), edges.end()};
}

// Back over reshapes of one element. They do not change which parameters are reached.
inline Edge through_reshapes(Edge edge) {
  static const std::set<std::string> reshapes = {
      "ViewBackward0",    "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0",
      "SqueezeBackward1", "SqueezeBackward2",    "CloneBackward0",        "AliasBackward0",     "ExpandBackward0"};
  while (reshapes.count(node_name(edge))) {
    const auto edges = inputs_of(edge);
    if (edges.empty() || numel_at(edges[0]) != 1) break;
    edge = edges[0];
  }
  return edge;
}

// The scalars that a 1-D tensor of `length` losses was stacked or concatenated from; empty if it was not.
inline std::vector<Edge> scalars_of(const Edge &edge, int64_t length) {
  const std::string name = node_name(edge);
  const auto edges = inputs_of(edge);
  if (name == "StackBackward0" || name == "CatBackward0") {
    if (static_cast<int64_t>(edges.size()) != length) return {};
    std::vector<Edge> scalars;
    for (const auto &input : edges) {
      if (numel_at(input) != 1) return {};
      scalars.push_back(through_reshapes(input));
    }
    return scalars;
  }
  if (name == "AliasBackward0" || name == "CloneBackward0" || name == "ViewBackward0")
    return !edges.empty() && numel_at(edges[0]) == length ? scalars_of(edges[0], length) : std::vector<Edge>();
  return {};
}

// Where a 0-d loss starts: itself, or the scalar it was, if it is an element of a stack. Nothing if it is an element of
// a vector that was computed as a whole.
inline std::optional<Edge> follow_element(const Edge &edge) {
  using torch::autograd::generated::SelectBackward0;
  const Edge start = through_reshapes(edge);
  const std::string name = node_name(start);
  int64_t index = 0;
  if (name == "SelectBackward0") {
    const auto *select = dynamic_cast<const SelectBackward0 *>(&*start.function);
    const auto known = select ? select->index.maybe_as_int() : std::nullopt;
    if (!known) return std::nullopt;
    index = *known;
  } else if (name == "UnbindBackward0") {
    index = start.input_nr;
  } else {
    return edge;
  }
  const auto parents = inputs_of(start);
  if (parents.empty()) return std::nullopt;
  const auto length = numel_at(parents[0]);
  if (!length) return std::nullopt;
  if (*length == 1) return edge;
  if (index < 0) index += *length;
  const auto scalars = scalars_of(parents[0], *length);
  if (index < 0 || index >= static_cast<int64_t>(scalars.size())) return std::nullopt;
  return scalars[static_cast<size_t>(index)];
}

// The leaf tensors that the graph behind an edge reaches.
inline std::set<const void *> leaves(const Edge &edge) {
  using torch::autograd::Node;
  std::set<const void *> found;
  std::set<const Node *> seen;
  std::vector<const Node *> todo = {edge.function.get()};
  while (!todo.empty()) {
    const Node *node = todo.back();
    todo.pop_back();
    if (!seen.insert(node).second) continue;
    if (const auto *leaf = dynamic_cast<const torch::autograd::AccumulateGrad *>(node))
      found.insert(leaf->variable.unsafeGetTensorImpl());
    for (const Edge &input : node->next_edges())
      if (input.is_valid()) todo.push_back(input.function.get());
  }
  return found;
}

inline void check_differentiable(const std::string &what, const torch::Tensor &value) {
  if (value.is_complex())
    throw std::invalid_argument(what + " is complex (" + text(value.scalar_type()) + "); losses must be real");
  if (!value.requires_grad())
    throw std::runtime_error(what +
                             " has no graph (requires_grad is False): it does not depend on any parameter that "
                             "requires grad, or the closure ran it under no_grad, detached it or called .item()");
  if (!value.grad_fn()) throw std::runtime_error(what + " is a leaf tensor, not computed from the model");
}

// Checks the loss of one task. grad is false for losses computed without graphs.
inline Loss read_loss(const Task &task, const torch::Tensor &value, bool grad = true) {
  const std::string what = "loss of task " + text(task);
  if (value.dim() != 0) throw std::invalid_argument(what + " must be a scalar, but has shape " + text(value.sizes()));
  if (!grad) return {task, value.detach(), Edge(), true};
  check_differentiable(what, value);
  const Edge edge = torch::autograd::impl::gradient_edge(value);
  const auto scalar = follow_element(edge);
  return {task, value.detach(), scalar.value_or(edge), scalar.has_value()};
}

inline std::vector<std::optional<Loss>> read_tensor(const torch::Tensor &vector, bool grad) {
  if (!vector.defined()) throw std::invalid_argument("closure returned no losses");
  if (vector.dim() == 0) return {read_loss(int64_t{0}, vector, grad)};
  if (vector.dim() != 1)
    throw std::invalid_argument("a tensor of losses must have 0 or 1 dimensions, but has shape " +
                                text(vector.sizes()));
  const int64_t length = vector.size(0);
  if (length == 0) throw std::invalid_argument("closure returned no losses");
  std::vector<std::optional<Loss>> losses;
  if (!grad) {
    for (int64_t i = 0; i < length; ++i) losses.push_back(Loss{i, vector.detach()[i], Edge(), true});
    return losses;
  }
  check_differentiable("the tensor of losses", vector);
  const auto scalars = scalars_of(torch::autograd::impl::gradient_edge(vector), length);
  for (int64_t i = 0; i < length; ++i) {
    const torch::Tensor value = vector.detach()[i];
    if (!scalars.empty()) {
      losses.push_back(Loss{i, value, scalars[static_cast<size_t>(i)], true});
    } else {
      torch::AutoGradMode enable_grad(true);
      losses.push_back(Loss{i, value, torch::autograd::impl::gradient_edge(vector[i]), length == 1});
    }
  }
  return losses;
}

// Checks what a closure returned: one Loss a task, none for an absent one.
inline std::vector<std::optional<Loss>> read_losses(const TaskLosses &container, bool grad = true) {
  if (container.kind == TaskLosses::Kind::tensor) return read_tensor(container.tensor, grad);
  if (container.values.empty()) throw std::invalid_argument("closure returned no losses");
  std::vector<std::optional<Loss>> losses;
  for (size_t i = 0; i < container.values.size(); ++i) {
    losses.emplace_back();
    if (container.values[i].defined()) losses.back() = read_loss(container.tasks[i], container.values[i], grad);
  }
  return losses;
}

// The shape of a container of losses, for the message when it changes between passes.
inline std::string describe(const TaskLosses &container) {
  switch (container.kind) {
    case TaskLosses::Kind::tensor:
      return container.tensor.defined() ? "a tensor of shape " + text(container.tensor.sizes()) : "no tensor";
    case TaskLosses::Kind::dict:
      return "a dict with keys " + text(container.tasks);
    case TaskLosses::Kind::list:
      break;
  }
  return "a list of " + std::to_string(container.values.size());
}

// The mean, task by task, of containers of detached losses; a task's absences are left out.
inline TaskLosses mean_losses(const std::vector<TaskLosses> &containers) {
  if (containers.size() == 1) return containers[0];
  TaskLosses result = containers[0];
  const bool vector = result.tensor.defined() && result.tensor.dim() == 1;
  std::vector<torch::Tensor> means;
  for (size_t t = 0; t < result.tasks.size(); ++t) {
    std::vector<torch::Tensor> found;
    for (const TaskLosses &container : containers) {
      const torch::Tensor &tensor = container.tensor;
      const torch::Tensor value = !tensor.defined() ? container.values[t]
                                  : vector          ? tensor[static_cast<int64_t>(t)]
                                                    : tensor;
      if (value.defined()) found.push_back(value);
    }
    means.push_back(found.empty() ? torch::Tensor() : torch::stack(found).mean());
  }
  if (!result.tensor.defined())
    result.values = means;
  else
    result.tensor = vector ? torch::stack(means) : means[0];
  return result;
}

}  // namespace detail
}  // namespace flatmtl
