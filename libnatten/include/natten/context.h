#pragma once

#include <natten/export.h>

#include <cstddef>
#include <functional>

namespace natten {

/// Runs CPU work. Implement it to run kernels on a pool of your own.
class NATTEN_EXPORT Executor {
 public:
  virtual ~Executor();
  /// How many threads may work at once, the caller's among them.
  virtual int concurrency() const = 0;
  /// Runs `task` now or later on any thread. The caller of a kernel always takes part in its work,
  /// so a task that runs late, or waits for a busy pool, only costs speed.
  virtual void schedule(std::function<void()> task) = 0;
  /// Runs `task` here and on up to `threads` - 1 other threads; returns once it has returned here.
  /// By default schedules it on the others. Override it for a pool that only forks and joins. What
  /// an override throws reaches the caller of the kernel, after this thread has done what is left
  /// of the work. The default goes on where `schedule` throws.
  virtual void run_on(int threads, const std::function<void()>& task);
};

/// The library's own pool, used where a context names no executor. Survives fork().
NATTEN_EXPORT Executor& default_executor();
/// Threads of the default pool. Initially NATTEN_NUM_THREADS, else OMP_NUM_THREADS, else the
/// number of processors this process may use. Results do not depend on it. Throws Error
/// (invalid_value) where NATTEN_NUM_THREADS is no such number.
NATTEN_EXPORT int num_threads();
/// Throws Error (invalid_value) unless count >= 1.
NATTEN_EXPORT void set_num_threads(int count);

/// Where and how a call runs. The default context is right for the CPU.
struct Context {
  Executor* executor = nullptr;  ///< null: default_executor()
  void* stream = nullptr;        ///< CUDA stream (cudaStream_t) that kernels are enqueued on
  /// Forces a backend by name, or with "fused" any but the reference; null or "" lets the registry
  /// choose, after the environment variable NATTEN_BACKEND.
  const char* backend = nullptr;
  /// Scratch of at least `workspace_bytes`, aligned to 64 bytes. Null on the CPU: allocated for the
  /// duration of the call. On CUDA it is memory of the device, which kernels use until the stream
  /// has run them, and a call that needs it throws Error without it.
  void* workspace = nullptr;
  std::size_t workspace_size = 0;
  /// Asked about every 50 milliseconds of a call on the CPU, in the thread that made the call. Once
  /// it answers true, or throws, all threads leave their work, which takes them some milliseconds,
  /// and the call throws Error (interrupted), or what it threw; the contents of the outputs are
  /// then unspecified. It may call the library. Shorter calls, and calls on CUDA, do not ask.
  std::function<bool()> interrupted;
};

}  // namespace natten
