#pragma once

#include <nanobind/nanobind.h>

#include <exception>
#include <functional>

/// The interpreter's lock around calls of the library that may take long.
namespace natten::bindings {

/// Lives as long as a call of a function of the module that runs Python code or releases the lock.
/// While the interpreter finalizes, Python ends other threads than the main one when they wait for
/// the lock: up to 3.13 by an exception that no C++ function on their stack may stop, but one
/// always does. So while the interpreter exits, such threads are stopped here for good before they
/// wait, as Python 3.14 itself does, and those that wait already are let through before it
/// finalizes.
class HoldsLock {
 public:
  HoldsLock();
  ~HoldsLock();
  HoldsLock(const HoldsLock&) = delete;
  HoldsLock& operator=(const HoldsLock&) = delete;

  /// Runs `work` without the lock. Throws the Python exception that is set then, else what it
  /// threw.
  void release_while(const std::function<void()>& work);
};

/// For `Context::interrupted`: runs Python's signal handlers. True with a Python exception set
/// where one of them raised it. Null in threads that run none.
std::function<bool()> signal_check();

/// Asks the interpreter to report when it exits and when it was forked.
void watch_interpreter();

}  // namespace natten::bindings
