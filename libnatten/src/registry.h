#pragma once

#include <natten/backends.h>
#include <natten/problem.h>

#include <string>
#include <vector>

namespace natten::detail {

/// A checked call that a backend runs.
struct Job {
  Problem problem;
  Tensors tensors;
  void* workspace;
};

/// One implementation. Backends are rows of an ordered table per device (registry.cpp).
struct Backend {
  const char* name;
  DeviceType device;
  /// Empty if the backend runs the problem, else a sentence that says why not.
  std::string (*refuse_reason)(const Problem&);
  std::size_t (*workspace_bytes)(const Problem&);
  /// Runs independent jobs, in one parallel region where the device has such a thing.
  void (*run)(const std::vector<Job>& jobs, const Context&);
};

/// The forced backend (context, then NATTEN_BACKEND), or the first that accepts. Throws Error where
/// none does, with the reasons.
const Backend& select(const Problem& problem, const Context& context);

}  // namespace natten::detail
