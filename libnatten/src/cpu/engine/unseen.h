#pragma once

#include <array>
#include <vector>

#include "pass.h"

namespace natten::detail::cpu::engine {

/// Which of the keys that are given some query sees: those that are seen along all axes.
class SeenKeys {
 public:
  explicit SeenKeys(const RowGrid& queries);

  bool contains(int axis, std::int64_t key) const {
    return along_[axis].empty() || along_[axis][key] != 0;
  }
  /// How many keys of a batch entry no query sees.
  std::int64_t others() const { return others_; }

 private:
  std::array<std::vector<char>, kMaxRank> along_;  // of an axis all of whose keys are seen, nothing
  std::int64_t others_ = 0;
};

/// Sets the gradients of keys that no query sees to 0, where the plan of `backward_query` sums
/// columns: none of its items writes these.
template <class E>
Phase clear_unseen_keys(const Job& job, const Plan& plan);

}  // namespace natten::detail::cpu::engine
