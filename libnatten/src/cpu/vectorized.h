#pragma once

#include "../backend.h"

namespace natten::detail::cpu {

/// Attention, fused and unfused, with vector instructions.
extern const Backend vectorized;

}  // namespace natten::detail::cpu
