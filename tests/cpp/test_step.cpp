// The step against closed forms, against the C state machine, and against torch's optimizer alone.
#include <algorithm>
#include <cmath>
#include <limits>

#include "support.h"

using namespace support;

TEST_CASE("The update of quadratics is the closed form", "[step]") {
  Quadratics q;
  torch::optim::SGD sgd(q.params(), 0.5);
  flatmtl::FlatMTL optimizer(sgd, raw("sum").rho({0.2, 0.1}));
  const Tensors before = {copy_of(q.theta), copy_of(q.psi[0]), copy_of(q.psi[1])};
  const Tensors losses = optimizer.backward([&] { return q.losses(); });

  REQUIRE(same_bits({q.theta, q.psi[0], q.psi[1]}, before));
  REQUIRE(losses.size() == 2);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(close(losses[i], q.loss(i)));
    CHECK_FALSE(losses[i].requires_grad());
    CHECK(close(q.psi[i].grad(), q.t(i, 0.1)));
  }
  CHECK(close(q.theta.grad(), q.s(0, 0.2) + q.s(1, 0.2)));

  const flatmtl::Record &last = optimizer.last();
  CHECK(close(last.norms_loss, torch::stack({q.g(0).norm(), q.g(1).norm()})));
  CHECK(close(last.norms_flat, torch::tensor({0.2 * 2.0, 0.2 * 0.5}, torch::kDouble)));
  CHECK(close(last.weights_flat, torch::ones(2)));
  const double cosine = (q.g(0).dot(q.g(1)) / q.g(0).norm() / q.g(1).norm()).item<double>();
  CHECK(last.cosine_loss[0][1].item<double>() == Approx(cosine));
  CHECK(close(last.sharpness, last.perturbed_losses - last.losses));
  CHECK((last.sharpness > 0).all().item<bool>());

  const Tensor update = copy_of(q.theta.grad());
  optimizer.step();  // applies it
  CHECK(close(q.theta, before[0] - 0.5 * update));
}

TEST_CASE("Combinations and norms follow their equations", "[step]") {
  Quadratics q;
  torch::optim::SGD sgd(q.params(), 0.5);
  SECTION("direct: A(s)") {
    flatmtl::FlatMTL optimizer(sgd, raw(flatmtl::Aggregator::fixed({2.0, 3.0})).rho(0.1).combine("direct"));
    optimizer.backward([&] { return q.losses(); });
    CHECK(close(q.theta.grad(), 2.0 * q.s(0, 0.1) + 3.0 * q.s(1, 0.1)));
  }
  SECTION("joint: one norm over both parts") {
    flatmtl::FlatMTL optimizer(sgd, raw("sum").rho(0.1).norm("joint"));
    optimizer.backward([&] { return q.losses(); });
    Tensor expected = torch::zeros(2, torch::kDouble);
    for (size_t i = 0; i < 2; ++i) {
      const Tensor norm = (q.g(i).square().sum() + q.h(i).square().sum()).sqrt();
      expected += q.g(i) * (1.0 + 0.1 * q.a[i] / norm);
      CHECK(close(q.psi[i].grad(), q.h(i) * (1.0 + 0.1 * q.b[i] / norm)));
    }
    CHECK(close(q.theta.grad(), expected));
  }
  SECTION("adaptive: T^2 g / |T g|, T = |theta| + eta") {
    flatmtl::FlatMTL optimizer(sgd, raw("sum").rho(0.3).adaptive(true).eta(0.01));
    optimizer.backward([&] { return q.losses(); });
    Tensor expected = torch::zeros(2, torch::kDouble);
    const Tensor t = q.theta.detach().abs() + 0.01;
    for (size_t i = 0; i < 2; ++i) expected += q.g(i) + q.a[i] * 0.3 * t.square() * q.g(i) / (t * q.g(i)).norm();
    CHECK(close(q.theta.grad(), expected));
  }
  SECTION("radii of a group") {
    flatmtl::FlatMTL optimizer(sgd, raw("sum").rho(0.1));
    optimizer.set_rho(0, {0.4, 0.0});
    optimizer.backward([&] { return q.losses(); });
    CHECK(close(q.theta.grad(), q.s(0, 0.4) + q.s(1, 0.4)));
    CHECK(close(q.psi[0].grad(), q.h(0)));
  }
  SECTION("one task is SAM") {
    flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().rho(0.1));
    const Tensor loss = optimizer.backward([&] { return q.loss(0); });
    CHECK(close(loss, q.loss(0)));
    const Tensor norm = (q.g(0).square().sum() + q.h(0).square().sum()).sqrt();
    CHECK(close(q.theta.grad(), q.g(0) * (1.0 + 0.1 * q.a[0] / norm)));
    CHECK_FALSE(q.psi[1].grad().defined());  // not reached: left alone
  }
}

