#pragma once

#include <natten/simulate.h>

#include <vector>

#include "../backend.h"

// Host code alone: it is there in builds without CUDA too.

namespace natten::detail::cuda {

/// What the kernels of the backend "fna" do for a fused call; see natten::work_of. Throws Error
/// where they do not run it.
std::vector<PassWork> count_passes(const Job& job);

/// See natten::work_of_fixed_tiles.
PassWork count_fixed_tiles(const Problem& problem, const Tuple& query_tile, const Tuple& key_tile);

}  // namespace natten::detail::cuda
