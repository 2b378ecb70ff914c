// Flatness modes: closed forms, costs, what is kept, refusals. The bits of every mode are compared with Python's by
// tests/python/test_cpp.py.
#include <cmath>
#include <limits>

#include "support.h"

namespace {

using namespace support;
using flatmtl::Flatness;

// Both tasks' gradients as vectors over (theta, psi_0, psi_1), and the Hessians' diagonals.
struct Vectors {
  explicit Vectors(const Quadratics &q) {
    const Tensor zero = torch::zeros(1, torch::kDouble);
    for (size_t i = 0; i < 2; ++i) {
      g.push_back(torch::cat({q.g(i), i == 0 ? q.h(0) : zero, i == 1 ? q.h(1) : zero}));
      curvature.push_back(
          torch::tensor({q.a[i], q.a[i], i == 0 ? q.b[0] : 0.0, i == 1 ? q.b[1] : 0.0}, torch::kDouble));
    }
  }
  Tensor sum() const { return g[0] + g[1]; }
  // rho direction / ||direction||, on one sphere for theta and one for psi.
  static Tensor separate(const Tensor &direction, double rho) {
    const Tensor theta = direction.slice(0, 0, 2), psi = direction.slice(0, 2);
    return rho * torch::cat({theta / theta.norm(), psi / psi.norm()});
  }
  // The gradients at (theta, psi) + eps.
  Tensors at(const Tensor &eps) const { return {g[0] + curvature[0] * eps, g[1] + curvature[1] * eps}; }

  Tensors g, curvature;
};

Tensor gradient(const Quadratics &q) {
  return torch::cat({q.theta.grad(), q.psi[0].grad(), q.psi[1].grad()});
}

// The update that follows from rows r_i, with weights 2 and 3 of the shared parameters.
Tensor weighted_sum(const Tensors &r) {
  return torch::cat({2.0 * r[0].slice(0, 0, 2) + 3.0 * r[1].slice(0, 0, 2), (r[0] + r[1]).slice(0, 2)});
}

struct Flat {
  explicit Flat(const Flatness &mode, flatmtl::FlatMTLOptions options = raw(flatmtl::Aggregator::fixed({2.0, 3.0})))
      : optimizer(sgd, options.flat(mode)) {}
  // The update at the same point, again and again.
  Tensor update() {
    optimizer.backward([&] {
      ++calls;
      return q.losses();
    });
    return gradient(q);
  }
  int calls = 0;
  Quadratics q;
  torch::optim::SGD sgd{q.params(), 0.5};
  flatmtl::FlatMTL optimizer;
};

flatmtl::FlatMTLOptions weights(double rho) {
  return raw(flatmtl::Aggregator::fixed({2.0, 3.0})).rho(rho);
}

// v_i = s_i - c g_i
Tensors minus(const Tensors &s, const Tensors &g, const Tensor &c0, const Tensor &c1) {
  return {s[0] - c0 * g[0], s[1] - c1 * g[1]};
}

}  // namespace

TEST_CASE("SAM: every task at the point along the sum", "[flatness]") {
  const std::string combine = GENERATE("decomposed", "direct");
  Flat t("sam", weights(0.3).combine(combine));
  const Vectors v(t.q);
  CHECK(close(t.update(), weighted_sum(v.at(Vectors::separate(v.sum(), 0.3)))));
  CHECK(t.calls == 2);
  const flatmtl::Record &last = t.optimizer.last();
  CHECK(last.norms_loss.isnan().all().item<bool>() == (combine == "direct"));
  CHECK(last.cosine_flat.isnan().all().item<bool>() == (combine == "direct"));
  CHECK(close(last.weights_loss, torch::tensor({2.0, 3.0}, torch::kDouble)));
  CHECK((last.sharpness.sum() > 0).item<bool>());

  Flat joint("sam", weights(0.3).combine(combine).norm("joint"));
  CHECK(close(joint.update(), weighted_sum(v.at(0.3 * v.sum() / v.sum().norm()))));
}

