#pragma once

#include "../backend.h"

namespace natten::detail::cuda {

/// None in builds without CUDA (no_cuda.cpp).
const Backends& backends();

/// As natten::compute_capability.
int compute_capability(int device_index) noexcept;

}  // namespace natten::detail::cuda
