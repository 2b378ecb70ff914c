// rows_dtype: the memory of a step. What it computes is compared with Python by tests/python/test_cpp.py.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include "support.h"

using namespace support;

namespace rows_dtype {

// The most bytes that tensors made since this began have held at once.
struct Peak : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void *, int64_t bytes, size_t, size_t, c10::Device) override {
    held += bytes;
    most = std::max(most, held);
  }
  bool memoryProfilingEnabled() const override { return true; }

  int64_t held = 0, most = 0;
};

constexpr int64_t width = 128, layers = 12, tasks = 3;

// The peak of a step, in rows of float32; of one with so many micro-batches, if any.
double peak(const flatmtl::FlatMTLOptions &options, size_t micro = 0) {
  torch::manual_seed(0);
  torch::nn::Sequential trunk;
  for (int64_t i = 0; i < layers; ++i) trunk->push_back(torch::nn::Linear(width, width));
  Tensors params = trunk->parameters();
  std::vector<torch::nn::Linear> heads;
  for (int64_t i = 0; i < tasks; ++i) {
    heads.emplace_back(width, 2);
    for (const Tensor &p : heads.back()->parameters()) params.push_back(p);
  }
  const Tensor x = torch::randn({2, width});
  torch::optim::SGD sgd(params, 0.1);
  flatmtl::FlatMTL optimizer(sgd, options);
  const auto losses_of = [&](const Tensor &input) {
    const Tensor h = trunk->forward(input);
    Tensors result;
    for (auto &head : heads) result.push_back(head->forward(h).square().sum());
    return result;
  };
  const auto losses = [&] { return losses_of(x); };
  const Tensors batches(micro, x);
  optimizer.step(losses);  // roles, and what torch keeps
  const auto counter = std::make_shared<Peak>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, counter);
    if (micro > 0)
      optimizer.backward(losses_of, batches);
    else
      optimizer.backward(losses);
  }
  return static_cast<double>(counter->most) / static_cast<double>(4 * layers * (width * width + width));
}

TEST_CASE("With rows_dtype gradients wait in half of the memory", "[rows_dtype]") {
  using Options = flatmtl::FlatMTLOptions;
  const double slack = 3.0 / layers;  // temporaries of some layers
  // K / 2 rows g, as many s, the last one wide too, and the copy of the parameters
  for (const char *flat : {"fmtl", "sam"}) {
    CHECK(peak(Options().flat(flat).rows_dtype(torch::kBFloat16)) <= 1.5 + 1.5 + 1.0 + 1.0 + slack);
    CHECK(peak(Options().flat(flat)) >= 3.0 + 3.0 + 1.0 - 0.01);
  }
  CHECK(peak(Options().rho(0.0).rows_dtype(torch::kBFloat16)) <= 1.5 + 1.0 + 1.0 + slack);
  CHECK(peak(Options().rho(0.0)) >= 3.0 + 1.0 - 0.01);
}

TEST_CASE("Memory does not grow with the number of micro-batches", "[batches]") {
  using Options = flatmtl::FlatMTLOptions;
  const double slack = 3.0 / layers;
  // K rows g, as many s, the one that is added to a mean, and the copy of the parameters
  for (const char *flat : {"fmtl", "sam"}) {
    const double two = peak(Options().flat(flat), 2), five = peak(Options().flat(flat), 5);
    CHECK(five <= two + 0.05);
    CHECK(five <= 3.0 + 3.0 + 1.0 + 1.0 + slack);
  }
  CHECK(peak(Options().rho(0.0), 5) <= 3.0 + 1.0 + 1.0 + slack);
  CHECK(peak(Options().m_sharpness(true), 5) <= 6.0 + 6.0 + 1.0 + slack);  // and both families of one micro-batch
}

}  // namespace rows_dtype
