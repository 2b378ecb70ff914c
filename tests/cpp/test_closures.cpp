// What closures may be and may return, and what is said about those that may not.
#include <array>
#include <map>

#include "support.h"

namespace {

using namespace support;

struct Tasks {
  Tasks() : sgd({w, v}, 0.5), optimizer(sgd) {}
  Tensor a() const { return (w * v).sum(); }
  Tensor b() const { return (w - 1.0).square().sum(); }

  Tensor w = torch::tensor({1.0, 2.0}, torch::kDouble).requires_grad_();
  Tensor v = torch::tensor({-1.0, 0.5}, torch::kDouble).requires_grad_();
  torch::optim::SGD sgd;
  flatmtl::FlatMTL optimizer;
};

}  // namespace

TEST_CASE("Every container of losses gives the same step, and comes back", "[closures]") {
  Tasks expected;
  const Tensors list = expected.optimizer.backward([&] { return Tensors{expected.a(), expected.b()}; });
  Tasks t;
  const auto same = [&] {
    CHECK(same_bits(t.w.grad(), expected.w.grad()));
    CHECK(same_bits(t.v.grad(), expected.v.grad()));
  };
  SECTION("array") {
    const std::array<Tensor, 2> found = t.optimizer.backward([&] { return std::array<Tensor, 2>{t.a(), t.b()}; });
    CHECK(same_bits({found[0], found[1]}, list));
    same();
  }
  SECTION("optionals") {
    using Losses = std::vector<std::optional<Tensor>>;
    const Losses found = t.optimizer.backward([&] { return Losses{t.a(), t.b()}; });
    CHECK(same_bits({*found[0], *found[1]}, list));
    same();
    const Losses absent = t.optimizer.backward([&] { return Losses{std::nullopt, t.b()}; });
    CHECK_FALSE(absent[0].has_value());
  }
  SECTION("stacked") {
    const Tensor found = t.optimizer.backward([&] { return torch::stack({t.a(), t.b()}); });
    CHECK(same_bits(found, torch::stack(list)));
    same();
  }
  SECTION("ordered dictionary") {
    using Losses = torch::OrderedDict<std::string, Tensor>;
    const Losses found = t.optimizer.backward([&] {
      Losses losses;
      losses.insert("depth", t.a());
      losses.insert("class", t.b());
      return losses;
    });
    CHECK((found.keys() == std::vector<std::string>{"depth", "class"}));
    CHECK(same_bits(found.values(), list));
    CHECK((t.optimizer.last().tasks == std::vector<flatmtl::Task>{"depth", "class"}));
    same();
  }
  SECTION("map") {
    using Losses = std::map<std::string, Tensor>;
    const Losses found = t.optimizer.backward([&] { return Losses{{"a", t.a()}, {"b", t.b()}}; });
    CHECK(same_bits({found.at("a"), found.at("b")}, list));
    same();
  }
  SECTION("one closure a task") {
    const Tensors found = t.optimizer.backward({[&] { return t.a(); }, [&] { return t.b(); }});
    CHECK(same_bits(found, list));
    same();
  }
  SECTION("one closure a task, by name") {
    const flatmtl::NamedTaskClosures closures = {{"x", [&] { return t.a(); }}, {"y", [&] { return t.b(); }}};
    const auto found = t.optimizer.backward(closures);
    CHECK((found.keys() == std::vector<std::string>{"x", "y"}));
    same();
  }
  SECTION("a closure that is told the task") {
    std::vector<std::optional<flatmtl::Task>> asked;
    t.optimizer.backward([&](std::optional<flatmtl::Task> task) {
      asked.push_back(task);
      return task ? (std::get<int64_t>(*task) == 0 ? t.a() : t.b()) : torch::stack({t.a(), t.b()});
    });
    CHECK((asked == std::vector<std::optional<flatmtl::Task>>{std::nullopt, int64_t{0}, int64_t{1}}));
    same();
  }
}

