// Every output of every function over every other array and vector of the call.
#include <cstring>
#include <string>
#include <vector>

#include "catch.h"
#include "refusals_support.h"

namespace {

// A vector that begins at `memory`, its second segment elsewhere.
struct At {
  At(const World &w, const void *memory) : data{const_cast<void *>(memory), w.out.pointers[1]} {
    vector = {FLATMTL_F32, 2, w.out.lengths.data(), data};
    rows = {FLATMTL_F32, 2, 2, w.out.lengths.data(), four};
    four[0] = memory;
    four[1] = w.memory.pointers[1];
    four[2] = w.memory.pointers[2];
    four[3] = w.memory.pointers[3];
    buffers = as_buffers(rows);
  }
  At(const At &) = delete;
  At &operator=(const At &) = delete;

  void *data[2];
  const void *four[4];
  flatmtl_vector vector;
  flatmtl_rows rows;
  flatmtl_buffers buffers;
};

}  // namespace

TEST_CASE("An output that overlaps any other array or vector of the call is refused", "[errors]") {
  World w;
  const flatmtl_context *c = w.context;
  Numbers &n = w.n;
  const auto overlap = FLATMTL_ERROR_OVERLAP;
  const auto moco = FLATMTL_BUFFER_MOCO, excess = FLATMTL_BUFFER_EXCESS_MTL;
  auto *in_g = static_cast<double *>(w.g.at(1, 0)), *in_s = static_cast<double *>(w.s.at(0, 5));
  auto *in_memory = static_cast<double *>(w.memory.at(1, 5));
  int32_t six = 8, one = 1;
  double options[8] = {};
  REQUIRE(flatmtl_buffer_method_defaults(moco, 2, options, &six, nullptr) == FLATMTL_OK);
  std::memcpy(n.options, options, sizeof options);
  const flatmtl_mixed_rows factors = {&w.g_rows, &w.s_rows, n.factors, n.flat};
  const At on_g(w, w.g.at(0, 2)), on_s(w, w.s.at(1, 6)), on_memory(w, w.memory.at(1, 6)), on_weights(w, &n.weights[1]),
      on_flat(w, n.flat), on_scale(w, &n.scale[1]), on_keep(w, n.keep), on_factors(w, &n.factors[1]),
      on_leak(w, n.leak), on_losses(w, n.losses), on_state(w, &n.state[3]), on_options(w, &n.options[5]);
  flatmtl_settings fixed = w.settings;
  fixed.method = FLATMTL_CAGRAD;
  fixed.options = n.options + 2;
  fixed.num_options = 1;
  const auto update = [&](flatmtl_buffer_method method, const flatmtl_mixed_rows *x, const flatmtl_buffers *b,
                          double *state, double *weights, const flatmtl_vector *out) {
    const int32_t count = method == moco ? six : one;
    return [=, &n](flatmtl_error *e) {
      return flatmtl_buffer_update(c, method, n.options, count, x, n.losses, 0, b, state, weights, out, e);
    };
  };
  const auto factors_into = [&](double *a, double *b) {
    return [=, &n](flatmtl_error *e) {
      return flatmtl_buffer_factors(moco, n.options, six, 2, n.losses, n.squares, n.state, a, b, e);
    };
  };
  const auto weights_into = [&](double *state, double *weights) {
    return [=, &n](flatmtl_error *e) {
      return flatmtl_buffer_weights(c, moco, n.options, six, 2, n.gramian, state, weights, e);
    };
  };
  const auto gradvac_into = [&](double *state, double *weights) {
    return [=, &n](flatmtl_error *e) {
      return flatmtl_weights(c, FLATMTL_GRADVAC, n.options + 5, 3, 2, n.gramian, state, weights, e);
    };
  };
  n.options[5] = 1.0;  // beta, seed, draw
  const auto step_into = [&](double *a, double *b) {
    return [=, &n](flatmtl_error *e) { return flatmtl_step_weights(c, &fixed, 2, n.pair, nullptr, a, b, nullptr, e); };
  };
  const auto uw = FLATMTL_WEIGHTING_UW, famo = FLATMTL_WEIGHTING_FAMO;
  n.options[0] = 0.5;
  const auto loss_into = [&](double *state, double *weights) {
    return [=, &n](flatmtl_error *e) {
      return flatmtl_loss_weights(c, uw, n.options, 2, 2, n.losses, nullptr, state, weights, e);
    };
  };
  check_refused(
      w,
      {
          {"sq_norms in rows", overlap, "sq_norms",
           [&](flatmtl_error *e) { return flatmtl_sq_norms(c, &w.g_rows, nullptr, 0, in_g, e); }},
          {"sq_norms in params", overlap, "sq_norms",
           [&](flatmtl_error *e) { return flatmtl_sq_norms(c, &w.g_rows, &w.row, 0, in_g, e); }},
          {"gramian in rows", overlap, "gramian",
           [&](flatmtl_error *e) { return flatmtl_gramian(c, &w.g_rows, in_g, e); }},
          {"gramian_pair in loss_rows", overlap, "gramian",
           [&](flatmtl_error *e) { return flatmtl_gramian_pair(c, &w.g_rows, &w.s_rows, 1, in_g, e); }},
          {"gramian_pair in perturbed_rows", overlap, "gramian",
           [&](flatmtl_error *e) { return flatmtl_gramian_pair(c, &w.g_rows, &w.s_rows, 1, in_s, e); }},
          {"combine over weights", overlap, "out",
           [&](flatmtl_error *e) { return flatmtl_combine(c, &w.g_rows, n.weights, &on_weights.vector, e); }},
          {"combine_pair over loss_weights", overlap, "out",
           [&](flatmtl_error *e) {
             return flatmtl_combine_pair(c, &w.g_rows, &w.s_rows, n.weights, n.flat, &on_weights.vector, e);
           }},
          {"combine_pair over flat_weights", overlap, "out",
           [&](flatmtl_error *e) {
             return flatmtl_combine_pair(c, &w.g_rows, &w.s_rows, n.weights, n.flat, &on_flat.vector, e);
           }},
          {"combine_pair over perturbed_rows", overlap, "perturbed_rows",
           [&](flatmtl_error *e) {
             return flatmtl_combine_pair(c, &w.g_rows, &w.s_rows, n.weights, n.flat, &on_s.vector, e);
           }},
          {"perturb over scale", overlap, "params",
           [&](flatmtl_error *e) {
             return flatmtl_perturb(c, &on_scale.vector, &w.saved_rows, &w.row, n.scale, 0, 0, e);
           }},
          {"weights over state", overlap, "weights", gradvac_into(n.state, &n.state[3])},
          {"weights over gramian", overlap, "weights", gradvac_into(n.state, &n.gramian[3])},
          {"weights over options", overlap, "weights", gradvac_into(n.state, &n.options[7])},
          {"state over gramian", overlap, "state", gradvac_into(&n.gramian[3], n.weights)},
          {"state over options", overlap, "state", gradvac_into(&n.options[4], n.weights)},
          {"step weights over one another", overlap, "loss_weights", step_into(n.result, &n.result[1])},
          {"step weights over options", overlap, "flat_weights", step_into(n.result, &n.options[1])},
          {"step weights over the Gramian", overlap, "loss_weights", step_into(&n.pair[15], n.result)},
          {"loss weights over losses", overlap, "weights", loss_into(n.state, &n.losses[1])},
          {"loss weights over options", overlap, "weights", loss_into(n.state, &n.options[1])},
          {"state of a weighting over losses", overlap, "state", loss_into(n.losses, n.weights)},
          {"observe: state over losses_after", overlap, "state",
           [&](flatmtl_error *e) {
             return flatmtl_loss_observe(c, famo, nullptr, 0, 2, n.losses, n.after, n.after, e);
           }},
          {"observe: state over losses", overlap, "state",
           [&](flatmtl_error *e) {
             return flatmtl_loss_observe(c, famo, nullptr, 0, 2, n.losses, n.after, n.losses, e);
           }},
          {"factors are keep", overlap, "factors", factors_into(n.factors, n.factors)},
          {"factors over losses", overlap, "factors", factors_into(&n.losses[1], n.keep)},
          {"factors over state", overlap, "factors", factors_into(&n.state[1], n.keep)},
          {"keep over sq_norms", overlap, "keep", factors_into(n.factors, n.squares)},
          {"keep over options", overlap, "keep", factors_into(n.factors, &n.options[5])},
          {"weights over sums", overlap, "weights", weights_into(n.state, &n.gramian[3])},
          {"weights over the state of a buffer method", overlap, "weights", weights_into(n.state, &n.state[3])},
          {"weights over options of a buffer method", overlap, "weights", weights_into(n.state, &n.options[5])},
          {"state over sums", overlap, "state", weights_into(n.gramian, n.weights)},
          {"moving_average: buffers over rows", overlap, "loss_rows",
           [&](flatmtl_error *e) { return flatmtl_moving_average(c, &w.x, n.keep, &on_g.buffers, e); }},
          {"moving_average: buffers over perturbed rows", overlap, "perturbed_rows",
           [&](flatmtl_error *e) { return flatmtl_moving_average(c, &w.x, n.keep, &on_s.buffers, e); }},
          {"moving_average: buffers over themselves", overlap, "buffers",
           [&](flatmtl_error *e) { return flatmtl_moving_average(c, &w.x, n.keep, &on_memory.buffers, e); }},
          {"moving_average: buffers over keep", overlap, "buffers",
           [&](flatmtl_error *e) { return flatmtl_moving_average(c, &w.x, n.keep, &on_keep.buffers, e); }},
          {"moving_average: buffers over loss_factors", overlap, "buffers",
           [&](flatmtl_error *e) { return flatmtl_moving_average(c, &factors, n.keep, &on_factors.buffers, e); }},
          {"excess in rows", overlap, "excess",
           [&](flatmtl_error *e) { return flatmtl_excess(c, &w.x, &w.buffers, in_g, e); }},
          {"excess in perturbed rows", overlap, "excess",
           [&](flatmtl_error *e) { return flatmtl_excess(c, &w.x, &w.buffers, in_s, e); }},
          {"excess in buffers", overlap, "excess",
           [&](flatmtl_error *e) { return flatmtl_excess(c, &w.x, &w.buffers, in_memory, e); }},
          {"excess over flat_factors", overlap, "excess",
           [&](flatmtl_error *e) { return flatmtl_excess(c, &factors, &w.buffers, &n.flat[1], e); }},
          {"excess: buffers over rows", overlap, "loss_rows",
           [&](flatmtl_error *e) { return flatmtl_excess(c, &w.x, &on_g.buffers, n.result, e); }},
          {"excess: buffers over flat_factors", overlap, "buffers",
           [&](flatmtl_error *e) { return flatmtl_excess(c, &factors, &on_flat.buffers, n.result, e); }},
          {"cross_gramian in rows", overlap, "gramian",
           [&](flatmtl_error *e) { return flatmtl_cross_gramian(c, &w.x, &w.x, in_g, e); }},
          {"cross_gramian in others", overlap, "gramian",
           [&](flatmtl_error *e) {
             const flatmtl_mixed_rows others = w.mixed(&w.memory_rows);
             return flatmtl_cross_gramian(c, &w.x, &others, in_memory, e);
           }},
          {"cross_gramian over loss_factors", overlap, "gramian",
           [&](flatmtl_error *e) { return flatmtl_cross_gramian(c, &w.x, &factors, n.factors, e); }},
          {"graddrop over rows", overlap, "loss_rows",
           [&](flatmtl_error *e) { return flatmtl_graddrop(c, &w.x, nullptr, 0, 0, 0, 0, &on_g.vector, e); }},
          {"graddrop over leak", overlap, "out",
           [&](flatmtl_error *e) { return flatmtl_graddrop(c, &w.x, n.leak, 0, 0, 0, 0, &on_leak.vector, e); }},
          {"graddrop over loss_factors", overlap, "out",
           [&](flatmtl_error *e) { return flatmtl_graddrop(c, &factors, n.leak, 0, 0, 0, 0, &on_factors.vector, e); }},
          {"combine_buffers over buffers", overlap, "buffers",
           [&](flatmtl_error *e) { return flatmtl_combine_buffers(c, &w.buffers, n.weights, &on_memory.vector, e); }},
          {"combine_buffers over weights", overlap, "out",
           [&](flatmtl_error *e) { return flatmtl_combine_buffers(c, &w.buffers, n.weights, &on_weights.vector, e); }},
          {"update over rows", overlap, "loss_rows", update(moco, &w.x, &w.buffers, n.state, n.weights, &on_g.vector)},
          {"update over losses", overlap, "out", update(moco, &w.x, &w.buffers, n.state, n.weights, &on_losses.vector)},
          {"update over state", overlap, "out", update(excess, &w.x, &w.buffers, n.state, n.weights, &on_state.vector)},
          {"update over options", overlap, "out",
           update(moco, &w.x, &w.buffers, n.state, n.weights, &on_options.vector)},
          {"update over factors", overlap, "out",
           update(moco, &factors, &w.buffers, n.state, n.weights, &on_factors.vector)},
          {"update: buffers over losses", overlap, "buffers",
           update(moco, &w.x, &on_losses.buffers, n.state, n.weights, &w.target)},
          {"update: weights in rows", overlap, "weights", update(moco, &w.x, &w.buffers, n.state, in_s, &w.target)},
          {"update: weights in buffers", overlap, "buffers",
           update(moco, &w.x, &w.buffers, n.state, in_memory, &w.target)},
          {"update: weights over losses", overlap, "weights",
           update(moco, &w.x, &w.buffers, n.state, n.losses, &w.target)},
          {"update: weights over state", overlap, "weights",
           update(excess, &w.x, &w.buffers, n.state, &n.state[5], &w.target)},
          {"update: state over flat_factors", overlap, "state",
           update(moco, &factors, &w.buffers, n.flat, nullptr, &w.target)},
      });
}
