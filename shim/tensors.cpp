#include "tensors.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

namespace flatmtl {
namespace {

// Every call of torch's C shim reports failure by a code; none of those used here fails on a defined CPU tensor.
void must(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("flatmtl: a call of torch's C interface failed");
}

template <typename T, typename Handle>
T ask(AOTITorchError (*getter)(Handle, T *), const Tensor &tensor) {
  T value{};
  must(getter(tensor.get(), &value));
  return value;
}

std::string element(const char *name, bool has_rows, int64_t row, int64_t segment) {
  std::ostringstream text;
  text << name;
  if (has_rows) text << '[' << row << ']';
  text << '[' << segment << ']';
  return text.str();
}

std::string list(int64_t dim, const int64_t *values) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "") << values[d];
  text << (dim == 1 ? ",)" : ")");
  return text.str();
}

// The C core's dtype, or -1.
int core_dtype(int32_t torch_dtype) {
  if (torch_dtype == aoti_torch_dtype_float32()) return FLATMTL_F32;
  if (torch_dtype == aoti_torch_dtype_float64()) return FLATMTL_F64;
  if (torch_dtype == aoti_torch_dtype_bfloat16()) return FLATMTL_BF16;
  if (torch_dtype == aoti_torch_dtype_float16()) return FLATMTL_F16;
  return -1;
}

std::string dtype_name(int32_t torch_dtype) {
  static const char *const names[] = {"float32", "float64", "bfloat16", "float16"};
  const int dtype = core_dtype(torch_dtype);
  if (dtype >= 0) return names[dtype];
  if (torch_dtype == aoti_torch_dtype_int64()) return "int64";
  if (torch_dtype == aoti_torch_dtype_int32()) return "int32";
  if (torch_dtype == aoti_torch_dtype_bool()) return "bool";
  if (torch_dtype == aoti_torch_dtype_complex64()) return "complex64";
  if (torch_dtype == aoti_torch_dtype_complex128()) return "complex128";
  return "of torch's dtype number " + std::to_string(torch_dtype);
}

// Whether the elements fill one block of memory, each once, in any order of the dimensions.
bool is_dense(int64_t dim, const int64_t *sizes, const int64_t *strides) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t d = dim; contiguous && d-- > 0;) {
    contiguous = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
  }
  if (contiguous) return true;
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1) order.emplace_back(strides[d], sizes[d]);
  }
  std::sort(order.begin(), order.end());
  expected = 1;
  for (const auto &[stride, size] : order) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Strides of dimensions of size 1 say nothing.
bool same_strides(int64_t dim, const int64_t *sizes, const int64_t *a, const int64_t *b) {
  for (int64_t d = 0; d < dim; ++d)
    if (a[d] != b[d] && sizes[d] > 1) return false;
  return true;
}

// Undefined, on another device, or without strides: nothing below can read it.
void check_kind(const char *op, const std::string &name, const Tensor &tensor) {
  if (!tensor.defined())
    fail(op, name +
                 " is undefined. TorchScript empties a list that it hands to an op: pass a fresh list "
                 "([t for t in tensors]) or use flatmtl.script");
  if (!tensor.is_cpu())
    fail(op,
         name + " is not on the CPU; this op computes there. flatmtl.gramian and flatmtl.aggregate take any device");
  if (ask<int32_t>(aoti_torch_get_layout, tensor) != aoti_torch_layout_strided())
    fail(op, name + " is not a strided tensor (it is sparse, say); convert it with to_dense()");
}

Tensor new_strided(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t torch_dtype) {
  AtenTensorHandle handle = nullptr;
  must(aoti_torch_empty_strided(dim, sizes, strides, torch_dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_contiguous(const std::vector<int64_t> &sizes, int32_t torch_dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return new_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), torch_dtype);
}

// ThreadSanitizer does not see that the pool of torch, which is not built for it, runs the body after the caller's
// writes and before the caller goes on: this says so.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void *address);
extern "C" void __tsan_release(void *address);
void acquire(const void *address) {
  __tsan_acquire(const_cast<void *>(address));
}
void release(const void *address) {
  __tsan_release(const_cast<void *>(address));
}
#else
void acquire(const void *) {}
void release(const void *) {}
#endif

struct Call {
  int64_t begin, end, grain;
  flatmtl_range_fn fn;
  void *context;
};

// torch_parallel_for may cut ranges below its grain; whole grains are handed out instead, as the C core asks.
void run_grains(int64_t first, int64_t last, void *context) {
  const Call *call = static_cast<const Call *>(context);
  acquire(call);
  call->fn(call->begin + first * call->grain, std::min(call->end, call->begin + last * call->grain), call->context);
  release(&call->fn);
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, flatmtl_range_fn fn, void *context, void *host) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  Call call{begin, end, grain, fn, context};
  const int64_t grains = (end - begin - 1) / grain + 1;
  release(&call);
  if (torch_parallel_for(0, grains, 1, run_grains, &call) != AOTI_TORCH_SUCCESS) *static_cast<bool *>(host) = true;
  acquire(&call.fn);
}

}  // namespace

