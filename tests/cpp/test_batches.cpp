// Micro-batches, and autocast.
#include <ATen/autocast_mode.h>

#include <cmath>
#include <limits>

#include "support.h"

namespace {

using namespace support;

// Two tasks on rows of x, in float64, without BatchNorm: means over the examples.
struct Regression {
  explicit Regression(flatmtl::FlatMTLOptions options = {}) : sgd(params, 0.1), optimizer(sgd, std::move(options)) {}
  Tensors losses(const Tensor &rows) const {
    const Tensor h = torch::tanh(rows.matmul(params[0]));
    return {h.matmul(params[1]).square().mean(), (h.matmul(params[2]) - 1.0).square().mean()};
  }
  Tensors grads() const {
    Tensors result;
    for (const Tensor &p : params) result.push_back(copy_of(p.grad()));
    return result;
  }

  static Tensor draw(int64_t seed, at::IntArrayRef sizes) {
    return torch::randn(sizes, at::detail::createCPUGenerator(static_cast<uint64_t>(seed)),
                        torch::TensorOptions().dtype(torch::kDouble));
  }
  Tensors params = {draw(1, {4, 3}).requires_grad_(), draw(2, {3}).requires_grad_(), draw(3, {3}).requires_grad_()};
  Tensor x = draw(4, {12, 4});
  torch::optim::SGD sgd;
  flatmtl::FlatMTL optimizer;
};

}  // namespace

TEST_CASE("Micro-batches give the step of the whole batch", "[batches]") {
  Regression whole, t;
  const Tensors expected = whole.optimizer.backward([&] { return whole.losses(whole.x); });
  const int form = GENERATE(0, 1, 2, 3, 4);
  CAPTURE(form);
  const Tensors batches = t.x.chunk(form == 4 ? 1 : 3);
  size_t calls = 0;
  const auto loss = [&](const Tensor &rows, size_t i) {
    ++calls;
    return t.losses(rows)[i];
  };
  Tensors found;
  if (form == 0 || form == 4) {
    found = t.optimizer.backward(
        [&](const Tensor &rows) {
          ++calls;
          return t.losses(rows);
        },
        batches);
    CHECK(calls == 3 * batches.size());
  } else if (form == 1) {
    found = t.optimizer.backward(
        [&](const Tensor &rows, std::optional<flatmtl::Task> task) {
          Tensors all(2);
          for (int64_t i = 0; i < 2; ++i)
            if (!task || *task == flatmtl::Task(i)) all[static_cast<size_t>(i)] = loss(rows, static_cast<size_t>(i));
          return all;
        },
        batches);
    CHECK(calls == 3 * (2 + 1 + 1));
  } else if (form == 2) {
    found = t.optimizer.backward(
        {[&](const Tensor &rows) { return loss(rows, 0); }, [&](const Tensor &rows) { return loss(rows, 1); }},
        batches);
    CHECK(calls == 3 * 4);
  } else {
    const flatmtl::NamedBatchTaskClosures<Tensor> closures = {{"a", [&](const Tensor &rows) { return loss(rows, 0); }},
                                                              {"b", [&](const Tensor &rows) { return loss(rows, 1); }}};
    const auto named = t.optimizer.backward(closures, batches);
    CHECK((named.keys() == std::vector<std::string>{"a", "b"}));
    found = named.values();
  }
  if (form == 4) CHECK(same_bits(found, expected));
  for (size_t i = 0; i < 2; ++i) CHECK(close(found[i], expected[i]));
  for (size_t i = 0; i < 3; ++i) {
    if (form == 4) CHECK(same_bits(t.params[i].grad(), whole.params[i].grad()));
    CHECK(close(t.params[i].grad(), whole.params[i].grad(), 1e-10));
  }
  CHECK(close(t.optimizer.last().sharpness, whole.optimizer.last().sharpness, 1e-10));
  t.optimizer.step();
  whole.optimizer.step();
  CHECK(close(t.params[0], whole.params[0], 1e-10));
}

