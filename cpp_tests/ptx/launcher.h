#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <typeinfo>

#include "../../libnatten/src/cuda/machine.h"
#include "block.h"
#include "memory.h"
#include "parser.h"

namespace natten_tests::ptx {

/// The kernels of all PTX files that this build has.
Module& kernels();
/// Memory of the device that they run on.
GlobalMemory& device_memory();

/// What the entries that have run took, for each: blocks, instructions of warps per block, and per
/// product of matrices.
void print_counts(std::ostream& out);

/// Of all warps, since the program began.
struct WarpCounts {
  std::uint64_t instructions = 0;
  std::uint64_t products = 0;  ///< of matrices; they are instructions too
};
WarpCounts warp_counts();

/// Of all products of matrices, since the program began.
std::int64_t multiply_adds();

/// Runs kernels where `natten::detail::cuda::Launcher` would enqueue them, from their PTX.
class Launcher {
 public:
  explicit Launcher(std::uint64_t seed = 0) : seed_(seed) {}

  template <class Kernel>
  void operator()(const Kernel& kernel, std::int64_t blocks, int shared_bytes = 0) {
    ++launches;
    static Entry& entry = entry_of(typeid(Kernel).name());
    run(entry, Kernel::kThreads, blocks, shared_bytes, &kernel);
  }
  void clear(void* memory, std::size_t bytes);
  static int shared_bytes() { return natten::detail::cuda::kSharedBytesOfLargest; }

  int launches = 0;

 private:
  /// `entry<Kernel>` (launch.h) by the mangled name of the type.
  static Entry& entry_of(const char* type);
  void run(Entry& entry, int threads, std::int64_t blocks, int shared_bytes, const void* kernel);

  std::uint64_t seed_;
};

}  // namespace natten_tests::ptx
