#pragma once

// Runs CUDA kernels (libnatten/src/cuda) on the host, block by block. The threads of a block are
// fibers that run until they meet at a barrier or an operation of their warp, in an order that a
// seed chooses; so a missing barrier shows as a wrong result under some seed. Lanes of a warp go
// their own ways on a GPU once they have taken different paths, and ldmatrix and mma need them
// together: so these throw where lanes have done different things since they last met at a barrier.
// What matrices of ldmatrix and mma hold where is written from the PTX manual, independently of the
// kernels.

#include <natten/half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../libnatten/src/cuda/machine.h"

namespace natten_tests {

class EmulatedBlock;

/// Of matrix products, since the program began.
inline std::int64_t& emulated_multiply_adds() {
  static std::int64_t count = 0;
  return count;
}

/// One thread of an emulated block, with the interface of natten::detail::cuda::Gpu.
class EmulatedThread {
 public:
  std::int64_t block() const;
  int thread() const { return thread_; }
  template <class E>
  E* shared(int offset) {
    step(Step::shared);
    return reinterpret_cast<E*>(shared_bytes(offset, sizeof(E)));
  }
  int opaque(int x) const { return x; }
  template <class E>
  E* opaque(E* x) const {
    return x;
  }
  void sync();
  void sync_warp();
  float shuffle_xor(float x, int mask);
  std::uint32_t shuffle(std::uint32_t x, int lane);
  bool all(bool x);
  void copy_async(int to, const void* from) { copy_async<16>(to, from, 16); }
  template <int kBytes>
  void copy_async(int to, const void* from, int given) {
    begin_copy(to, from, static_cast<std::size_t>(given), kBytes);
  }
  void commit();
  template <int kPending>
  void wait() {
    wait_until_pending(kPending);
  }
  void load_matrices(std::uint32_t (&r)[4], int row) { load(r, row, false); }
  void load_matrices_transposed(std::uint32_t (&r)[4], int row) { load(r, row, true); }
  void read_chunk(std::uint32_t (&r)[4], int from) {
    step(Step::shared);
    std::memcpy(r, shared_bytes(from, 16), 16);
  }
  void write_chunk(int to, const std::uint32_t (&r)[4]) {
    step(Step::shared);
    std::memcpy(shared_bytes(to, 16), r, 16);
  }
  std::uint32_t funnel(std::uint32_t low, std::uint32_t high, int shift) {
    return static_cast<std::uint32_t>((std::uint64_t{high} << 32 | low) >> shift);
  }
  template <class T>
  void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
  template <class T>
  void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    for (float& x : c) x = 0;
    multiply_add<T>(c, a, b);
  }
  template <class T>
  std::uint32_t pack(float first, float second) {
    return static_cast<std::uint32_t>(T(first).bits) | static_cast<std::uint32_t>(T(second).bits)
                                                           << 16;
  }
  float exp2(float x) const { return std::exp2(x); }
  float log(float x) const { return std::log(x); }
  template <int kBytes>
  void copy(void* to, const void* from) {
    step(Step::global);
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % kBytes)
      throw std::logic_error("copy: addresses must be multiples of its bytes");
    std::memcpy(to, from, kBytes);
  }
  void atomic_add(float* to, float x) {
    step(Step::global);
    *to += x;
  }

 private:
  friend class EmulatedBlock;
  struct Copy {
    void* to;
    const void* from;
    std::size_t given, bytes;
  };
  /// What lanes may do of their own; `path_` is a digest of what this one has done since a barrier.
  enum class Step : std::uint64_t { shared = 1, copy, global };
  void step(Step s) { path_ = (path_ ^ static_cast<std::uint64_t>(s)) * 0x100000001b3; }
  /// Some bytes of shared memory, aligned to as many.
  char* shared_bytes(int offset, std::size_t bytes) const;
  void begin_copy(int to, const void* from, std::size_t given, std::size_t bytes);
  void wait_until_pending(int groups);
  void load(std::uint32_t (&r)[4], int row, bool transposed);
  /// Calls `f(args of all 32 lanes)` once, by the last lane to arrive; returns when it is done.
  template <class Args, class F>
  void with_warp(Args& args, F&& f);
  /// The same for operations that need the lanes of a warp together.
  template <class Args, class F>
  void with_aligned_warp(const char* what, Args& args, F&& f);

  EmulatedBlock* owner_ = nullptr;
  int thread_ = 0;
  std::uint64_t path_ = 0;
  std::vector<std::vector<Copy>> groups_{1};  // the last one is open
};

