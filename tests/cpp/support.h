// support.h - a small network and comparisons that the tests share.
#ifndef FLATMTL_TESTS_CPP_SUPPORT_H
#define FLATMTL_TESTS_CPP_SUPPORT_H

#include <torch/torch.h>

#include <flatmtl/torch.h>

#include <cstring>
#include <string>
#include <vector>

#undef CHECK  // torch's, of its logging
#include "catch.h"

namespace support {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

// A trunk with BatchNorm and dropout, and two linear heads.
struct NetImpl : torch::nn::Module {
  explicit NetImpl(double dropout = 0.25) {
    trunk = register_module("trunk", torch::nn::Linear(5, 6));
    norm = register_module("norm", torch::nn::BatchNorm1d(6));
    drop = register_module("drop", torch::nn::Dropout(dropout));
    head_a = register_module("head_a", torch::nn::Linear(6, 3));
    head_b = register_module("head_b", torch::nn::Linear(6, 1));
  }
  Tensor forward(const Tensor &x) { return drop(torch::tanh(norm(trunk(x)))); }
  torch::nn::Linear trunk{nullptr}, head_a{nullptr}, head_b{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  torch::nn::Dropout drop{nullptr};
};
TORCH_MODULE(Net);

inline Net net(double dropout = 0.25) {
  torch::manual_seed(3);
  return Net(dropout);
}

struct Batch {
  explicit Batch(int64_t i = 0) {
    at::Generator g = at::detail::createCPUGenerator(100 + static_cast<uint64_t>(i));
    x = torch::randn({12, 5}, g);
    a = torch::randint(0, 3, {12}, g, torch::kLong);
    b = torch::randn({12, 1}, g);
  }
  Tensor x, a, b;
};

inline Tensors losses(Net &model, const Batch &batch) {
  const Tensor h = model(batch.x);
  return {torch::cross_entropy_loss(model->head_a(h), batch.a), torch::mse_loss(model->head_b(h), batch.b)};
}

inline torch::optim::SGDOptions sgd_options() {
  return torch::optim::SGDOptions(0.1).momentum(0.9);
}

inline bool same_bits(const Tensor &a, const Tensor &b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const Tensor x = a.detach().contiguous(), y = b.detach().contiguous();
  return std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

inline bool same_bits(const Tensors &a, const Tensors &b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (!same_bits(a[i], b[i])) return false;
  return true;
}

inline bool close(const Tensor &a, const Tensor &b, double tolerance = 1e-12) {
  return torch::allclose(a.to(torch::kDouble), b.to(torch::kDouble), tolerance, tolerance);
}

inline Tensor copy_of(const Tensor &tensor) {
  return tensor.defined() ? tensor.detach().clone() : tensor;
}

// Everything that a failed step must leave as it was.
inline Tensors everything(torch::nn::Module &model, torch::optim::Optimizer &sgd) {
  Tensors all;
  for (const Tensor &p : model.parameters()) {
    all.push_back(copy_of(p));
    all.push_back(copy_of(p.grad()));
    const auto state = sgd.state().find(p.unsafeGetTensorImpl());
    if (state != sgd.state().end())
      all.push_back(copy_of(static_cast<torch::optim::SGDParamState &>(*state->second).momentum_buffer()));
  }
  for (const Tensor &b : model.buffers()) all.push_back(copy_of(b));
  all.push_back(at::detail::getDefaultCPUGenerator().get_state());
  return all;
}

// what() of the exception of type E that f throws.
template <typename E, typename F>
std::string message(F f) {
  try {
    f();
  } catch (const E &error) {
    return error.what();
  }
  return "no exception";
}

}  // namespace support

#endif
