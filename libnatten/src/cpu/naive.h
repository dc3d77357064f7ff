#pragma once

#include <vector>

#include "../backend.h"
#include "parallel.h"

namespace natten::detail::cpu {

/// The readable reference: every operation and every problem, straight from the definition.
extern const Backend naive;

/// What the backend runs for a job.
std::vector<Phase> naive_phases(const Job& job);

/// The part of av_transpose that belongs to additional tokens: each sums over all queries.
Phase additional_keys_phase(const Job& job);

}  // namespace natten::detail::cpu