TEST_CASE("max_norm bounds each family, or the whole update", "[step]") {
  Quadratics q;
  torch::optim::SGD sgd(q.params(), 0.5);
  const auto update = [&](flatmtl::FlatMTLOptions options) {
    flatmtl::FlatMTL optimizer(sgd, options.rho(0.2));
    optimizer.backward([&] { return q.losses(); });
    CHECK(close(q.psi[0].grad(), options.rho().task == 0.0 ? q.h(0) : q.t(0, 0.2)));  // own ones are not clipped
    return copy_of(q.theta.grad());
  };
  const auto clipped = [](const Tensor &x, double norm) { return x * std::min(1.0, norm / x.norm().item<double>()); };
  const Tensor g = q.g(0) + q.g(1), f = q.s(0, 0.2) + q.s(1, 0.2) - g;
  // |f| < 0.45 < |g|
  REQUIRE(f.norm().item<double>() < 0.45);
  REQUIRE(g.norm().item<double>() > 0.45);
  CHECK(close(update(raw("sum").max_norm(0.45)), clipped(g, 0.45) + f));
  CHECK(close(update(raw("sum").max_norm(0.1)), clipped(g, 0.1) + clipped(f, 0.1)));
  CHECK(close(update(raw("sum").max_norm(0.1).combine("direct")), clipped(g + f, 0.1)));
  CHECK(close(update(raw("sum").max_norm(0.1).combine("second")), clipped(g + f, 0.1)));
  CHECK(same_bits(update(raw("sum").max_norm(1e3)), update(raw("sum"))));
  for (const double bad : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")})
    CHECK(message<std::invalid_argument>([&] {
            flatmtl::FlatMTL(sgd, raw("sum").max_norm(bad));
          }).find("Invalid max_norm: ") == 0);
}

TEST_CASE("The step is that of the C state machine, bit for bit", "[step]") {
  const auto combine = GENERATE(FLATMTL_DECOMPOSED, FLATMTL_SECOND, FLATMTL_EACH);
  const char *const names[] = {"decomposed", "direct", "second", "each"};
  Quadratics q;
  torch::optim::SGD sgd(q.params(), 0.5);
  flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().aggregator("nash_mtl").combine(names[combine]).rho(0.3));
  optimizer.backward([&] { return q.losses(); });

  flatmtl_settings settings;
  REQUIRE(flatmtl_settings_default(&settings, nullptr) == FLATMTL_OK);
  settings.method = FLATMTL_NASH_MTL;
  settings.combine = combine;
  settings.rho_shared = settings.rho_task = 0.3;
  const auto pointer = [](const Tensor &tensor) { return tensor.mutable_data_ptr(); };
  Tensors g(2), h(2), s(2), t(2),
      saved = {torch::empty(2, torch::kDouble), torch::empty(1, torch::kDouble), torch::empty(1, torch::kDouble)};
  for (size_t i = 0; i < 2; ++i) {
    const auto grads = torch::autograd::grad({q.loss(i)}, {q.theta, q.psi[i]});
    g[i] = grads[0];
    h[i] = grads[1];
    s[i] = torch::empty(2, torch::kDouble);
    t[i] = torch::empty(1, torch::kDouble);
  }
  const int64_t two = 2, one = 1;
  void *theta[] = {pointer(q.theta)}, *theta_saved[] = {pointer(saved[0])};
  void *psi[][1] = {{pointer(q.psi[0])}, {pointer(q.psi[1])}};
  void *psi_saved[][1] = {{pointer(saved[1])}, {pointer(saved[2])}};
  const void *loss_rows[] = {pointer(g[0]), pointer(g[1])}, *perturbed_rows[] = {pointer(s[0]), pointer(s[1])};
  const void *own_loss[][1] = {{pointer(h[0])}, {pointer(h[1])}};
  const void *own_perturbed[][1] = {{pointer(t[0])}, {pointer(t[1])}};
  const flatmtl_vector own[] = {{FLATMTL_F64, 1, &one, psi[0]}, {FLATMTL_F64, 1, &one, psi[1]}};
  const flatmtl_vector own_saved[] = {{FLATMTL_F64, 1, &one, psi_saved[0]}, {FLATMTL_F64, 1, &one, psi_saved[1]}};
  const flatmtl_rows own_rows[] = {{FLATMTL_F64, 1, 1, &one, own_loss[0]}, {FLATMTL_F64, 1, 1, &one, own_loss[1]}};
  const flatmtl_rows own_moved[] = {{FLATMTL_F64, 1, 1, &one, own_perturbed[0]},
                                    {FLATMTL_F64, 1, 1, &one, own_perturbed[1]}};
  const flatmtl_problem problem = {2,
                                   {FLATMTL_F64, 1, &two, theta},
                                   {FLATMTL_F64, 1, &two, theta_saved},
                                   {FLATMTL_F64, 2, 1, &two, loss_rows},
                                   {FLATMTL_F64, 2, 1, &two, perturbed_rows},
                                   own,
                                   own_saved,
                                   own_rows,
                                   own_moved};
  size_t bytes = 0;
  REQUIRE(flatmtl_step_size(2, &bytes, nullptr) == FLATMTL_OK);
  std::unique_ptr<void, void (*)(void *)> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
  flatmtl::detail::Context context("test", 2);
  flatmtl_step *step = nullptr;
  REQUIRE(flatmtl_step_init(memory.get(), bytes, &problem, &settings, &step, nullptr) == FLATMTL_OK);
  REQUIRE(flatmtl_step_begin(step, context.get(), nullptr) == FLATMTL_OK);
  for (int32_t i = 0; i < 2; ++i) {
    REQUIRE(flatmtl_step_perturb(step, context.get(), i, nullptr) == FLATMTL_OK);
    const auto grads =
        torch::autograd::grad({q.loss(static_cast<size_t>(i))}, {q.theta, q.psi[static_cast<size_t>(i)]});
    s[static_cast<size_t>(i)].copy_(grads[0]);
    t[static_cast<size_t>(i)].copy_(grads[1]);
    REQUIRE(flatmtl_step_restore(step, context.get(), nullptr) == FLATMTL_OK);
  }
  REQUIRE(flatmtl_step_finish(step, context.get(), nullptr) == FLATMTL_OK);
  const flatmtl_vector out = {FLATMTL_F64, 1, &two, theta_saved};
  REQUIRE(flatmtl_step_update(step, context.get(), &out, nullptr) == FLATMTL_OK);

  CHECK(same_bits(q.theta.grad(), saved[0]));
  CHECK(same_bits({q.psi[0].grad(), q.psi[1].grad()}, t));
}

