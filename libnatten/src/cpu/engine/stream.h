#pragma once

#include <natten/simulate.h>

#include "../../backend.h"
#include "../parallel.h"

namespace natten::detail::cpu::engine {

/// Whether a forward pass has one line of queries, of which few see a key, and all see more than is
/// summed in one go anyway: one new token, or row, against a cache. Then packing a key costs more
/// than what its queries do with it.
bool is_stream(const Problem&);

/// The forward pass of such queries: keys and values are read where they lie.
template <class E>
Phase stream(const Job& job, int threads);

/// What that does.
PassWork count_stream(const Problem&, int threads);

}  // namespace natten::detail::cpu::engine
