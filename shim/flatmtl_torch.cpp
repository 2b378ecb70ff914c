// flatmtl_torch.cpp - the C core as torch operators, on the LibTorch stable ABI: one shared object for torch >= 2.10.
//
// Every op checks its tensors, hands their buffers to the C core and computes nothing itself. Registered for all
// backends (CompositeExplicitAutograd) rather than for the CPU alone: the dispatcher then finds the op for empty lists
// too, and tensors of other devices get our message. There is no autograd: call them under no_grad. Version
// counters of the tensors written to are the caller's business (torch.autograd.graph.increment_version).
#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace flatmtl {
namespace {

// Results of the kernels hold Inf and NaN where the input does; the caller looks at them.
flatmtl_status allow_nonfinite(flatmtl_status status) {
  return status == FLATMTL_ERROR_NONFINITE ? FLATMTL_OK : status;
}

flatmtl_method method_number(const char *op, int64_t method) {
  if (method < 0 || method >= FLATMTL_NUM_METHODS)
    fail(op, "method is " + std::to_string(method) + "; it must be between 0 and " +
                 std::to_string(FLATMTL_NUM_METHODS - 1));
  return static_cast<flatmtl_method>(method);
}

int32_t option_count(const char *op, const std::vector<double> &options) {
  if (options.size() > FLATMTL_MAX_TASKS)
    fail(op, "options has " + std::to_string(options.size()) + " values, more than there can be tasks");
  return static_cast<int32_t>(options.size());
}

// K of a (factor K, factor K) tensor.
int64_t square_size(const char *op, const char *name, const Tensor &tensor, int64_t factor) {
  const int64_t size = tensor.defined() && tensor.dim() == 2 ? tensor.size(0) : 0;
  if (size < factor || size != tensor.size(1) || size % factor != 0)
    fail(op,
         std::string(name) + (factor == 1 ? " must be a K x K matrix" : " must be a 2K x 2K matrix") + " with K >= 1");
  return size / factor;
}

Tensor gramian(const Tensors &rows, int64_t num_tasks, int64_t accumulate) {
  const char *op = "gramian";
  Context context(op, num_tasks, accumulate);
  Segments segments(op);
  const Rows matrix(segments, "rows", rows, num_tasks);
  Tensor result = new_doubles({num_tasks, num_tasks});
  flatmtl_error error{};
  context.check(allow_nonfinite(flatmtl_gramian(context.get(), matrix.get(), doubles(result), &error)), error);
  return result;
}

Tensor gramian_pair(const Tensors &loss_rows, const Tensors &perturbed_rows, int64_t num_tasks, int64_t accumulate,
                    bool cross) {
  const char *op = "gramian_pair";
  Context context(op, num_tasks, accumulate);
  Segments segments(op);
  const Rows loss(segments, "loss_rows", loss_rows, num_tasks);
  const Rows perturbed(segments, "perturbed_rows", perturbed_rows, num_tasks);
  Tensor result = new_doubles({2 * num_tasks, 2 * num_tasks});
  flatmtl_error error{};
  context.check(
      allow_nonfinite(flatmtl_gramian_pair(context.get(), loss.get(), perturbed.get(), cross, doubles(result), &error)),
      error);
  return result;
}

Tensor sq_norms(const Tensors &rows, int64_t num_tasks, const Tensors &params, double eta) {
  const char *op = "sq_norms";
  Context context(op, num_tasks);
  Segments segments(op);
  const Rows matrix(segments, "rows", rows, num_tasks);
  std::optional<Rows> weights;
  if (!params.empty()) weights.emplace(segments, "params", params, Dtype::wide);
  Tensor result = new_doubles({num_tasks});
  flatmtl_error error{};
  context.check(allow_nonfinite(flatmtl_sq_norms(context.get(), matrix.get(), weights ? weights->get() : nullptr, eta,
                                                 doubles(result), &error)),
                error);
  return result;
}

// The state argument of an op: count doubles; without one a fresh state, which is forgotten.
class State {
 public:
  State(const char *op, const std::optional<Tensor> &state, int64_t count) {
    if (!state) {
      fresh_.resize(static_cast<size_t>(count));
      data_ = fresh_.data();
    } else {
      doubles_argument(op, "state", *state, {count});
      data_ = static_cast<double *>(state->mutable_data_ptr());
    }
  }
  State(const State &) = delete;
  State &operator=(const State &) = delete;
  double *get() const { return data_; }

