#pragma once

#include <natten/context.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace natten::detail::cpu {

/// Independent work items 0 .. items - 1. `body(begin, end)` runs some of them; which thread runs
/// which never changes a result.
struct Phase {
  std::int64_t items;
  std::function<void(std::int64_t begin, std::int64_t end)> body;
};

/// Into how many runs items are cut, which threads take when they are free. There are more runs
/// than threads, to even out items of unequal cost and threads that start late.
inline std::int64_t chunks_of(std::int64_t items, std::int64_t threads) {
  return std::min(items, 8 * threads);
}

/// An executor with no thread but the caller's.
Executor& calling_thread();

/// Runs phase 0 of all jobs in one parallel region, then phase 1 of all jobs, and so on.
/// Kernels run with the default floating-point environment, whatever the caller's is.
/// `interrupted` is that of `Context`; throws where it ends the call.
void run_phases(const std::vector<std::vector<Phase>>& jobs, Executor* executor,
                const std::function<bool()>& interrupted);

/// Bodies of phases report here how much they have worked, in multiply-adds or elements copied, at
/// most some 10^8 at a time. If the call has been interrupted, this throws, which ends the body.
void checkpoint(std::int64_t work);

}  // namespace natten::detail::cpu