TEST_CASE("Through a torch::optim::Optimizer reference", "[closures]") {
  Tasks expected, t;
  expected.optimizer.step([&] { return torch::stack({expected.a(), expected.b()}); });
  torch::optim::Optimizer &base = t.optimizer;
  const Tensor found = base.step([&] { return torch::stack({t.a(), t.b()}); });
  CHECK(found.sizes() == c10::IntArrayRef({2}));
  CHECK(same_bits({t.w, t.v}, {expected.w, expected.v}));
  CHECK(base.size() == 2);

  torch::optim::StepLR scheduler(base, 1, 0.5);
  scheduler.step();
  scheduler.step();
  CHECK(t.sgd.param_groups()[0].options().get_lr() < 0.5);

  Tensor more = torch::ones(1, torch::kDouble).requires_grad_();
  base.add_param_group(torch::optim::OptimizerParamGroup({more}));
  t.optimizer.step([&] { return Tensors{t.a() * more.sum(), t.b()}; });
  CHECK(t.sgd.param_groups().size() == 2);
  CHECK_FALSE(close(more, torch::ones(1)));
  base.zero_grad();
  CHECK_FALSE(t.w.grad().defined());

  Tensor third = torch::ones(1, torch::kDouble).requires_grad_();
  t.optimizer.add_param_group(torch::optim::OptimizerParamGroup({third}), flatmtl::Rho(0.7, 0.2));
  CHECK(t.optimizer.param_groups().size() == 3);
  CHECK(static_cast<const torch::optim::Optimizer &>(t.optimizer).param_groups().size() == 3);
  CHECK(t.optimizer.rho(2).shared == 0.7);
  CHECK(t.optimizer.rho(1).shared == 0.05);
}

TEST_CASE("A vector computed as a whole needs shared parameters named", "[closures]") {
  Tasks t;
  const auto vector = [&] { return torch::stack({t.w, t.v}).square().sum(1); };
  CHECK(message<std::runtime_error>([&] { t.optimizer.step(vector); }) ==
        "loss of task 0 is an element of a vector computed as a whole, so the graph does not tell which parameters it "
        "reaches. Return the losses as separate scalars (or torch.stack of them), or name the shared parameters: "
        "FlatMTL(..., shared=...)");
  flatmtl::FlatMTL optimizer(t.sgd, flatmtl::FlatMTLOptions().shared(Tensors{t.w}));
  optimizer.step(vector);
  CHECK(optimizer.steps() == 1);
}

TEST_CASE("An element of a stack is followed to its scalar", "[closures]") {
  Tasks expected, t;
  expected.optimizer.backward([&] { return Tensors{expected.a(), expected.b()}; });
  t.optimizer.backward([&] {
    const Tensor both = torch::stack({t.b(), t.a()});
    return Tensors{both[-1], both.unbind()[0]};
  });
  CHECK(same_bits(t.v.grad(), expected.v.grad()));  // v is a's own: not mistaken for shared
}