TEST_CASE("ASAM is adaptive SAM with eta = 0.01, or another one", "[flatness]") {
  Flat asam("asam", weights(0.3)), sam("sam", weights(0.3).adaptive(true).eta(0.01));
  CHECK(same_bits(asam.update(), sam.update()));
  CHECK(asam.optimizer.flat_options().adaptive());
  CHECK(asam.optimizer.flat_options().eta() == 0.01);
  Flat given("asam", weights(0.3).eta(0.5));
  CHECK(given.optimizer.flat_options().eta() == 0.5);
  CHECK_FALSE(same_bits(given.update(), asam.update()));
}

TEST_CASE("GSAM and WSAM change the flat gradients", "[flatness]") {
  const std::string combine = GENERATE("decomposed", "direct");
  Flat gsam(Flatness::gsam(0.25), weights(0.3).combine(combine));
  const Vectors v(gsam.q);
  const Tensors s = v.at(Vectors::separate(v.sum(), 0.3));
  const Tensor sum = s[0] + s[1], c = v.sum().dot(sum) / sum.dot(sum);
  Tensors r(2);
  for (size_t i = 0; i < 2; ++i) r[i] = s[i] - 0.25 * (v.g[i] - c * s[i]);
  CHECK(close(gsam.update(), weighted_sum(r)));
  CHECK(close(gsam.optimizer.last().norms_flat[0], (r[0] - v.g[0]).slice(0, 0, 2).norm()));

  Flat wsam(Flatness::wsam(0.75), weights(0.3).combine(combine));
  for (size_t i = 0; i < 2; ++i) r[i] = v.g[i] + 3.0 * (s[i] - v.g[i]);
  CHECK(close(wsam.update(), weighted_sum(r)));
}

TEST_CASE("FSAM: along the gradient less its moving average", "[flatness]") {
  const std::string combine = GENERATE("decomposed", "direct");
  Flat t(Flatness::fsam(2.0, 0.25), weights(0.3).combine(combine));
  const Vectors v(t.q);
  const Tensor eps = Vectors::separate(v.sum(), 0.3);
  CHECK(close(t.update(), weighted_sum(v.at(eps))));
  CHECK(close(t.update(), weighted_sum(v.at(-eps))));  // g - 2 m = -g
  {
    torch::NoGradGuard no_grad;
    t.q.theta.add_(torch::tensor({0.5, -1.0}, torch::kDouble));
  }
  const Vectors moved(t.q);
  CHECK(close(t.update(), weighted_sum(moved.at(Vectors::separate(moved.sum() - 2.0 * v.sum(), 0.3)))));
  const Tensor mean = 0.25 * v.sum() + 0.75 * moved.sum();
  CHECK(close(t.update(), weighted_sum(moved.at(Vectors::separate(moved.sum() - 2.0 * mean, 0.3)))));
}

TEST_CASE("LookSAM: the orthogonal component is reused", "[flatness]") {
  Flat t(Flatness::looksam(3, 0.6), weights(0.3));
  const Vectors v(t.q);
  const Tensors s = v.at(Vectors::separate(v.sum(), 0.3));
  const Tensor g = v.sum(), c = g.dot(s[0] + s[1]) / g.dot(g);
  const Tensors orthogonal = minus(s, v.g, c, c);
  const Tensor scale = 0.6 * g.norm() / (orthogonal[0] + orthogonal[1]).norm();
  const Tensors reused = {v.g[0] + scale * orthogonal[0], v.g[1] + scale * orthogonal[1]};
  for (const int pass : {1, 0, 0, 1}) {
    t.calls = 0;
    CHECK(close(t.update(), weighted_sum(pass == 1 ? s : reused)));
    CHECK(t.calls == 1 + pass);
    CHECK(t.optimizer.last().sharpness.isnan().all().item<bool>() == (pass == 0));
  }
}

