#pragma once

#include <cstdint>
#include <vector>

#include "instructions.h"
#include "memory.h"
#include "warp.h"

namespace natten_tests::ptx {

/// Runs blocks of an entry, one after another. With seed 0 warps run from barrier to barrier in
/// order, and asynchronous copies arrive when they are waited for. Any other seed makes warps
/// advance by random numbers of instructions, parted lanes in any order, and copies arrive at any
/// time.
class Block {
 public:
  Block(Entry& entry, int threads, int shared_bytes, GlobalMemory& global, std::uint64_t seed);

  /// Throws Fault with where it happened.
  void run(std::uint32_t block, const void* parameters);

 private:
  Entry& entry_;
  const std::uint64_t seed_;
  SharedMemory shared_;
  std::vector<Warp> warps_;
};

}  // namespace natten_tests::ptx
