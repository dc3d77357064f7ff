#pragma once

#include <cstddef>
#include <string>

#include "../registry.h"

namespace natten::detail::cuda {

std::string simt_refuse_reason(const Problem& problem);
std::size_t simt_workspace_bytes(const Problem& problem);

/// Enqueues the kernels of a job.
template <class Launcher>
void run_simt(const Job& job, Launcher& launch);

}  // namespace natten::detail::cuda
