// errors.h - exceptions. Wrong arguments are std::invalid_argument, everything else std::runtime_error; the texts are
// those of the Python package.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include <flatmtl.h>

#include "text.h"

namespace flatmtl {

// A loss or a gradient is Inf or NaN.
class NonFiniteError : public std::runtime_error {
 public:
  NonFiniteError(Task task, std::string pass, const std::string &what, double value)
      : std::runtime_error("task " + detail::text(task) + ": " + what + " is not finite (" + detail::text(value) +
                           ") in the " + pass +
                           " pass; nothing was changed. If this task is absent from the batch, return None as its "
                           "loss; nonfinite='skip' skips such steps"),
        task_(std::move(task)),
        pass_(std::move(pass)),
        value_(value) {}

  const Task &task() const { return task_; }
  const std::string &pass() const { return pass_; }  // "unperturbed" or "perturbed"
  double value() const { return value_; }

 private:
  Task task_;
  std::string pass_;
  double value_;
};

namespace detail {

inline std::string message(const flatmtl_error &error) {
  char buffer[512];
  return flatmtl_error_message(&error, buffer, sizeof buffer) < 0 ? "unknown error" : buffer;
}

// Throws for an error of the C core (status < 0), otherwise returns status. name: what was called.
inline flatmtl_status check(const char *name, flatmtl_status status, const flatmtl_error &error) {
  if (status < 0) throw std::runtime_error(std::string("flatmtl::") + name + ": " + message(error));
  return status;
}

}  // namespace detail
}  // namespace flatmtl
