#include "openmp.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>
#endif

namespace natten::bindings {
namespace {

/// What compilers turn `#pragma omp parallel` into. GCC's runtime defines it, and LLVM's and
/// Intel's do too, to be compatible.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

#if defined(__unix__) || defined(__APPLE__)
/// Whether another process has forked this one, without starting a new program: then the runtime
/// may have been loaded, and its threads started, before the fork. True where that is unknown.
bool is_forked() {
#if defined(__linux__)
  // "pid (name) state", then numbers, of which the sixth are flags of the kernel.
  std::ifstream file("/proc/self/stat");
  std::string line, skipped;
  std::getline(file, line);
  std::istringstream fields(line.substr(line.rfind(')') + 1));
  unsigned long flags = 0;
  for (int i = 0; i < 6; ++i) fields >> skipped;
  constexpr unsigned long kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC
  return !(fields >> flags) || (flags & kForkedWithoutExec) != 0;
#else
  return false;  // the runtime there is LLVM's, which makes new threads after a fork
#endif
}

const pid_t loaded_by = getpid();
const bool loaded_in_child = is_forked();

Parallel parallel() {
  // A forked child has none of the runtime's threads, and would wait for them forever.
  if (loaded_in_child || getpid() != loaded_by) return nullptr;
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
