#pragma once

// Runs kernels whose threads share nothing on the host, thread by thread.

#include <cstdint>
#include <cstring>

#include "tensors.h"

namespace natten_tests {

/// All that these kernels may ask of a GPU; what they compile against shows that they share no
/// memory of a block and that blocks never wait. What lanes of a warp do in turn may be done in any
/// order.
class PlainThread {
 public:
  PlainThread(std::int64_t block, int thread) : block_(block), thread_(thread) {}
  std::int64_t block() const { return block_; }
  int thread() const { return thread_; }
  int opaque(int x) const { return x; }
  bool all(bool x) const { return x; }
  void sync_warp() const {}

 private:
  std::int64_t block_;
  int thread_;
};

/// Runs the threads of a kernel one after another, in an order that a seed chooses.
class PlainLauncher {
 public:
  explicit PlainLauncher(std::uint64_t seed = 0) : seed_(seed) {}

  template <class Kernel>
  void operator()(const Kernel& kernel, std::int64_t blocks) {
    ++launches;
    const std::int64_t threads = blocks * Kernel::kThreads;
    if (threads == 0) return;
    Rng rng(seed_);
    const std::int64_t first = seed_ == 0 ? 0 : uniform(rng, 0, threads - 1);
    const bool backwards = seed_ != 0 && chance(rng, 0.5);
    for (std::int64_t i = 0; i < threads; ++i) {
      const std::int64_t at = (first + (backwards ? threads - i : i)) % threads;
      PlainThread gpu(at / Kernel::kThreads, static_cast<int>(at % Kernel::kThreads));
      kernel(gpu);
    }
  }

  void clear(void* memory, std::size_t bytes) { std::memset(memory, 0, bytes); }

  int launches = 0;

 private:
  std::uint64_t seed_;
};

}  // namespace natten_tests
