// Whatever fails before the wrapped optimizer's update: everything is as it was, bit for bit.
#include <cmath>
#include <limits>

#include "support.h"

namespace {

using namespace support;

struct Training {
  Training() : model(net()), sgd(model->parameters(), sgd_options()), optimizer(sgd, options()) {
    for (int i = 0; i < 2; ++i) optimizer.step([&] { return losses(model, Batch(i)); });
  }
  flatmtl::FlatMTLOptions options() { return flatmtl::FlatMTLOptions().modules({model}); }
  Tensors all() { return everything(*model, sgd); }

  Net model;
  torch::optim::SGD sgd;
  flatmtl::FlatMTL optimizer;
};

// A scripted network with BatchNorm-like statistics, one of which the forward assigns anew.
torch::jit::Module scripted() {
  torch::manual_seed(5);
  torch::jit::Module module("Net");
  module.register_parameter("w", torch::randn({6, 5}).requires_grad_(), false);
  module.register_parameter("a", torch::randn({3, 6}).requires_grad_(), false);
  module.register_parameter("b", torch::randn({1, 6}).requires_grad_(), false);
  module.register_buffer("mean", torch::zeros({6}));
  module.register_buffer("count", torch::zeros({1}));
  module.define(R"(
    def forward(self, x):
        h = torch.tanh(torch.matmul(x, self.w.t()))
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.count = self.count + 1
        return torch.matmul(h, self.a.t()), torch.matmul(h, self.b.t())
  )");
  return module;
}

Tensors scripted_losses(torch::jit::Module &module, const Batch &batch) {
  const auto outputs = module.forward({batch.x}).toTuple();
  return {torch::cross_entropy_loss(outputs->elements()[0].toTensor(), batch.a),
          torch::mse_loss(outputs->elements()[1].toTensor(), batch.b)};
}

}  // namespace

TEST_CASE("A closure that throws, in whatever pass", "[restore]") {
  Training t;
  const int at = GENERATE(0, 1, 2);
  const Tensors before = t.all();
  const int64_t steps = t.optimizer.steps();
  int calls = 0;
  CHECK(message<std::domain_error>([&] {
          t.optimizer.step([&] {
            const Tensors values = losses(t.model, Batch(7));
            if (calls++ == at) throw std::domain_error("no more data");
            return values;
          });
        }) == "no more data");
  CHECK(calls == at + 1);
  CHECK(same_bits(t.all(), before));
  CHECK(t.optimizer.steps() == steps);
}

TEST_CASE("A closure that calls backward or changes a parameter", "[restore]") {
  Training t;
  const Tensors before = t.all();
  const int at = GENERATE(0, 1);
  int calls = 0;
  CHECK(message<std::runtime_error>([&] {
          t.optimizer.step([&] {
            const Tensors values = losses(t.model, Batch(7));
            if (calls++ == at) {
              torch::NoGradGuard no_grad;
              t.model->trunk->bias.add_(1.0);
            }
            return values;
          });
        }) == "parameter param_groups[0]['params'][1] was changed in place by the closure");
  CHECK(same_bits(t.all(), before));
}

TEST_CASE("A loss or a gradient that is not finite", "[restore]") {
  Training t;
  const int at = GENERATE(0, 2);
  const bool skip = GENERATE(false, true);
  flatmtl::FlatMTL optimizer(t.sgd, t.options().nonfinite(skip ? "skip" : "raise"));
  const Tensors before = t.all();
  int calls = 0;
  const auto closure = [&] {
    Tensors values = losses(t.model, Batch(7));
    if (calls++ == at) values[1] = values[1] * std::numeric_limits<double>::quiet_NaN();
    return values;
  };
  if (skip) {
    const Tensors found = optimizer.step(closure);
    CHECK(found.size() == 2);
    CHECK(optimizer.last().skipped);
    for (const Tensor &p : t.model->parameters()) CHECK_FALSE(p.grad().defined());
    CHECK(optimizer.steps() == 0);
    Tensors after = t.all();
    REQUIRE(after.size() == before.size());
    for (size_t i = 0; i < after.size(); ++i)
      if (after[i].defined()) CHECK(same_bits(after[i], before[i]));
    return;
  }
  try {
    optimizer.step(closure);
    FAIL("no exception");
  } catch (const flatmtl::NonFiniteError &error) {
    CHECK(std::get<int64_t>(error.task()) == 1);
    CHECK(error.pass() == (at == 0 ? "unperturbed" : "perturbed"));
    CHECK(std::isnan(error.value()));
    CHECK(std::string(error.what()).find("task 1: the loss is not finite (nan) in the ") == 0);
  }
  CHECK(same_bits(t.all(), before));
}