TEST_CASE("F-MTL with every: each task's orthogonal component is reused", "[flatness]") {
  const bool rescaled = GENERATE(false, true);
  Flat t(Flatness::fmtl(3, rescaled ? std::optional<double>(0.5) : std::nullopt), weights(0.3));
  const Vectors v(t.q);
  Tensors s(2), c(2);
  for (size_t i = 0; i < 2; ++i) {
    s[i] = torch::cat({t.q.s(i, 0.3), torch::zeros(2, torch::kDouble)});
    s[i][2 + static_cast<int64_t>(i)] = t.q.t(i, 0.3)[0];
    c[i] = s[i].dot(v.g[i]) / v.g[i].dot(v.g[i]);
  }
  Tensors reused = minus(s, v.g, c[0], c[1]);
  for (size_t i = 0; i < 2; ++i)
    reused[i] = v.g[i] + (rescaled ? 0.5 * v.g[i].norm() / reused[i].norm() : torch::ones({})) * reused[i];
  for (const int pass : {1, 0, 0, 1}) {
    t.calls = 0;
    CHECK(close(t.update(), weighted_sum(pass == 1 ? s : reused)));
    CHECK(t.calls == 1 + 2 * pass);
  }
}

TEST_CASE("SGSU: a step of each task's own, without rho", "[flatness]") {
  Flat t(Flatness::sgsu(0.2), weights(0.0));
  CHECK(*t.optimizer.flat_options().combine() == "direct");
  const Vectors v(t.q);
  Tensors s(2);
  for (size_t i = 0; i < 2; ++i)
    s[i] = torch::cat({(1.0 - 0.2 * t.q.a[i]) * v.g[i].slice(0, 0, 2), v.g[i].slice(0, 2)});
  CHECK(close(t.update(), weighted_sum(s)));
  CHECK(t.calls == 3);
}

TEST_CASE("SAMO: between the sum's gradient and a guess", "[flatness]") {
  Flat global(Flatness::samo(1.0), weights(0.3));
  CHECK(*global.optimizer.flat_options().combine() == "direct");
  const Vectors v(global.q);
  const Tensor g = v.sum().slice(0, 0, 2);
  Tensor expected = torch::zeros(2, torch::kDouble);
  for (size_t i = 0; i < 2; ++i)
    expected += (i == 0 ? 2.0 : 3.0) * (v.g[i].slice(0, 0, 2) + global.q.a[i] * 0.3 * g / g.norm());
  CHECK(close(global.update().slice(0, 0, 2), expected));
  for (size_t i = 0; i < 2; ++i) CHECK(close(global.q.psi[i].grad(), global.q.t(i, 0.3)));
  CHECK(global.calls == 3);

  // alpha = 0: +-rho z/||z||, with the sign of the rise of the loss along z.
  Flat guess(Flatness::samo(0.0), weights(0.3)), again(Flatness::samo(0.0), weights(0.3)),
      other(Flatness::samo(0.0), weights(0.3).seed(1));
  const auto random = at::detail::getDefaultCPUGenerator().get_state();
  std::vector<Tensors> seen;
  guess.optimizer.backward([&] {
    seen.push_back({copy_of(guess.q.theta), copy_of(guess.q.psi[0]), copy_of(guess.q.psi[1])});
    return guess.q.losses();
  });
  CHECK(same_bits(at::detail::getDefaultCPUGenerator().get_state(), random));
  REQUIRE(seen.size() == 7);  // 1 + 3 K
  for (size_t i = 0; i < 2; ++i) {
    const Tensor up = seen[1 + 3 * i][0] - seen[0][0], down = seen[2 + 3 * i][0] - seen[0][0],
                 eps = seen[3 + 3 * i][0] - seen[0][0];
    CHECK(close(up, -down));
    CHECK(close(eps.norm(), torch::tensor(0.3, torch::kDouble)));
    CHECK(close(torch::abs(eps.dot(up)), eps.norm() * up.norm()));
    CHECK((eps.dot(guess.q.g(i)) > 0).item<bool>());
    CHECK(same_bits(seen[3 + 3 * i][2 - i], seen[0][2 - i]));  // the other task's own parameter
  }
  CHECK_FALSE(close(seen[1][0] - seen[0][0], seen[4][0] - seen[0][0]));
  CHECK(same_bits(again.update(), gradient(guess.q)));
  CHECK_FALSE(same_bits(other.update(), gradient(guess.q)));
  CHECK_FALSE(same_bits(again.update(), gradient(guess.q)));  // another step draws anew
}

