#pragma once

// What the suites of CUDA kernels run them on: threads that are emulated, from their C++ source,
// or, where NATTEN_PTX_FILES names their PTX, that (ptx/launcher.h).

#include <gtest/gtest.h>
#include <natten/roles.h>

#include <cstdint>
#include <map>
#include <vector>

#include "../libnatten/src/backend.h"
#include "tensors.h"

#ifdef NATTEN_PTX_FILES
#include "ptx/launcher.h"
#else
#include "gpu_emulator.h"
#include "plain_launcher.h"
#endif

namespace natten_tests {

#ifdef NATTEN_PTX_FILES
/// Of all products of matrices, since the program began.
inline std::int64_t multiply_adds() { return ptx::multiply_adds(); }

using TileLauncher = ptx::Launcher;    ///< for kernels of blocks whose threads meet
using ThreadLauncher = ptx::Launcher;  ///< for kernels whose threads share nothing
inline constexpr char kFnaName[] = "fna_ptx", kSimtName[] = "simt_ptx";
/// Of many cases of one kind, each element type takes one of so many.
inline constexpr std::uint64_t kOneOf = 3;
#else
inline std::int64_t multiply_adds() { return emulated_multiply_adds(); }

using TileLauncher = Emulator;
using ThreadLauncher = PlainLauncher;
inline constexpr char kFnaName[] = "fna_emulated", kSimtName[] = "simt_emulated";
inline constexpr std::uint64_t kOneOf = 1;
#endif

/// Whether an element type takes a case, of those that have numbers. Three types take all of them.
inline bool takes_case(natten::DType dtype, std::uint64_t number) {
  return (number + static_cast<std::uint64_t>(dtype)) % kOneOf == 0;
}

/// The memory that kernels of a call see, as long as it lives: that of the host in its place, or,
/// for PTX, at addresses between which there is nothing.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
#ifdef NATTEN_PTX_FILES
  ~DeviceMemory() {
    for (std::uint64_t address : addresses_) ptx::device_memory().remove(address);
  }
#endif

  natten::Tensors tensors(natten::Op op, natten::Tensors tensors) {
    for (const natten::Role& role : natten::roles_of(op)) {
      natten::TensorView& view = tensors.*role.tensor;
      if (!view) continue;
      const Extent extent = extent_of(view);
      const std::int64_t first = static_cast<char*>(view.data) - extent.begin;
      view.data =
          static_cast<char*>(place(role.name, extent.begin, extent.bytes, role.is_output)) + first;
    }
    return tensors;
  }
  template <class T>
  const T* input(const char* name, std::vector<T>& values) {
    return static_cast<T*>(place(name, values.data(), values.size() * sizeof(T), false));
  }
  /// Memory that starts as NaN, and a guard after it. There is one.
  void* workspace(std::size_t bytes) {
    workspace_bytes_ = bytes;
    workspace_.assign(bytes + kGuard, kFill);
    return place("workspace", workspace_.data(), bytes, true);
  }
  void expect_guard_intact() const {
    for (std::size_t i = workspace_bytes_; i < workspace_.size(); ++i)
      ASSERT_EQ(workspace_[i], kFill)
          << "written " << i - workspace_bytes_ << " bytes past the workspace";
  }

 private:
  static constexpr std::size_t kGuard = 512;
  static constexpr unsigned char kFill = 0xff;

  void* place([[maybe_unused]] const char* name, void* data, [[maybe_unused]] std::size_t bytes,
              [[maybe_unused]] bool is_writable) {
#ifdef NATTEN_PTX_FILES
    addresses_.push_back(ptx::device_memory().add(name, data, bytes, is_writable));
    return reinterpret_cast<void*>(addresses_.back());
#else
    return data;
#endif
  }

  std::vector<unsigned char> workspace_;
  std::size_t workspace_bytes_ = 0;
#ifdef NATTEN_PTX_FILES
  std::vector<std::uint64_t> addresses_;
#endif
};

/// Runs the kernels of a call by `run(job, launcher)`, in an order of threads that `seed` says.
template <class Run>
void run_on_tiles(const natten::Call& call, std::uint64_t seed,
                  std::size_t (*workspace_bytes)(const natten::Problem&), Run&& run) {
  const natten::Problem problem = natten::describe(call);
  DeviceMemory memory;
  const natten::Tensors tensors = memory.tensors(call.op, call.tensors);
  static std::map<std::uint64_t, TileLauncher> launchers;  // they keep their threads
  TileLauncher& launch = launchers.try_emplace(seed, seed).first->second;
  run(natten::detail::Job{problem, tensors, memory.workspace(workspace_bytes(problem))}, launch);
  memory.expect_guard_intact();
}

/// A job of examples that lie one after another, and the memory that it works on.
struct PackedJob {
  DeviceMemory memory;
  natten::detail::Job job;

  PackedJob(const natten::Call& call, const natten::Packing& packing,
            std::size_t (*workspace_bytes)(const natten::Problem&)) {
    natten::Call whole = call;
    whole.options.allow_no_keys = true;
    job.problem = natten::describe(whole);
    job.tensors = memory.tensors(call.op, call.tensors);
    job.examples = natten::detail::examples_in(packing);
    const std::size_t table =
        (job.examples.size() * sizeof(natten::detail::Example) + 63) / 64 * 64;
    void* const workspace = memory.workspace(table + workspace_bytes(job.problem));
    job.example_table = static_cast<natten::detail::Example*>(workspace);
    job.workspace = static_cast<char*>(workspace) + table;
  }
};

}  // namespace natten_tests