TEST_CASE("A gradient that overflows", "[restore]") {
  Tensor w = torch::full({1}, 1e-30f).requires_grad_();
  torch::optim::SGD sgd({w}, 0.1);
  flatmtl::FlatMTL optimizer(sgd);
  const Tensor before = copy_of(w);
  CHECK(message<flatmtl::NonFiniteError>([&] {
          optimizer.step([&] { return Tensors{(w.sqrt() * 1e-5f).rsqrt().sum(), (w * 1e38f * 1e5f).sum()}; });
        }).find("is not finite (inf) in the unperturbed pass") != std::string::npos);
  CHECK(same_bits(w, before));
}

TEST_CASE("Every pass sees the same dropout and starts from the same statistics", "[restore]") {
  Training t;
  Tensors masks;
  const Tensors statistics = {copy_of(t.model->norm->running_mean), copy_of(t.model->norm->running_var)};
  Tensors starts, ends;
  t.optimizer.step([&] {
    starts.push_back(copy_of(t.model->norm->running_mean));
    Tensors values = losses(t.model, Batch(3));
    ends.push_back(copy_of(t.model->norm->running_mean));
    masks.push_back(torch::rand({4}));
    return values;
  });
  REQUIRE(masks.size() == 3);
  CHECK(same_bits({masks[1], masks[2]}, {masks[0], masks[0]}));
  CHECK(same_bits(starts, {statistics[0], statistics[0], statistics[0]}));
  CHECK(same_bits(t.model->norm->running_mean, ends[0]));  // the unperturbed pass's
  CHECK_FALSE(same_bits(ends[2], ends[0]));
  CHECK_FALSE(same_bits(torch::rand({4}), masks[0]));
}

TEST_CASE("A TorchScript module: roles, and buffers that it assigns anew", "[restore][jit]") {
  torch::jit::Module module = scripted();
  const Tensors params = flatmtl::parameters(module);
  REQUIRE(params.size() == 3);
  torch::optim::SGD sgd(params, 0.05);
  flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().modules({module}));

  // The same network without TorchScript.
  Tensors eager;
  for (const Tensor &p : params) eager.push_back(copy_of(p).requires_grad_());
  torch::optim::SGD eager_sgd(eager, 0.05);
  flatmtl::FlatMTL eager_optimizer(eager_sgd);
  for (int i = 0; i < 5; ++i) {  // past the calls in which TorchScript profiles and optimizes
    const Batch batch(i);
    optimizer.step([&] { return scripted_losses(module, batch); });
    eager_optimizer.step([&] {
      const Tensor h = torch::tanh(torch::matmul(batch.x, eager[0].t()));
      return Tensors{torch::cross_entropy_loss(torch::matmul(h, eager[1].t()), batch.a),
                     torch::mse_loss(torch::matmul(h, eager[2].t()), batch.b)};
    });
    for (size_t p = 0; p < params.size(); ++p) CHECK(close(params[p], eager[p], 1e-5));
  }
  CHECK(module.attr("count").toTensor().item<double>() == 5.0);

  const Tensors before = {copy_of(module.attr("mean").toTensor()), copy_of(module.attr("count").toTensor())};
  int calls = 0;
  CHECK_THROWS_AS(optimizer.step([&] {
    Tensors values = scripted_losses(module, Batch(1));
    if (calls++ == 1) throw std::domain_error("stop");
    return values;
  }),
                  std::domain_error);
  CHECK(same_bits({module.attr("mean").toTensor(), module.attr("count").toTensor()}, before));
}

TEST_CASE("Parameters that cannot be trained here are named", "[restore]") {
  Tensor complex = torch::ones({2}, torch::kComplexFloat).requires_grad_();
  torch::optim::SGD sgd({complex}, 0.1);
  flatmtl::FlatMTL optimizer(sgd);
  const auto loss = [&] { return torch::real(complex).sum(); };
  CHECK(message<std::invalid_argument>([&] { optimizer.step(loss); }) ==
        "parameter param_groups[0]['params'][0] is torch.complex64; only real floating-point ones are supported");
  Tensor meta = torch::ones({2}, torch::kMeta).requires_grad_();
  torch::optim::SGD on_meta({meta}, 0.1);
  flatmtl::FlatMTL other(on_meta);
  CHECK(message<std::invalid_argument>([&] { other.step([&] { return meta.sum(); }); }) ==
        "parameter param_groups[0]['params'][0] is on meta; the C++ optimizer works on the CPU alone");
  torch::optim::SGD none({torch::ones({2})}, 0.1);
  flatmtl::FlatMTL nothing(none);
  CHECK(message<std::runtime_error>([&] { nothing.step([&] { return meta.sum(); }); }) ==
        "no parameter of the optimizer requires grad");
}
