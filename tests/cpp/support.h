// support.h - a small network and comparisons that the tests share.
#ifndef FLATMTL_TESTS_CPP_SUPPORT_H
#define FLATMTL_TESTS_CPP_SUPPORT_H

#include <torch/torch.h>

#include <flatmtl/torch.h>

#include <cstring>
#include <sstream>
#include <string>
#include <utility>
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

// l_i = a_i/2 |theta - c_i|^2 + b_i/2 (psi_i - d_i)^2
struct Quadratics {
  Tensor theta = torch::tensor({1.0, -2.0}, torch::kDouble).requires_grad_();
  Tensors psi = {torch::tensor({0.5}, torch::kDouble).requires_grad_(),
                 torch::tensor({-1.5}, torch::kDouble).requires_grad_()};
  double a[2] = {2.0, 0.5}, b[2] = {3.0, 0.25}, d[2] = {1.0, 2.0};
  Tensors c = {torch::tensor({0.0, 1.0}, torch::kDouble), torch::tensor({3.0, -1.0}, torch::kDouble)};

  Tensors params() const { return {theta, psi[0], psi[1]}; }
  Tensor loss(size_t i) const {
    return a[i] / 2 * (theta - c[i]).square().sum() + b[i] / 2 * (psi[i] - d[i]).square().sum();
  }
  Tensors losses() const { return {loss(0), loss(1)}; }
  Tensor g(size_t i) const { return (a[i] * (theta - c[i])).detach(); }
  Tensor h(size_t i) const { return (b[i] * (psi[i] - d[i])).detach(); }
  // The Hessians are multiples of the identity: s = g (1 + rho a / |g|).
  Tensor s(size_t i, double rho) const { return g(i) * (1.0 + rho * a[i] / g(i).norm()); }
  Tensor t(size_t i, double rho) const { return h(i) * (1.0 + rho * b[i] / h(i).norm()); }
};

inline flatmtl::FlatMTLOptions raw(const flatmtl::Aggregator &aggregator) {
  return flatmtl::FlatMTLOptions().aggregator(aggregator).family_scale("none");
}

template <typename Optimizer>
std::string saved(const Optimizer &optimizer) {
  torch::serialize::OutputArchive archive;
  optimizer.save(archive);
  std::ostringstream stream;
  archive.save_to(stream);
  return stream.str();
}

template <typename Optimizer>
void load(Optimizer &optimizer, const std::string &bytes) {
  torch::serialize::InputArchive archive;
  std::istringstream stream(bytes);
  archive.load_from(stream);
  optimizer.load(archive);
}

// A network in training; step i on batch i, with the random numbers of seed i.
struct Run {
  explicit Run(flatmtl::FlatMTLOptions options = {}, Net net = support::net())
      : model(std::move(net)), sgd(model->parameters(), sgd_options()), optimizer(sgd, options.modules({model})) {}
  void train(int from, int to) {
    for (int i = from; i < to; ++i) {
      torch::manual_seed(i);
      optimizer.step([&] { return losses(model, Batch(i)); });
    }
  }
  Tensors all() { return everything(*model, sgd); }

  Net model;
  torch::optim::SGD sgd;
  flatmtl::FlatMTL optimizer;
};

inline void copy_weights(const Net &from, const Net &to) {
  torch::NoGradGuard no_grad;
  for (size_t i = 0; i < from->parameters().size(); ++i) to->parameters()[i].copy_(from->parameters()[i]);
  for (size_t i = 0; i < from->buffers().size(); ++i) to->buffers()[i].copy_(from->buffers()[i]);
}

// The archive of an optimizer with a state that `change` has been at.
template <typename F>
std::string forged(const Run &run, F change) {
  torch::serialize::InputArchive archive, own;
  std::istringstream stream(saved(run.optimizer));
  archive.load_from(stream);
  archive.read("flatmtl", own);
  auto state = flatmtl::detail::State::load(own);
  change(state);
  torch::serialize::OutputArchive out;
  run.sgd.save(out);
  torch::serialize::OutputArchive written(out.compilation_unit());
  state.save(written);
  out.write("flatmtl", written);
  std::ostringstream bytes;
  out.save_to(bytes);
  return bytes.str();
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
