#pragma once

#include "../registry.h"

namespace natten::detail::cpu {

/// The readable reference: every operation and every problem, straight from the definition.
extern const Backend naive;

}  // namespace natten::detail::cpu
