// What a call pays for the tuner.
//
//     cmake -B build/benchmarks -DNATTEN_BUILD_BENCHMARKS=ON
//     cmake --build build/benchmarks && build/benchmarks/natten_tuner_cost
//
// Prints nanoseconds per read of a choice that the cache has in memory, the least and the median of
// rounds, of a cache that has one problem, and of one that has 200, which are asked for in turn.
//
//     valgrind --tool=callgrind build/benchmarks/natten_tuner_cost 300 off
//
// makes that many calls on 16 tokens, with the tuner off, or reading a choice (read), so that
// instructions can be counted: the difference of two runs is that of their calls.

#include <natten/natten.h>
#include <natten/tuner.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRounds = 201, kReads = 2000;

natten::Problem problem_of_length(std::int64_t length) {
  natten::Problem problem;
  problem.rank = 2;
  problem.batch = 1;
  problem.heads = problem.kv_heads = 4;
  problem.head_dim = problem.value_dim = 32;
  for (natten::Axis& axis : problem.axes) axis.query_length = axis.key_length = length;
  return problem;
}

void measure(int count) {
  natten::TuningCache cache;
  const natten::Machine machine{"a machine", 2};
  natten::Choice choice;
  choice.configuration.strip = 32;
  std::vector<natten::Problem> problems;
  for (int i = 0; i < count; ++i) {
    problems.push_back(problem_of_length(i + 1));
    cache.store(problems.back(), "vectorized", machine, choice);
  }
  const auto accepts = [](const natten::Configuration&) { return true; };
  std::vector<double> rounds;
  int found = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = Clock::now();
    for (int i = 0; i < kReads; ++i) {
      const natten::Problem& problem = problems[static_cast<std::size_t>(i % count)];
      found += cache.find(problem, "vectorized", machine, std::cref(accepts)).has_value();
    }
    const std::chrono::duration<double, std::nano> elapsed = Clock::now() - start;
    rounds.push_back(elapsed.count() / kReads);
  }
  std::sort(rounds.begin(), rounds.end());
  std::printf("%3d problems: %4.0f ns, median %4.0f ns, of a read (%d found)\n", count, rounds[0],
              rounds[kRounds / 2], found);
}

/// Calls on 4 x 4 tokens, one head of 8.
void call(int count, natten::TuningMode mode) {
  const std::int64_t shape[] = {1, 4, 4, 1, 8};
  std::vector<float> values(512, 0.5f);
  natten::Call call;
  call.op = natten::Op::attention_forward;
  call.neighborhood.kernel_size = {3, 3};
  float* at = values.data();
  for (natten::TensorView* view :
       {&call.tensors.query, &call.tensors.key, &call.tensors.value, &call.tensors.output}) {
    *view = natten::contiguous_view(at, natten::DType::float32, {}, shape, 5);
    at += 128;
  }
  natten::TuningSettings settings;
  settings.forward = natten::TuningMode::tune;
  settings.forward_limits.seconds = 0.01;
  if (mode == natten::TuningMode::read) {
    natten::set_tuning_settings(settings);
    natten::run(call, {});
  }
  settings.forward = mode;
  natten::set_tuning_settings(settings);
  for (int i = 0; i < count; ++i) natten::run(call, {});
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3) {
    const bool reads = std::strcmp(arguments[2], "read") == 0;
    call(std::atoi(arguments[1]), reads ? natten::TuningMode::read : natten::TuningMode::off);
    return 0;
  }
  measure(1);
  measure(200);
}
