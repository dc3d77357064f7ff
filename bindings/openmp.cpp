#include "openmp.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace natten::bindings {
namespace {

/// What compilers make of `#pragma omp parallel`. GCC's runtime defines it, and LLVM's and Intel's
/// do for its sake.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

#if defined(__unix__) || defined(__APPLE__)
const pid_t loaded_by = getpid();

Parallel parallel() {
  // A forked child has none of the runtime's threads, and would wait for them forever.
  if (getpid() != loaded_by) return nullptr;
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}
#else
Parallel parallel() { return nullptr; }
#endif

}  // namespace

void OpenMpExecutor::schedule(std::function<void()> task) {
  default_executor().schedule(std::move(task));
}

void OpenMpExecutor::run_on(int threads, const std::function<void()>& task) {
  if (const Parallel run = parallel())
    run([](void* data) { (*static_cast<const std::function<void()>*>(data))(); },
        const_cast<std::function<void()>*>(&task), static_cast<unsigned>(threads), 0);
  else
    Executor::run_on(threads, task);
}

}  // namespace natten::bindings
