#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace natten::detail::cpu::engine {

/// Where two items of work that give sums to the same columns meet, on whatever threads they run.
/// The first leaves its sums, the second adds them to its own. As a + b is b + a, it does not
/// matter which comes first.
template <class T>
class Exchange {
 public:
  /// What the columns are known by.
  using Key = std::array<std::int64_t, 9>;

  /// Calls `leave(memory)` with memory for `elements`, or `take(memory)` with what the other item
  /// has left, and tells whether it was there.
  template <class Leave, class Take>
  bool meet(const Key& key, std::int64_t elements, Leave&& leave, Take&& take) {
    Part& part = parts_[hash(key) % kParts];
    std::lock_guard<std::mutex> lock(part.mutex);
    const auto found = part.left.find(key);
    if (found == part.left.end()) {
      leave(part.left.emplace(key, std::vector<T>(static_cast<std::size_t>(elements)))
                .first->second.data());
      return false;
    }
    take(found->second.data());
    part.left.erase(found);
    return true;
  }

 private:
  static constexpr std::size_t kParts = 64;  // so that threads seldom wait for each other
  struct Part {
    std::mutex mutex;
    std::map<Key, std::vector<T>> left;
  };
  static std::size_t hash(const Key& key) {
    std::size_t h = 0;
    for (const std::int64_t k : key) h = h * 31 + static_cast<std::size_t>(k);
    return h;
  }
  std::array<Part, kParts> parts_;
};

}  // namespace natten::detail::cpu::engine
