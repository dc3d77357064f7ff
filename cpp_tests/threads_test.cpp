#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "cases.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace natten_tests {
namespace {

/// Restores the number of threads of the library's pool.
class Threads {
 public:
  explicit Threads(int count) : before_(natten::num_threads()) { natten::set_num_threads(count); }
  ~Threads() { natten::set_num_threads(before_); }

 private:
  int before_;
};

/// Forward and backward of a problem; the bytes of all that was written.
std::vector<std::vector<unsigned char>> results_of(const Case& c, const natten::Context& context) {
  std::vector<std::vector<unsigned char>> bytes;
  FusedProblem problem(c);
  natten::run(problem.forward(), context);
  natten::run(problem.backward(), context);
  problem.buffers.for_each([&](const char*, Buffer& buffer, natten::TensorView natten::Tensors::*) {
    bytes.push_back(buffer.bytes());
  });
  return bytes;
}

/// Those of random problems.
std::vector<std::vector<unsigned char>> results(const natten::Context& context = {}) {
  std::vector<std::vector<unsigned char>> bytes;
  for (int i = 0; i < 9; ++i) {
    Case c =
        random_case(base_seed() + 500 + static_cast<std::uint64_t>(i), kDTypes[i % 4], 1 + i % 3);
    c.logsumexp = true;
    c.rpb = i % 2 == 0;
    c.batch = 4;  // small problems stay on the thread of the caller
    c.dim = c.value_dim = 64;
    for (auto& one : results_of(c, context)) bytes.push_back(std::move(one));
  }
  return bytes;
}

TEST(Threading, ResultsDoNotDependOnTheirNumber) {
  Threads one(1);
  const auto expected = results();
  for (int count : {2, 3, 7, 1, 5}) {
    natten::set_num_threads(count);
    EXPECT_EQ(natten::num_threads(), count);
    EXPECT_EQ(natten::default_executor().concurrency(), count);
    for (int repeat = 0; repeat < 3; ++repeat)
      ASSERT_EQ(results(), expected) << count << " threads";
  }
}

/// Of problems with many lines and heads, which are cut into more items where there are more
/// threads.
TEST(Threading, LargeProblemsAreCutForAnyNumber) {
  for (bool with_bias : {false, true}) {
    Case c;
    c.seed = base_seed() + 600;
    c.axes = {{41, 5, 1, 1, false}, {37, 7, 1, 1, false}};
    c.heads = with_bias ? 2 : 12;
    c.kv_heads = with_bias ? 2 : 12;
    c.dim = 8;
    c.value_dim = 12;
    c.rpb = with_bias;
    Threads one(1);
    const auto expected = results_of(c, {});
    for (int count : {2, 5, 40}) {
      natten::set_num_threads(count);
      ASSERT_EQ(results_of(c, {}), expected) << c << " with " << count << " threads";
    }
  }
}

/// Few queries of long windows share the heads, of which fewer go together the more threads there
/// are.
TEST(Threading, StreamsAreCutForAnyNumber) {
  Case c;
  c.seed = base_seed() + 610;
  c.axes = {{3000, 2900, 1, 1, true, natten::Boundary::cut, 2997, 0, 3}};
  c.heads = 10;
  c.kv_heads = 5;
  c.dim = 24;
  c.value_dim = 32;
  Threads one(1);
  const auto expected = results_of(c, {});
  for (int count : {2, 5, 40}) {
    natten::set_num_threads(count);
    ASSERT_EQ(results_of(c, {}), expected) << count << " threads";
  }
}

/// Threads that take tasks in order.
class SmallPool : public natten::Executor {
 public:
  explicit SmallPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~SmallPool() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int concurrency() const override { return static_cast<int>(threads_.size()) + 1; }
  void schedule(std::function<void()> task) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
      ++scheduled;
    }
    wake_.notify_one();
  }
  int scheduled = 0;

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

