// buffers.cpp - the buffer methods (GradDrop, MoCo, DB-MTL, ExcessMTL, SDMGrad) as torch operators. See
// flatmtl_torch.cpp.
#include <algorithm>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace flatmtl {
namespace {

flatmtl_buffer_method buffer_method(const char *op, int64_t method) {
  if (method < 0 || method >= FLATMTL_NUM_BUFFER_METHODS)
    fail(op, "method is " + std::to_string(method) + "; it must be between 0 and " +
                 std::to_string(FLATMTL_NUM_BUFFER_METHODS - 1));
  return static_cast<flatmtl_buffer_method>(method);
}

int32_t option_count(const char *op, const std::vector<double> &options) {
  if (options.size() > FLATMTL_MAX_TASKS + 2)
    fail(op, "options has " + std::to_string(options.size()) + " values, more than any method");
  return static_cast<int32_t>(options.size());
}

// x_i = a_i g_i + b_i (s_i - g_i); an empty list of perturbed rows is none.
struct Mixed {
  Mixed(const char *op, Segments &segments, const char *name, const Tensors &loss_rows, const Tensors &perturbed_rows,
        int64_t num_tasks, const Tensor &loss_factors, const Tensor &flat_factors, Dtype allowed = Dtype::same)
      : loss(segments, name, loss_rows, num_tasks, allowed) {
    if (!perturbed_rows.empty()) perturbed.emplace(segments, "perturbed_rows", perturbed_rows, num_tasks, allowed);
    value = {loss.get(), perturbed ? perturbed->get() : nullptr,
             doubles_argument(op, "loss_factors", loss_factors, {num_tasks}),
             doubles_argument(op, "flat_factors", flat_factors, {num_tasks})};
  }
  Mixed(const Mixed &) = delete;
  Mixed &operator=(const Mixed &) = delete;
  const flatmtl_mixed_rows *get() const { return &value; }

  Rows loss;
  std::optional<Rows> perturbed;
  flatmtl_mixed_rows value{};
};

// Buffers, which may be of another dtype than the rows; the elements of both must lie in the same order.
struct Buffers {
  Buffers(const char *op, const Tensors &buffers, const Tensors &rows, int64_t num_tasks)
      : segments(op), data(segments.add("buffers", buffers, num_tasks, true)) {
    const size_t count = static_cast<size_t>(segments.count());
    for (size_t t = 0; t < std::min(count, rows.size()); t++) {
      const Tensor &a = buffers[t], &b = rows[t];
      bool same = b.defined() && a.dim() == b.dim();
      for (int64_t d = 0; same && d < a.dim(); d++)
        same = a.size(d) == b.size(d) && (a.stride(d) == b.stride(d) || a.size(d) < 2);
      if (!same)
        fail(op, "buffers[0][" + std::to_string(t) + "] has another shape, or its elements in another order, than [" +
                     std::to_string(t) + "] of the rows");
    }
    value = {data.dtype, static_cast<int32_t>(num_tasks), segments.count(), segments.lengths(), data.pointers.data()};
  }
  Buffers(const Buffers &) = delete;
  Buffers &operator=(const Buffers &) = delete;
  const flatmtl_buffers *get() const { return &value; }

