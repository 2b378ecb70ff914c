// Optimizers of their own in threads of their own, and one whose passes share the threads of torch's pool.
#include <thread>

#include "support.h"

namespace {

using namespace support;

Tensors train_alone(uint64_t seed) {
  at::Generator g = at::detail::createCPUGenerator(seed);
  Tensor trunk = torch::randn({40, 100}, g).requires_grad_();
  Tensor a = torch::randn({3, 40}, g).requires_grad_(), b = torch::randn({2, 40}, g).requires_grad_();
  torch::optim::SGD sgd({trunk, a, b}, sgd_options());
  flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().replay_rng(false));
  for (int i = 0; i < 5; ++i) {
    const Tensor x = torch::randn({20, 100}, g);
    optimizer.step([&] {
      const Tensor h = torch::tanh(torch::matmul(x, trunk.t()));
      return Tensors{torch::matmul(h, a.t()).square().mean(), torch::matmul(h, b.t()).sub(1.0).square().mean()};
    });
  }
  return {trunk, a, b};
}

// Enough elements for every pass to be cut into pieces for torch's pool. Gradients are element by element: torch's own
// sums may depend on the number of threads.
Tensors train_with(int threads) {
  const int before = at::get_num_threads();
  at::set_num_threads(threads);
  at::Generator g = at::detail::createCPUGenerator(7);
  const Tensor theta = torch::randn({500, 400}, g).requires_grad_(), c = torch::randn({500, 400}, g);
  const Tensor a = torch::randn({100'000}, g).requires_grad_(), b = torch::randn({3}, g).requires_grad_();
  torch::optim::SGD sgd({theta, a, b}, sgd_options());
  flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().adaptive(true));
  for (int i = 0; i < 3; ++i)
    optimizer.step([&] {
      return Tensors{theta.square().sum() + a.square().sum(), (theta - c).square().sum() + b.square().sum()};
    });
  at::set_num_threads(before);
  return {theta, a, b};
}

}  // namespace

TEST_CASE("Four threads train what one trains", "[threads]") {
  std::vector<Tensors> expected(4), found(4);
  for (size_t i = 0; i < 4; ++i) expected[i] = train_alone(i);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 4; ++i) threads.emplace_back([&found, i] { found[i] = train_alone(i); });
  for (auto &thread : threads) thread.join();
  for (size_t i = 0; i < 4; ++i) CHECK(same_bits(found[i], expected[i]));
}

TEST_CASE("The threads of torch's pool give the bits of one thread", "[threads]") {
  const Tensors expected = train_with(1);
  for (int threads : {2, 4}) CHECK(same_bits(train_with(threads), expected));
}
