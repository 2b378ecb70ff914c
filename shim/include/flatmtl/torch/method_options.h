// method_options.h - what aggregator.h, weighting.h and flatness.h share: methods by name, checks of their options.
// Private.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "close_match.h"
#include "text.h"

namespace flatmtl {
namespace detail {

// The method of this name. name_of gives the names of the numbers from 0 on, and then a null pointer. kind: what the
// methods are, for the message.
template <typename E>
E by_name(const char *kind, const std::string &name, const char *(*name_of)(E)) {
  std::vector<std::string> known;
  for (int i = 0; const char *found = name_of(static_cast<E>(i)); ++i) {
    if (name == found) return static_cast<E>(i);
    known.emplace_back(found);
  }
  const auto close = close_match(name, known);
  std::string list;
  for (const auto &each : known) list += (list.empty() ? "" : ", ") + quoted(each);
  throw std::invalid_argument(std::string("there is no ") + kind + " " + quoted(name) + "." +
                              (close ? " Did you mean " + quoted(*close) + "?" : "") + " Known: " + list);
}

// Throws unless ok. cls: the method's class in Python.
inline void check_option(const char *cls, const std::string &option, const std::string &value, bool ok,
                         const char *must) {
  if (!ok) throw std::invalid_argument(std::string(cls) + ": " + option + " is " + value + "; it must be " + must);
}
inline void check_option(const char *cls, const std::string &option, double value, bool ok, const char *must) {
  check_option(cls, option, text(value), ok, must);
}

inline void check_positive(const char *cls, const char *option, double value) {
  check_option(cls, option, value, std::isfinite(value), "finite");
  check_option(cls, option, value, value > 0.0, "positive and finite");
}

inline void check_at_least_0(const char *cls, const char *option, double value) {
  check_option(cls, option, value, std::isfinite(value), "finite");
  check_option(cls, option, value, value >= 0.0, ">= 0");
}

inline double checked_integer(const char *cls, const char *option, int64_t value, int64_t least) {
  const std::string must = "an integer, at least " + std::to_string(least);
  check_option(cls, option, std::to_string(value), value >= least && value < int64_t{1} << 53, must.c_str());
  return static_cast<double>(value);
}

inline int64_t checked_seed(int64_t seed) {
  if (seed < 0 || seed >= int64_t{1} << 53)
    throw std::invalid_argument("seed is " + std::to_string(seed) +
                                "; it must be an integer, at least 0 and below 2^53");
  return seed;
}

// The first `common` options, then of the others, one a task, those of the tasks present. The message: "FAMO has " 3
// " min_losses" for 2 tasks.
inline std::vector<double> per_task(const char *has, const char *what, const std::vector<double> &options,
                                    size_t common, int64_t num_tasks, const std::vector<int64_t> &present) {
  const size_t count = options.size() - common;
  if (static_cast<int64_t>(count) != num_tasks)
    throw std::invalid_argument(has + std::to_string(count) + what + " for " + std::to_string(num_tasks) + " tasks");
  std::vector<double> values(options.begin(), options.begin() + static_cast<std::ptrdiff_t>(common));
  for (const int64_t i : present) values.push_back(options[common + static_cast<size_t>(i)]);
  return values;
}

}  // namespace detail
}  // namespace flatmtl
