// protect.h - what a step must give back besides parameters: module buffers (BatchNorm statistics) and random
// generators. Also flatmtl::parameters(module).
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

namespace flatmtl {

// A module whose buffers a step protects. A torch::nn module given by reference must outlive the optimizer.
class ProtectedModule {
 public:
  ProtectedModule(torch::nn::Module &module) : module_(&module) {}  // NOLINT(google-explicit-constructor)
  template <typename M>
  ProtectedModule(const std::shared_ptr<M> &module)  // NOLINT(google-explicit-constructor)
      : module_(module.get()), owner_(module) {}
  template <typename M>
  ProtectedModule(const torch::nn::ModuleHolder<M> &module)  // NOLINT(google-explicit-constructor)
      : ProtectedModule(module.ptr()) {}
  ProtectedModule(torch::jit::Module module) : module_(std::move(module)) {}  // NOLINT(google-explicit-constructor)

  // One buffer: where it stands, and the tensor found there.
  struct Slot {
    torch::Tensor tensor;
    std::optional<torch::jit::Module> owner;  // of a TorchScript attribute, which a forward may assign anew
    std::string name;

    torch::Tensor current() const { return owner ? owner->attr(name).toTensor() : tensor; }
  };

  std::vector<Slot> buffers() const {
    std::vector<Slot> slots;
    if (const auto *module = std::get_if<torch::nn::Module *>(&module_)) {
      for (const auto &buffer : (*module)->buffers())
        if (buffer.defined()) slots.push_back({buffer, std::nullopt, ""});
      return slots;
    }
    for (const auto &child : std::get<torch::jit::Module>(module_).modules())
      for (const auto &buffer : child.named_buffers(/*recurse=*/false))
        if (buffer.value.defined()) slots.push_back({buffer.value, child, buffer.name});
    return slots;
  }

 private:
  std::variant<torch::nn::Module *, torch::jit::Module> module_;
  std::shared_ptr<void> owner_;
};

// The parameters of a TorchScript module that require a gradient, each once: what an optimizer takes.
inline std::vector<torch::Tensor> parameters(const torch::jit::Module &module) {
  std::vector<torch::Tensor> found;
  std::unordered_set<const void *> seen;
  for (const torch::Tensor &parameter : module.parameters())
    if (parameter.requires_grad() && seen.insert(parameter.unsafeGetTensorImpl()).second) found.push_back(parameter);
  return found;
}

namespace detail {

// Buffers of the protected modules and the CPU generator's state, at one moment.
class Snapshot {
 public:
  explicit Snapshot(const std::vector<ProtectedModule::Slot> &slots) : slots_(&slots) {
    for (const auto &slot : slots) values_.push_back(slot.current().detach().clone());
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    rng_ = generator.get_state();
  }

  void restore(bool rng = true) const {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < values_.size(); ++i) {
      const auto &slot = (*slots_)[i];
      if (slot.owner && !slot.current().is_same(slot.tensor))
        torch::jit::Module(*slot.owner).setattr(slot.name, slot.tensor);
      torch::Tensor buffer = slot.tensor;
      if (buffer.sizes() == values_[i].sizes())
        buffer.copy_(values_[i]);
      else
        buffer.set_(values_[i].clone());
    }
    if (!rng) return;
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(rng_);
  }

 private:
  const std::vector<ProtectedModule::Slot> *slots_;
  std::vector<torch::Tensor> values_;
  torch::Tensor rng_;
};

// Every buffer of the modules once.
inline std::vector<ProtectedModule::Slot> buffers(const std::vector<ProtectedModule> &modules) {
  std::vector<ProtectedModule::Slot> slots;
  std::unordered_set<const void *> seen;
  for (const auto &module : modules)
    for (auto &slot : module.buffers())
      if (seen.insert(slot.tensor.unsafeGetTensorImpl()).second) slots.push_back(std::move(slot));
  return slots;
}

}  // namespace detail
}  // namespace flatmtl
