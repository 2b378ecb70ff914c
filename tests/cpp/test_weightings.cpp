// Loss weightings: closed forms, refusals, what is learned after the update, checkpoints. The bits of every method are
// compared with Python's by tests/python/test_cpp.py.
#include <cmath>

#include "support.h"

namespace {

using namespace support;
using flatmtl::Weighting;

flatmtl::FlatMTLOptions weighted(const Weighting &weighting) {
  return flatmtl::FlatMTLOptions().aggregator("sum").family_scale("none").weighting(weighting);
}

}  // namespace

TEST_CASE("A step with a weighting is the step of the weighted losses", "[weightings]") {
  const double rho = GENERATE(0.0, 0.1);
  const std::string name = GENERATE("si", "gls", "uw", "fixed");
  CAPTURE(rho, name);
  Run t(weighted(name == "fixed" ? Weighting::fixed({0.5, 3.0}) : Weighting(name)).rho(rho), net(0.0));
  const Tensors values = losses(t.model, Batch(1));
  const double l[2] = {values[0].item<double>(), values[1].item<double>()};
  double c[2] = {0.5, 3.0};
  for (int i = 0; i < 2; ++i) {
    if (name == "si") c[i] = 1.0 / l[i];
    if (name == "gls") c[i] = std::sqrt(l[0] * l[1]) / (2.0 * l[i]);
    if (name == "uw") c[i] = std::exp(0.5) / 2.0;
  }
  Run plain(flatmtl::FlatMTLOptions().aggregator("sum").family_scale("none").rho(rho), net(0.0));
  t.optimizer.backward([&] { return losses(t.model, Batch(1)); });
  plain.optimizer.backward([&] {
    Tensors all = losses(plain.model, Batch(1));
    for (size_t i = 0; i < 2; ++i) all[i] = all[i] * c[i];
    return all;
  });
  CHECK(close(t.optimizer.last().loss_weights, torch::tensor({c[0], c[1]}, torch::kDouble), 1e-6));
  CHECK(close(plain.optimizer.last().loss_weights, torch::ones(2)));
  for (size_t i = 0; i < t.model->parameters().size(); ++i)
    CHECK(close(t.model->parameters()[i].grad(), plain.model->parameters()[i].grad(), 1e-5));
}

TEST_CASE("Losses that a weighting is not defined for are named, and nothing changes", "[weightings][restore]") {
  const auto [weighting, expected] = GENERATE(table<Weighting, std::string>({
      {"si", "weighting 'si' needs losses > 0, but that of task 1 is -2.0; nothing was changed"},
      {"dwa", "weighting 'dwa' needs losses >= 0, but that of task 1 is -2.0; nothing was changed"},
      {Weighting::famo(0.1, 0.0, {0.0, -2.0}),
       "weighting 'famo' needs losses above their lower bound, but that of task 1 is -2.0, its bound -2.0 "
       "(min_losses); "
       "nothing was changed"},
  }));
  Run t(weighted(weighting));
  t.train(0, 2);
  const Tensors before = t.all();
  CHECK(message<std::runtime_error>([&] {
          t.optimizer.step([&] {
            Tensors values = losses(t.model, Batch(2));
            values[1] = values[1] * 0.0 - 2.0;
            return values;
          });
        }) == expected);
  CHECK(same_bits(t.all(), before));
  CHECK(t.optimizer.steps() == 2);
}

TEST_CASE("FAMO sees the losses after the update, and leaves buffers and random numbers alone", "[weightings]") {
  const bool apart = GENERATE(false, true);  // backward and step
  Run t(weighted("famo")), plain(weighted("famo"));
  int calls = 0;
  std::vector<bool> grad_modes;
  Tensor statistics, after_losses;
  const auto closure = [&] {
    const Tensors values = losses(t.model, Batch(0));
    grad_modes.push_back(torch::GradMode::is_enabled());
    if (++calls == 1) statistics = copy_of(t.model->norm->running_mean);
    if (calls == 4) after_losses = torch::stack(values);
    return values;
  };
  torch::manual_seed(0);
  if (apart) {
    t.optimizer.backward([&] { return closure(); });
    CHECK(calls == 3);
    t.optimizer.step();
  } else {
    t.optimizer.step(closure);
  }
  CHECK(calls == 4);
  CHECK((grad_modes == std::vector<bool>{true, true, true, false}));
  CHECK(same_bits(t.model->norm->running_mean, statistics));
  CHECK_FALSE(after_losses.requires_grad());
  const Tensor random = torch::rand({3});
  torch::manual_seed(0);
  losses(plain.model, Batch(0));
  CHECK(same_bits(torch::rand({3}), random));
  // The task whose loss fell less, in log, weighs more.
  const Tensor fall = (torch::log(t.optimizer.last().losses) - torch::log(after_losses.to(torch::kDouble)));
  t.optimizer.backward([&] { return losses(t.model, Batch(0)); });
  const Tensor z = t.optimizer.last().loss_weights * t.optimizer.last().losses;
  CHECK((z[0] < z[1]).item<bool>() == (fall[0] > fall[1]).item<bool>());
  CHECK_FALSE(close(z[0], z[1]));
}

