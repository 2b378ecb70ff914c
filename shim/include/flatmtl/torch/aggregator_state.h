// aggregator_state.h - what an aggregator keeps from step to step (GradVac), by call within a step. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "aggregator.h"

namespace flatmtl {
namespace detail {

// A value: a step makes a new one. K x K matrices, row-major, with a row and a column a task: "loss" and "flat" for the
// calls of the families; with combine "second" also "both", 2 x 2; with "each" "pairs", 2 x 2, one a task, and "loss"
// for the call that joins the tasks. A call that has not come yet has none.
class AggregatorState {
 public:
  std::map<std::string, std::vector<double>> calls;

  // What the tasks present need, as settings.state takes it; empty if the method keeps nothing.
  std::vector<double> gather(flatmtl_method method, flatmtl_combination combine, int64_t tasks,
                             const std::vector<int64_t> &present) const {
    std::vector<double> out;
    const int64_t m = matrices(method);
    if (m == 0) return out;
    for (const char *call : names(combine)) {
      const auto found = calls.find(call);
      const std::vector<double> old =
          found == calls.end() ? std::vector<double>(length(call, m, tasks)) : found->second;
      for (const size_t i : places(call, m, tasks, present)) out.push_back(old[i]);
    }
    return out;
  }

  // This state with the entries of the tasks present replaced.
  AggregatorState scatter(flatmtl_method method, flatmtl_combination combine, int64_t tasks,
                          const std::vector<int64_t> &present, const std::vector<double> &values) const {
    AggregatorState result = *this;
    const int64_t m = matrices(method);
    auto next = values.begin();
    for (const char *call : names(combine)) {
      std::vector<double> &value = result.calls.try_emplace(call, length(call, m, tasks)).first->second;
      for (const size_t i : places(call, m, tasks, present)) value[i] = *next++;
    }
    return result;
  }

  // std::runtime_error unless this is a state of the method for so many tasks.
  void check(flatmtl_method method, int64_t tasks) const {
    const std::string what = "state of the aggregator " + quoted(flatmtl_method_name(method)) + ": ";
    for (const auto &[call, values] : calls) {
      if (values.size() != length(call, matrices(method), tasks))
        throw std::runtime_error(what + quoted(call) + " has " + std::to_string(values.size()) + " numbers, but " +
                                 std::to_string(tasks) + " tasks need " +
                                 std::to_string(length(call, matrices(method), tasks)));
      for (const double value : values)
        if (!(std::fabs(value) <= 1.0)) throw std::runtime_error(what + quoted(call) + " holds values beyond [-1, 1]");
    }
  }

 private:
  static std::vector<const char *> names(flatmtl_combination combine) {
    switch (combine) {
      case FLATMTL_DIRECT:
        return {"loss"};
      case FLATMTL_SECOND:
        return {"loss", "flat", "both"};
      case FLATMTL_EACH:
        return {"pairs", "loss"};
      case FLATMTL_DECOMPOSED:
        break;
    }
    return {"loss", "flat"};
  }

  static int64_t matrices(flatmtl_method method) {
    int64_t count = 0;
    flatmtl_error error{};
    detail::check("state_size", flatmtl_state_size(method, 1, &count, &error), error);
    return count;
  }

  static size_t length(const std::string &call, int64_t m, int64_t tasks) {
    return static_cast<size_t>(call == "both" ? 4 * m : call == "pairs" ? 4 * m * tasks : m * tasks * tasks);
  }

  // Where the numbers of the tasks present stand, in the order in which the C core takes them.
  static std::vector<size_t> places(const std::string &call, int64_t m, int64_t tasks,
                                    const std::vector<int64_t> &present) {
    std::vector<size_t> result;
    const auto add = [&](int64_t i) { result.push_back(static_cast<size_t>(i)); };
    if (call == "both") {
      for (int64_t i = 0; i < 4 * m; ++i) add(i);
    } else if (call == "pairs") {
      for (const int64_t task : present)
        for (int64_t i = 0; i < 4 * m; ++i) add(4 * m * task + i);
    } else {
      for (int64_t k = 0; k < m; ++k)
        for (const int64_t i : present)
          for (const int64_t j : present) add((k * tasks + i) * tasks + j);
    }
    return result;
  }
};

}  // namespace detail
}  // namespace flatmtl
