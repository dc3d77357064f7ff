// What a call pays for a choice that the tuner's cache has in memory.
//
//     cmake -B build/benchmarks -DNATTEN_BUILD_BENCHMARKS=ON
//     cmake --build build/benchmarks && build/benchmarks/natten_tuner_cost
//
// Prints nanoseconds per read, the least and the median of rounds, of a cache that has one problem,
// and of one that has 200, which are asked for in turn.

#include <natten/natten.h>
#include <natten/tuner.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
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

}  // namespace

int main() {
  measure(1);
  measure(200);
}