TEST_CASE("A gradient of the sum that is not finite is named, and nothing changes", "[flatness][restore]") {
  Run run(flatmtl::FlatMTLOptions().flat("sam").combine("direct"));
  run.train(0, 1);
  const Tensors before = run.all();
  CHECK(message<flatmtl::NonFiniteError>([&] {
          run.optimizer.step([&] {
            Tensors values = losses(run.model, Batch(1));
            values[1] =
                values[1] + ((run.model->head_b->bias - run.model->head_b->bias.detach()).abs() + 0.0).sqrt().sum();
            return values;
          });
        }).find("task 'sum of the losses': the gradient is not finite") == 0);
  CHECK(same_bits(run.all(), before));
}

TEST_CASE("Tasks without loss and gradient leave a mode's state alone", "[flatness]") {
  const Flatness mode = GENERATE(Flatness::fsam(), Flatness::looksam(2), Flatness::fmtl(2));
  CAPTURE(mode.text());
  Run run(flatmtl::FlatMTLOptions().flat(mode)), plain(flatmtl::FlatMTLOptions().flat(mode));
  for (Run *r : {&run, &plain}) r->train(0, 1);
  copy_weights(plain.model, run.model);
  run.optimizer.backward([&] {
    Tensors values = losses(run.model, Batch(1));
    for (Tensor &value : values) value = value * 0.0;
    return values;
  });
  copy_weights(plain.model, run.model);
  for (Run *r : {&run, &plain}) {
    torch::manual_seed(2);
    r->optimizer.backward([&] { return losses(r->model, Batch(2)); });
  }
  for (size_t i = 0; i < run.model->parameters().size(); ++i)
    CHECK(same_bits(run.model->parameters()[i].grad(), plain.model->parameters()[i].grad()));
}

TEST_CASE("A task that is absent keeps its flat gradient and its age", "[flatness]") {
  Run run(flatmtl::FlatMTLOptions().every(2));
  const auto calls = [&](bool second) {
    int count = 0;
    run.optimizer.step([&] {
      ++count;
      Tensors values = losses(run.model, Batch(0));
      if (!second) values[1] = Tensor();
      return values;
    });
    return count;
  };
  CHECK(calls(true) == 3);
  CHECK(calls(false) == 1);  // the first task reuses
  CHECK(calls(true) == 2);   // the first task passes anew, the second reuses
  CHECK(std::isnan(run.optimizer.last().sharpness[1].item<double>()));
  CHECK(calls(true) == 2);  // the other way round
  Run looksam(flatmtl::FlatMTLOptions().flat(Flatness::looksam(5)));
  looksam.optimizer.step([&] { return Tensors{losses(looksam.model, Batch(0))[0], Tensor()}; });
  int count = 0;
  looksam.optimizer.step([&] {
    ++count;
    return losses(looksam.model, Batch(1));
  });
  CHECK(count == 2);  // a task without a row brings the pass forward
}

