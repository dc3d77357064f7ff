// Stands for backends.cu in builds without CUDA.

#include "backends.h"

namespace natten::detail::cuda {

const Backends& backends() {
  static const Backends none;
  return none;
}

int compute_capability(int /*device_index*/) noexcept { return 0; }

}  // namespace natten::detail::cuda