TEST_CASE("m-sharpness: the mean of the gradients at each micro-batch's own point", "[batches]") {
  const bool own = GENERATE(true, false);
  Regression t(flatmtl::FlatMTLOptions().rho(0.3).m_sharpness(own));
  const Tensors batches = t.x.chunk(3);
  // One task, so that the step is SAM.
  const auto loss = [&](const Tensor &w, const Tensor &rows) { return torch::tanh(rows.matmul(w)).square().mean(); };
  const auto gradient = [&](const Tensor &at, const Tensor &rows) {
    const Tensor w = copy_of(at).requires_grad_();
    return torch::autograd::grad({loss(w, rows)}, {w})[0];
  };
  Tensor expected = torch::zeros_like(t.params[0]);
  for (const Tensor &rows : batches) {
    const Tensor along = gradient(t.params[0], own ? rows : t.x);
    expected += gradient(t.params[0] + 0.3 * along / along.norm(), rows) / 3.0;
  }
  t.optimizer.backward([&](const Tensor &rows) { return Tensors{loss(t.params[0], rows)}; }, batches);
  CHECK(close(t.params[0].grad(), expected, 1e-10));
}

TEST_CASE("Losses and perturbed losses are means over the same micro-batches", "[batches]") {
  const auto options = flatmtl::FlatMTLOptions().rho(0.3).m_sharpness(true);
  Regression both(options), alone(options);
  const Tensors batches = both.x.chunk(2);
  // The loss and the gradient of the second task are zero in the first micro-batch.
  const auto losses = [&](const Regression &t, const Tensor &rows) {
    Tensors values = t.losses(rows);
    if (rows.data_ptr() == batches[0].data_ptr()) values[1] = values[1] * 0.0;
    return values;
  };
  both.optimizer.backward([&](const Tensor &rows) { return losses(both, rows); }, batches);
  alone.optimizer.backward([&] { return alone.losses(batches[1]); });
  const auto &half = both.optimizer.last(), &whole = alone.optimizer.last();
  CHECK(half.losses[1].item<double>() == Approx(whole.losses[1].item<double>() / 2));
  CHECK(half.perturbed_losses[1].item<double>() == Approx(whole.perturbed_losses[1].item<double>() / 2));
  CHECK(half.sharpness[1].item<double>() == Approx(whole.sharpness[1].item<double>() / 2));
}

TEST_CASE("A task that is absent from some micro-batches takes the mean over the others", "[batches]") {
  Regression whole(flatmtl::FlatMTLOptions().aggregator("sum")), t(flatmtl::FlatMTLOptions().aggregator("sum"));
  const Tensors batches = t.x.chunk(3);
  const Tensor rest = torch::cat({batches[0], batches[2]});
  const Tensors expected = whole.optimizer.backward([&] {
    return Tensors{whole.losses(whole.x)[0], whole.losses(rest)[1]};
  });
  size_t number = 0;
  const Tensors found = t.optimizer.backward(
      [&](const Tensor &rows) {
        Tensors values = t.losses(rows);
        ++number;
        if (rows.data_ptr() == batches[1].data_ptr()) values[1] = Tensor();
        return values;
      },
      batches);
  CHECK(number == 8);  // the perturbed pass of an absent task is not made: 3 + 3 + 2
  for (size_t i = 0; i < 2; ++i) CHECK(close(found[i], expected[i]));
  for (size_t i = 0; i < 3; ++i) CHECK(close(t.params[i].grad(), whole.params[i].grad(), 1e-10));
  CHECK(t.optimizer.backward(
                       [&](const Tensor &rows) {
                         return Tensors{t.losses(rows)[0], Tensor()};
                       },
                       batches)[1]
            .defined() == false);
}

TEST_CASE("Whatever fails in a micro-batch restores everything", "[batches][restore]") {
  Net model = net();
  torch::optim::SGD sgd(model->parameters(), sgd_options());
  flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().modules({model}).m_sharpness(GENERATE(false, true)));
  optimizer.step([&] { return losses(model, Batch(0)); });
  const std::vector<Batch> batches = {Batch(1), Batch(2)};
  const Tensors before = everything(*model, sgd);
  const int at = GENERATE(0, 1, 2, 3, 4, 5);
  CAPTURE(at);
  int calls = 0;
  SECTION("an exception") {
    CHECK(message<std::domain_error>([&] {
            optimizer.step(
                [&](const Batch &batch) {
                  const Tensors values = losses(model, batch);
                  if (calls++ == at) throw std::domain_error("no more data");
                  return values;
                },
                batches);
          }) == "no more data");
    CHECK(calls == at + 1);
  }
  SECTION("a loss that is not finite") {
    const auto text = message<flatmtl::NonFiniteError>([&] {
      optimizer.step(
          [&](const Batch &batch) {
            Tensors values = losses(model, batch);
            if (calls++ == at)
              for (Tensor &value : values) value = value * std::numeric_limits<double>::infinity();
            return values;
          },
          batches);
    });
    CHECK(text.find("the loss is not finite (inf)") != std::string::npos);
  }
  SECTION("another container") {
    const auto text = message<std::runtime_error>([&] {
      optimizer.step(
          [&](const Batch &batch) {
            Tensors values = losses(model, batch);
            if (calls++ == at) values.push_back(values[0] * 2);
            return values;
          },
          batches);
    });
    if (at != 0) CHECK(text.find("closure returned a list of 2 in the unperturbed pass, but a list of 3 in ") == 0);
    if (at == 0) CHECK(text != "no exception");
  }
  CHECK(same_bits(everything(*model, sgd), before));
  CHECK(optimizer.steps() == 1);
}