TEST(Threading, CustomExecutors) {
  const auto expected = results();
  natten::Context context;
  {
    SmallPool pool(3);
    context.executor = &pool;
    for (int repeat = 0; repeat < 5; ++repeat) ASSERT_EQ(results(context), expected);
    EXPECT_GT(pool.scheduled, 0) << "the executor was not used";
  }
}

/// Keeps tasks for later, as a busy pool does.
struct LatePool : natten::Executor {
  std::vector<std::function<void()>> tasks;
  int concurrency() const override { return 4; }
  void schedule(std::function<void()> task) override { tasks.push_back(std::move(task)); }
};

TEST(Threading, TasksMayRunAfterTheCallOrNever) {
  const auto expected = results();
  LatePool pool;
  natten::Context context;
  context.executor = &pool;
  EXPECT_EQ(results(context), expected);
  ASSERT_FALSE(pool.tasks.empty());
  for (std::size_t i = 0; i < pool.tasks.size(); i += 2) pool.tasks[i]();  // harmless by now
}

/// Fails after it has handed out tasks, some of which run now and some later.
struct FailingPool : SmallPool {
  FailingPool() : SmallPool(2) {}
  std::vector<std::function<void()>> late;
  void run_on(int threads, const std::function<void()>& task) override {
    for (int i = 1; i < threads; ++i) schedule(task);
    late.push_back(task);
    throw std::runtime_error("no more threads");
  }
};

TEST(Threading, ExecutorsThatFailLeaveNoTaskBehind) {
  Case c;
  c.seed = base_seed();
  c.axes = {{500, 9, 1, 1, false}};
  c.batch = 4;
  c.dim = c.value_dim = 32;
  FusedProblem expected(c), problem(c);
  natten::run(expected.forward());
  natten::Context context;
  FailingPool pool;
  context.executor = &pool;
  const natten::Call call = problem.forward();
  try {
    natten::run(call, context);
    ADD_FAILURE() << "what the executor throws must reach the caller";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "no more threads");
  }
  EXPECT_EQ(problem.buffers.output.bytes(), expected.buffers.output.bytes())
      << "tasks run on while the call has ended, or never";
  ASSERT_FALSE(pool.late.empty());
  for (const std::function<void()>& task : pool.late) task();  // harmless by now
}

/// Runs tasks at once, in the caller.
struct ImmediatePool : natten::Executor {
  int threads = 4;
  int concurrency() const override { return threads; }
  void schedule(std::function<void()> task) override { task(); }
};

TEST(Threading, TasksMayRunAtOnce) {
  const auto expected = results();
  ImmediatePool pool;
  natten::Context context;
  context.executor = &pool;
  for (int threads : {0, 1, 4, 1000}) {
    pool.threads = threads;
    EXPECT_EQ(results(context), expected) << threads;
  }
}

TEST(Threading, MergingDoesNotDependOnThreads) {
  Rng rng(base_seed());
  const Shape wide{3, 50, 2, 7}, narrow{3, 50, 2};
  Buffer a(natten::DType::float16, normal(rng, wide)), b(natten::DType::float16, normal(rng, wide));
  Buffer la(natten::DType::float32, normal(rng, narrow)),
      lb(natten::DType::float32, normal(rng, narrow));
  std::vector<unsigned char> expected;
  for (int count : {1, 2, 7}) {
    Threads threads(count);
    Buffer output(natten::DType::float16, wide), logsumexp(natten::DType::float32, narrow);
    natten::merge_attentions({a.view(), b.view()}, {la.view(), lb.view()}, output.view(),
                             logsumexp.view());
    if (expected.empty()) expected = output.bytes();
    EXPECT_EQ(output.bytes(), expected);
  }
}

