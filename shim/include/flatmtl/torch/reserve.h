// reserve.h - memory for copies of the parameters, kept from step to step. Private.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include <torch/torch.h>

namespace flatmtl {
namespace detail {

// Two copies of each large parameter at most: the one that is its gradient now, and the one before. A step's copy
// becomes the gradient. Were it given back when that is let go of, the system would have to find it anew in the next
// step, page by page, which takes several times as long as the copying.
class Reserve {
 public:
  // As torch::empty_like, for the parameter of this index; in memory that was in use before if nobody has it.
  torch::Tensor empty_like(size_t index, const torch::Tensor &parameter) {
    if (parameter.nbytes() < least) return torch::empty_like(parameter);
    std::vector<torch::Tensor> &kept = kept_[index];
    for (const torch::Tensor &tensor : kept)
      if (fits(tensor, parameter) && tensor.storage().use_count() == 1)
        return torch::empty({0}, tensor.options()).set_(tensor.storage(), 0, tensor.sizes(), tensor.strides());
    if (kept.size() > 1) kept.erase(kept.begin());
    const torch::Tensor fresh = torch::empty_like(parameter);
    kept.push_back(torch::empty({0}, fresh.options()).set_(fresh.storage(), 0, fresh.sizes(), fresh.strides()));
    return fresh;
  }

 private:
  enum : size_t { least = 1 << 20 };  // bytes: smaller tensors come from memory that the allocator keeps itself

  static bool fits(const torch::Tensor &tensor, const torch::Tensor &parameter) {
    return tensor.scalar_type() == parameter.scalar_type() && tensor.sizes() == parameter.sizes() &&
           tensor.strides() == parameter.strides();
  }

  std::map<size_t, std::vector<torch::Tensor>> kept_;  // tensors that nobody else has, for their storage and layout
};

}  // namespace detail
}  // namespace flatmtl