TEST_CASE("Wrong losses are named", "[closures]") {
  Tasks t;
  const auto refused = [&](const Tensors &losses) {
    return message<std::exception>([&] { t.optimizer.step([&] { return losses; }); });
  };
  CHECK(refused({}) == "closure returned no losses");
  CHECK(refused({t.a(), t.w * 2}) == "loss of task 1 must be a scalar, but has shape (2,)");
  CHECK(refused({torch::zeros({}), t.a()}).find("loss of task 0 has no graph (requires_grad is False)") == 0);
  CHECK(refused({t.a(), torch::ones({}).requires_grad_()}) ==
        "loss of task 1 is a leaf tensor, not computed from the model");
  CHECK(refused({torch::complex(t.a(), t.b())}) == "loss of task 0 is complex (torch.complex128); losses must be real");
  CHECK(message<std::invalid_argument>([&] {
          t.optimizer.step([&] { return t.w.view({1, 2}) * 1; });
        }) == "a tensor of losses must have 0 or 1 dimensions, but has shape (1, 2)");
  CHECK(message<std::invalid_argument>([&] { t.optimizer.step(flatmtl::TaskClosures()); }) ==
        "closure is empty: expected one closure a task");
  CHECK(message<std::invalid_argument>([&] { t.optimizer.step(flatmtl::TaskClosures(1)); }) ==
        "closure[0] must be callable, but is an empty function");
  CHECK(t.optimizer.steps() == 0);
  t.optimizer.step([&] { return Tensors{t.a(), t.b()}; });
  CHECK(refused({t.a()}) ==
        "closure returned losses of tasks [0], but earlier steps had [0, 1] (return None for a task that is absent "
        "from a batch)");
  int calls = 0;
  CHECK(message<std::runtime_error>([&] {
          t.optimizer.step([&] { return calls++ ? Tensors{t.a()} : Tensors{t.a(), t.b()}; });
        }) == "closure returned a list of 2 in the unperturbed pass, but a list of 1 in a perturbed pass");
  calls = 0;
  CHECK(message<std::runtime_error>([&] {
          t.optimizer.step([&] { return calls++ ? Tensors{t.a(), Tensor()} : Tensors{t.a(), t.b()}; });
        }) == "loss of task 1 is None in the perturbed pass only");
}

TEST_CASE("Wrong options are named", "[options]") {
  Tasks t;
  const auto refused = [&](const flatmtl::FlatMTLOptions &options) {
    return message<std::invalid_argument>([&] { flatmtl::FlatMTL optimizer(t.sgd, options); });
  };
  using Options = flatmtl::FlatMTLOptions;
  CHECK(refused(Options().rho(-1.0)) ==
        "Invalid rho: -1.0 (expected a finite number >= 0, or a pair (shared, task) of them)");
  CHECK(refused(Options().eta(-0.5)) == "Invalid eta: -0.5 (expected a finite number >= 0)");
  CHECK(refused(Options().norm("both")) == "Invalid norm: 'both' (expected one of 'separate', 'joint')");
  CHECK(refused(Options().combine("sum")) ==
        "Invalid combine: 'sum' (expected one of 'decomposed', 'direct', 'second', 'each')");
  CHECK(refused(Options().seed(-1)) == "Invalid seed: -1 (expected an integer in [0, 2^53))");
  CHECK(refused(Options().nonfinite("stop")) == "Invalid nonfinite: 'stop' (expected one of 'raise', 'skip')");
  using flatmtl::Aggregator;
  CHECK(message<std::invalid_argument>([] {
          Aggregator("gradient");
        }).find("there is no aggregator 'gradient'. Known: 'sum', 'mean'") == 0);
  CHECK(message<std::invalid_argument>([] { Aggregator::cagrad(1.0); }) == "CAGrad: c is 1.0; it must be in [0, 1)");
  CHECK(message<std::invalid_argument>([] {
          Aggregator::fixed({1.0, NAN});
        }) == "Fixed: values[1] is nan; it must be finite");
  CHECK(message<std::invalid_argument>([] { Aggregator("fixed"); }).find("aggregator 'fixed' needs") == 0);
  flatmtl::FlatMTL optimizer(t.sgd, Options().aggregator(Aggregator::fixed({1.0, 2.0, 3.0})));
  CHECK(message<std::invalid_argument>([&] {
          optimizer.step([&] { return Tensors{t.a(), t.b()}; });
        }) == "Fixed has 3 values for 2 tasks");
  CHECK(message<std::invalid_argument>([&] {
          flatmtl::FlatMTL again(static_cast<torch::optim::Optimizer &>(optimizer));
        }) == "optimizer is a FlatMTL already");
  torch::optim::LBFGS lbfgs({t.w});
  CHECK(message<std::invalid_argument>([&] { flatmtl::FlatMTL again(lbfgs); }).find("LBFGS cannot be wrapped") == 0);
}
