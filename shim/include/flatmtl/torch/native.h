// native.h - the C core's kernels on lists of CPU tensors, with torch's threads. Private.
//
// A row is a list of T tensors of one dtype. Every tensor is dense, and the t-th of every row has the same shape and
// strides; the callers see to that. Rows of gradients may be narrower than the parameters they stand beside, as the C
// core allows it. Nothing is copied.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/c/shim.h>
#include <torch/types.h>

#include "errors.h"

// ThreadSanitizer does not see fork and join of torch's pool, which is not built for it: this says so.
#if defined(__SANITIZE_THREAD__)
#define FLATMTL_TSAN(call) call
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FLATMTL_TSAN(call) call
#endif
#endif
#ifdef FLATMTL_TSAN
extern "C" void __tsan_acquire(void *address);
extern "C" void __tsan_release(void *address);
#else
#define FLATMTL_TSAN(call) static_cast<void>(0)
#endif

namespace flatmtl {
namespace detail {

using Row = std::vector<torch::Tensor>;

// The C core's dtype, or -1.
inline int core_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return FLATMTL_F32;
    case at::kDouble:
      return FLATMTL_F64;
    case at::kBFloat16:
      return FLATMTL_BF16;
    case at::kHalf:
      return FLATMTL_F16;
    default:
      return -1;
  }
}

// The segment table of the first row of a call, which all others must have; the rows of one list are of one dtype.
class Segments {
 public:
  explicit Segments(const Row &first) {
    for (const auto &tensor : first) lengths_.push_back(tensor.numel());
  }

  flatmtl_rows rows(const std::vector<Row> &rows, std::vector<const void *> *data) const {
    const flatmtl_dtype dtype = rows.empty() ? FLATMTL_F32 : dtype_of(rows[0]);
    for (const auto &row : rows)
      for (size_t t = 0; t < row.size(); ++t) data->push_back(checked(row, t, dtype).const_data_ptr());
    return {dtype, static_cast<int32_t>(rows.size()), count(), lengths_.data(), data->data()};
  }

  flatmtl_vector vector(const Row &row, std::vector<void *> *data) const {
    const flatmtl_dtype dtype = dtype_of(row);
    for (size_t t = 0; t < row.size(); ++t) data->push_back(checked(row, t, dtype).mutable_data_ptr());
    return {dtype, count(), lengths_.data(), data->data()};
  }

 private:
  int64_t count() const { return static_cast<int64_t>(lengths_.size()); }

  static flatmtl_dtype dtype_of(const Row &row) {
    return row.empty() ? FLATMTL_F32 : static_cast<flatmtl_dtype>(core_dtype(row[0].scalar_type()));
  }

  const torch::Tensor &checked(const Row &row, size_t t, flatmtl_dtype dtype) const {
    const torch::Tensor &tensor = row[t];
    if (row.size() != lengths_.size() || tensor.numel() != lengths_[t] || core_dtype(tensor.scalar_type()) != dtype ||
        !tensor.is_cpu())
      throw std::logic_error("flatmtl: rows of different shapes or dtypes (a bug, please report it)");
    return tensor;
  }

  std::vector<int64_t> lengths_;
};

// Threads of torch's pool and scratch memory for one call of the C core.
class Context {
 public:
  Context(const char *name, int64_t num_tasks, flatmtl_accumulate accumulate = FLATMTL_ACCUMULATE_AUTO) : name_(name) {
    size_t bytes = 0;
    flatmtl_error error{};
    detail::check(name, flatmtl_workspace_size(static_cast<int32_t>(num_tasks), &bytes, &error), error);
    bytes = (bytes + 63) / 64 * 64;
    workspace_.reset(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
    if (!workspace_)
      throw std::runtime_error(std::string("flatmtl::") + name + ": no memory for a workspace of " +
                               std::to_string(bytes) + " bytes");
    context_ = {parallel_for, &failed_, workspace_.get(), bytes, accumulate};
  }
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;

  const flatmtl_context *get() const { return &context_; }

  // The kernels' results hold Inf and NaN where the rows do; the caller looks at them.
  void check(flatmtl_status status, const flatmtl_error &error) const {
    if (failed_) throw std::runtime_error(std::string("flatmtl::") + name_ + ": torch_parallel_for failed");
    if (status != FLATMTL_ERROR_NONFINITE || error.row < 0) detail::check(name_, status, error);
  }

 private:
  struct Call {
    int64_t begin, end, grain;
    flatmtl_range_fn fn;
    void *context;
  };

  // torch_parallel_for may cut ranges below its grain; whole grains are handed out instead, as the C core asks.
  static void run_grains(int64_t first, int64_t last, void *context) {
    Call *call = static_cast<Call *>(context);
    FLATMTL_TSAN(__tsan_acquire(&call->begin));
    call->fn(call->begin + first * call->grain, std::min(call->end, call->begin + last * call->grain), call->context);
    FLATMTL_TSAN(__tsan_release(&call->fn));  // another address: no worker waits for another
  }

  // torch's parallel_for inside its library: the template in its headers is serial where OpenMP is off in this build.
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, flatmtl_range_fn fn, void *context, void *host) {
    if (begin >= end) return;
    grain = std::max<int64_t>(grain, 1);
    Call call{begin, end, grain, fn, context};
    const int64_t grains = (end - begin - 1) / grain + 1;
    FLATMTL_TSAN(__tsan_release(&call.begin));
    if (torch_parallel_for(0, grains, 1, run_grains, &call) != 0) *static_cast<bool *>(host) = true;
    FLATMTL_TSAN(__tsan_acquire(&call.fn));
  }