TEST_CASE("A step that is skipped returns the mean losses", "[batches]") {
  Regression t(flatmtl::FlatMTLOptions().nonfinite("skip"));
  const Tensors found = t.optimizer.step(
      [&](const Tensor &rows) {
        Tensors values = t.losses(rows);
        values[1] = values[1] / 0.0;
        return values;
      },
      t.x.chunk(3));
  CHECK(close(found[0], t.losses(t.x)[0]));
  CHECK(t.optimizer.last().skipped);
  CHECK(t.optimizer.steps() == 0);
}

TEST_CASE("No micro-batch", "[batches]") {
  Regression t;
  const Tensor grad = t.params[0].mutable_grad() = torch::ones({4, 3}, torch::kDouble);
  CHECK(message<std::invalid_argument>([&] {
          t.optimizer.step([&](const Tensor &rows) { return t.losses(rows); }, Tensors());
        }) == "batches is empty: expected at least one micro-batch");
  CHECK(t.params[0].grad().is_same(grad));
}

TEST_CASE("A zero loss with a zero gradient is an absent task, whose state stays", "[batches]") {
  const auto options = flatmtl::FlatMTLOptions().aggregator(flatmtl::Aggregator::gradvac(0.5));
  Regression zero(options), absent(options);
  for (int i = 0; i < 4; ++i) {
    const bool gone = i % 2 == 1;
    zero.optimizer.step([&] {
      Tensors values = zero.losses(zero.x);
      if (gone) values[1] = values[1] * 0.0;
      return values;
    });
    absent.optimizer.step([&] {
      Tensors values = absent.losses(absent.x);
      if (gone) values[1] = Tensor();
      return values;
    });
    CHECK(std::isnan(zero.optimizer.last().weights_loss[1].item<double>()) == gone);
  }
  CHECK(same_bits(zero.params, absent.params));
}

TEST_CASE("Within an outer autocast every pass casts the parameters anew", "[batches][autocast]") {
  struct Autocast {
    Autocast() : before(at::autocast::is_autocast_enabled(at::kCPU)) {
      at::autocast::set_autocast_enabled(at::kCPU, true);
      at::autocast::increment_nesting();
    }
    ~Autocast() {
      if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
      at::autocast::set_autocast_enabled(at::kCPU, before);
    }
    bool before;
  };
  const bool before_too = GENERATE(false, true);  // a forward of the user's in the same autocast
  Net inner = net(0.0), outer = net(0.0);
  torch::optim::SGD inner_sgd(inner->parameters(), 0.1), outer_sgd(outer->parameters(), 0.1);
  flatmtl::FlatMTL inner_optimizer(inner_sgd, flatmtl::FlatMTLOptions().modules({inner})),
      outer_optimizer(outer_sgd, flatmtl::FlatMTLOptions().modules({outer}));
  const Batch batch(1);
  const auto values = [&](Net &model) {
    const Tensor h = model(batch.x);
    return Tensors{torch::cross_entropy_loss(model->head_a(h).to(torch::kFloat), batch.a),
                   torch::mse_loss(model->head_b(h).to(torch::kFloat), batch.b)};
  };
  if (before_too) values(inner);
  inner_optimizer.backward([&] {
    const Autocast autocast;
    return values(inner);
  });
  {
    const Autocast autocast;
    if (before_too) values(outer);
    outer_optimizer.backward([&] { return values(outer); });
  }
  CHECK(outer_optimizer.last().sharpness.abs().min().item<double>() > 0.0);
  CHECK(same_bits(outer_optimizer.last().sharpness, inner_optimizer.last().sharpness));
  for (size_t i = 0; i < inner->parameters().size(); ++i)
    CHECK(same_bits(outer->parameters()[i].grad(), inner->parameters()[i].grad()));
}
