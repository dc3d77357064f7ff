#pragma once

// Examples of different lengths on the device (../examples.h).

#include <algorithm>
#include <cstddef>

#include "../backend.h"
#include "machine.h"

namespace natten::detail::cuda {

/// Where the examples of a job lie; none where it is one grid.
struct Examples {
  const Example* data = nullptr;
  int count = 0;

  NATTEN_HOST_DEVICE explicit operator bool() const { return count > 0; }
};

/// Writes a part of the table. Arguments travel with a launch: a copy from the host's memory might
/// wait for the stream.
struct WriteExamples {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  Example from[kThreads];
  int count;
  Example* to;

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    if (gpu.thread() < count) to[gpu.thread()] = from[gpu.thread()];
  }
};

/// Enqueues that, and returns what kernels that come after it may read.
template <class Launcher>
Examples write_examples(const Job& job, Launcher& launch) {
  const std::size_t count = job.examples.size();
  for (std::size_t first = 0; first < count; first += WriteExamples::kThreads) {
    WriteExamples write{};
    write.count = static_cast<int>(std::min<std::size_t>(count - first, WriteExamples::kThreads));
    std::copy_n(job.examples.data() + first, write.count, write.from);
    write.to = job.example_table + first;
    launch(write, 1);
  }
  return {job.example_table, static_cast<int>(count)};
}

}  // namespace natten::detail::cuda
