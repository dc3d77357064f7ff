#pragma once

#include <natten/problem.h>
#include <natten/tuner.h>

#include <vector>

namespace natten::detail::cpu::engine {

/// What the tuner may try for a problem, the default first. Each cuts a pass in another way than
/// those before it, and all give results with the same bits.
std::vector<Configuration> candidates(const Problem& problem, int threads, bool thorough);

}  // namespace natten::detail::cpu::engine
