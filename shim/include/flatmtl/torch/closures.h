// closures.h - what a closure may be and what it may return: the kinds of containers of losses, and closures with their
// types erased. Private but for LossTraits, which can be specialised for a container of one's own.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/ordered_dict.h>
#include <torch/types.h>

#include "text.h"

namespace flatmtl {

// What a closure returned, whatever its type. An undefined tensor is a task that is absent from this batch.
struct TaskLosses {
  enum class Kind { list, dict, tensor };
  Kind kind = Kind::list;
  std::vector<Task> tasks;
  std::vector<torch::Tensor> values;  // list and dict: one a task
  torch::Tensor tensor;               // tensor: 0-D or 1-D
};

// How a type becomes TaskLosses, and how the detached losses are put into that type again.
template <typename T>
struct LossTraits {
  static constexpr bool known = false;
};

namespace detail {

inline TaskLosses list_of(std::vector<torch::Tensor> values) {
  TaskLosses result;
  for (size_t i = 0; i < values.size(); ++i) result.tasks.emplace_back(static_cast<int64_t>(i));
  result.values = std::move(values);
  return result;
}

inline void add_to_dict(TaskLosses *losses, const std::string &name, const torch::Tensor &value) {
  losses->kind = TaskLosses::Kind::dict;
  losses->tasks.emplace_back(name);
  losses->values.push_back(value);
}

}  // namespace detail

template <>
struct LossTraits<torch::Tensor> {
  static constexpr bool known = true;
  static TaskLosses read(const torch::Tensor &tensor) {
    TaskLosses result;
    result.kind = TaskLosses::Kind::tensor;
    result.tensor = tensor;
    const int64_t count = tensor.defined() && tensor.dim() == 1 ? tensor.size(0) : 1;
    for (int64_t i = 0; i < count; ++i) result.tasks.emplace_back(i);
    return result;
  }
  static torch::Tensor write(const TaskLosses &losses) { return losses.tensor; }
};

template <>
struct LossTraits<std::vector<torch::Tensor>> {
  static constexpr bool known = true;
  static TaskLosses read(const std::vector<torch::Tensor> &losses) { return detail::list_of(losses); }
  static std::vector<torch::Tensor> write(const TaskLosses &losses) { return losses.values; }
};

template <>
struct LossTraits<std::vector<std::optional<torch::Tensor>>> {
  using Losses = std::vector<std::optional<torch::Tensor>>;
  static constexpr bool known = true;
  static TaskLosses read(const Losses &losses) {
    std::vector<torch::Tensor> values;
    for (const auto &loss : losses) values.push_back(loss.value_or(torch::Tensor()));
    return detail::list_of(std::move(values));
  }
  static Losses write(const TaskLosses &losses) {
    Losses result;
    for (const auto &value : losses.values)
      result.push_back(value.defined() ? std::optional<torch::Tensor>(value) : std::nullopt);
    return result;
  }
};

template <size_t N>
struct LossTraits<std::array<torch::Tensor, N>> {
  static constexpr bool known = true;
  static TaskLosses read(const std::array<torch::Tensor, N> &losses) {
    return detail::list_of({losses.begin(), losses.end()});
  }
  static std::array<torch::Tensor, N> write(const TaskLosses &losses) {
    std::array<torch::Tensor, N> result;
    for (size_t i = 0; i < N; ++i) result[i] = losses.values.at(i);
    return result;
  }
};

// By name, in the order of the container.
template <>
struct LossTraits<torch::OrderedDict<std::string, torch::Tensor>> {
  using Losses = torch::OrderedDict<std::string, torch::Tensor>;
  static constexpr bool known = true;
  static TaskLosses read(const Losses &losses) {
    TaskLosses result;
    for (const auto &item : losses) detail::add_to_dict(&result, item.key(), item.value());
    return result;
  }
  static Losses write(const TaskLosses &losses) {
    Losses result("Loss");
    for (size_t i = 0; i < losses.tasks.size(); ++i)
      result.insert(std::get<std::string>(losses.tasks[i]), losses.values[i]);
    return result;
  }
};

template <>
struct LossTraits<std::map<std::string, torch::Tensor>> {
  using Losses = std::map<std::string, torch::Tensor>;
  static constexpr bool known = true;
  static TaskLosses read(const Losses &losses) {
    TaskLosses result;
    for (const auto &item : losses) detail::add_to_dict(&result, item.first, item.second);
    return result;
  }
  static Losses write(const TaskLosses &losses) {
    Losses result;
    for (size_t i = 0; i < losses.tasks.size(); ++i) result[std::get<std::string>(losses.tasks[i])] = losses.values[i];
    return result;
  }
};

// One closure a task, by place or by name.
using TaskClosure = std::function<torch::Tensor()>;
using TaskClosures = std::vector<TaskClosure>;
using NamedTaskClosures = std::vector<std::pair<std::string, TaskClosure>>;

namespace detail {

// Any closure. Either `all`, or `each`, one a task.
struct Closure {
  std::function<TaskLosses(const std::optional<Task> &)> all;
  bool takes_task = false;
  std::vector<std::pair<Task, TaskClosure>> each;
  bool named = false;
};

inline Closure erased(const TaskClosures &closures) {
  Closure result;
  for (const auto &closure : closures) result.each.emplace_back(static_cast<int64_t>(result.each.size()), closure);
  return result;
}

inline Closure erased(const NamedTaskClosures &closures) {
  Closure result;
  result.named = true;
  for (const auto &closure : closures) result.each.emplace_back(closure.first, closure.second);
  return result;
}

inline void check_closures(const Closure &closure) {
  if (closure.each.empty()) throw std::invalid_argument("closure is empty: expected one closure a task");
  for (const auto &item : closure.each)
    if (!item.second)
      throw std::invalid_argument("closure[" + text(item.first) + "] must be callable, but is an empty function");
}

template <typename F, typename = void>
struct Returned {
  using type = std::decay_t<std::invoke_result_t<F &>>;
  static constexpr bool takes_task = false;
};

// A closure with a parameter: std::nullopt in the unperturbed pass, the one task wanted in a perturbed pass.
template <typename F>
struct Returned<F, std::enable_if_t<!std::is_invocable_v<F &> && std::is_invocable_v<F &, std::optional<Task>>>> {
  using type = std::decay_t<std::invoke_result_t<F &, std::optional<Task>>>;
  static constexpr bool takes_task = true;
};

template <typename F>
constexpr bool is_closure = std::is_invocable_v<F &> || std::is_invocable_v<F &, std::optional<Task>>;

template <typename F>
Closure erase(F &function) {
  using R = Returned<F>;
  static_assert(LossTraits<typename R::type>::known,
                "the closure must return the task losses as a std::vector<torch::Tensor>, a std::array of tensors, a "
                "torch::OrderedDict or std::map from names to tensors, or one torch::Tensor (0-D or 1-D)");
  Closure result;
  result.takes_task = R::takes_task;
  result.all = [&function](const std::optional<Task> &task) {
    if constexpr (R::takes_task) {
      return LossTraits<typename R::type>::read(function(task));
    } else {
      (void)task;
      return LossTraits<typename R::type>::read(function());
    }
  };
  return result;
}

}  // namespace detail
}  // namespace flatmtl
