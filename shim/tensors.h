// tensors.h - lists of torch tensors as the C core's rows and vectors: checked, not copied. Private.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "flatmtl.h"

namespace flatmtl {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Throws "flatmtl::<op>: <what>", which arrives in Python as a RuntimeError.
[[noreturn]] void fail(const char *op, const std::string &what);

// Throws for an error of the C core (status < 0); otherwise returns status.
flatmtl_status check(const char *op, flatmtl_status status, const flatmtl_error &error);

// The dtype of a list of tensors against that of the first one: the same, or also rows of bfloat16 or float16 beside a
// float32 vector, where the list is the rows (narrow) or the vector (wide).
enum class Dtype { same, narrow, wide };

// Data pointers, row-major, and the dtype of what they point to.
struct Data {
  std::vector<void *> pointers;
  flatmtl_dtype dtype;
};

// The dtype and the shape of every segment, as the first list of tensors of a call sets them. Later lists are held
// against it. Points into that list, which must outlive it.
class Segments {
 public:
  explicit Segments(const char *op) : op_(op) {}

  // Takes or checks num_rows x T tensors. name as in the op's schema; has_rows says whether messages call an element
  // name[row][segment] or name[segment].
  Data add(const char *name, const Tensors &tensors, int64_t num_rows, bool has_rows, Dtype allowed = Dtype::same);

  const char *op() const { return op_; }
  int64_t count() const { return static_cast<int64_t>(lengths_.size()); }
  const int64_t *lengths() const { return lengths_.data(); }

 private:
  struct Shape {
    int64_t dim;
    const int64_t *sizes, *strides;
  };
  void take(int64_t segment, const Tensor &tensor, const Shape &shape, int32_t torch_dtype);
  void compare(const std::string &name, int64_t segment, const Tensor &tensor, const Shape &shape, int32_t torch_dtype,
               int32_t expected_dtype) const;
  bool allows(Dtype allowed, int32_t torch_dtype) const;
  std::string reference(int64_t segment) const;

  const char *op_;
  const char *name_ = nullptr;  // of the first list
  bool has_rows_ = false;
  int32_t torch_dtype_ = -1;
  int32_t rows_dtype_ = -1;  // of the lists of rows that may be narrower; they are of one dtype
  std::vector<int64_t> lengths_;
  std::vector<Shape> shapes_;
};

// A Tensor[] argument of num_rows x T tensors.
class Rows {
 public:
  Rows(Segments &segments, const char *name, const Tensors &tensors, int64_t num_rows, Dtype allowed = Dtype::same);
  // One row: a plain list of T tensors.
  Rows(Segments &segments, const char *name, const Tensors &tensors, Dtype allowed = Dtype::same);
  Rows(const Rows &) = delete;
  Rows &operator=(const Rows &) = delete;
  const flatmtl_rows *get() const { return &rows_; }

 private:
  Data data_;
  flatmtl_rows rows_;
};

// A Tensor(a!)[] argument of T tensors.
class Vector {
 public:
  Vector(Segments &segments, const char *name, const Tensors &tensors);
  Vector(const Vector &) = delete;
  Vector &operator=(const Vector &) = delete;
  const flatmtl_vector *get() const { return &vector_; }

 private:
  Data data_;
  flatmtl_vector vector_;
};

// Threads of torch's pool and scratch memory for one call.
class Context {
 public:
  Context(const char *op, int64_t num_tasks, int64_t accumulate = FLATMTL_ACCUMULATE_AUTO);
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;
  const flatmtl_context *get() const { return &context_; }
  // As check(); also throws if torch's parallel_for failed.
  flatmtl_status check(flatmtl_status status, const flatmtl_error &error) const;

 private:
  struct Free {
    void operator()(void *memory) const;
  };
  const char *op_;
  bool parallel_failed_ = false;
  std::unique_ptr<void, Free> workspace_;
  flatmtl_context context_;
};

// num_tasks as the C core takes it, or an error.
int32_t task_count(const char *op, int64_t num_tasks);

// A new uninitialised CPU tensor: contiguous, or with the dtype, shape and strides of another.
Tensor new_doubles(const std::vector<int64_t> &sizes);
Tensor new_int64s(int64_t size);
Tensor new_like(const Tensor &tensor);
double *doubles(const Tensor &tensor);

// The data of a contiguous f64 CPU tensor of the given shape.
const double *doubles_argument(const char *op, const char *name, const Tensor &tensor,
                               const std::vector<int64_t> &sizes);

}  // namespace flatmtl
