// weightings.cpp - loss weightings as torch operators. See flatmtl_torch.cpp.
#include <optional>

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace flatmtl {
namespace {

flatmtl_weighting weighting_number(const char *op, int64_t weighting) {
  if (weighting < 0 || weighting >= FLATMTL_NUM_WEIGHTINGS)
    fail(op, "weighting is " + std::to_string(weighting) + "; it must be between 0 and " +
                 std::to_string(FLATMTL_NUM_WEIGHTINGS - 1));
  return static_cast<flatmtl_weighting>(weighting);
}

// What both ops take: K losses, the options and the state of that many tasks.
struct Call {
  Call(const char *op, const Tensor &losses, int64_t number, const std::vector<double> &options, const Tensor &state)
      : num_tasks(losses.defined() && losses.dim() == 1 ? losses.size(0) : 0),
        context(op, num_tasks),
        weighting(weighting_number(op, number)),
        losses(doubles_argument(op, "losses", losses, {num_tasks})) {
    if (options.size() > FLATMTL_MAX_TASKS + 2)
      fail(op, "options has " + std::to_string(options.size()) + " values, more than any weighting");
    num_options = static_cast<int32_t>(options.size());
    int64_t count = 0;
    flatmtl_error error{};
    check(op, flatmtl_weighting_state_size(weighting, static_cast<int32_t>(num_tasks), &count, &error), error);
    doubles_argument(op, "state", state, {count});
    this->state = count > 0 ? doubles(state) : nullptr;
  }

  int64_t num_tasks;
  Context context;
  flatmtl_weighting weighting;
  const double *losses;
  int32_t num_options = 0;
  double *state = nullptr;
};

Tensor loss_weights(const Tensor &losses, const std::optional<Tensor> &norms, int64_t weighting,
                    const std::vector<double> &options, const Tensor &state) {
  const char *op = "loss_weights";
  const Call call(op, losses, weighting, options, state);
  const double *norm_values = norms ? doubles_argument(op, "norms", *norms, {call.num_tasks}) : nullptr;
  Tensor result = new_doubles({call.num_tasks});
  flatmtl_error error{};
  call.context.check(flatmtl_loss_weights(call.context.get(), call.weighting, options.data(), call.num_options,
                                          static_cast<int32_t>(call.num_tasks), call.losses, norm_values, call.state,
                                          doubles(result), &error),
                     error);
  return result;
}

void loss_observe(const Tensor &losses, const Tensor &losses_after, int64_t weighting,
                  const std::vector<double> &options, const Tensor &state) {
  const char *op = "loss_observe";
  const Call call(op, losses, weighting, options, state);
  const double *after = doubles_argument(op, "losses_after", losses_after, {call.num_tasks});
  flatmtl_error error{};
  call.context.check(flatmtl_loss_observe(call.context.get(), call.weighting, options.data(), call.num_options,
                                          static_cast<int32_t>(call.num_tasks), call.losses, after, call.state, &error),
                     error);
}

}  // namespace
}  // namespace flatmtl

STABLE_TORCH_LIBRARY_FRAGMENT(flatmtl, m) {
  m.def("loss_weights(Tensor losses, Tensor? norms, int weighting, float[] options, Tensor(a!) state) -> Tensor");
  m.def("loss_observe(Tensor losses, Tensor losses_after, int weighting, float[] options, Tensor(a!) state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CompositeExplicitAutograd, m) {
  m.impl("loss_weights", TORCH_BOX(&flatmtl::loss_weights));
  m.impl("loss_observe", TORCH_BOX(&flatmtl::loss_observe));
}
