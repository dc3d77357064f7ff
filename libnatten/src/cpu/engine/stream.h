#pragma once

#include <natten/simulate.h>

#include "../../backend.h"
#include "../parallel.h"

namespace natten::detail::cpu::engine {

/// Whether a forward pass has one line of queries, of which few see any key, and all of which see
/// more keys than are summed in one go: one new token, or row, against a cache. Then packing a key
/// costs more than the products with it.
bool is_stream(const Problem&);

/// The forward pass of such queries: keys and values are read where they lie.
template <class E>
Phase stream(const Job& job, int threads);

/// What that pass does.
PassWork count_stream(const Problem&, int threads);

}  // namespace natten::detail::cpu::engine
