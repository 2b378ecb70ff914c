// text.h - values as they stand in messages, written as the Python package writes them. Private.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <variant>
#include <vector>

#include <torch/types.h>

namespace flatmtl {

// Which task: its index, or its name if the losses came by name.
using Task = std::variant<int64_t, std::string>;

namespace detail {

inline std::string quoted(const std::string &text) {
  return "'" + text + "'";
}

inline std::string text(const Task &task) {
  if (const auto *index = std::get_if<int64_t>(&task)) return std::to_string(*index);
  return quoted(std::get<std::string>(task));
}

// The shortest decimal that reads back as value.
inline std::string text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[40];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(buffer, sizeof buffer, "%.*g", digits, value);
    if (std::strtod(buffer, nullptr) == value) break;
  }
  std::string result = buffer;
  if (result.find_first_of(".e") == std::string::npos) result += ".0";
  return result;
}

// (2, 3) and (2,)
inline std::string text(c10::IntArrayRef sizes) {
  std::string result = "(";
  for (size_t i = 0; i < sizes.size(); ++i) result += (i ? ", " : "") + std::to_string(sizes[i]);
  return result + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string text(const std::vector<Task> &tasks) {
  std::string result = "[";
  for (size_t i = 0; i < tasks.size(); ++i) result += (i ? ", " : "") + text(tasks[i]);
  return result + "]";
}

inline std::string text(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kComplexFloat:
      return "torch.complex64";
    case at::kComplexDouble:
      return "torch.complex128";
    default:
      return std::string("torch.") + c10::toString(dtype);
  }
}

}  // namespace detail
}  // namespace flatmtl
