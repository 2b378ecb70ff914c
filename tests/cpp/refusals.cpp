// What exceptions say, a line a case: NAME, tab, TEXT. tests/python/test_cpp_texts.py has the same cases in Python.
#include <cmath>
#include <functional>
#include <iostream>
#include <limits>
#include <utility>

#include "support.h"

namespace refusals {  // one translation unit with the tests: names of its own

using namespace support;
using flatmtl::Aggregator;
using flatmtl::FlatMTLOptions;
using flatmtl::Weighting;

// l_0 = |w - a|^2, l_1 = |w b|^2
struct Tasks {
  explicit Tasks(const FlatMTLOptions &options = FlatMTLOptions()) : sgd({w, a, b}, 0.1), optimizer(sgd, options) {}
  Tensor first() const { return (w - a).square().sum(); }
  Tensor second() const { return (w * b).square().sum(); }
  Tensors losses() const { return {first(), second()}; }

  Tensor w = torch::ones(2, torch::kDouble).requires_grad_(), a = torch::zeros(2, torch::kDouble).requires_grad_(),
         b = torch::full({1}, 2.0, torch::kDouble).requires_grad_();
  torch::optim::SGD sgd;
  flatmtl::FlatMTL optimizer;
};

using Case = std::pair<std::string, std::function<void()>>;
inline const double kNan = std::numeric_limits<double>::quiet_NaN();

inline std::function<void()> option(const FlatMTLOptions &options) {
  return [options] { Tasks t(options); };
}

// A step, after some that succeed.
inline std::function<void()> step(const std::function<Tensors(Tasks &, int call)> &closure,
                                  const FlatMTLOptions &options = FlatMTLOptions(), int before = 0) {
  return [=] {
    Tasks t(options);
    for (int i = 0; i < before; ++i) t.optimizer.step([&] { return t.losses(); });
    int call = 0;
    t.optimizer.step([&] { return closure(t, call++); });
  };
}

inline const auto valid = [](Tasks &t, int) { return t.losses(); };

inline std::vector<Case> options() {
  return {
      {"rho", option(FlatMTLOptions().rho(-1.0))},
      {"rho, a pair", option(FlatMTLOptions().rho({0.5, INFINITY}))},
      {"eta", option(FlatMTLOptions().eta(-0.5))},
      {"norm", option(FlatMTLOptions().norm("both"))},
      {"combine", option(FlatMTLOptions().combine("sum"))},
      {"max_norm", option(FlatMTLOptions().max_norm(0.0))},
      {"nonfinite", option(FlatMTLOptions().nonfinite("ignore"))},
      {"seed", option(FlatMTLOptions().seed(-1))},
      {"rows_dtype", option(FlatMTLOptions().rows_dtype(torch::kFloat))},
      {"rows_dtype, float16", option(FlatMTLOptions().rows_dtype(torch::kHalf))},
      {"no such aggregator", [] { Aggregator("NashMTL"); }},
      {"no such aggregator, three are close", [] { Aggregator("grad"); }},
      {"no such aggregator, none is close", [] { Aggregator("adam"); }},
      {"no such weighting", [] { Weighting("gradnom"); }},
      {"no such flatness mode", [] { flatmtl::Flatness("LookSAM2"); }},
      {"fixed by name", [] { Aggregator("fixed"); }},
      {"fixed, none", [] { Aggregator::fixed({}); }},
      {"fixed, nan",
       [] {
         Aggregator::fixed({1.0, kNan});
       }},
      {"pcgrad", [] { Aggregator::pcgrad(-1); }},
      {"cagrad", [] { Aggregator::cagrad(1.0); }},
      {"fairgrad", [] { Aggregator::fairgrad(0.0); }},
      {"gradvac", [] { Aggregator::gradvac(2.0); }},
      {"aligned_mtl, scale", [] { Aggregator::aligned_mtl("mean"); }},
      {"aligned_mtl, tolerance", [] { Aggregator::aligned_mtl("min", -0.5); }},
      {"upgrad",
       [] {
         Aggregator::upgrad({0.5, -1.0});
       }},
      {"dualproj", [] { Aggregator::dualproj({INFINITY}); }},
      {"ntkmtl", [] { Aggregator::ntkmtl(1.5); }},
      {"fixed weights by name", [] { Weighting("fixed"); }},
      {"fixed weights, none", [] { Weighting::fixed({}); }},
      {"fixed weights, negative",
       [] {
         Weighting::fixed({1.0, -1.0});
       }},
      {"uw, lr", [] { Weighting::uw(0.0); }},
      {"uw, initial", [] { Weighting::uw(0.1, kNan); }},
      {"dwa, temperature", [] { Weighting::dwa(INFINITY); }},
      {"dwa, epoch", [] { Weighting::dwa(2.0, 0); }},
      {"rlw", [] { Weighting::rlw(-3); }},
      {"stch, warmup", [] { Weighting::stch(1.0, 25, -1); }},
      {"imtl_l", [] { Weighting::imtl_l(-0.1); }},
      {"famo, gamma", [] { Weighting::famo(0.1, -1.0); }},
      {"famo, min_losses",
       [] {
         Weighting::famo(0.1, 0.0, {0.0, kNan});
       }},
      {"gradnorm", [] { Weighting::gradnorm(-1.0); }},
      {"go4align", [] { Weighting::go4align(0.1, 0); }},
      {"slaw", [] { Weighting::slaw(1.0); }},
      {"bmtl", [] { Weighting::bmtl(0.0); }},
      {"emtl", [] { Weighting::emtl(-0.5); }},
  };
}

inline std::vector<Case> steps() {
  const auto loss = [](const std::string &weighting) { return FlatMTLOptions().weighting(Weighting(weighting)); };
  const auto spoilt = [](Tensor value) {
    return [value](Tasks &t, int) { return Tensors{t.first(), t.second() * value}; };
  };
  const auto late = [](Tensor value) {
    return [value](Tasks &t, int call) { return Tensors{t.first(), call ? t.second() * value : t.second()}; };
  };
  return {
      {"values of fixed", step(valid, FlatMTLOptions().aggregator(Aggregator::fixed({1.0, 2.0, 3.0})))},
      {"preference", step(valid, FlatMTLOptions().aggregator(Aggregator::upgrad({1.0, 2.0, 3.0})))},
      {"values of fixed weights", step(valid, FlatMTLOptions().weighting(Weighting::fixed({1.0})))},
      {"min_losses of famo", step(valid, FlatMTLOptions().weighting(Weighting::famo(0.1, 0.0, {0.0, 0.0, 0.0})))},
      {"no losses", step([](Tasks &, int) { return Tensors{}; })},
      {"a vector", step([](Tasks &t, int) {
         return Tensors{t.first(), t.w * 2};
       })},
      {"no graph", step([](Tasks &t, int) {
         return Tensors{t.first(), t.second().detach()};
       })},
      {"a leaf", step([](Tasks &t, int) {
         return Tensors{t.first(), torch::ones({}).requires_grad_()};
       })},
      {"complex", step([](Tasks &t, int) { return Tensors{torch::complex(t.first(), t.second())}; })},
      {"a matrix",
       [] {
         Tasks t;
         t.optimizer.step([&] { return t.w.view({1, 2}) * 1; });
       }},
      {"a vector computed as a whole",
       [] {
         Tasks t;
         t.optimizer.step([&] { return (t.w - t.a).square(); });
       }},
      {"no closures", [] { Tasks().optimizer.step(flatmtl::TaskClosures()); }},
      {"no batches",
       [] {
         Tasks t;
         t.optimizer.step([&](const Tensor &) { return t.losses(); }, Tensors());
       }},
      {"fewer tasks", step([](Tasks &t, int) { return Tensors{t.first()}; }, FlatMTLOptions(), 1)},
      {"fewer losses later", step([](Tasks &t, int call) { return call ? Tensors{t.first()} : t.losses(); })},
      {"None later", step([](Tasks &t, int call) {
         return call ? Tensors{t.first(), Tensor()} : t.losses();
       })},
      {"a loss of nan", step(spoilt(torch::tensor(kNan)))},
      {"a loss of inf", step(spoilt(torch::tensor(INFINITY)))},
      {"a loss of -inf, perturbed", step(late(torch::tensor(-INFINITY)))},
      {"a gradient of nan", step([](Tasks &t, int) {
         return Tensors{t.first(), (t.second() - t.second()).sqrt()};
       })},
      {"written to", step([](Tasks &t, int call) {
         if (call == 1) {
           torch::NoGradGuard no_grad;
           t.w.add_(1.0);
         }
         return t.losses();
       })},
      {"a loss below 0, dwa", step(spoilt(torch::tensor(-1.0)), loss("dwa"))},
      {"a loss of 0, si", step(
                              [](Tasks &t, int) {
                                return Tensors{t.first(), t.second() - t.second().detach()};
                              },
                              loss("si"))},
      {"a loss below 0, stch", step(spoilt(torch::tensor(-0.25)), loss("stch"), 1)},
      {"a loss at its bound, famo", step(
                                        [](Tasks &t, int) {
                                          return Tensors{t.first(), t.second() * 0.0 - 1.5};
                                        },
                                        FlatMTLOptions().weighting(Weighting::famo(0.1, 0.0, {0.0, -1.5})))},
      {"complex parameters",
       [] {
         Tensor w = torch::ones(2, torch::kComplexFloat).requires_grad_();
         torch::optim::SGD sgd({w}, 0.1);
         flatmtl::FlatMTL(sgd).step([&] { return torch::real(w).sum(); });
       }},
      {"no parameters",
       [] {
         Tensor w = torch::ones(2);
         torch::optim::SGD sgd({w}, 0.1);
         flatmtl::FlatMTL(sgd).step([&] { return w.sum(); });
       }},
  };
}

}  // namespace refusals

int refusals_main() {
  int silent = 0;
  for (const auto &cases : {refusals::options(), refusals::steps()})
    for (const auto &[name, call] : cases) {
      const std::string text = support::message<std::exception>(call);
      silent += text == "no exception";
      std::cout << name << '\t' << text << '\n';
    }
  return silent;
}