/// The fibers of a block and their scheduler.
class EmulatedBlock {
 public:
  static constexpr int kLanes = 32;

  EmulatedBlock(int threads, std::uint64_t seed)
      : seed_(seed),
        threads_(static_cast<std::size_t>(threads)),
        warps_(static_cast<std::size_t>(threads / kLanes)) {
    if (threads % kLanes != 0) throw std::logic_error("threads must fill warps");
  }

  void run(std::int64_t block, int shared_bytes, const std::function<void(EmulatedThread&)>& body) {
    block_ = block;
    body_ = &body;
    // Shared memory starts as NaN, so that what is read before it is written shows.
    shared_.assign(static_cast<std::size_t>(shared_bytes) + kSharedAlignment, '\xff');
    arrived_ = 0;
    std::mt19937_64 rng(seed_ + static_cast<std::uint64_t>(block));
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      Fiber& f = threads_[i];
      f.thread = EmulatedThread();
      f.thread.owner_ = this;
      f.thread.thread_ = static_cast<int>(i);
      f.state = State::ready;
    }
    for (Warp& w : warps_) w = Warp();
    for (done_ = 0; done_ < threads_.size();) {
      // Whole warps change places: lanes of a warp meet all the time anyway.
      const std::size_t first = seed_ == 0 ? 0 : rng() % warps_.size() * kLanes;
      bool progress = false;
      for (std::size_t n = 0; n < threads_.size(); ++n) {
        const std::size_t i = (first + n) % threads_.size();
        if (threads_[i].state != State::ready) continue;
        progress = true;
        resume(i);
        n += current_ - i;  // lanes after it have run too
        if (error_) {
          for (Fiber& other : threads_) other.started = false;  // the next block starts them anew
          std::rethrow_exception(std::exchange(error_, nullptr));
        }
      }
      if (!progress && done_ < threads_.size())
        throw std::logic_error("emulated threads wait for each other: a barrier not all reach");
    }
  }

  std::int64_t block() const { return block_; }
  std::size_t shared_size() const { return shared_.size() - kSharedAlignment; }
  char* shared() {
    const auto address = reinterpret_cast<std::uintptr_t>(shared_.data());
    return shared_.data() + (kSharedAlignment - address % kSharedAlignment) % kSharedAlignment;
  }

  void sync() {
    if (++arrived_ < static_cast<int>(threads_.size())) return wait(State::at_barrier);
    arrived_ = 0;
    for (Fiber& f : threads_)
      if (f.state == State::at_barrier) f.state = State::ready;
  }

  template <class Args, class F>
  void with_warp(int thread, Args& args, F&& f) {
    Warp& warp = warps_[static_cast<std::size_t>(thread / kLanes)];
    warp.args[thread % kLanes] = &args;
    if (++warp.arrived < kLanes) return wait(State::at_warp);
    warp.arrived = 0;
    Args* all[kLanes];
    for (int i = 0; i < kLanes; ++i) all[i] = static_cast<Args*>(warp.args[i]);
    f(all);
    const std::size_t first = static_cast<std::size_t>(thread / kLanes * kLanes);
    for (std::size_t i = first; i < first + kLanes; ++i)
      if (threads_[i].state == State::at_warp) threads_[i].state = State::ready;
  }

 private:
  static constexpr std::size_t kSharedAlignment = 128;
  static constexpr std::size_t kStackBytes = 256 * 1024;
  enum class State { ready, at_barrier, at_warp, done };
  struct Fiber {
    EmulatedThread thread;
    State state = State::ready;
    bool started = false;
    std::vector<char> stack;
    ucontext_t context;  // where it starts
    std::jmp_buf at;     // where it goes on; unlike swapcontext, without a system call
  };
  struct Warp {
    int arrived = 0;
    void* args[kLanes] = {};
  };

  static void start(unsigned low, unsigned high) {
    auto* self = reinterpret_cast<EmulatedBlock*>(static_cast<std::uintptr_t>(high) << 32 | low);
    Fiber& f = self->threads_[self->current_];
    for (;;) {  // once per block
      try {
        (*self->body_)(f.thread);
      } catch (...) {
        self->error_ = std::current_exception();
      }
      self->wait(State::done);
    }
  }
  /// Runs a thread until it waits or is done, and then lanes of its warp after it, up to one that
  /// cannot go on. The last of them is `current_`.
  void resume(std::size_t i) {
    Fiber& f = threads_[i];
    current_ = i;
    if (_setjmp(scheduler_) != 0) return;
    if (f.started) std::longjmp(f.at, 1);
    f.started = true;
    f.stack.resize(kStackBytes);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&f.context, reinterpret_cast<void (*)()>(&start), 2, static_cast<unsigned>(self),
                static_cast<unsigned>(self >> 32));
    setcontext(&f.context);
  }
  void wait(State state) {
    Fiber& f = threads_[current_];
    f.state = state;
    if (state == State::done) ++done_;
    if (_setjmp(f.at) != 0) return;
    if (!error_ && (current_ + 1) % kLanes != 0) {  // not by way of the scheduler: that is slow
      Fiber& next = threads_[current_ + 1];
      if (next.started && next.state == State::ready) {
        ++current_;
        std::longjmp(next.at, 1);
      }
    }
    std::longjmp(scheduler_, 1);
  }

  const std::uint64_t seed_;
  std::vector<char> shared_;
  std::vector<Fiber> threads_;
  std::vector<Warp> warps_;
  std::int64_t block_ = 0;
  const std::function<void(EmulatedThread&)>* body_ = nullptr;
  int arrived_ = 0;
  std::size_t current_ = 0, done_ = 0;
  std::jmp_buf scheduler_;
  std::exception_ptr error_;
};