 private:
  std::vector<double> fresh_;
  double *data_;
};

Tensor weights_of(const Tensor &gramian, int64_t method, const std::vector<double> &options,
                  const std::optional<Tensor> &state) {
  const char *op = "weights";
  const int64_t num_tasks = square_size(op, "gramian", gramian, 1);
  Context context(op, num_tasks);
  const double *matrix = doubles_argument(op, "gramian", gramian, {num_tasks, num_tasks});
  const flatmtl_method number = method_number(op, method);
  flatmtl_error error{};
  int64_t count = 0;
  check(op, flatmtl_state_size(number, task_count(op, num_tasks), &count, &error), error);
  const State state_data(op, state, count);
  Tensor result = new_doubles({num_tasks});
  context.check(flatmtl_weights(context.get(), number, options.data(), option_count(op, options),
                                task_count(op, num_tasks), matrix, state_data.get(), doubles(result), &error),
                error);
  return result;
}

// Two ops, with a state and without: Inductor (torch 2.13) compiles none that may write to an optional argument.
Tensor weights(const Tensor &gramian, int64_t method, const std::vector<double> &options) {
  return weights_of(gramian, method, options, std::nullopt);
}

Tensor weights_(const Tensor &gramian, int64_t method, const std::vector<double> &options, const Tensor &state) {
  return weights_of(gramian, method, options, state);
}

std::tuple<Tensor, Tensor, Tensor> weights_of_step(const Tensor &gramian_pair,
                                                   const std::optional<Tensor> &perturbed_gramian, int64_t method,
                                                   const std::vector<double> &options, int64_t combine,
                                                   int64_t family_scale, const std::optional<Tensor> &state) {
  const char *op = "step_weights";
  const int64_t num_tasks = square_size(op, "gramian_pair", gramian_pair, 2);
  Context context(op, num_tasks);
  const double *pair = doubles_argument(op, "gramian_pair", gramian_pair, {2 * num_tasks, 2 * num_tasks});
  const double *perturbed = nullptr;
  if (perturbed_gramian)
    perturbed = doubles_argument(op, "perturbed_gramian", *perturbed_gramian, {num_tasks, num_tasks});
  flatmtl_error error{};
  flatmtl_settings settings;
  check(op, flatmtl_settings_default(&settings, &error), error);
  settings.method = method_number(op, method);
  settings.options = options.data();
  settings.num_options = option_count(op, options);
  if (combine < FLATMTL_DECOMPOSED || combine > FLATMTL_EACH)
    fail(op, "combine is " + std::to_string(combine) + "; it must be between 0 and 3");
  if (family_scale != FLATMTL_SCALE_NONE && family_scale != FLATMTL_SCALE_RMS)
    fail(op, "family_scale is " + std::to_string(family_scale) + "; it must be 0 or 1");
  settings.combine = static_cast<flatmtl_combination>(combine);
  settings.family_scale = static_cast<flatmtl_family_scale>(family_scale);
  int64_t count = 0;
  check(op, flatmtl_step_state_size(&settings, task_count(op, num_tasks), &count, &error), error);
  const State state_data(op, state, count);
  settings.state = state_data.get();
  Tensor loss_weights = new_doubles({num_tasks}), flat_weights = new_doubles({num_tasks});
  flatmtl_status family_status[2] = {FLATMTL_OK, FLATMTL_OK};
  context.check(flatmtl_step_weights(context.get(), &settings, task_count(op, num_tasks), pair, perturbed,
                                     doubles(loss_weights), doubles(flat_weights), family_status, &error),
                error);
  Tensor status = new_int64s(2);
  int64_t *values = static_cast<int64_t *>(status.mutable_data_ptr());
  values[0] = family_status[0];
  values[1] = family_status[1];
  return {loss_weights, flat_weights, status};
}

// As weights and weights_.
std::tuple<Tensor, Tensor, Tensor> step_weights(const Tensor &gramian_pair,
                                                const std::optional<Tensor> &perturbed_gramian, int64_t method,
                                                const std::vector<double> &options, int64_t combine,
                                                int64_t family_scale) {
  return weights_of_step(gramian_pair, perturbed_gramian, method, options, combine, family_scale, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> step_weights_(const Tensor &gramian_pair,
                                                 const std::optional<Tensor> &perturbed_gramian, int64_t method,
                                                 const std::vector<double> &options, int64_t combine,
                                                 int64_t family_scale, const Tensor &state) {
  return weights_of_step(gramian_pair, perturbed_gramian, method, options, combine, family_scale, state);
}

// One new tensor for each of the first count.
Tensors new_row(const Tensors &like, int64_t count) {
  Tensors row;
  for (int64_t t = 0; t < count; ++t) row.push_back(new_like(like[static_cast<size_t>(t)]));
  return row;
}

// With a fresh state: torch's compilers take no op that writes to an argument and returns a list.
Tensors aggregate(const Tensors &rows, int64_t num_tasks, int64_t method, const std::vector<double> &options) {
  const char *op = "aggregate";
  Context context(op, num_tasks);
  Segments segments(op);
  const Rows matrix(segments, "rows", rows, num_tasks);
  const size_t size = static_cast<size_t>(num_tasks);
  std::vector<double> gramian(size * size), weights(size);
  flatmtl_error error{};
  context.check(flatmtl_gramian(context.get(), matrix.get(), gramian.data(), &error), error);
  const flatmtl_method number = method_number(op, method);
  int64_t count = 0;
  check(op, flatmtl_state_size(number, task_count(op, num_tasks), &count, &error), error);
  const State state(op, std::nullopt, count);
  context.check(flatmtl_weights(context.get(), number, options.data(), option_count(op, options),
                                task_count(op, num_tasks), gramian.data(), state.get(), weights.data(), &error),
                error);
  const Tensors result = new_row(rows, segments.count());
  const Vector out(segments, "out", result);
  context.check(flatmtl_combine(context.get(), matrix.get(), weights.data(), out.get(), &error), error);
  return result;
}

void perturb_(const Tensors &params, const Tensors &saved, const Tensors &grads, const std::vector<double> &scale,
              bool adaptive, double eta) {
  const char *op = "perturb_";
  Context context(op, 1);
  Segments segments(op);
  const Vector out(segments, "params", params);
  const Rows from(segments, "saved", saved), gradient(segments, "grads", grads, Dtype::narrow);
  if (static_cast<int64_t>(scale.size()) != segments.count())
    fail(op, "scale has " + std::to_string(scale.size()) + " values, params has " + std::to_string(segments.count()) +
                 " tensors");
  flatmtl_error error{};
  context.check(flatmtl_perturb(context.get(), out.get(), from.get(), gradient.get(), scale.data(), adaptive ? 1 : 0,
                                eta, &error),
                error);
}

void copy_(const Tensors &to, const Tensors &source) {
  const char *op = "copy_";
  Context context(op, 1);
  Segments segments(op);
  const Vector out(segments, "to", to);
  const Rows in(segments, "source", source);
  flatmtl_error error{};
  context.check(flatmtl_copy(context.get(), out.get(), in.get(), &error), error);
}

void combine_(const Tensors &out, const Tensors &rows, int64_t num_tasks, const Tensor &weights) {
  const char *op = "combine_";
  Context context(op, num_tasks);
  Segments segments(op);
  const Vector result(segments, "out", out);
  const Rows matrix(segments, "rows", rows, num_tasks, Dtype::narrow);
  const double *values = doubles_argument(op, "weights", weights, {num_tasks});
  flatmtl_error error{};
  context.check(flatmtl_combine(context.get(), matrix.get(), values, result.get(), &error), error);
}

void combine_pair_(const Tensors &out, const Tensors &loss_rows, const Tensors &perturbed_rows, int64_t num_tasks,
                   const Tensor &loss_weights, const Tensor &flat_weights) {
  const char *op = "combine_pair_";
  Context context(op, num_tasks);
  Segments segments(op);
  const Vector result(segments, "out", out);
  const Rows loss(segments, "loss_rows", loss_rows, num_tasks, Dtype::narrow);
  const Rows perturbed(segments, "perturbed_rows", perturbed_rows, num_tasks, Dtype::narrow);
  const double *a = doubles_argument(op, "loss_weights", loss_weights, {num_tasks});
  const double *b = doubles_argument(op, "flat_weights", flat_weights, {num_tasks});
  flatmtl_error error{};
  context.check(flatmtl_combine_pair(context.get(), loss.get(), perturbed.get(), a, b, result.get(), &error), error);
}

// The same ones with new tensors for their result. TorchScript needs them: it drops a call that returns nothing if the
// list written to is a temporary, whatever the tensors in it.

Tensors perturb(const Tensors &saved, const Tensors &grads, const std::vector<double> &scale, bool adaptive,
                double eta) {
  const char *op = "perturb";
  Context context(op, 1);
  Segments segments(op);
  const Rows from(segments, "saved", saved), gradient(segments, "grads", grads, Dtype::narrow);
  if (static_cast<int64_t>(scale.size()) != segments.count())
    fail(op, "scale has " + std::to_string(scale.size()) + " values, saved has " + std::to_string(segments.count()) +
                 " tensors");
  const Tensors result = new_row(saved, segments.count());
  const Vector out(segments, "out", result);
  flatmtl_error error{};
  context.check(flatmtl_perturb(context.get(), out.get(), from.get(), gradient.get(), scale.data(), adaptive ? 1 : 0,
                                eta, &error),
                error);
  return result;
}

Tensors combine(const Tensors &rows, int64_t num_tasks, const Tensor &weights) {
  const char *op = "combine";
  Context context(op, num_tasks);
  Segments segments(op);
  const Rows matrix(segments, "rows", rows, num_tasks);
  const double *values = doubles_argument(op, "weights", weights, {num_tasks});
  const Tensors result = new_row(rows, segments.count());
  const Vector out(segments, "out", result);
  flatmtl_error error{};
  context.check(flatmtl_combine(context.get(), matrix.get(), values, out.get(), &error), error);
  return result;
}

Tensors combine_pair(const Tensors &loss_rows, const Tensors &perturbed_rows, int64_t num_tasks,
                     const Tensor &loss_weights, const Tensor &flat_weights) {
  const char *op = "combine_pair";
  Context context(op, num_tasks);
  Segments segments(op);
  const Rows loss(segments, "loss_rows", loss_rows, num_tasks);
  const Rows perturbed(segments, "perturbed_rows", perturbed_rows, num_tasks);
  const double *a = doubles_argument(op, "loss_weights", loss_weights, {num_tasks});
  const double *b = doubles_argument(op, "flat_weights", flat_weights, {num_tasks});
  const Tensors result = new_row(loss_rows, segments.count());
  const Vector out(segments, "out", result);
  flatmtl_error error{};
  context.check(flatmtl_combine_pair(context.get(), loss.get(), perturbed.get(), a, b, out.get(), &error), error);
  return result;
}

}  // namespace
}  // namespace flatmtl

// Methods are numbers, not strings: string arguments leak in torch 2.13 (upstream issue 191340).
STABLE_TORCH_LIBRARY(flatmtl, m) {
  m.def("gramian(Tensor[] rows, int num_tasks, int accumulate=0) -> Tensor");
  m.def(
      "gramian_pair(Tensor[] loss_rows, Tensor[] perturbed_rows, int num_tasks, int accumulate=0, "
      "bool cross=True) -> Tensor");
  m.def("sq_norms(Tensor[] rows, int num_tasks, Tensor[] params, float eta) -> Tensor");
  m.def("weights(Tensor gramian, int method, float[] options) -> Tensor");
  m.def("weights_(Tensor gramian, int method, float[] options, Tensor(a!) state) -> Tensor");
  m.def(
      "step_weights(Tensor gramian_pair, Tensor? perturbed_gramian, int method, float[] options, int combine, "
      "int family_scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "step_weights_(Tensor gramian_pair, Tensor? perturbed_gramian, int method, float[] options, int combine, "
      "int family_scale, Tensor(a!) state) -> (Tensor, Tensor, Tensor)");
  m.def("aggregate(Tensor[] rows, int num_tasks, int method, float[] options) -> Tensor[]");
  m.def("perturb_(Tensor(a!)[] params, Tensor[] saved, Tensor[] grads, float[] scale, bool adaptive, float eta) -> ()");
  m.def("copy_(Tensor(a!)[] to, Tensor[] source) -> ()");
  m.def("combine_(Tensor(a!)[] out, Tensor[] rows, int num_tasks, Tensor weights) -> ()");
  m.def(
      "combine_pair_(Tensor(a!)[] out, Tensor[] loss_rows, Tensor[] perturbed_rows, int num_tasks, "
      "Tensor loss_weights, Tensor flat_weights) -> ()");
  m.def("perturb(Tensor[] saved, Tensor[] grads, float[] scale, bool adaptive, float eta) -> Tensor[]");
  m.def("combine(Tensor[] rows, int num_tasks, Tensor weights) -> Tensor[]");
  m.def(
      "combine_pair(Tensor[] loss_rows, Tensor[] perturbed_rows, int num_tasks, Tensor loss_weights, "
      "Tensor flat_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CompositeExplicitAutograd, m) {
  m.impl("gramian", TORCH_BOX(&flatmtl::gramian));
  m.impl("gramian_pair", TORCH_BOX(&flatmtl::gramian_pair));
  m.impl("sq_norms", TORCH_BOX(&flatmtl::sq_norms));
  m.impl("weights", TORCH_BOX(&flatmtl::weights));
  m.impl("weights_", TORCH_BOX(&flatmtl::weights_));
  m.impl("step_weights", TORCH_BOX(&flatmtl::step_weights));
  m.impl("step_weights_", TORCH_BOX(&flatmtl::step_weights_));
  m.impl("aggregate", TORCH_BOX(&flatmtl::aggregate));
  m.impl("perturb_", TORCH_BOX(&flatmtl::perturb_));
  m.impl("copy_", TORCH_BOX(&flatmtl::copy_));
  m.impl("combine_", TORCH_BOX(&flatmtl::combine_));
  m.impl("combine_pair_", TORCH_BOX(&flatmtl::combine_pair_));
  m.impl("perturb", TORCH_BOX(&flatmtl::perturb));
  m.impl("combine", TORCH_BOX(&flatmtl::combine));
  m.impl("combine_pair", TORCH_BOX(&flatmtl::combine_pair));
}
