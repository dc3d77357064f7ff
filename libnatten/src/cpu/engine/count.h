#pragma once

#include <natten/simulate.h>

#include <vector>

namespace natten::detail::cpu::engine {

/// What the passes of fused attention do for a problem; see natten::work_of.
std::vector<PassWork> count_passes(const Problem& problem, int threads);

}  // namespace natten::detail::cpu::engine