TEST_CASE("What a flatness mode keeps is saved, and left alone by a step that fails", "[flatness][state]") {
  const Flatness mode = GENERATE(Flatness::fsam(), Flatness::looksam(3), Flatness::fmtl(3), Flatness::fmtl(3, 0.5));
  CAPTURE(mode.text());
  const auto options = flatmtl::FlatMTLOptions().flat(mode);
  Run whole(options), second(options), forgetful(options), failing(options);
  for (Run *run : {&whole, &failing}) run->train(0, 2);
  const std::string bytes = saved(whole.optimizer);
  for (Run *run : {&second, &forgetful}) copy_weights(whole.model, run->model);
  load(second.optimizer, bytes);
  load(forgetful.optimizer, saved(whole.sgd));
  for (Run *run : {&second, &forgetful}) run->train(2, 4);
  for (int step = 2; step < 4; ++step) {
    torch::manual_seed(step);
    int calls = 0;
    whole.optimizer.step([&] {
      ++calls;
      return losses(whole.model, Batch(step));
    });
    const Tensors before = failing.all();
    for (const int at : {0, calls - 1}) {
      int number = 0;
      CHECK_THROWS_AS(failing.optimizer.step([&] {
        const Tensors values = losses(failing.model, Batch(step + 7));
        if (number++ == at) throw std::domain_error("stop");
        return values;
      }),
                      std::domain_error);
      CHECK(same_bits(failing.all(), before));
    }
    failing.train(step, step + 1);
  }
  CHECK(same_bits(second.model->parameters(), whole.model->parameters()));
  CHECK(same_bits(failing.all(), whole.all()));
  CHECK_FALSE(same_bits(forgetful.model->trunk->weight, whole.model->trunk->weight));
  CHECK(saved(second.optimizer).size() == saved(whole.optimizer).size());
}

TEST_CASE("Rows follow their parameters: frozen ones, and other dtypes", "[flatness][state]") {
  Run run(flatmtl::FlatMTLOptions().flat("fsam")), later(flatmtl::FlatMTLOptions().flat("fsam"));
  run.model->trunk->weight.set_requires_grad(false);
  run.train(0, 2);
  run.model->trunk->weight.set_requires_grad(true);
  CHECK_NOTHROW(run.train(2, 4));
  const std::string bytes = saved(run.optimizer);
  later.model->to(torch::kDouble);
  load(later.optimizer, bytes);
  CHECK_NOTHROW(later.optimizer.backward([&] {
    const Batch batch(1);
    const Tensor h = later.model(batch.x.to(torch::kDouble));
    return Tensors{torch::cross_entropy_loss(later.model->head_a(h), batch.a),
                   torch::mse_loss(later.model->head_b(h), batch.b.to(torch::kDouble))};
  }));
  CHECK(later.model->trunk->weight.grad().scalar_type() == torch::kDouble);
}

