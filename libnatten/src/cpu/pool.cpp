#include <natten/context.h>
#include <natten/error.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace natten {

Executor::~Executor() = default;

void Executor::run_on(int threads, const std::function<void()>& task) {
  try {
    for (int i = 1; i < threads; ++i) schedule(task);
  } catch (...) {
    // An executor that takes no more tasks only costs speed: this thread does what is left. Leaving
    // here would take away what the tasks work on that are queued already.
  }
  task();
}

namespace {

int initial_threads() {
  if (const char* value = std::getenv("NATTEN_NUM_THREADS"); value && *value) {
    char* end = nullptr;
    const long long count = std::strtoll(value, &end, 10);
    while (*end == ' ') ++end;
    if (*end == '\0' && count > 0 && count <= std::numeric_limits<int>::max())
      return static_cast<int>(count);
    throw Error(ErrorKind::invalid_value, std::string("NATTEN_NUM_THREADS: got \"") + value +
                                              "\"; must be a positive integer");
  }
  if (const char* value = std::getenv("OMP_NUM_THREADS"))  // OpenMP's to complain of
    if (const int count = std::atoi(value); count > 0) return count;
#if defined(__linux__)
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable) == 0) return std::max(1, CPU_COUNT(&usable));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::atomic<int>& thread_count() {
  static std::atomic<int> count{initial_threads()};
  return count;
}

void pause_briefly() {
#if defined(__SSE__)
  _mm_pause();
#endif
}

/// A queue of tasks and threads that take from it. Threads start when they are first needed.
class Pool final : public Executor {
 public:
  int concurrency() const override { return num_threads(); }

  void schedule(std::function<void()> task) override {
    bool someone_sleeps;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < num_threads() - 1)
        threads_.emplace_back([this] { work(); });
      tasks_.push_back(std::move(task));
      waiting_ = static_cast<int>(tasks_.size());
      someone_sleeps = sleepers_ > 0;
    }
    if (someone_sleeps) wake_.notify_one();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (tasks_.empty()) {
        lock.unlock();
        spin();
        lock.lock();
        ++sleepers_;
        wake_.wait(lock, [&] { return !tasks_.empty(); });
        --sleepers_;
      }
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      waiting_ = static_cast<int>(tasks_.size());
      lock.unlock();
      task();
      task = nullptr;  // what it holds must not outlive it on a sleeping thread
      lock.lock();
    }
  }

  /// A caller that comes back within 50 microseconds need not wake a sleeping thread, which takes
  /// about as long as a small call.
  void spin() const {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::microseconds(50);
    while (waiting_ == 0 && Clock::now() < end)
      for (int i = 0; i < 16; ++i) pause_briefly();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  std::atomic<int> waiting_{0};  // tasks_.size(), readable without the mutex
  int sleepers_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

}  // namespace

int num_threads() { return thread_count(); }

void set_num_threads(int count) {
  if (count < 1)
    throw Error(ErrorKind::invalid_value,
                "num_threads: got " + std::to_string(count) + "; must be at least 1");
  thread_count() = count;
}

Executor& default_executor() {
  // Never destroyed: its threads may outlive static destructors. A forked child has none of the
  // parent's threads, so it starts with a new pool.
  if (Pool* pool = the_pool) return *pool;
#if defined(__unix__) || defined(__APPLE__)
  static std::once_flag registered;
  std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; }); });
#endif
  auto* created = new Pool;  // without a lock, which a fork could leave locked in the child
  Pool* other = nullptr;
  if (the_pool.compare_exchange_strong(other, created)) return *created;
  delete created;
  return *other;
}

}  // namespace natten
