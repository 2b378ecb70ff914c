// The memory of a step's copy of the parameters: used again, but never while somebody has it.
#include <set>

#include "support.h"

namespace {

using namespace support;

struct Large {
  Large()
      : weight(torch::ones({600, 600}).requires_grad_()), sgd(std::vector<Tensor>{weight}, 0.1), optimizer(sgd, {}) {}
  const void *step() {
    optimizer.step([this] { return Tensors{(weight * 0.5).square().mean(), (weight - 2.0).square().mean()}; });
    return weight.grad().data_ptr();
  }
  void let_go() { weight.mutable_grad().reset(); }

  Tensor weight;
  torch::optim::SGD sgd;
  flatmtl::FlatMTL optimizer;
};

}  // namespace

TEST_CASE("Gradients lie in two places in turn, or in one if they are let go of", "[reserve]") {
  Large training;
  const void *first = training.step(), *second = training.step();
  CHECK(first != second);
  CHECK(training.step() == first);
  CHECK(training.step() == second);
  training.let_go();
  std::set<const void *> places;
  for (int i = 0; i < 3; ++i) {
    places.insert(training.step());
    training.let_go();
  }
  CHECK(places.size() == 1);
}

TEST_CASE("Gradients that somebody keeps stay as they are", "[reserve]") {
  Large training;
  Tensors held, values;
  std::vector<torch::Storage> storages;
  for (int i = 0; i < 9; ++i) {
    training.step();
    const Tensor grad = training.weight.grad();
    values.push_back(grad.clone());
    if (i % 3 == 0) held.push_back(grad);
    if (i % 3 == 1) held.push_back(grad.view({-1}));
    if (i % 3 == 2) {
      storages.push_back(grad.storage());
      held.push_back(torch::Tensor());
    }
    training.let_go();
  }
  for (size_t i = 0; i < held.size(); ++i) {
    if (!held[i].defined())
      held[i] = torch::empty({0}).set_(storages[i / 3], 0, values[i].sizes(), values[i].strides());
    CHECK(torch::equal(held[i].reshape_as(values[i]), values[i]));
  }
}

TEST_CASE("Layouts of copies in used memory", "[reserve]") {
  flatmtl::detail::Reserve reserve;
  for (const Tensor &like :
       {torch::zeros({600, 700}), torch::zeros({600, 700}).t(), torch::zeros({600, 700}, torch::kDouble),
        torch::zeros({2, 8, 200, 200}).to(torch::kFloat, false, false, at::MemoryFormat::ChannelsLast)})
    for (int i = 0; i < 3; ++i) {
      const Tensor copy = reserve.empty_like(0, like);
      CHECK(copy.sizes() == like.sizes());
      CHECK(copy.strides() == like.strides());
      CHECK(copy.scalar_type() == like.scalar_type());
    }
}