  struct Free {
    void operator()(void *memory) const { std::free(memory); }
  };
  const char *name_;
  bool failed_ = false;
  std::unique_ptr<void, Free> workspace_;
  flatmtl_context context_{};
};

inline double *doubles(torch::Tensor &tensor) {
  return static_cast<double *>(tensor.mutable_data_ptr());
}

// Tells autograd that tensors were written to.
inline void increment_version(const Row &row) {
  for (const auto &tensor : row) tensor.unsafeGetTensorImpl()->bump_version();
}

// G_ij = <x_i, x_j>, (K, K) float64.
inline torch::Tensor gramian(const std::vector<Row> &rows, flatmtl_accumulate accumulate) {
  const auto count = static_cast<int64_t>(rows.size());
  Context context("gramian", count, accumulate);
  const Segments segments(rows[0]);
  std::vector<const void *> data;
  const flatmtl_rows matrix = segments.rows(rows, &data);
  torch::Tensor result = torch::empty({count, count}, torch::kDouble);
  flatmtl_error error{};
  context.check(flatmtl_gramian(context.get(), &matrix, doubles(result), &error), error);
  return result;
}

// Gramian of (g_1 .. g_K, f_1 .. f_K), f = perturbed - loss rows, (2K, 2K) float64; <g_i, f_j> = 0 without `cross`.
inline torch::Tensor gramian_pair(const std::vector<Row> &loss_rows, const std::vector<Row> &perturbed_rows,
                                  flatmtl_accumulate accumulate, bool cross) {
  const auto count = static_cast<int64_t>(loss_rows.size());
  Context context("gramian_pair", count, accumulate);
  const Segments segments(loss_rows[0]);
  std::vector<const void *> loss_data, perturbed_data;
  const flatmtl_rows loss = segments.rows(loss_rows, &loss_data);
  const flatmtl_rows perturbed = segments.rows(perturbed_rows, &perturbed_data);
  torch::Tensor result = torch::empty({2 * count, 2 * count}, torch::kDouble);
  flatmtl_error error{};
  context.check(flatmtl_gramian_pair(context.get(), &loss, &perturbed, cross, doubles(result), &error), error);
  return result;
}

// Squared norm of one row; with params (not empty) of (|params| + eta) x.
inline double sq_norm(const Row &row, const Row &params, double eta) {
  Context context("sq_norms", 1);
  const Segments segments(row);
  std::vector<const void *> data, param_data;
  const flatmtl_rows x = segments.rows({row}, &data);
  const flatmtl_rows t = segments.rows({params}, &param_data);
  double result = 0.0;
  flatmtl_error error{};
  context.check(flatmtl_sq_norms(context.get(), &x, params.empty() ? nullptr : &t, eta, &result, &error), error);
  return result;
}

// params[t] = saved[t] + scale[t] T^2 grads[t], T = 1, or |saved[t]| + eta if adaptive.
inline void perturb(const Row &params, const Row &saved, const Row &grads, const std::vector<double> &scale,
                    bool adaptive, double eta) {
  Context context("perturb_", 1);
  const Segments segments(params);
  std::vector<void *> out_data;
  std::vector<const void *> saved_data, grad_data;
  const flatmtl_vector out = segments.vector(params, &out_data);
  const flatmtl_rows from = segments.rows({saved}, &saved_data), gradient = segments.rows({grads}, &grad_data);
  flatmtl_error error{};
  flatmtl_status status =
      flatmtl_perturb(context.get(), &out, &from, &gradient, scale.data(), adaptive ? 1 : 0, eta, &error);
  check("perturb_", status, error);
  context.check(status, error);
  increment_version(params);
}

// to[t] = from[t], bit for bit.
inline void copy(const Row &to, const Row &from) {
  Context context("copy_", 1);
  const Segments segments(to);
  std::vector<void *> out_data;
  std::vector<const void *> in_data;
  const flatmtl_vector out = segments.vector(to, &out_data);
  const flatmtl_rows in = segments.rows({from}, &in_data);
  flatmtl_error error{};
  context.check(flatmtl_copy(context.get(), &out, &in, &error), error);
  increment_version(to);
}

// out[t] = SUM_i weights[i] rows[i][t].
inline void combine(const Row &out, const std::vector<Row> &rows, const std::vector<double> &weights) {
  Context context("combine_", static_cast<int64_t>(rows.size()));
  const Segments segments(out);
  std::vector<void *> out_data;
  std::vector<const void *> data;
  const flatmtl_vector result = segments.vector(out, &out_data);
  const flatmtl_rows matrix = segments.rows(rows, &data);
  flatmtl_error error{};
  context.check(flatmtl_combine(context.get(), &matrix, weights.data(), &result, &error), error);
  increment_version(out);
}

// out[t] = SUM_i loss_weights[i] g_i[t] + flat_weights[i] (s_i - g_i)[t].
inline void combine_pair(const Row &out, const std::vector<Row> &loss_rows, const std::vector<Row> &perturbed_rows,
                         const std::vector<double> &loss_weights, const std::vector<double> &flat_weights) {
  Context context("combine_pair_", static_cast<int64_t>(loss_rows.size()));
  const Segments segments(out);
  std::vector<void *> out_data;
  std::vector<const void *> loss_data, perturbed_data;
  const flatmtl_vector result = segments.vector(out, &out_data);
  const flatmtl_rows loss = segments.rows(loss_rows, &loss_data);
  const flatmtl_rows perturbed = segments.rows(perturbed_rows, &perturbed_data);
  flatmtl_error error{};
  context.check(
      flatmtl_combine_pair(context.get(), &loss, &perturbed, loss_weights.data(), flat_weights.data(), &result, &error),
      error);
  increment_version(out);
}

}  // namespace detail
}  // namespace flatmtl