TEST(Threading, CallsFromSeveralThreadsAtOnce) {
  Threads three(3);
  const auto expected = results();
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 3; ++repeat) {
        if (i == 0) natten::set_num_threads(1 + repeat);  // also while others compute
        if (results() != expected) ++wrong;
      }
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Threading, CallsInsideTasksOfTheSamePool) {
  Threads two(2);
  const auto expected = results();
  std::atomic<int> right{0}, done{0};
  for (int i = 0; i < 4; ++i)
    natten::default_executor().schedule([&] {
      right += results() == expected;
      ++done;
    });
  while (done < 4) std::this_thread::yield();
  EXPECT_EQ(right, 4);
}

/// Starts threads and waits for them, as OpenMP does.
struct JoiningPool : natten::Executor {
  int concurrency() const override { return 3; }
  void schedule(std::function<void()> task) override { task(); }
  void run_on(int threads, const std::function<void()>& task) override {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(task);
    task();
    for (std::thread& other : others) other.join();
  }
};

/// All tokens see all: by the number of tokens it takes as long as one likes, and little memory.
Case long_case(std::int64_t tokens, std::int64_t heads) {
  Case c;
  c.seed = base_seed() + 700;
  c.axes = {{tokens, tokens, 1, 1, false}};
  c.heads = c.kv_heads = heads;
  return c;
}

TEST(Interruption, EndsCallsOfAnyKind) {
  FusedProblem problem(long_case(1 << 15, 16));  // takes seconds in every case below
  JoiningPool joining;
  Threads two(2);
  for (const char* backend : {"vectorized", "naive"})
    for (const natten::Call& call : {problem.forward(), problem.backward()})
      for (natten::Executor* executor :
           {static_cast<natten::Executor*>(nullptr), static_cast<natten::Executor*>(&joining)})
        for (int threads : {1, 2}) {
          SCOPED_TRACE(std::string(backend) + " " + name_of(call.op) + " on " +
                       (executor ? "joined threads" : std::to_string(threads)));
          if (executor && threads > 1) continue;  // it has a number of its own
          natten::set_num_threads(threads);
          using Clock = std::chrono::steady_clock;
          Clock::time_point asked;
          const std::thread::id caller = std::this_thread::get_id();
          natten::Context context;
          context.backend = backend;
          context.executor = executor;
          context.interrupted = [&] {
            EXPECT_EQ(std::this_thread::get_id(), caller);
            EXPECT_EQ(asked, Clock::time_point()) << "asked after it had answered";
            asked = Clock::now();
            return true;
          };
          try {
            natten::run(call, context);
            ADD_FAILURE() << "went on";
          } catch (const natten::Error& e) {
            EXPECT_EQ(e.kind(), natten::ErrorKind::interrupted) << e.what();
          }
          EXPECT_LT(Clock::now() - asked, std::chrono::seconds(1));

          context.interrupted = []() -> bool { throw std::out_of_range("of the callback"); };
          EXPECT_THROW(natten::run(call, context), std::out_of_range);
        }
}

/// The callback makes a call of its own in the middle of another.
TEST(Interruption, CallsThatGoOnHaveTheSameBits) {
  const Case c = long_case(1 << 13, 2);  // takes longer than the time between two questions
  const auto expected = results_of(c, {}), inner = results();
  for (int threads : {1, 2}) {
    Threads some(threads);
    int asked = 0;
    natten::Context context;
    context.interrupted = [&] {
      if (++asked == 1) {
        EXPECT_EQ(results(), inner);
      }
      return false;
    };
    EXPECT_EQ(results_of(c, context), expected);
    EXPECT_GT(asked, 0);
  }
}

TEST(Interruption, IsNotAskedForInShortCalls) {
  Threads one(1);
  const Case c = long_case(64, 1);
  natten::Context context;
  context.interrupted = [] { return true; };
  EXPECT_EQ(results_of(c, context), results_of(c, {}));
}

#if !defined(_WIN32)
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