TEST_CASE("A state that does not fit is refused, and nothing changes", "[flatness][state]") {
  using flatmtl::detail::State;
  const auto refused = [](Run &run, auto change) {
    const Tensors before = run.all();
    const std::string own = saved(run.optimizer), bytes = forged(run, change);
    const std::string text = message<std::runtime_error>([&] { load(run.optimizer, bytes); });
    CHECK(same_bits(run.all(), before));
    CHECK(saved(run.optimizer) == own);
    return text;
  };
  Run every(flatmtl::FlatMTLOptions().every(2)), fsam(flatmtl::FlatMTLOptions().flat("fsam")),
      looksam(flatmtl::FlatMTLOptions().flat("looksam")),
      uw(flatmtl::FlatMTLOptions().weighting("uw").aggregator(flatmtl::Aggregator::gradvac(0.5)));
  for (Run *run : {&every, &fsam, &looksam, &uw}) run->train(0, 2);
  CHECK(refused(every, [](State &) {}) == "no exception");
  CHECK(refused(every, [](State &s) { s.methods.flatness.rows.pop_back(); }) ==
        "state_dict holds fmtl's gradients of 1 tasks, but there are 2");
  CHECK(refused(every, [](State &s) { s.methods.flatness.rows[1].resize(9); }) ==
        "state_dict holds fmtl's gradients of 9 parameters, not 8");
  CHECK(refused(fsam, [](State &s) { s.methods.flatness.rows[0][0] = torch::zeros(3); }) ==
        "state_dict holds fsam's gradient of task 0 and parameter 0 with shape (3,), but the parameter has (6, 5)");
  CHECK(refused(fsam, [](State &s) { s.methods.flatness.rows.resize(2); }) ==
        "state_dict holds fsam's gradients of 2 tasks, but there are 1");
  CHECK(refused(fsam, [](State &s) { s.flat = "looksam"; }) ==
        "state_dict holds the state of flat 'looksam', but the optimizer has 'fsam'");
  const std::string damaged = "state_dict['flatmtl'] is damaged";
  CHECK(refused(every, [](State &s) { s.methods.flatness.age.pop_back(); }) == damaged);
  CHECK(refused(every, [](State &s) { s.methods.flatness.norm.push_back(1.0); }) == damaged);
  CHECK(refused(looksam, [](State &s) { s.methods.flatness.orthogonal_norm.clear(); }) == damaged);
  CHECK(refused(looksam, [](State &s) { s.methods.flatness.age.clear(); }) == damaged);

  const std::string eight = "state_dict holds a state of weighting 'uw' that is not 8 float64 numbers, for 2 tasks";
  CHECK(refused(uw, [](State &s) { s.methods.weighting.values.pop_back(); }) == eight);
  CHECK(refused(uw, [](State &s) { s.methods.weighting.values.push_back(0.0); }) == eight);
  CHECK(refused(uw, [](State &s) { s.methods.weighting.values[0] = std::nan(""); }) == eight);
  CHECK(refused(uw, [](State &s) { s.methods.aggregator.calls["loss"].pop_back(); }) ==
        "state of the aggregator 'gradvac': 'loss' has 3 numbers, but 2 tasks need 4");
  CHECK(refused(uw, [](State &s) { s.methods.aggregator.calls["flat"][1] = 2.0; }) ==
        "state of the aggregator 'gradvac': 'flat' holds values beyond [-1, 1]");

  // Rows that do not add up.
  const auto read = [](const std::vector<int64_t> &lengths, const std::vector<int64_t> &defined) {
    torch::serialize::OutputArchive out;
    out.write("flat_lengths", c10::IValue(c10::List<int64_t>(lengths)));
    out.write("flat_defined", c10::IValue(c10::List<int64_t>(defined)));
    out.write("flat_tensors", c10::IValue(c10::List<Tensor>({torch::ones(1)})));
    std::stringstream stream;
    out.save_to(stream);
    torch::serialize::InputArchive in;
    in.load_from(stream);
    return message<std::runtime_error>([&] { flatmtl::detail::FlatnessState::load(in); });
  };
  CHECK(read({2}, {1}) == damaged);
  CHECK(read({-1}, {1}) == damaged);
  CHECK(read({2}, {1, 1}) == damaged);
  CHECK(read({2}, {0, 0}) == damaged);
  CHECK(read({1}, {1, 0}) == damaged);
}

