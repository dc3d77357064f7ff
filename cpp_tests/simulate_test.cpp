// What natten::work_of counts, against counts over all pairs of a query and a key.

#include <natten/simulate.h>

#include <algorithm>
#include <set>

#include "cases.h"

namespace natten_tests {
namespace {

using natten::PassWork;

/// A random case that can be counted.
Case countable_case(std::uint64_t seed, natten::DType dtype, int rank) {
  Case c = random_case(seed, dtype, rank);
  c.batch = std::max<std::int64_t>(c.batch, 1);
  c.rpb = c.key_mask = false;
  c.additional.reset();
  return c;
}

/// Pairs of a query and a key that it sees, of all heads.
double pair_count(const Case& c) {
  auto pairs = static_cast<double>(c.batch * c.heads);
  for (const oracle::Axis& axis : c.axes) {
    std::size_t of_axis = 0;
    for (const auto& keys : oracle::given_pairs_of(axis)) of_axis += keys.size();
    pairs *= static_cast<double>(of_axis);
  }
  return pairs;
}

double sum_of(const std::vector<PassWork>& passes, double PassWork::*member) {
  double sum = 0;
  for (const PassWork& pass : passes) sum += pass.*member;
  return sum;
}

class Simulated : public testing::TestWithParam<natten::DType> {
 protected:
  /// Calls `f(case, problem)` with random cases of every rank.
  template <class F>
  void for_each_case(F&& f) {
    std::uint64_t seed = base_seed() + 7000;
    for (int rank = 1; rank <= 3; ++rank)
      for (int i = 0; i < 20; ++i) {
        const Case c = countable_case(++seed, GetParam(), rank);
        std::ostringstream text;
        text << c;
        SCOPED_TRACE(text.str());
        FusedProblem problem(c);
        f(c, problem);
      }
  }
};

TEST_P(Simulated, CountsPairsAndBytes) {
  for_each_case([](const Case& c, FusedProblem& problem) {
    const double pairs = pair_count(c);
    const natten::Problem p = natten::describe(problem.forward());
    const auto rows = static_cast<double>(p.batch * p.heads * p.queries());
    const auto columns = static_cast<double>(p.batch * p.kv_heads * p.keys());
    const auto d = static_cast<double>(c.dim), dv = static_cast<double>(c.value_dim);
    const auto bytes = static_cast<double>(natten::size_of(c.dtype));
    const auto statistic = static_cast<double>(natten::size_of(natten::statistic_dtype(c.dtype)));

    const std::vector<PassWork> forward = natten::work_of(problem.forward());
    ASSERT_EQ(forward.size(), 1U);
    EXPECT_EQ(forward[0].name, "forward");
    EXPECT_EQ(forward[0].useful, pairs * (d + dv));
    EXPECT_GE(forward[0].weights, pairs);
    EXPECT_GE(forward[0].executed, pairs * (d + dv));
    EXPECT_LE(forward[0].masked, forward[0].weights);
    EXPECT_EQ(forward[0].written, rows * (dv * bytes + (c.logsumexp ? statistic : 0)));
    EXPECT_GE(forward[0].read, rows * d * bytes);

    const std::vector<PassWork> backward = natten::work_of(problem.backward());
    EXPECT_EQ(sum_of(backward, &PassWork::useful), pairs * (3 * d + 2 * dv));
    EXPECT_GE(backward[0].weights, pairs);
    if (backward[0].name == "backward") {
      ASSERT_EQ(backward.size(), 1U);
      EXPECT_GE(backward[0].executed, pairs * (3 * d + 2 * dv));
      // What two items of work see is written by both.
      EXPECT_GE(backward[0].written, rows * (d * bytes + statistic) + columns * (d + dv) * bytes);
      return;
    }
    ASSERT_EQ(backward.size(), 2U);
    EXPECT_GE(sum_of(backward, &PassWork::executed), pairs * (4 * d + 3 * dv));
    EXPECT_EQ(backward[0].written, rows * (d * bytes + statistic));
    EXPECT_EQ(backward[1].written, columns * (d + dv) * bytes);
  });
}

/// Threads share the work; some keys may be packed once more, but nothing is computed twice.
TEST_P(Simulated, ThreadsChangeNoArithmetic) {
  for_each_case([](const Case&, FusedProblem& problem) {
    for (const natten::Call& call : {problem.forward(), problem.backward()}) {
      const std::vector<PassWork> one = natten::work_of(call), many = natten::work_of(call, 7);
      EXPECT_EQ(sum_of(one, &PassWork::useful), sum_of(many, &PassWork::useful));
      EXPECT_EQ(sum_of(one, &PassWork::written), sum_of(many, &PassWork::written));
      EXPECT_EQ(sum_of(one, &PassWork::weights), sum_of(many, &PassWork::weights));
    }
  });
}

/// No thread has much more to do than the others: 128 lines in stacks of three that 64 threads
/// share make 0.896 at best.
TEST(SimulatedThreads, ShareWorkEvenly) {
  for (std::int64_t dilation : {1, 4}) {
    Case c;
    c.dtype = natten::DType::float32;
    c.axes = {{128, 13, 1, dilation, false}, {128, 13, 1, dilation, false}};
    c.heads = c.kv_heads = 4;
    c.dim = c.value_dim = 64;
    FusedProblem problem(c);
    for (const natten::Call& call : {problem.forward(), problem.backward()})
      for (int threads = 1; threads <= 64; threads *= 2)
        for (const PassWork& pass : natten::work_of(call, threads)) {
          // Sums of keys bind the backward pass to 28 sweeps.
          if (pass.name == "backward" && dilation == 1 && threads > 4) continue;
          EXPECT_GE(pass.balance, threads <= 32 ? 0.9 : 0.85)
              << pass.name << " with dilation " << dilation << " on " << threads << " threads";
          EXPECT_LE(pass.balance, 1.0 + 1e-9);
        }
  }
}

/// Attention of everything to everything fills vectors and hides nothing.
TEST_P(Simulated, WholeVectorsAreCountedExactly) {
  Case c;
  c.dtype = GetParam();
  c.axes = {{96, 96, 1, 1, false}};
  c.batch = 2;
  c.heads = c.kv_heads = 3;
  c.dim = c.value_dim = 16;
  FusedProblem problem(c);
  const PassWork work = natten::work_of(problem.forward()).at(0);
  EXPECT_EQ(work.weights, pair_count(c));
  EXPECT_EQ(work.masked, 0);
  EXPECT_EQ(work.executed, work.useful);
  // Each row and column is packed once, keys transposed and values plain.
  const auto sums = static_cast<double>(natten::size_of(natten::statistic_dtype(c.dtype)));
  const int transposed = are_multiplied_in_pairs(c.dtype) ? 16 / 2 : 16;
  EXPECT_EQ(work.packed, 2.0 * 3 * 96 * (transposed + transposed + 16) * sums);
}

/// A stream reads each key once, packs none and does nothing that it is not asked for.
TEST_P(Simulated, StreamsReadWhatTheySee) {
  Case c;
  c.dtype = GetParam();
  c.axes = {{900, 700, 1, 1, true, natten::Boundary::cut, 899, 0, 1}};
  c.heads = 6;
  c.kv_heads = 3;
  c.dim = 24;
  c.value_dim = 16;
  c.logsumexp = false;
  FusedProblem problem(c);
  const PassWork work = natten::work_of(problem.forward()).at(0);
  EXPECT_EQ(work.name, "forward");
  EXPECT_EQ(work.weights, pair_count(c));
  EXPECT_EQ(work.executed, work.useful);
  EXPECT_EQ(work.packs, 0);
  const auto bytes = static_cast<double>(natten::size_of(c.dtype));
  EXPECT_EQ(work.read, (3.0 * 700 * (24 + 16) + 6 * 24) * bytes);
}

TEST_P(Simulated, FixedTilesAreThoseThatHoldAPair) {
  Rng rng(base_seed());
  for_each_case([&](const Case& drawn, FusedProblem&) {
    Case c = drawn;
    c.gives_grid = false;
    for (oracle::Axis& axis : c.axes) {
      axis.given_queries = axis.given_keys = -1;
      axis.query_offset = axis.key_offset = 0;
      if (axis.boundary != natten::Boundary::shift) return;
    }
    natten::Tuple tiles[2];
    for (natten::Tuple& tile : tiles)
      for (; tile.size < c.rank(); ++tile.size) tile.values[index(tile.size)] = uniform(rng, 1, 9);
    double visits = 1, wholes = 1, pairs_of_tile = 1;
    for (int i = 0; i < c.rank(); ++i) {
      const oracle::Axis& axis = c.axes[index(i)];
      std::map<std::vector<std::int64_t>, std::int64_t> seen;  // pairs by group and tiles
      const oracle::Pairs pairs = oracle::pairs_of(axis);
      for (std::int64_t q = 0; q < axis.length; ++q)
        for (const oracle::Pair& pair : pairs[index(q)])
          ++seen[{q % axis.dilation, q / axis.dilation / tiles[0][i],
                  pair.key / axis.dilation / tiles[1][i]}];
      visits *= static_cast<double>(seen.size());
      double whole = 0;
      for (const auto& [where, count] : seen) {
        const std::int64_t n = (axis.length - where[0] + axis.dilation - 1) / axis.dilation;
        const std::int64_t rows = std::min(tiles[0][i], n - where[1] * tiles[0][i]);
        whole += count == rows * tiles[1][i];
      }
      wholes *= whole;
      pairs_of_tile *= static_cast<double>(tiles[0][i] * tiles[1][i]);
    }
    FusedProblem problem(c);
    const PassWork work = natten::work_of_fixed_tiles(problem.forward(), tiles[0], tiles[1]);
    const auto heads = static_cast<double>(c.batch * c.heads);
    EXPECT_EQ(work.tiles, heads * visits);
    EXPECT_EQ(work.weights, heads * visits * pairs_of_tile);
    EXPECT_EQ(work.masked, heads * (visits - wholes) * pairs_of_tile);
    EXPECT_EQ(work.useful, pair_count(c) * static_cast<double>(c.dim + c.value_dim));
  });
}

INSTANTIATE_TEST_SUITE_P(Work, Simulated, testing::ValuesIn(kDTypes),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(Simulate, Refuses) {
  Case c;
  c.axes = {{9, 3, 1, 1, false}};
  FusedProblem problem(c);
  const auto message = [](auto&& f) -> std::string {
    try {
      f();
    } catch (const natten::Error& e) {
      return e.what();
    }
    return "";
  };
  natten::Call call = problem.forward();
  EXPECT_EQ(message([&] { natten::work_of(call, 0); }), "threads: got 0; must be at least 1");
  EXPECT_EQ(message([&] {
              natten::work_of_fixed_tiles(call, {4, 4}, {4});
            }),
            "query_tile: got [4, 4]; must be 1 positive integers up to 2^20");
  c.rpb = true;
  FusedProblem with_bias(c);
  EXPECT_EQ(message([&] { natten::work_of(with_bias.forward()); }),
            "rpb: calls with them are not counted");
  for (const natten::Role& role : natten::roles_of(call.op))
    (call.tensors.*role.tensor).device = {natten::DeviceType::cuda, -1};
  EXPECT_NE(message([&] { natten::work_of(call); }).find("float32 in TF32 only"),
            std::string::npos);
}

}  // namespace
}  // namespace natten_tests