  Segments segments;
  Data data;
  flatmtl_buffers value{};
};

void moving_average_(const Tensors &buffers, const Tensors &loss_rows, const Tensors &perturbed_rows, int64_t num_tasks,
                     const Tensor &loss_factors, const Tensor &flat_factors, const Tensor &keep) {
  const char *op = "moving_average_";
  Context context(op, num_tasks);
  Segments segments(op);
  const Mixed rows(op, segments, "loss_rows", loss_rows, perturbed_rows, num_tasks, loss_factors, flat_factors);
  const Buffers memory(op, buffers, loss_rows, num_tasks);
  flatmtl_error error{};
  context.check(flatmtl_moving_average(context.get(), rows.get(), doubles_argument(op, "keep", keep, {num_tasks}),
                                       memory.get(), &error),
                error);
}

Tensor excess_(const Tensors &buffers, const Tensors &loss_rows, const Tensors &perturbed_rows, int64_t num_tasks,
               const Tensor &loss_factors, const Tensor &flat_factors) {
  const char *op = "excess_";
  Context context(op, num_tasks);
  Segments segments(op);
  const Mixed rows(op, segments, "loss_rows", loss_rows, perturbed_rows, num_tasks, loss_factors, flat_factors);
  const Buffers memory(op, buffers, loss_rows, num_tasks);
  Tensor result = new_doubles({num_tasks});
  flatmtl_error error{};
  context.check(flatmtl_excess(context.get(), rows.get(), memory.get(), doubles(result), &error), error);
  return result;
}

Tensor cross_gramian(const Tensors &loss_rows, const Tensors &perturbed_rows, const Tensors &other_loss_rows,
                     const Tensors &other_perturbed_rows, int64_t num_tasks, const Tensor &loss_factors,
                     const Tensor &flat_factors) {
  const char *op = "cross_gramian";
  Context context(op, num_tasks);
  Segments segments(op);
  const Mixed rows(op, segments, "loss_rows", loss_rows, perturbed_rows, num_tasks, loss_factors, flat_factors);
  const Mixed others(op, segments, "other_loss_rows", other_loss_rows, other_perturbed_rows, num_tasks, loss_factors,
                     flat_factors);
  Tensor result = new_doubles({num_tasks, num_tasks});
  flatmtl_error error{};
  context.check(flatmtl_cross_gramian(context.get(), rows.get(), others.get(), doubles(result), &error), error);
  return result;
}

void graddrop_(const Tensors &out, const Tensors &loss_rows, const Tensors &perturbed_rows, int64_t num_tasks,
               const Tensor &loss_factors, const Tensor &flat_factors, const Tensor &leak, int64_t seed, int64_t draw,
               int64_t call, int64_t position) {
  const char *op = "graddrop_";
  Context context(op, num_tasks);
  Segments segments(op);
  const Vector target(segments, "out", out);
  const Mixed rows(op, segments, "loss_rows", loss_rows, perturbed_rows, num_tasks, loss_factors, flat_factors,
                   Dtype::narrow);
  flatmtl_error error{};
  context.check(flatmtl_graddrop(context.get(), rows.get(), doubles_argument(op, "leak", leak, {num_tasks}), seed, draw,
                                 call, position, target.get(), &error),
                error);
}

void combine_buffers_(const Tensors &out, const Tensors &buffers, int64_t num_tasks, const Tensor &weights) {
  const char *op = "combine_buffers_";
  Context context(op, num_tasks);
  Segments segments(op);
  const Vector target(segments, "out", out);
  const Buffers memory(op, buffers, out, num_tasks);
  flatmtl_error error{};
  context.check(flatmtl_combine_buffers(context.get(), memory.get(),
                                        doubles_argument(op, "weights", weights, {num_tasks}), target.get(), &error),
                error);
}

// The state of a method for num_tasks tasks, nullptr where it has none.
double *state_argument(const char *op, flatmtl_buffer_method method, const Tensor &state, int64_t num_tasks) {
  int64_t count = 0;
  flatmtl_error error{};
  check(op, flatmtl_buffer_state_size(method, task_count(op, num_tasks), &count, nullptr, &error), error);
  doubles_argument(op, "state", state, {count});
  return count > 0 ? doubles(state) : nullptr;
}

std::tuple<Tensor, Tensor> buffer_factors(const Tensor &losses, const Tensor &sq_norms, const Tensor &state,
                                          int64_t method, const std::vector<double> &options) {
  const char *op = "buffer_factors";
  const int64_t num_tasks = losses.defined() && losses.dim() == 1 ? losses.size(0) : 0;
  const flatmtl_buffer_method number = buffer_method(op, method);
  const double *memory = state_argument(op, number, state, num_tasks);
  Tensor factors = new_doubles({num_tasks}), keep = new_doubles({num_tasks});
  flatmtl_error error{};
  check(op,
        flatmtl_buffer_factors(number, options.data(), option_count(op, options), task_count(op, num_tasks),
                               doubles_argument(op, "losses", losses, {num_tasks}),
                               doubles_argument(op, "sq_norms", sq_norms, {num_tasks}), memory, doubles(factors),
                               doubles(keep), &error),
        error);
  return {factors, keep};
}

Tensor buffer_weights(const Tensor &sums, const Tensor &state, int64_t method, const std::vector<double> &options) {
  const char *op = "buffer_weights";
  const int64_t num_tasks = sums.defined() && sums.dim() > 0 ? sums.size(0) : 0;
  const flatmtl_buffer_method number = buffer_method(op, method);
  Context context(op, num_tasks);
  const bool square = number == FLATMTL_BUFFER_MOCO || number == FLATMTL_BUFFER_SDMGRAD;
  const std::vector<int64_t> shape =
      square ? std::vector<int64_t>{num_tasks, num_tasks} : std::vector<int64_t>{num_tasks};
  const double *values = doubles_argument(op, "sums", sums, shape);
  double *memory = state_argument(op, number, state, num_tasks);
  Tensor weights = new_doubles({num_tasks});
  flatmtl_error error{};
  context.check(flatmtl_buffer_weights(context.get(), number, options.data(), option_count(op, options),
                                       task_count(op, num_tasks), values, memory, doubles(weights), &error),
                error);
  return weights;
}

Tensors buffer_update(const Tensors &rows, int64_t num_tasks, const Tensor &losses, int64_t method,
                      const std::vector<double> &options, int64_t call, const Tensors &buffers, const Tensor &state) {
  const char *op = "buffer_update";
  const flatmtl_buffer_method number = buffer_method(op, method);
  Context context(op, num_tasks);
  Segments segments(op);
  const Rows matrix(segments, "rows", rows, num_tasks);
  const flatmtl_mixed_rows mixed = {matrix.get(), nullptr, nullptr, nullptr};
  std::optional<Buffers> memory;
  if (number != FLATMTL_BUFFER_GRADDROP) memory.emplace(op, buffers, rows, num_tasks);
  double *numbers = state_argument(op, number, state, num_tasks);
  Tensors result;
  for (int64_t t = 0; t < segments.count(); ++t) result.push_back(new_like(rows[static_cast<size_t>(t)]));
  const Vector out(segments, "out", result);
  flatmtl_error error{};
  context.check(flatmtl_buffer_update(context.get(), number, options.data(), option_count(op, options), &mixed,
                                      doubles_argument(op, "losses", losses, {num_tasks}), call,
                                      memory ? memory->get() : nullptr, numbers, nullptr, out.get(), &error),
                error);
  return result;
}

}  // namespace
}  // namespace flatmtl

