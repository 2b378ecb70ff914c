// roles.h - which parameters are shared and which are one task's own: found from the losses' graphs, and remembered.
// Private.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <torch/types.h>

namespace flatmtl {
namespace detail {

constexpr int64_t SHARED = -1;

// Role of every parameter that was reached: SHARED, or the index of the one task that reached it so far. Roles only
// grow: unknown -> one task's own -> shared, and never back. With `fixed` exactly those parameters are shared and every
// other is own, whatever the graphs say.
struct Roles {
  using Key = const void *;  // of the TensorImpl
  std::optional<std::unordered_set<Key>> fixed;
  std::unordered_map<Key, int64_t> of;

  static Key key(const torch::Tensor &tensor) { return tensor.unsafeGetTensorImpl(); }

  // Takes over a saved role. With shared() given, that wins: a role that contradicts it is found anew.
  void load(const torch::Tensor &tensor, int64_t role) {
    if (!fixed || (role == SHARED) == (fixed->count(key(tensor)) > 0)) of[key(tensor)] = role;
  }

  // `roles`, after task i's loss has reached the parameters reached[i] too.
  std::unordered_map<Key, int64_t> grown(const std::vector<std::vector<Key>> &reached,
                                         std::unordered_map<Key, int64_t> roles) const {
    for (size_t i = 0; i < reached.size(); ++i) {
      const auto task = static_cast<int64_t>(i);
      for (const Key p : reached[i]) {
        int64_t &role = roles.emplace(p, task).first->second;
        if (fixed ? fixed->count(p) > 0 : role != task) role = SHARED;
      }
    }
    return roles;
  }
};

}  // namespace detail
}  // namespace flatmtl
