#pragma once

#include <natten/context.h>
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

/// One implementation. The registry knows them all, in order.
struct Backend {
  const char* name;
  /// Empty if the backend runs the problem, else a sentence that says why not.
  std::string (*refuse_reason)(const Problem&);
  std::size_t (*workspace_bytes)(const Problem&);
  /// Runs independent jobs, in one parallel region where the device has such a thing.
  void (*run)(const std::vector<Job>& jobs, const Context&);
};

/// The backends of one device, best first.
using Backends = std::vector<const Backend*>;

}  // namespace natten::detail