/// A child process has none of its parent's threads, yet must compute.
TEST(Threading, ForkedChildrenCompute) {
  if (kThreadSanitizer) GTEST_SKIP() << "ThreadSanitizer cannot follow threads of a forked child";
  Threads four(4);
  const auto expected = results();  // the pool's threads exist now
  for (int generation = 0; generation < 2; ++generation) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(30);  // a child that waits for its parent's threads must not hang the suite
      bool right = results() == expected;
      const pid_t grandchild = fork();
      if (grandchild == 0) _exit(results() == expected ? 0 : 1);
      int status = 1;
      waitpid(grandchild, &status, 0);
      right = right && status == 0;
      _exit(right ? 0 : 1);
    }
    int status = 1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
    EXPECT_EQ(results(), expected) << "the parent goes on";
  }
}
#endif

#if defined(__SSE__)
/// Sets a control word of the floating-point unit for the life of a scope.
class ControlWord {
 public:
  explicit ControlWord(unsigned word) : before_(_mm_getcsr()) { _mm_setcsr(word); }
  ~ControlWord() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

/// Results among the subnormals of every type, which flushing to zero would lose. The library is
/// called with `mode` set; everything else happens in the default mode.
std::vector<std::vector<unsigned char>> subnormal_results(unsigned mode,
                                                          const natten::Context& context = {}) {
  std::vector<std::vector<unsigned char>> bytes;
  for (natten::DType dtype : kDTypes) {
    Case c;
    c.seed = base_seed();
    c.dtype = dtype;
    c.axes = {{12, 3, 1, 1, false}};
    c.batch = 2;
    FusedProblem problem(c);
    Buffers& b = problem.buffers;
    const double tiny = dtype == natten::DType::float16   ? 0x1p-20
                        : dtype == natten::DType::float64 ? 0x1p-1030
                                                          : 0x1p-130;
    for (Buffer* buffer : {&b.value, &b.grad_output})
      for (std::int64_t i = 0; i < buffer->view().size(); ++i)
        buffer->set(i, tiny * (1 + static_cast<double>(i % 7)));
    Buffer merged(dtype, b.output.dense().shape);
    Buffer merged_logsumexp(statistic_of(dtype), b.logsumexp.dense().shape);
    const natten::Call forward = problem.forward(), backward = problem.backward();
    unsigned before, after;
    {
      ControlWord set(_mm_getcsr() | mode);
      before = _mm_getcsr();
      natten::run(forward, context);
      natten::run(backward, context);
      natten::merge_attentions({b.output.view()}, {b.logsumexp.view()}, merged.view(),
                               merged_logsumexp.view(), context);
      after = _mm_getcsr();
    }
    constexpr unsigned kExceptions = 0x3f;  // what happened so far, not part of the mode
    EXPECT_EQ(after & ~kExceptions, before & ~kExceptions) << "the caller's mode";
    for (Buffer* buffer : {&b.output, &b.grad_value, &merged}) bytes.push_back(buffer->bytes());
  }
  return bytes;
}

TEST(FloatingPointMode, OfTheCallerChangesNoResultAndIsKept) {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40, kRoundUp = 0x4000;
  Threads four(4);
  const auto expected = subnormal_results(0);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const bool is_zero =
        std::all_of(expected[i].begin(), expected[i].end(), [](unsigned char b) { return b == 0; });
    // In pairs such numbers count as 0.
    EXPECT_TRUE(!is_zero || are_multiplied_in_pairs(kDTypes[i / 3]));
  }
  for (unsigned mode : {kFlushToZero | kDenormalsAreZero, kFlushToZero, kDenormalsAreZero,
                        kRoundUp | kFlushToZero}) {
    std::unique_ptr<SmallPool> pool;
    {
      ControlWord set(_mm_getcsr() | mode);
      pool = std::make_unique<SmallPool>(2);  // threads inherit the mode of who starts them
    }
    natten::Context context;
    context.executor = pool.get();
    EXPECT_EQ(subnormal_results(mode, context), expected) << "mode " << mode;
    for (int count : {1, 4}) {
      natten::set_num_threads(count);
      EXPECT_EQ(subnormal_results(mode), expected) << count << " threads, mode " << mode;
    }
  }
}
#endif

}  // namespace
}  // namespace natten_tests
