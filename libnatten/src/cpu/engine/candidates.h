#pragma once

#include <natten/problem.h>
#include <natten/tuner.h>

#include <vector>

namespace natten::detail::cpu::engine {

/// What the tuner may try for a problem, the default first: only what cuts a pass differently than
/// those before it, and leaves all results the same bits.
std::vector<Configuration> candidates(const Problem& problem, int threads, bool thorough);

}  // namespace natten::detail::cpu::engine