TEST_CASE("A closure that throws after the update", "[weightings][restore]") {
  Run t(weighted("famo")), plain(weighted("famo"));
  int calls = 0;
  const auto closure = [&] {
    const Tensors values = losses(t.model, Batch(0));
    if (++calls == 4) throw std::domain_error("stop");
    return values;
  };
  torch::manual_seed(0);
  CHECK_THROWS_AS(t.optimizer.step(closure), std::domain_error);
  plain.train(0, 1);
  CHECK(same_bits(t.model->buffers(), plain.model->buffers()));
  CHECK(same_bits(t.model->parameters(), plain.model->parameters()));  // the update is made
  CHECK(t.optimizer.steps() == 1);
  t.optimizer.backward([&] { return losses(t.model, Batch(0)); });
  const Tensor z = t.optimizer.last().loss_weights * t.optimizer.last().losses;
  CHECK(close(z[0], z[1]));  // nothing was learned
}

TEST_CASE("What cannot be copied is refused where it must be kept", "[weightings]") {
  Run t(weighted("famo"));
  struct Closure {
    explicit Closure(Run &of) : t(of) {}
    Closure(const Closure &) = delete;
    Tensors operator()() { return losses(t.model, Batch(0)); }
    Run &t;
  } closure(t);
  CHECK(message<std::invalid_argument>([&] { t.optimizer.backward(closure); }).find("the closure cannot be copied") ==
        0);
  t.optimizer.step(closure);
  CHECK(t.optimizer.steps() == 1);
}

TEST_CASE("What the weighting keeps is saved, for that weighting alone", "[weightings][state]") {
  const Weighting weighting = GENERATE(Weighting::uw(0.5), Weighting::famo(0.5), Weighting::gradnorm(1.0, 0.2));
  CAPTURE(weighting.name());
  Run whole(weighted(weighting)), second(weighted(weighting)), forgetful(weighted(weighting));
  whole.train(0, 3);
  const std::string bytes = saved(whole.optimizer);
  copy_weights(whole.model, second.model);
  copy_weights(whole.model, forgetful.model);
  load(second.optimizer, bytes);
  Run none(flatmtl::FlatMTLOptions().aggregator("sum").family_scale("none"), whole.model);
  Run other(weighted("dwa"));
  const std::string named =
      "state_dict holds the state of weighting '" + weighting.name() + "', but the optimizer has ";
  CHECK(message<std::runtime_error>([&] { load(none.optimizer, bytes); }) == named + "None");
  CHECK(message<std::runtime_error>([&] { load(other.optimizer, bytes); }) == named + "'dwa'");
  CHECK(other.optimizer.steps() == 0);
  whole.train(3, 5);
  second.train(3, 5);
  CHECK(same_bits(second.model->parameters(), whole.model->parameters()));
  forgetful.train(3, 5);
  CHECK_FALSE(same_bits(forgetful.optimizer.last().loss_weights, whole.optimizer.last().loss_weights));
}

TEST_CASE("Options of weightings are checked", "[weightings]") {
  const auto text = [](auto make) { return message<std::invalid_argument>(make); };
  CHECK(text([] { Weighting("uws"); }).find("there is no weighting 'uws'. Did you mean 'uw'? Known: 'fixed', 'uw'") ==
        0);
  CHECK(text([] { Weighting("fixed"); }).find("weighting 'fixed' needs its option 'values'") == 0);
  CHECK(text([] { Weighting::fixed({1.0, -1.0}); }) == "FixedWeights: values[1] is -1.0; it must be >= 0 and finite");
  CHECK(text([] { Weighting::uw(0.0); }) == "UW: lr is 0.0; it must be positive and finite");
  CHECK(text([] { Weighting::uw(0.1, std::nan("")); }) == "UW: initial is nan; it must be finite");
  CHECK(text([] { Weighting::dwa(2.0, 0); }) == "DWA: epoch is 0; it must be an integer, at least 1");
  CHECK(text([] { Weighting::slaw(1.0); }) == "SLAW: beta is 1.0; it must be in [0, 1)");
  CHECK(text([] { Weighting::gradnorm(-1.0); }) == "GradNorm: alpha is -1.0; it must be >= 0");
  CHECK(text([] { Weighting::rlw(-1); }).find("seed is -1; ") == 0);
  Run t(weighted(Weighting::fixed({1.0, 2.0, 3.0})));
  CHECK(text([&] { t.train(0, 1); }) == "FixedWeights has 3 values for 2 tasks");
  Run bounds(weighted(Weighting::famo(0.1, 0.0, {0.0})));
  CHECK(text([&] { bounds.train(0, 1); }) == "FAMO has 1 min_losses for 2 tasks");
}
