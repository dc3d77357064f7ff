#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

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

/// The chunks of one parallel region. Shared with the tasks, which may run after it has ended.
class Region {
 public:
  Region(std::int64_t chunks, std::function<void(std::int64_t)> run_chunk)
      : chunks_(chunks), run_chunk_(std::move(run_chunk)) {}

  void work() {
    for (std::int64_t chunk = next_++; chunk < chunks_; chunk = next_++) {
      try {
        DefaultFloatingPoint mode;
        run_chunk_(chunk);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      if (++done_ == chunks_) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [&] { return done_ == chunks_; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const std::int64_t chunks_;
  const std::function<void(std::int64_t)> run_chunk_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  std::exception_ptr error_;
};

/// One phase of every job, its items numbered through.
void run_phase(const std::vector<const Phase*>& phases, Executor& executor) {
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
    run_items(0, items);
    return;
  }
  // More chunks than threads even out items of unequal cost and threads that start late.
  const std::int64_t chunks = std::min(items, threads * 8);
  auto region = std::make_shared<Region>(chunks, [&](std::int64_t chunk) {
    run_items(items * chunk / chunks, items * (chunk + 1) / chunks);
  });
  std::exception_ptr failure;
  try {
    executor.run_on(static_cast<int>(threads), [region] { region->work(); });
  } catch (...) {
    // Tasks that it has queued already work on what is in this scope.
    failure = std::current_exception();
    region->work();
  }
  region->wait();
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

void run_phases(const std::vector<std::vector<Phase>>& jobs, Executor* executor) {
  Executor& used = executor ? *executor : default_executor();
  std::size_t count = 0;
  for (const std::vector<Phase>& job : jobs) count = std::max(count, job.size());
  for (std::size_t i = 0; i < count; ++i) {
    std::vector<const Phase*> phases;
    for (const std::vector<Phase>& job : jobs)
      if (i < job.size()) phases.push_back(&job[i]);
    run_phase(phases, used);
  }
}

}  // namespace natten::detail::cpu
