#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace natten::detail::cpu::engine {

/// Memory that a thread keeps from call to call, in the hands of one engine: at a checkpoint of
/// this call the thread's owner may make another.
class ThreadMemory {
 public:
  ThreadMemory() { bytes_.swap(of_thread()); }
  ~ThreadMemory() { bytes_.swap(of_thread()); }
  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;
  std::vector<char>& bytes() { return bytes_; }

 private:
  static std::vector<char>& of_thread() {
    thread_local std::vector<char> bytes;
    return bytes;
  }
  std::vector<char> bytes_;
};

/// Cuts memory of a thread into arrays, aligned to cache lines. All are taken twice: first to add
/// up their sizes, which gives null pointers, and after `begin` to get them.
class Arena {
 public:
  explicit Arena(std::vector<char>& memory) : memory_(memory) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::size_t offset = used_;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }
  /// In elements.
  template <class T>
  std::int64_t used() const {
    return static_cast<std::int64_t>(used_ / sizeof(T));
  }
  void begin() {
    if (memory_.size() < used_ + kAlignment) memory_.resize(used_ + kAlignment);
#if defined(__SANITIZE_ADDRESS__)
    // What is read before it is written shows as NaN.
    std::fill(memory_.begin(), memory_.end(), static_cast<char>(0xFF));
#endif
    const auto misaligned = reinterpret_cast<std::uintptr_t>(memory_.data()) % kAlignment;
    base_ = memory_.data() + (kAlignment - misaligned) % kAlignment;
    used_ = 0;
  }

 private:
  static constexpr std::size_t kAlignment = 64;  // a cache line
  std::vector<char>& memory_;
  char* base_ = nullptr;
  std::size_t used_ = 0;
};

}  // namespace natten::detail::cpu::engine
