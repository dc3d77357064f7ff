// What the tuner costs a call whose problem it knows.
//
//     cmake -B build/benchmarks -DNATTEN_BUILD_BENCHMARKS=ON
//     cmake --build build/benchmarks && build/benchmarks/natten_tuner_cost
//
// Calls of a tiny problem (16 tokens, a window of 3x3) in turns: with the tuner off, with the choice
// read from a cache that has this problem, one that has 200, and in turn with another problem, so
// that no two calls in a row are of the same. Prints nanoseconds per call, the medians of rounds.

#include <natten/natten.h>
#include <natten/tuner.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRounds = 101, kCalls = 2000;

/// Tokens on a grid, one head of 8 channels, and the call of a window of 3x3.
class Attention {
 public:
  Attention(std::int64_t rows, std::int64_t columns)
      : query_(static_cast<std::size_t>(rows * columns * kDim), 1.0f),
        output_(query_.size()) {
    const auto tensor = [&](std::vector<float>& data) {
      return natten::view(data.data(), {1, rows, columns, 1, kDim});
    };
    call_.op = natten::Op::attention_forward;
    call_.tensors.query = call_.tensors.key = call_.tensors.value = tensor(query_);
    call_.tensors.output = tensor(output_);
    call_.neighborhood.kernel_size = {3, 3};
    call_.neighborhood.stride = call_.neighborhood.dilation = {1, 1};
    call_.neighborhood.is_causal = {false, false};
  }
  const natten::Call& call() const { return call_; }

 private:
  static constexpr std::int64_t kDim = 8;
  std::vector<float> query_, output_;
  natten::Call call_;
};

double nanoseconds(const std::vector<const natten::Call*>& calls) {
  const auto start = Clock::now();
  for (int i = 0; i < kCalls; ++i)
    natten::run(*calls[static_cast<std::size_t>(i) % calls.size()]);
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count() / kCalls;
}

void set_mode(natten::TuningMode mode) {
  natten::TuningSettings settings = natten::tuning_settings();
  settings.forward = mode;
  settings.forward_limits = {0, 1, 0.01, false};
  settings.cache_dir.clear();
  natten::set_tuning_settings(settings);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Of calls with the tuner off, and of what the cache adds to each in the same turn.
void measure(const char* what, const std::vector<const natten::Call*>& calls) {
  std::vector<double> off, added;
  for (int round = 0; round < kRounds; ++round) {
    set_mode(natten::TuningMode::off);
    off.push_back(nanoseconds(calls));
    set_mode(natten::TuningMode::read);
    added.push_back(nanoseconds(calls) - off.back());
  }
  std::printf("%-40s %7.0f ns off, cache %+5.0f ns\n", what, median(off), median(added));
}

}  // namespace

int main() {
  try {
    natten::set_num_threads(1);
    const Attention one(4, 4), other(4, 5);
    set_mode(natten::TuningMode::read);
    natten::tune(natten::describe(one.call()));
    measure("one problem", {&one.call()});
    for (std::int64_t columns = 5; columns < 204; ++columns)
      natten::tune(natten::describe(Attention(4, columns).call()));
    measure("one problem of 200", {&one.call()});
    measure("two problems of 200, in turn", {&one.call(), &other.call()});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
