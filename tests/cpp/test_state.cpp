// Checkpoints: training goes on with the same bits, and what does not fit is refused and changes nothing.
#include "support.h"

namespace {

using namespace support;

flatmtl::FlatMTLOptions pcgrad(int64_t seed) {
  return flatmtl::FlatMTLOptions().aggregator("pcgrad").seed(seed);
}

}  // namespace

TEST_CASE("Training goes on where it was saved, bit for bit", "[state]") {
  Run whole(pcgrad(4));
  whole.train(0, 6);

  Run first(pcgrad(4));
  first.optimizer.set_rho(0, {0.05, 0.05});
  first.train(0, 3);
  const std::string optimizer = saved(first.optimizer);
  std::ostringstream weights;
  torch::save(first.model, weights);

  Run second(pcgrad(99));
  second.train(0, 1);  // to be forgotten
  std::istringstream stream(weights.str());
  torch::load(second.model, stream);
  load(second.optimizer, optimizer);
  CHECK(second.optimizer.steps() == 3);
  CHECK(second.optimizer.flat_options().seed() == 4);
  second.train(3, 6);
  CHECK(same_bits(second.all(), whole.all()));
}

TEST_CASE("What the aggregator keeps is saved", "[state]") {
  const auto options = [] {
    return flatmtl::FlatMTLOptions().aggregator(flatmtl::Aggregator::gradvac(0.5)).combine("second");
  };
  Run whole(options()), second(options()), forgetful(options());
  whole.train(0, 3);
  const std::string bytes = saved(whole.optimizer);
  for (Run *run : {&second, &forgetful}) {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < 8; ++i) run->model->parameters()[i].copy_(whole.model->parameters()[i]);
    for (size_t i = 0; i < 3; ++i) run->model->buffers()[i].copy_(whole.model->buffers()[i]);
  }
  load(second.optimizer, bytes);
  load(forgetful.optimizer, saved(whole.sgd));
  for (Run *run : {&whole, &second, &forgetful}) run->train(3, 5);
  CHECK(same_bits(second.model->parameters(), whole.model->parameters()));
  CHECK_FALSE(same_bits(forgetful.model->trunk->weight, whole.model->trunk->weight));

  Run other;
  CHECK(message<std::runtime_error>([&] { load(other.optimizer, bytes); }) ==
        "state_dict holds the state of aggregator 'gradvac', but the optimizer has 'cagrad'");
}

TEST_CASE("Radii and roles are saved", "[state]") {
  Run run;
  run.train(0, 1);
  run.optimizer.set_rho(0, {0.3, 0.2});
  const std::string bytes = saved(run.optimizer);
  Run other;
  load(other.optimizer, bytes);
  CHECK(other.optimizer.rho(0).shared == 0.3);
  CHECK(other.optimizer.rho(0).task == 0.2);
  CHECK(saved(other.optimizer).size() == bytes.size());
}

TEST_CASE("shared() wins over loaded roles", "[state]") {
  const auto options = [] { return raw(flatmtl::Aggregator::fixed({2.0, 3.0})).rho(0.1); };
  Quadratics found, given, loaded;
  const auto named = [&](const Quadratics &q) { return options().shared(Tensors{q.psi[0]}); };
  torch::optim::SGD first_sgd(found.params(), 0.0), given_sgd(given.params(), 0.0), loaded_sgd(loaded.params(), 0.0);
  flatmtl::FlatMTL first(first_sgd, options()), other(given_sgd, named(given)), second(loaded_sgd, named(loaded));
  first.backward([&] { return found.losses(); });
  other.backward([&] { return given.losses(); });
  CHECK_FALSE(same_bits(found.theta.grad(), given.theta.grad()));  // shared, and own
  load(second, saved(first));
  second.backward([&] { return loaded.losses(); });
  for (size_t i = 0; i < 3; ++i) CHECK(same_bits(loaded.params()[i].grad(), given.params()[i].grad()));
}

TEST_CASE("An archive of the wrapped optimizer alone loads", "[state]") {
  Run run;
  run.train(0, 2);
  Run other;
  load(other.optimizer, saved(run.sgd));
  CHECK(other.optimizer.steps() == 0);
  const Tensor p = other.model->trunk->weight, q = run.model->trunk->weight;
  const auto buffer = [](Run &r, const Tensor &parameter) {
    return static_cast<torch::optim::SGDParamState &>(*r.sgd.state().at(parameter.unsafeGetTensorImpl()))
        .momentum_buffer();
  };
  CHECK(same_bits(buffer(other, p), buffer(run, q)));
  load(other.sgd, saved(run.optimizer));  // and the other way round
}

TEST_CASE("What does not fit is refused, and nothing changes", "[state]") {
  Run run;
  run.train(0, 2);
  const auto refused = [&](const std::string &bytes) {
    const Tensors before = run.all();
    const std::string text = message<std::exception>([&] { load(run.optimizer, bytes); });
    CHECK(same_bits(run.all(), before));
    CHECK(run.optimizer.steps() == 2);
    CHECK(run.optimizer.rho(0).shared == 0.05);
    CHECK(run.sgd.param_groups()[0].options().get_lr() == 0.1);
    return text;
  };
  SECTION("another number of tasks") {
    Run other;
    other.optimizer.step([&] {
      Tensors values = losses(other.model, Batch());
      values.push_back(values[0] * 2);
      return values;
    });
    CHECK(refused(saved(other.optimizer)) == "state_dict has 3 tasks, but the optimizer has 2");
  }
  SECTION("another number of parameters") {
    Tensor w = torch::ones(2).requires_grad_();
    torch::optim::SGD sgd({w}, sgd_options());
    flatmtl::FlatMTL other(sgd);
    CHECK(refused(saved(other)) == "state_dict['flatmtl']['roles'] is for 1 parameters, but the optimizer has 8");
  }
  SECTION("another shape") {
    Tensors params;
    for (const Tensor &p : run.model->parameters()) params.push_back(torch::ones(p.numel() + 1).requires_grad_());
    torch::optim::SGD sgd(params, sgd_options());
    flatmtl::FlatMTL other(sgd);
    CHECK(refused(saved(other)) ==
          "state_dict['flatmtl']: parameter 0 has shape (31,), but the optimizer's has shape (6, 5)");
  }
  SECTION("another optimizer") {
    Net model = net();
    torch::optim::Adam adam(model->parameters());
    flatmtl::FlatMTL other(adam);
    other.step([&] { return losses(model, Batch()); });
    CHECK(refused(saved(other)) != "no exception");
  }
  SECTION("another version") {
    torch::serialize::OutputArchive archive;
    run.sgd.save(archive);
    torch::serialize::OutputArchive own(archive.compilation_unit());
    own.write("version", c10::IValue(int64_t{7}));
    archive.write("flatmtl", own);
    std::ostringstream stream;
    archive.save_to(stream);
    CHECK(refused(stream.str()) == "state_dict['flatmtl'] has version 7, but this flatmtl reads 1");
  }
}
