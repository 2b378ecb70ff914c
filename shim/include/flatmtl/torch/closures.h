// closures.h - what a closure may be and what it may return: the kinds of containers of losses, and closures with their
// types erased. Private but for LossTraits, which can be specialised for a container of one's own.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
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

// The same, called with one micro-batch.
template <typename Batch>
using BatchTaskClosures = std::vector<std::function<torch::Tensor(const Batch &)>>;
template <typename Batch>
using NamedBatchTaskClosures = std::vector<std::pair<std::string, std::function<torch::Tensor(const Batch &)>>>;

namespace detail {

// Any closure, called with the number of a micro-batch. Either `all`, or `each`, one a task.
struct Closure {
  std::function<TaskLosses(size_t, const std::optional<Task> &)> all;
  bool takes_task = false;
  std::vector<std::pair<Task, std::function<torch::Tensor(size_t)>>> each;
  bool named = false;
  size_t batches = 1;  // number of micro-batches
};

// A copy of a closure or of a list of micro-batches, made to be called once more after the update.
template <typename Copy, bool copyable, typename T>
std::shared_ptr<Copy> copy_to_keep(const char *what, T &value) {
  if constexpr (copyable)
    return std::make_shared<Copy>(value);
  else
    throw std::invalid_argument(std::string(what) +
                                " cannot be copied, but the weighting needs it once more after the update: use "
                                "step(closure) instead of backward(closure)");
}

// Calls functions with the m-th micro-batch of a list, which is kept by reference or owned.
template <typename Batch>
struct WithBatches {
  WithBatches(const std::vector<Batch> &batches, bool copy) : list(&batches) {
    if (!copy) return;
    owner = copy_to_keep<std::vector<Batch>, std::is_copy_constructible_v<Batch>>("a micro-batch", batches);
    list = owner.get();
  }
  const std::vector<Batch> *list;
  std::shared_ptr<std::vector<Batch>> owner;
  size_t size() const { return list->size(); }
  template <typename F, typename... Args>
  auto call(F &function, size_t m, Args &&...args) const {
    return function((*list)[m], std::forward<Args>(args)...);
  }
};

// Calls functions without one.
struct WithoutBatches {
  size_t size() const { return 1; }
  template <typename F, typename... Args>
  auto call(F &function, size_t, Args &&...args) const {
    return function(std::forward<Args>(args)...);
  }
};

template <typename Caller>
Closure empty_closure(const Caller &caller) {
  if (caller.size() == 0) throw std::invalid_argument("batches is empty: expected at least one micro-batch");
  Closure result;
  result.batches = caller.size();
  return result;
}

template <typename F>
std::pair<Task, F> named_closure(size_t place, const F &function) {
  return {static_cast<int64_t>(place), function};
}
template <typename F>
std::pair<Task, F> named_closure(size_t, const std::pair<std::string, F> &item) {
  return {item.first, item.second};
}

// One closure a task: std::function objects, or pairs of a name and one. They are copied.
template <typename Item, typename Caller>
Closure erase_each(const std::vector<Item> &closures, Caller caller) {
  if (closures.empty()) throw std::invalid_argument("closure is empty: expected one closure a task");
  Closure result = empty_closure(caller);
  for (const Item &item : closures) {
    const auto closure = named_closure(result.each.size(), item);
    if (!closure.second)
      throw std::invalid_argument("closure[" + text(closure.first) + "] must be callable, but is an empty function");
    result.named = std::holds_alternative<std::string>(closure.first);
    result.each.emplace_back(closure.first, [call = closure.second, caller](size_t m) { return caller.call(call, m); });
  }
  return result;
}

// What a closure of all tasks returns when called with Args: nothing, or a micro-batch.
template <typename F, typename Enable, typename... Args>
struct ReturnedBy {
  using type = std::decay_t<std::invoke_result_t<F &, Args...>>;
  static constexpr bool takes_task = false;
};

// A closure with one parameter more: std::nullopt in the unperturbed pass, the one task wanted in a perturbed pass.
template <typename F, typename... Args>
struct ReturnedBy<
    F, std::enable_if_t<!std::is_invocable_v<F &, Args...> && std::is_invocable_v<F &, Args..., std::optional<Task>>>,
    Args...> {
  using type = std::decay_t<std::invoke_result_t<F &, Args..., std::optional<Task>>>;
  static constexpr bool takes_task = true;
};

template <typename F, typename... Args>
using Returned = ReturnedBy<F, void, Args...>;

template <typename F, typename... Args>
constexpr bool is_closure = std::is_invocable_v<F &, Args...> || std::is_invocable_v<F &, Args..., std::optional<Task>>;

// A closure of all tasks, by reference. R: what Returned says of it; owner: of the closure, if it is to be kept.
template <typename R, typename F, typename Caller>
Closure erase(F &function, Caller caller, std::shared_ptr<void> owner = nullptr) {
  static_assert(LossTraits<typename R::type>::known,
                "the closure must return the task losses as a std::vector<torch::Tensor>, a std::array of tensors, a "
                "torch::OrderedDict or std::map from names to tensors, or one torch::Tensor (0-D or 1-D)");
  Closure result = empty_closure(caller);
  result.takes_task = R::takes_task;
  result.all = [&function, caller, owner = std::move(owner)](size_t m, const std::optional<Task> &task) {
    if constexpr (R::takes_task) {
      return LossTraits<typename R::type>::read(caller.call(function, m, task));
    } else {
      (void)task;
      return LossTraits<typename R::type>::read(caller.call(function, m));
    }
  };
  return result;
}

// The same; `copy`: of a copy of it.
template <typename R, typename F, typename Caller>
Closure erase(F &function, Caller caller, bool copy) {
  using Copy = std::decay_t<F>;
  if (!copy) return erase<R>(function, std::move(caller));
  const auto owner = copy_to_keep<Copy, std::is_copy_constructible_v<Copy>>("the closure", function);
  return erase<R>(*owner, std::move(caller), std::shared_ptr<void>(owner));
}

}  // namespace detail
}  // namespace flatmtl
