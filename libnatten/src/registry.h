#pragma once

#include <natten/backends.h>

#include "backend.h"

namespace natten::detail {

/// The forced backend (context, then NATTEN_BACKEND), or the first that accepts. Throws Error where
/// none does, with the reasons.
const Backend& select(const Problem& problem, const Context& context);

}  // namespace natten::detail