TEST_CASE("Options of flatness modes are checked", "[flatness]") {
  const auto text = [](auto make) { return message<std::invalid_argument>(make); };
  const auto options = [&](const flatmtl::FlatMTLOptions &made) {
    Quadratics q;
    torch::optim::SGD sgd(q.params(), 0.5);
    return text([&] { flatmtl::FlatMTL(sgd, made); });
  };
  using Options = flatmtl::FlatMTLOptions;
  CHECK(text([] { Flatness("sma"); }) ==
        "there is no flatness mode 'sma'. Did you mean 'sam'? Known: 'fmtl', 'sam', 'asam', 'gsam', 'wsam', 'fsam', "
        "'looksam', 'samo', "
        "'sgsu'");
  CHECK(text([] { Flatness("mtcool"); }) ==
        "flatness mode 'mtcool' is Python's alone: it perturbs what modules return, by hooks that C++ does not have");
  CHECK(text([] { Flatness::fmtl(0); }) == "FMTL: every is 0; it must be an integer >= 1");
  CHECK(text([] { Flatness::fmtl(2, -1.0); }) == "FMTL: alpha is -1.0; it must be None or a finite number >= 0");
  CHECK(text([] { Flatness::gsam(std::nan("")); }) == "GSAM: alpha is nan; it must be a finite number >= 0");
  CHECK(text([] { Flatness::wsam(1.0); }) == "WSAM: gamma is 1.0; it must be in [0, 1)");
  CHECK(text([] { Flatness::fsam(-1.0); }) == "FSAM: sigma is -1.0; it must be a finite number >= 0");
  CHECK(text([] { Flatness::fsam(1.0, 2.0); }) == "FSAM: lmbda is 2.0; it must be in [0, 1]");
  CHECK(text([] { Flatness::looksam(-3); }) == "LookSAM: every is -3; it must be an integer >= 1");
  CHECK(text([] { Flatness::looksam(2, -1.0); }) == "LookSAM: alpha is -1.0; it must be a finite number >= 0");
  CHECK(text([] { Flatness::samo(-0.5); }) == "SAMO: alpha is -0.5; it must be in [0, 1]");
  CHECK(text([] { Flatness::samo(0.5, 0.0); }) == "SAMO: mu is 0.0; it must be a finite number > 0");
  CHECK(text([] { Flatness::sgsu(std::numeric_limits<double>::infinity()); }) ==
        "SGSU: inner_lr is inf; it must be a finite number >= 0");
  CHECK(options(Options().flat("sam").every(3)) == "flatness mode 'sam' has no option every, which is 3");
  CHECK(options(Options().every(0)) == "FMTL: every is 0; it must be an integer >= 1");
  CHECK(options(Options().every(2).m_sharpness(true)) ==
        "m_sharpness=True: flatness mode FMTL(every=2, alpha=None) keeps gradients of whole steps");
  CHECK(options(Options().flat("fsam").m_sharpness(true)) ==
        "m_sharpness=True: flatness mode FSAM(sigma=1.0, lmbda=0.9) keeps gradients of whole steps");
  CHECK(options(Options().flat("looksam").m_sharpness(true)).find("m_sharpness=True: ") == 0);
  CHECK(options(Options().flat("samo").m_sharpness(true)) == "no exception");
  CHECK(options(Options().eta(-1.0)) == "Invalid eta: -1.0 (expected a finite number >= 0)");
  CHECK(options(Options().accumulate("f32")) == "Invalid accumulate: 'f32' (expected one of 'auto', 'f64')");
  CHECK(options(Options().combine("both")).find("Invalid combine: 'both'") == 0);
  const Flat looksam("looksam", Options().every(4));
  CHECK(looksam.optimizer.flat_options().flat().text() == "LookSAM(every=4, alpha=0.7)");
  CHECK(*looksam.optimizer.flat_options().combine() == "decomposed");
  CHECK(*Flat("samo", Options().combine("second")).optimizer.flat_options().combine() == "second");
  CHECK(Flatness("sam").text() == "SAM()");
  CHECK(text([] { Flatness("sam").option("alpha"); }) == "flatness mode 'sam' has no option alpha");
}

TEST_CASE("accumulate: Gramians of many long float32 rows", "[step]") {
  constexpr int64_t tasks = 6, length = 98304;
  const Tensor x = torch::randn({tasks, length}, at::detail::createCPUGenerator(5));
  const auto norms = [&](const std::string &accumulate) {
    Tensor w = torch::zeros(length).requires_grad_();
    torch::optim::SGD sgd({w}, 0.1);
    flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().rho(0.0).accumulate(accumulate));
    optimizer.backward([&] {
      Tensors values;
      for (int64_t i = 0; i < tasks; ++i) values.push_back((w * x[i]).sum());
      return values;
    });
    return optimizer.last().norms_loss;
  };
  const Tensor exact = x.to(torch::kDouble).norm(2, 1);
  CHECK(close(norms("f64"), exact, 1e-13));
  CHECK_FALSE(close(norms("auto"), exact, 1e-13));
  CHECK(close(norms("auto"), exact, 3e-6));
}
