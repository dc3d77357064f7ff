#pragma once

#include "../registry.h"

namespace natten::detail::cpu {

/// Fused attention, forward and backward, with vector instructions.
extern const Backend fused;

}  // namespace natten::detail::cpu
