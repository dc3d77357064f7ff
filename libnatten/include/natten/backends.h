#pragma once

#include <natten/context.h>
#include <natten/problem.h>

#include <string>
#include <vector>

namespace natten {

/// What one backend says about a problem.
struct Verdict {
  std::string backend;
  std::string refusal;  ///< empty: it accepts
  bool chosen = false;  ///< this one would run
};

/// Names of the backends built for a device, best first.
NATTEN_EXPORT std::vector<std::string> backends(DeviceType device);

/// Every backend of the problem's device, best first, with its answer. `context.backend` and
/// NATTEN_BACKEND count as in `run`; no backend is chosen where the forced one refuses.
NATTEN_EXPORT std::vector<Verdict> explain(const Problem& problem, const Context& context = {});

/// Whether kernels for the device were built. Says nothing about the machine's hardware.
NATTEN_EXPORT bool built_for(DeviceType device);

/// Compute capability of a CUDA device, 80 for 8.0; -1 is the current device. 0 where there is no
/// such device or no driver, and in builds without CUDA kernels.
NATTEN_EXPORT int compute_capability(int device_index = -1) noexcept;

}  // namespace natten
