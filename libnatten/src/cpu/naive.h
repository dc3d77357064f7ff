#pragma once

#include "../backend.h"
#include "parallel.h"

namespace natten::detail::cpu {

/// The readable reference: every operation and every problem, straight from the definition.
extern const Backend naive;

/// The part of av_transpose that belongs to additional tokens: each sums over all queries.
Phase additional_keys_phase(const Job& job);

}  // namespace natten::detail::cpu
