// The emulator of the tests itself.

#include "gpu_emulator.h"

#include <gtest/gtest.h>

namespace natten_tests {
namespace {

/// A kernel whose lanes copy different numbers of chunks before they load matrices.
struct PartingLanes {
  static constexpr int kThreads = 32;
  const char* from;  // 16 bytes, aligned
  bool meets;
  template <class Machine>
  void operator()(Machine& gpu) const {
    for (int i = 0; i < gpu.thread() % 2; ++i) gpu.copy_async(16 * gpu.thread(), from);
    gpu.commit();
    gpu.template wait<0>();
    if (meets) gpu.sync_warp();
    std::uint32_t x[4];
    gpu.load_matrices(x, 16 * gpu.thread());
  }
};

TEST(CudaEmulator, FindsLanesThatHaveParted) {
  alignas(16) const char from[16] = {};
  Emulator launch;
  for (int i = 0; i < 2; ++i) {
    EXPECT_NO_THROW(launch(PartingLanes{from, true}, 1, 512));
    EXPECT_THROW(launch(PartingLanes{from, false}, 1, 512), std::logic_error);
  }
}

}  // namespace
}  // namespace natten_tests