TEST_CASE("Without perturbation, the sum of two tasks is torch's optimizer alone", "[step]") {
  Net flat = net(), plain = net();
  torch::optim::SGD sgd(flat->parameters(), sgd_options()), alone(plain->parameters(), sgd_options());
  flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().aggregator("sum").family_scale("none").rho(0.0));
  for (int i = 0; i < 4; ++i) {
    const Batch batch(i);
    torch::manual_seed(i);
    optimizer.step([&] { return losses(flat, batch); });
    torch::manual_seed(i);
    const Tensors values = losses(plain, batch);
    Tensors params = plain->parameters();
    const auto a = torch::autograd::grad({values[0]}, params, {}, true, false, true);
    const auto b = torch::autograd::grad({values[1]}, params, {}, false, false, true);
    for (size_t p = 0; p < params.size(); ++p)
      params[p].mutable_grad() = !a[p].defined() ? b[p] : !b[p].defined() ? a[p] : a[p] + b[p];
    alone.step();
    REQUIRE(same_bits(flat->parameters(), plain->parameters()));
    REQUIRE(same_bits(flat->buffers(), plain->buffers()));
  }
}

TEST_CASE("In the pass of a task, the parameters of the others stand where they were", "[step]") {
  Quadratics q;
  torch::optim::SGD sgd(q.params(), 0.5);
  flatmtl::FlatMTL optimizer(sgd, raw("sum").rho(0.1));
  const auto version = q.theta._version();
  std::vector<Tensors> seen;
  optimizer.backward([&] {
    seen.push_back({copy_of(q.theta), copy_of(q.psi[0]), copy_of(q.psi[1])});
    return q.losses();
  });
  REQUIRE(seen.size() == 3);
  CHECK(same_bits({seen[1][2], seen[2][1]}, {seen[0][2], seen[0][1]}));
  for (size_t i = 0; i < 2; ++i) {
    CHECK(close((seen[i + 1][0] - seen[0][0]).norm(), torch::tensor(0.1, torch::kDouble)));
    CHECK(close((seen[i + 1][i + 1] - seen[0][i + 1]).norm(), torch::tensor(0.1, torch::kDouble)));
  }
  CHECK(q.theta._version() >= version + 3);  // autograd knows of every write: two moves, and back
}

TEST_CASE("An absent task takes no part, and keeps its parameters", "[step]") {
  Quadratics q;
  torch::optim::SGD sgd(q.params(), 0.5);
  flatmtl::FlatMTL optimizer(sgd, raw("sum").rho(0.1));
  optimizer.step([&] { return q.losses(); });
  const Tensor before = copy_of(q.psi[1]);
  const Tensors found = optimizer.backward([&] { return Tensors{q.loss(0), Tensor()}; });
  CHECK_FALSE(found[1].defined());
  CHECK(close(q.theta.grad(), q.s(0, 0.1)));  // theta is known to be shared
  CHECK_FALSE(q.psi[1].grad().defined());
  CHECK(std::isnan(optimizer.last().losses[1].item<double>()));
  optimizer.step();
  CHECK(same_bits(q.psi[1], before));
}

TEST_CASE("A parameter that requires no gradient, and one that no loss reaches, are left alone", "[step]") {
  Quadratics q;
  Tensor frozen = torch::ones(2), other = torch::ones(2).requires_grad_();
  other.mutable_grad() = torch::full({2}, 7.0);
  Tensors params = q.params();
  params.insert(params.end(), {frozen, other});
  torch::optim::SGD sgd(params, 0.5);
  flatmtl::FlatMTL optimizer(sgd);
  optimizer.backward([&] { return q.losses(); });
  CHECK_FALSE(frozen.grad().defined());
  CHECK(close(other.grad(), torch::full({2}, 7.0)));
}