inline std::int64_t EmulatedThread::block() const { return owner_->block(); }
inline char* EmulatedThread::shared_bytes(int offset, std::size_t bytes) const {
  const auto at = static_cast<std::size_t>(offset);
  if (offset < 0 || at % std::min<std::size_t>(bytes, 16) % 4 != 0 ||
      at + bytes > owner_->shared_size())
    throw std::logic_error("shared memory: an offset beyond its end, or not aligned");
  return owner_->shared() + at;
}
inline void EmulatedThread::sync() {
  owner_->sync();
  path_ = 0;
}

template <class Args, class F>
void EmulatedThread::with_warp(Args& args, F&& f) {
  owner_->with_warp(thread_, args, f);
}
template <class Args, class F>
void EmulatedThread::with_aligned_warp(const char* what, Args& args, F&& f) {
  struct Aligned {
    Args& args;
    std::uint64_t path;
  } aligned{args, path_};
  with_warp(aligned, [&](Aligned*(&lanes)[32]) {
    Args* all[32];
    for (int i = 0; i < 32; ++i) {
      all[i] = &lanes[i]->args;
      if (lanes[i]->path != lanes[0]->path)
        throw std::logic_error(std::string(what) + ": lanes have parted; a sync_warp is missing");
    }
    f(all);
  });
}
inline void EmulatedThread::sync_warp() {
  int none = 0;
  with_warp(none, [](int*(&)[32]) {});
  path_ = 0;
}
inline float EmulatedThread::shuffle_xor(float x, int mask) {
  struct Args {
    float x, result;
    int mask;
  } args{x, 0, mask};
  with_warp(args, [](Args*(&lanes)[32]) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[i ^ lanes[i]->mask]->x;
  });
  return args.result;
}
inline std::uint32_t EmulatedThread::shuffle(std::uint32_t x, int lane) {
  struct Args {
    std::uint32_t x, result;
    int lane;
  } args{x, 0, lane};
  with_warp(args, [](Args*(&lanes)[32]) {
    for (Args* to : lanes) to->result = lanes[to->lane % 32]->x;
  });
  return args.result;
}
inline bool EmulatedThread::all(bool x) {
  bool args = x;
  with_warp(args, [](bool*(&lanes)[32]) {
    bool every = true;
    for (bool* lane : lanes) every = every && *lane;
    for (bool* lane : lanes) *lane = every;
  });
  return args;
}
inline void EmulatedThread::begin_copy(int to, const void* from, std::size_t given,
                                       std::size_t bytes) {
  if (given > bytes) throw std::logic_error("asynchronous copy: of more than there is room for");
  if (static_cast<std::size_t>(to) % bytes != 0 ||
      reinterpret_cast<std::uintptr_t>(from) % bytes != 0)
    throw std::logic_error("asynchronous copy: addresses must be multiples of its bytes");
  step(Step::copy);
  groups_.back().push_back({shared_bytes(to, bytes), from, given, bytes});
}
inline void EmulatedThread::commit() { groups_.emplace_back(); }
inline void EmulatedThread::wait_until_pending(int groups) {
  // The open group is not counted, as in PTX.
  while (static_cast<int>(groups_.size()) - 1 > groups) {
    for (const Copy& copy : groups_.front()) {
      std::memset(copy.to, 0, copy.bytes);
      if (copy.given > 0) std::memcpy(copy.to, copy.from, copy.given);
    }
    groups_.erase(groups_.begin());
  }
}
inline void EmulatedThread::load(std::uint32_t (&r)[4], int row, bool transposed) {
  if (row % 16 != 0) throw std::logic_error("load_matrices: rows must be aligned to 16 bytes");
  struct Args {
    const void* row;
    bool transposed;
    std::uint32_t r[4];
  } args{shared_bytes(row, 16), transposed, {}};
  with_aligned_warp("load_matrices", args, [](Args*(&lanes)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t x[8][8];
      for (int i = 0; i < 8; ++i) {
        std::memcpy(x[i], lanes[8 * matrix + i]->row, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const bool t = lanes[lane]->transposed;
        const std::uint16_t low = t ? x[j][i] : x[i][j], high = t ? x[j + 1][i] : x[i][j + 1];
        lanes[lane]->r[matrix] = static_cast<std::uint32_t>(low) | static_cast<std::uint32_t>(high)
                                                                       << 16;
      }
    }
  });
  std::copy(args.r, args.r + 4, r);
}

