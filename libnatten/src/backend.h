#pragma once

#include <natten/context.h>
#include <natten/problem.h>
#include <natten/tuner.h>

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "examples.h"

namespace natten::detail {

/// A checked call that a backend runs.
struct Job {
  Problem problem;
  Tensors tensors;
  void* workspace;
  Configuration configuration = {};
  /// On CUDA a job may have several, which are grids of their own: `problem` and `tensors` are of
  /// all their tokens. It is of rank 1, fused and not circular, without additional tokens, parts
  /// and gradients of biases.
  std::vector<Example> examples = {};
  Example* example_table = nullptr;  ///< memory of the device for them, as scratch
};

/// What a backend offers to the tuner.
struct Tunable {
  /// As natten::candidates.
  std::vector<Configuration> (*candidates)(const Problem&, int threads, bool thorough);
  /// Names the machine that runs the problem, for the life of the process.
  std::string_view (*machine)(const Problem&);
  /// Whether a call may be timed now.
  bool (*can_time)(const Context&);
  /// Seconds that the device takes for what `run` enqueues.
  double (*seconds)(const Problem&, const std::function<void()>& run, const Context&);
};

/// One implementation. The registry knows them all, in order.
struct Backend {
  const char* name;
  /// Empty if the backend runs the problem, else a sentence that says why not.
  std::string (*refuse_reason)(const Problem&);
  std::size_t (*workspace_bytes)(const Problem&);
  /// Runs independent jobs, in one parallel region where the device has such a thing.
  void (*run)(const std::vector<Job>& jobs, const Context&);
  const Tunable* tunable = nullptr;  ///< null: there is nothing to choose
};

/// The backends of one device, best first.
using Backends = std::vector<const Backend*>;

}  // namespace natten::detail
