#pragma once

#include "../registry.h"

namespace natten::detail::cuda {

/// Tiles on tensor cores.
extern const Backend fna_backend;
/// Plain arithmetic, for everything else.
extern const Backend simt_backend;

/// As natten::compute_capability.
int compute_capability(int device_index) noexcept;

}  // namespace natten::detail::cuda
