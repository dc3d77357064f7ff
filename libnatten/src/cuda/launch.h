#pragma once

#include <natten/error.h>

#include <limits>
#include <string>

#include "machine.h"

namespace natten::detail::cuda {

/// Throws Error (runtime) where a call of CUDA's runtime failed.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorKind::runtime, std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    entry(const __grid_constant__ Kernel kernel) {
  Gpu gpu;
  kernel(gpu);
}

/// Enqueues kernels on a stream of the current device.
class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Kernel>
  void operator()(const Kernel& kernel, std::int64_t blocks, int shared_bytes = 0) {
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<std::int32_t>::max())
      throw Error(ErrorKind::runtime, "CUDA: a launch of " + std::to_string(blocks) +
                                          " blocks; a grid holds 2^31 - 1: split the batch");
    constexpr int kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking)
      check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared_bytes),
            "shared memory");
    entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads,
                    static_cast<std::size_t>(shared_bytes), stream_>>>(kernel);
    check(cudaGetLastError(), "launch");
  }

  /// Shared memory of a multiprocessor.
  int shared_bytes() const {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "current device");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          "shared memory of a multiprocessor");
    return bytes;
  }

  /// Fills memory of the device with zero bytes.
  void clear(void* memory, std::size_t bytes) {
    check(cudaMemsetAsync(memory, 0, bytes, stream_), "clearing memory");
  }

 private:
  cudaStream_t stream_;
};

}  // namespace natten::detail::cuda