STABLE_TORCH_LIBRARY_FRAGMENT(flatmtl, m) {
  m.def(
      "moving_average_(Tensor(a!)[] buffers, Tensor[] loss_rows, Tensor[] perturbed_rows, int num_tasks, "
      "Tensor loss_factors, Tensor flat_factors, Tensor keep) -> ()");
  m.def(
      "excess_(Tensor(a!)[] buffers, Tensor[] loss_rows, Tensor[] perturbed_rows, int num_tasks, Tensor loss_factors, "
      "Tensor flat_factors) -> Tensor");
  m.def(
      "cross_gramian(Tensor[] loss_rows, Tensor[] perturbed_rows, Tensor[] other_loss_rows, "
      "Tensor[] other_perturbed_rows, int num_tasks, Tensor loss_factors, Tensor flat_factors) -> Tensor");
  m.def(
      "graddrop_(Tensor(a!)[] out, Tensor[] loss_rows, Tensor[] perturbed_rows, int num_tasks, Tensor loss_factors, "
      "Tensor flat_factors, Tensor leak, int seed, int draw, int call, int position) -> ()");
  m.def("combine_buffers_(Tensor(a!)[] out, Tensor[] buffers, int num_tasks, Tensor weights) -> ()");
  m.def(
      "buffer_factors(Tensor losses, Tensor sq_norms, Tensor state, int method, float[] options) -> (Tensor, Tensor)");
  m.def("buffer_weights(Tensor sums, Tensor(a!) state, int method, float[] options) -> Tensor");
  m.def(
      "buffer_update(Tensor[] rows, int num_tasks, Tensor losses, int method, float[] options, int call, "
      "Tensor(a!)[] buffers, Tensor(b!) state) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CompositeExplicitAutograd, m) {
  m.impl("moving_average_", TORCH_BOX(&flatmtl::moving_average_));
  m.impl("excess_", TORCH_BOX(&flatmtl::excess_));
  m.impl("cross_gramian", TORCH_BOX(&flatmtl::cross_gramian));
  m.impl("graddrop_", TORCH_BOX(&flatmtl::graddrop_));
  m.impl("combine_buffers_", TORCH_BOX(&flatmtl::combine_buffers_));
  m.impl("buffer_factors", TORCH_BOX(&flatmtl::buffer_factors));
  m.impl("buffer_weights", TORCH_BOX(&flatmtl::buffer_weights));
  m.impl("buffer_update", TORCH_BOX(&flatmtl::buffer_update));
}