template <class T>
void EmulatedThread::multiply_add(float (&c)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2]) {
  struct Args {
    float (&c)[4];
    const std::uint32_t (&a)[4];
    const std::uint32_t (&b)[2];
  } args{c, a, b};
  with_aligned_warp("multiply_add", args, [](Args*(&lanes)[32]) {
    constexpr int kPacked = 4 / sizeof(T);  // elements in a register
    constexpr int kDepth = 8 * kPacked;
    emulated_multiply_adds() += 16 * 8 * kDepth;
    const auto element = [](std::uint32_t bits, int which) {
      if constexpr (std::is_same_v<T, float>) {
        if (bits & 0x1fff) throw std::logic_error("multiply_add: not rounded to TF32");
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
      } else {
        T x;
        x.bits = static_cast<std::uint16_t>(bits >> (16 * which));
        return static_cast<float>(x);
      }
    };
    static thread_local float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      for (int r = 0; r < 4; ++r)  // PTX: registers of A's fragment, then of B's
        for (int i = 0; i < kPacked; ++i) {
          const int at = in_group * kPacked + i;
          a[group + r % 2 * 8][at + r / 2 * kDepth / 2] = element(lanes[lane]->a[r], i);
          if (r < 2) b[at + r * kDepth / 2][group] = element(lanes[lane]->b[r], i);
        }
    }
    float c[16][8];
    const auto for_each_sum = [&](auto&& f) {
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
          f(lanes[lane]->c[i], c[lane / 4 + (i >= 2 ? 8 : 0)][lane % 4 * 2 + (i & 1)]);
    };
    for_each_sum([](float& of_lane, float& sum) { sum = of_lane; });
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kDepth; ++k)
        for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    for_each_sum([](float& of_lane, float& sum) { of_lane = sum; });
  });
}

/// Runs kernels where `natten::detail::cuda::Launcher` would enqueue them.
class Emulator {
 public:
  explicit Emulator(std::uint64_t seed = 0) : seed_(seed) {}

  template <class Kernel>
  void operator()(const Kernel& kernel, std::int64_t blocks, int shared_bytes = 0) {
    if (shared_bytes > natten::detail::cuda::kMostSharedBytes)
      throw std::logic_error("too much shared memory");
    auto& block = blocks_[Kernel::kThreads];
    if (!block) block = std::make_unique<EmulatedBlock>(Kernel::kThreads, seed_);
    for (std::int64_t i = 0; i < blocks; ++i)
      block->run(i, shared_bytes, [&](EmulatedThread& gpu) { kernel(gpu); });
  }
  void clear(void* memory, std::size_t bytes) { std::memset(memory, 0, bytes); }
  static int shared_bytes() { return natten::detail::cuda::kSharedBytesOfLargest; }

 private:
  std::uint64_t seed_;
  std::map<int, std::unique_ptr<EmulatedBlock>> blocks_;  // by their number of threads
};

}  // namespace natten_tests
