#pragma once

#include <cstddef>
#include <string>

#include "../../registry.h"

namespace natten::detail::cuda {

std::string fna_refuse_reason(const Problem& problem);
std::size_t fna_workspace_bytes(const Problem& problem);

/// Enqueues the kernels of a job.
template <class Launcher>
void run_fna(const Job& job, Launcher& launch);

}  // namespace natten::detail::cuda
