#include "parallel.h"

#include <natten/error.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace natten::detail::cpu {
namespace {

/// XLA calls its handlers with denormals flushed to zero, and a thread inherits that mode from the
/// thread that creates it; half-precision subnormals would come out as 0.
class DefaultFloatingPoint {
#if defined(__SSE__)
 public:
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
  }
  ~DefaultFloatingPoint() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  std::uint64_t saved_;
#endif
};

using Clock = std::chrono::steady_clock;
constexpr auto kTimeBetweenQuestions = std::chrono::milliseconds(50);
// Between two looks at the clock, which take as long as some hundred multiply-adds.
constexpr std::int64_t kWorkBetweenLooks = 1 << 20;

/// Ends a body of an interrupted call.
struct Stopped {};

/// Whether a call goes on. Its caller's thread asks, all look.
class Interruption {
 public:
  explicit Interruption(const std::function<bool()>& callback) : callback_(callback) {}

  std::thread::id caller() const { return caller_; }
  bool stopped() const { return stopped_; }
  /// For the caller alone: whether the call has taken long.
  bool has_asked() const { return has_asked_; }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
    if (stopped_)
      throw Error(ErrorKind::interrupted,
                  "interrupted: the context ended the call; its outputs "
                  "are incomplete");
  }

  void ask_when_due() {
    if (!callback_ || stopped_ || std::this_thread::get_id() != caller_) return;
    const Clock::time_point now = Clock::now();
    if (due_ == Clock::time_point{}) due_ = now + kTimeBetweenQuestions;
    if (now < due_) return;
    has_asked_ = true;
    try {
      if (callback_()) stopped_ = true;
    } catch (...) {
      error_ = std::current_exception();
      stopped_ = true;
    }
    due_ = Clock::now() + kTimeBetweenQuestions;
  }

 private:
  const std::function<bool()>& callback_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::atomic<bool> stopped_{false};
  Clock::time_point due_;  // this and below are the caller's
  bool has_asked_ = false;
  std::exception_ptr error_;
};

/// The call that a thread works for, and what it did since its last look.
struct Current {
  Interruption* call = nullptr;
  std::int64_t work = 0;
};
thread_local Current current;

/// Sets what a thread works for. A callback may make a call of its own in the middle of another.
class WorkFor {
 public:
  explicit WorkFor(Interruption& call) : before_(current) { current = {&call, 0}; }
  ~WorkFor() { current = before_; }
  WorkFor(const WorkFor&) = delete;
  WorkFor& operator=(const WorkFor&) = delete;

 private:
  const Current before_;
};

/// The chunks of one parallel region. Shared with the tasks, which may run after it has ended.
class Region {
 public:
  Region(std::int64_t chunks, std::function<void(std::int64_t)> run_chunk, Interruption& call)
      : chunks_(chunks), run_chunk_(std::move(run_chunk)), call_(call), caller_(call.caller()) {}

  /// Runs chunks as long as there are any.
  void work() {
    for (std::int64_t chunk = next_++; chunk < chunks_; chunk = next_++) {
      try {
        DefaultFloatingPoint mode;
        WorkFor call(call_);
        if (!call_.stopped()) run_chunk_(chunk);
      } catch (const Stopped&) {
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      if (++done_ == chunks_) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
    // An executor that joins its threads would wait for them without asking. Not in calls that have
    // been short so far: their threads are done in no time, for which it may wait awake.
    if (std::this_thread::get_id() == caller_ && done_ != chunks_ && call_.has_asked()) wait();
  }

  /// For the chunks that other threads have taken.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!finished_.wait_for(lock, kTimeBetweenQuestions, [&] { return done_ == chunks_; })) {
      lock.unlock();
      call_.ask_when_due();
      lock.lock();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const std::int64_t chunks_;
  const std::function<void(std::int64_t)> run_chunk_;
  Interruption& call_;  // lives until all chunks are done
  const std::thread::id caller_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  std::exception_ptr error_;
};

/// One phase of every job, its items numbered through.
void run_phase(const std::vector<const Phase*>& phases, Executor& executor, Interruption& call) {
  std::vector<std::int64_t> first{0};  // number of the first item of each phase, then the total
  for (const Phase* phase : phases) first.push_back(first.back() + phase->items);
  const std::int64_t items = first.back();
  if (items == 0) return;

  const auto run_items = [&](std::int64_t begin, std::int64_t end) {
    auto at = static_cast<std::size_t>(std::upper_bound(first.begin(), first.end(), begin) -
                                       first.begin() - 1);
    for (; begin < end; ++at) {
      const std::int64_t stop = std::min(end, first[at + 1]);
      if (begin < stop) phases[at]->body(begin - first[at], stop - first[at]);
      begin = std::max(begin, stop);
    }
  };

  const std::int64_t threads = std::min<std::int64_t>(executor.concurrency(), items);
  if (threads <= 1) {
    DefaultFloatingPoint mode;
    WorkFor work(call);
    try {
      run_items(0, items);
    } catch (const Stopped&) {
    }
    return call.rethrow();
  }
  const std::int64_t chunks = chunks_of(items, threads);
  auto region = std::make_shared<Region>(
      chunks,
      [&](std::int64_t chunk) { run_items(items * chunk / chunks, items * (chunk + 1) / chunks); },
      call);
  std::exception_ptr failure;
  try {
    executor.run_on(static_cast<int>(threads), [region] { region->work(); });
  } catch (...) {
    // Tasks that it has queued already work on what is in this scope.
    failure = std::current_exception();
    region->work();
  }
  region->wait();
  call.rethrow();
  region->rethrow();
  if (failure) std::rethrow_exception(failure);
}

class CallingThread final : public Executor {
  int concurrency() const override { return 1; }
  void schedule(std::function<void()> task) override { task(); }
};

}  // namespace

Executor& calling_thread() {
  static CallingThread executor;
  return executor;
}

void checkpoint(std::int64_t work) {
  current.work += work;
  if (current.work < kWorkBetweenLooks) return;
  current.work = 0;
  if (!current.call) return;
  current.call->ask_when_due();
  if (current.call->stopped()) throw Stopped{};
}

void run_phases(const std::vector<std::vector<Phase>>& jobs, Executor* executor,
                const std::function<bool()>& interrupted) {
  Executor& used = executor ? *executor : default_executor();
  Interruption call(interrupted);
  std::size_t count = 0;
  for (const std::vector<Phase>& job : jobs) count = std::max(count, job.size());
  for (std::size_t i = 0; i < count; ++i) {
    std::vector<const Phase*> phases;
    for (const std::vector<Phase>& job : jobs)
      if (i < job.size()) phases.push_back(&job[i]);
    run_phase(phases, used, call);
  }
}

}  // namespace natten::detail::cpu