void fail(const char *op, const std::string &what) {
  throw std::runtime_error(std::string("flatmtl::") + op + ": " + what);
}

flatmtl_status check(const char *op, flatmtl_status status, const flatmtl_error &error) {
  if (status < 0) {
    char text[512];
    if (flatmtl_error_message(&error, text, sizeof text) < 0) std::strcpy(text, "unknown error");
    fail(op, text);
  }
  return status;
}

std::string Segments::reference(int64_t segment) const {
  return element(name_, has_rows_, 0, segment);
}

void Segments::take(int64_t segment, const Tensor &tensor, const Shape &shape, int32_t torch_dtype) {
  if (segment == 0) {
    if (core_dtype(torch_dtype) < 0)
      fail(op_, reference(0) + " is " + dtype_name(torch_dtype) + "; float32, float64, bfloat16 and float16 work");
    torch_dtype_ = torch_dtype;
  } else if (torch_dtype != torch_dtype_) {
    fail(op_, reference(segment) + " is " + dtype_name(torch_dtype) + ", " + reference(0) + " is " +
                  dtype_name(torch_dtype_));
  }
  if (!is_dense(shape.dim, shape.sizes, shape.strides))
    fail(op_, reference(segment) + " has shape " + list(shape.dim, shape.sizes) + " and strides " +
                  list(shape.dim, shape.strides) +
                  ": its elements do not fill one block of memory; pass a contiguous tensor");
  lengths_.push_back(tensor.numel());
  shapes_.push_back(shape);
}

void Segments::compare(const std::string &name, int64_t segment, const Tensor &tensor, const Shape &shape,
                       int32_t torch_dtype, int32_t expected_dtype) const {
  const Shape &expected = shapes_[segment];
  if (torch_dtype != expected_dtype)
    fail(op_, name + " is " + dtype_name(torch_dtype) + ", " +
                  (expected_dtype == torch_dtype_ ? reference(segment) + " is " : "the tensors before it are ") +
                  dtype_name(expected_dtype));
  const int64_t length = tensor.numel();
  if (length != lengths_[segment])
    fail(op_, name + " has " + std::to_string(length) + " elements, " + reference(segment) + " has " +
                  std::to_string(lengths_[segment]));
  if (shape.dim != expected.dim || !std::equal(shape.sizes, shape.sizes + shape.dim, expected.sizes))
    fail(op_, name + " has shape " + list(shape.dim, shape.sizes) + ", " + reference(segment) + " has " +
                  list(expected.dim, expected.sizes));
  if (length > 0 && !same_strides(shape.dim, shape.sizes, shape.strides, expected.strides))
    fail(op_, name + " has strides " + list(shape.dim, shape.strides) + ", " + reference(segment) + " has " +
                  list(expected.dim, expected.strides) + "; their elements must lie in the same order");
}

bool Segments::allows(Dtype allowed, int32_t torch_dtype) const {
  const int32_t wide = aoti_torch_dtype_float32();
  const auto is_narrow = [](int32_t dtype) {
    return dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16();
  };
  if (allowed == Dtype::narrow) return torch_dtype_ == wide && is_narrow(torch_dtype);
  return allowed == Dtype::wide && torch_dtype == wide && is_narrow(torch_dtype_);
}

Data Segments::add(const char *name, const Tensors &tensors, int64_t num_rows, bool has_rows, Dtype allowed) {
  const int64_t total = static_cast<int64_t>(tensors.size());
  const bool first = name_ == nullptr;
  if (first) {
    name_ = name;
    has_rows_ = has_rows;
    if (total % num_rows != 0)
      fail(op_, std::string(name) + " has " + std::to_string(total) + " tensors, which " + std::to_string(num_rows) +
                    " tasks do not divide");
  } else if (total != num_rows * count()) {
    const std::string expected = has_rows ? std::to_string(num_rows) + " rows of " : std::string();
    fail(op_, std::string(name) + " has " + std::to_string(total) + " tensors, but " + name_ + " has " +
                  std::to_string(count()) + (has_rows_ ? " a row" : "") + ": expected " + expected +
                  std::to_string(count()));
  }
  const int64_t num_segments = total / num_rows;
  int32_t expected_dtype = allowed == Dtype::narrow && rows_dtype_ >= 0 ? rows_dtype_ : torch_dtype_;
  std::vector<void *> data(total);
  for (int64_t i = 0; i < total; ++i) {
    const int64_t row = i / num_segments, segment = i % num_segments;
    const Tensor &tensor = tensors[i];
    const auto label = [&] { return element(name, has_rows, row, segment); };
    if (!tensor.defined() || !tensor.is_cpu() ||
        ask<int32_t>(aoti_torch_get_layout, tensor) != aoti_torch_layout_strided())
      check_kind(op_, label(), tensor);
    const Shape shape{tensor.dim(), tensor.sizes().data(), tensor.strides().data()};
    const int32_t dtype = ask<int32_t>(aoti_torch_get_dtype, tensor);
    if (first && row == 0) {
      take(segment, tensor, shape, dtype);
      expected_dtype = torch_dtype_;
    } else {
      if (i == 0 && rows_dtype_ < 0 && allows(allowed, dtype)) expected_dtype = dtype;
      const Shape &expected = shapes_[segment];
      const size_t bytes = sizeof(int64_t) * static_cast<size_t>(expected.dim);
      // The usual case by comparing bytes; compare() finds what differs, if that matters.
      if (dtype != expected_dtype || shape.dim != expected.dim ||
          std::memcmp(shape.sizes, expected.sizes, bytes) != 0 ||
          std::memcmp(shape.strides, expected.strides, bytes) != 0)
        compare(label(), segment, tensor, shape, dtype, expected_dtype);
    }
    data[i] = tensor.data_ptr();
  }
  if (allowed == Dtype::narrow && total > 0) rows_dtype_ = expected_dtype;
  const int dtype = core_dtype(expected_dtype);
  return {std::move(data), dtype < 0 ? FLATMTL_F32 : static_cast<flatmtl_dtype>(dtype)};  // of no tensors: any
}

