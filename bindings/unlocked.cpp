#include "unlocked.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace nb = nanobind;

namespace natten::bindings {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<bool> exiting{false};
std::atomic<int> holders{0};  // that have the lock, lost it to another thread or wait for it
std::atomic<unsigned long> main_thread{0};
bool python_stops_threads = false;  // that wait for the lock while it finalizes

bool in_main_thread() { return PyThread_get_thread_ident() == main_thread; }

/// The process is about to end.
[[noreturn]] void wait_for_the_end() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

/// Without the lock. Either `interpreter_exits` sees this holder, or this sees that it has run.
void enter() {
  ++holders;
  if (!exiting || in_main_thread()) return;
  --holders;
  wait_for_the_end();
}

/// In the main thread, before the interpreter finalizes.
void interpreter_exits() {
  if (python_stops_threads) return;
  exiting = true;
  // Each thread that is in a function of the module leaves it, or reaches the place where it stops.
  // One that waits for something else does not keep the process from ending.
  const auto end = Clock::now() + std::chrono::seconds(1);
  while (holders > 0 && Clock::now() < end) {
    PyThreadState* state = PyEval_SaveThread();
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    PyEval_RestoreThread(state);
  }
}

/// In the only thread of a forked child, which thereby becomes its main thread.
void interpreter_was_forked() {
  holders = 0;
  main_thread = PyThread_get_thread_ident();
}

}  // namespace

HoldsLock::HoldsLock() {
  ++holders;
  if (!exiting || in_main_thread()) return;
  PyEval_SaveThread();
  --holders;
  wait_for_the_end();
}

HoldsLock::~HoldsLock() { --holders; }

void HoldsLock::release_while(const std::function<void()>& work) {
  std::exception_ptr error;
  --holders;
  PyThreadState* state = PyEval_SaveThread();
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  enter();
  PyEval_RestoreThread(state);
  if (PyErr_Occurred()) throw nb::python_error();
  if (error) std::rethrow_exception(error);
}

std::function<bool()> signal_check() {
  if (!in_main_thread()) return {};
  return [] {
    nb::gil_scoped_acquire lock;
    return PyErr_CheckSignals() != 0;
  };
}

void watch_interpreter() {
  main_thread = nb::cast<unsigned long>(
      nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  constexpr int kPython314 = 0x030E0000;
  python_stops_threads =
      nb::cast<int>(nb::module_::import_("sys").attr("hexversion")) >= kPython314;
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(interpreter_exits));
  const nb::object os = nb::module_::import_("os");
  if (nb::hasattr(os, "register_at_fork"))
    os.attr("register_at_fork")(nb::arg("after_in_child") =
                                    nb::cpp_function(interpreter_was_forked));
}

}  // namespace natten::bindings