Rows::Rows(Segments &segments, const char *name, const Tensors &tensors, int64_t num_rows, Dtype allowed)
    : data_(segments.add(name, tensors, num_rows, true, allowed)),
      rows_{data_.dtype, static_cast<int32_t>(num_rows), segments.count(), segments.lengths(), data_.pointers.data()} {}

Rows::Rows(Segments &segments, const char *name, const Tensors &tensors, Dtype allowed)
    : data_(segments.add(name, tensors, 1, false, allowed)),
      rows_{data_.dtype, 1, segments.count(), segments.lengths(), data_.pointers.data()} {}

Vector::Vector(Segments &segments, const char *name, const Tensors &tensors)
    : data_(segments.add(name, tensors, 1, false)),
      vector_{data_.dtype, segments.count(), segments.lengths(), data_.pointers.data()} {}

void Context::Free::operator()(void *memory) const {
  std::free(memory);
}

Context::Context(const char *op, int64_t num_tasks, int64_t accumulate) : op_(op) {
  if (accumulate != FLATMTL_ACCUMULATE_AUTO && accumulate != FLATMTL_ACCUMULATE_F64)
    fail(op, "accumulate is " + std::to_string(accumulate) + "; it must be 0 (auto) or 1 (f64)");
  flatmtl_error error{};
  size_t bytes = 0;
  flatmtl::check(op, flatmtl_workspace_size(task_count(op, num_tasks), &bytes, &error), error);
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > 0) {
    workspace_.reset(std::aligned_alloc(64, bytes));
    if (!workspace_) fail(op, "no memory for a workspace of " + std::to_string(bytes) + " bytes");
  }
  context_ = {parallel_for, &parallel_failed_, workspace_.get(), bytes, static_cast<flatmtl_accumulate>(accumulate)};
}

flatmtl_status Context::check(flatmtl_status status, const flatmtl_error &error) const {
  if (parallel_failed_) fail(op_, "torch_parallel_for failed");
  return flatmtl::check(op_, status, error);
}

int32_t task_count(const char *op, int64_t num_tasks) {
  if (num_tasks < 1 || num_tasks > FLATMTL_MAX_TASKS)
    fail(op, "num_tasks is " + std::to_string(num_tasks) + "; it must be between 1 and " +
                 std::to_string(FLATMTL_MAX_TASKS));
  return static_cast<int32_t>(num_tasks);
}

Tensor new_doubles(const std::vector<int64_t> &sizes) {
  return new_contiguous(sizes, aoti_torch_dtype_float64());
}

Tensor new_int64s(int64_t size) {
  return new_contiguous({size}, aoti_torch_dtype_int64());
}

Tensor new_like(const Tensor &tensor) {
  return new_strided(tensor.dim(), tensor.sizes().data(), tensor.strides().data(),
                     ask<int32_t>(aoti_torch_get_dtype, tensor));
}

double *doubles(const Tensor &tensor) {
  return static_cast<double *>(tensor.mutable_data_ptr());
}

const double *doubles_argument(const char *op, const char *name, const Tensor &tensor,
                               const std::vector<int64_t> &sizes) {
  check_kind(op, name, tensor);
  const int32_t dtype = ask<int32_t>(aoti_torch_get_dtype, tensor);
  if (dtype != aoti_torch_dtype_float64())
    fail(op, std::string(name) + " is " + dtype_name(dtype) + "; it must be float64");
  const int64_t dim = tensor.dim();
  const int64_t *shape = tensor.sizes().data();
  if (dim != static_cast<int64_t>(sizes.size()) || !std::equal(sizes.begin(), sizes.end(), shape))
    fail(op, std::string(name) + " has shape " + list(dim, shape) + "; expected " +
                 list(static_cast<int64_t>(sizes.size()), sizes.data()));
  if (!tensor.is_contiguous()) fail(op, std::string(name) + " is not contiguous");
  return static_cast<const double *>(tensor.const_data_ptr());
}

}  // namespace flatmtl
