// The SIMT kernels of the CUDA backend, run on host memory (cuda_machine.h). The suites of all
// backends run them too (`provided_backends`).

#include <algorithm>
#include <limits>
#include <map>
#include <random>

#include "../libnatten/src/cuda/simt.h"
#include "cases.h"
#include "cuda_machine.h"
#include "packed.h"

namespace natten_tests {
namespace {

using natten::Op;
using natten::detail::Job;
namespace cuda = natten::detail::cuda;

void run_emulated(const natten::Call& call) {
  const natten::Problem problem = natten::describe(call);
  DeviceMemory memory;
  const natten::Tensors tensors = memory.tensors(call.op, call.tensors);
  ThreadLauncher launch;
  cuda::run_simt(Job{problem, tensors, memory.workspace(cuda::simt_workspace_bytes(problem))},
                 launch);
  memory.expect_guard_intact();
}

void run_packed(const natten::Call& call, const natten::Packing& packing) {
  PackedJob packed(call, packing, cuda::simt_workspace_bytes);
  ThreadLauncher launch;
  cuda::run_simt(packed.job, launch);
  packed.memory.expect_guard_intact();
}

const bool kProvided = [] {
  provided_backends().push_back({kSimtName, cuda::simt_refuse_reason, run_emulated, run_packed});
  return true;
}();

class CudaSimt : public testing::TestWithParam<natten::DType> {
 protected:
  static void TearDownTestSuite() { errors_.print("CUDA, SIMT kernels: larger problems"); }

  natten::DType dtype() const { return GetParam(); }

  /// Forward and backward against the reference.
  void expect_definition(Case c) {
    c.dtype = dtype();
    FusedProblem problem(c);
    natten_tests::expect_definition(problem, errors_, [](const natten::Call& call) {
      ASSERT_EQ(cuda::simt_refuse_reason(natten::describe(call)), "");
      run_emulated(call);
    });
  }

  static ErrorTable errors_;
};
ErrorTable CudaSimt::errors_;

/// In several tiles of rows and chunks of columns.
TEST_P(CudaSimt, ExamplesOfDifferentLengths) {
  for (std::uint64_t i = 0; i < 16; ++i) {
    const PackedCase packed = packed_case(base_seed() * 59 + i, dtype(), 90, i % 2 == 0);
    if (takes_case(dtype(), i) && packed.is_one_job()) expect_examples(packed, errors_, run_packed);
  }
}

/// Around the numbers of elements that a kernel keeps in registers and reads at a time.
TEST_P(CudaSimt, HeadDims) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {7, 3, 1, 2, false}};
  c.additional = 3;
  c.heads = 2;
  std::uint64_t seed = base_seed();
  for (const auto& [dim, value_dim] : std::vector<std::pair<int, int>>{{16, 16},
                                                                       {32, 32},
                                                                       {40, 72},
                                                                       {64, 64},
                                                                       {96, 96},
                                                                       {128, 128},
                                                                       {160, 8},
                                                                       {8, 160},
                                                                       {256, 256},
                                                                       {33, 65},
                                                                       {129, 31},
                                                                       {136, 200},
                                                                       {1030, 24},
                                                                       {1, 1}}) {
    c.seed = ++seed;
    if (!takes_case(dtype(), seed)) continue;
    c.dim = dim;
    c.value_dim = value_dim;
    c.rpb = dim % 3 == 0;
    expect_definition(c);
  }
}

/// More than a tile of rows and a chunk of columns along every axis.
TEST_P(CudaSimt, TilesAndChunks) {
  std::uint64_t seed = base_seed() + 100;
  for (const std::vector<oracle::Axis>& axes : std::vector<std::vector<oracle::Axis>>{
           {{97, 37, 1, 1, false}},
           {{130, 33, 4, 3, false}},
           {{70, 64, 1, 1, true}},
           {{21, 7, 2, 2, false}, {19, 9, 1, 1, false}},
           {{18, 17, 1, 1, false}, {23, 5, 5, 4, true}},
           {{7, 5, 1, 1, true}, {9, 3, 3, 2, false}, {11, 5, 1, 1, false}},
           {{5, 2, 1, 2, false}, {6, 6, 1, 1, true}, {17, 4, 2, 3, true}},
       }) {
    Case c;
    c.seed = ++seed;
    if (!takes_case(dtype(), seed)) continue;
    c.axes = axes;
    c.heads = 4;
    c.kv_heads = 2;
    c.dim = 24;
    c.value_dim = 16;
    c.rpb = seed % 2 == 0;
    c.grad_logsumexp = true;
    c.additional = static_cast<std::int64_t>(seed % 3) * 17;
    c.is_contiguous = seed % 3 == 0;
    expect_definition(c);
  }
}

/// The same of borders, parts and masks: seams within tiles and chunks, and queries that are not
/// given in the middle of what a key sees.
TEST_P(CudaSimt, TilesAndChunksOfBordersPartsAndMasks) {
  using natten::Boundary;
  std::uint64_t seed = base_seed() + 700;
  for (const std::vector<oracle::Axis>& axes : std::vector<std::vector<oracle::Axis>>{
           {{97, 37, 1, 1, false, Boundary::circular}},
           {{97, 37, 1, 1, false, Boundary::circular, 11, -7, 60, 96}},
           {{50, 50, 5, 1, false, Boundary::circular, 20, 0, 3, 50}},
           {{90, 29, 3, 2, false, Boundary::circular, 30, 0, 40, 90}},
           {{64, 200, 7, 1, false, Boundary::cut, 40, -5, 24, 80}},
           {{70, 64, 1, 1, true, Boundary::cut, 50, -3, 9, 70}},
           {{21, 7, 2, 2, false, Boundary::cut}, {20, 9, 1, 1, false, Boundary::circular}},
           {{18, 17, 1, 1, false, Boundary::shift, 4, 0, 3, 18},
            {24, 6, 4, 3, false, Boundary::circular, 9, 5, 4, 24}},
           {{7, 5, 1, 1, true},
            {9, 9, 3, 1, false, Boundary::circular},
            {11, 15, 1, 1, false, Boundary::cut}},
       }) {
    Case c;
    c.seed = ++seed;
    if (!takes_case(dtype(), seed)) continue;
    c.axes = axes;
    c.batch = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.dim = 24;
    c.value_dim = 16;
    c.rpb = seed % 2 == 0;
    c.key_mask = seed % 3 != 0;
    c.additional = static_cast<std::int64_t>(seed % 3) * 17;
    c.is_contiguous = seed % 3 == 0;
    expect_definition(c);
  }
}

/// Gradients of additional tokens sum over more queries than one part of them holds.
TEST_P(CudaSimt, ManyQueriesOfAdditionalTokens) {
  Case c;
  c.seed = base_seed() + 200;
  c.axes = {{37, 3, 1, 1, false}, {29, 3, 1, 1, false}};
  c.heads = c.kv_heads = 2;
  c.additional = 40;
  c.dim = c.value_dim = 8;
  expect_definition(c);
}

/// But for lanes of a warp that add in turn, which only some launchers know of.
TEST_P(CudaSimt, OrderOfThreadsDoesNotMatter) {
  const auto run = [](const natten::Call& call, std::uint64_t seed) {
    run_on_tiles(call, seed, cuda::simt_workspace_bytes, cuda::run_simt<TileLauncher>);
  };
  for (std::uint64_t i = 0; i < 9; ++i) {
    Case c = random_case(base_seed() + 300 + i, dtype(), static_cast<int>(i % 3) + 1);
    c.rpb = true;
    c.additional = 2;
    SCOPED_TRACE(testing::Message() << c);
    std::vector<Dense> first;
    for (std::uint64_t seed : {0, 1, 2, 3}) {
      FusedProblem problem(c);
      problem.provide_logsumexp();
      run(problem.forward(), seed);
      run(problem.backward(), seed);
      Buffers& b = problem.buffers;
      std::vector<Dense> results;
      for (Buffer* x : {&b.output, &b.logsumexp, &b.grad_query, &b.grad_key, &b.grad_value,
                        &b.grad_rpb, &b.grad_additional_keys, &b.grad_additional_values})
        results.push_back(x->dense());
      if (seed == 0) first = results;
      for (std::size_t j = 0; j < results.size(); ++j)
        EXPECT_EQ(results[j].data, first[j].data) << "result " << j;
    }
  }
}

/// The pass that other backends borrow, which multiply float in TF32.
TEST_P(CudaSimt, BiasGradientFromGivenRowTerm) {
  natten::detail::dispatch_dtype(dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Sum = natten::detail::StatisticOf<T>;
    Case c;
    c.seed = base_seed() + 400;
    c.dtype = dtype();
    c.axes = {{9, 4, 1, 2, false}, {8, 5, 2, 1, true}};
    c.heads = 2;
    c.batch = 2;
    c.rpb = true;
    FusedProblem problem(c);
    problem.provide_logsumexp();
    run_emulated(problem.forward());
    run_emulated(problem.backward());
    const Dense expected = problem.buffers.grad_rpb.dense();
    Buffers& b = problem.buffers;

    const oracle::FusedResults reference = problem.expected();
    const std::int64_t queries = 9 * 8;
    std::vector<Sum> row_term(index(c.batch * c.heads * queries));
    // Without grad_logsumexp the sum of P * dP is <output, grad_output>.
    for (std::int64_t row = 0; row < c.batch * queries * c.heads; ++row) {
      double sum = 0;
      for (std::int64_t d = 0; d < c.value_dim; ++d)
        sum += reference.output[row * c.value_dim + d] * b.grad_output.get(row * c.value_dim + d);
      const std::int64_t head = row % c.heads, query = row / c.heads % queries,
                         batch = row / c.heads / queries;
      row_term[index((batch * c.heads + head) * queries + query)] = static_cast<Sum>(sum);
    }
    const natten::Call call = problem.backward();
    const natten::Problem p = natten::describe(call);
    DeviceMemory memory;
    const Job job{p, memory.tensors(call.op, call.tensors), nullptr};
    void* const workspace = memory.workspace(cuda::simt_grad_rpb_workspace_bytes(p));
    const Sum* const given = memory.input("row_term", row_term);
    const auto expect_gradient = [&] {
      const Precision precision(dtype(), dtype() == natten::DType::float32);
      EXPECT_LE(relative_error(b.grad_rpb.dense(), expected), bounds_of(precision).gradient);
      for (std::int64_t i = 0; i < expected.size(); ++i) b.grad_rpb.set(i, std::nan(""));
    };
    ThreadLauncher launch;
    cuda::simt_grad_rpb<T>(job, given, workspace, launch);
    memory.expect_guard_intact();
    expect_gradient();
  });
}

/// Takes the place of a launcher.
struct LaunchCounter {
  int launches = 0;
  std::int64_t most_warps = 0;

  template <class Kernel>
  void operator()(const Kernel&, std::int64_t blocks, int = 0) {
    ++launches;
    most_warps = std::max(most_warps, blocks * Kernel::kThreads / cuda::simt::kRows);
  }
  void clear(void*, std::size_t) {}
};

/// Whatever the window, one launch adds up biases' gradients, of enough warps for a large GPU, in a
/// workspace of some 64 MiB.
TEST(CudaSimtBiases, LaunchesDoNotGrowWithTheWindow) {
  for (const std::int64_t window : {3, 13, 80}) {
    const std::int64_t shape[] = {1, 256, 256, 24, 128};
    const std::int64_t biases[] = {24, 2 * window - 1, 2 * window - 1};
    natten::Call call;
    call.tensors.query = call.tensors.key = call.tensors.value =
        natten::contiguous_view(nullptr, natten::DType::bfloat16, {}, shape, 5);
    call.tensors.rpb = natten::contiguous_view(nullptr, natten::DType::bfloat16, {}, biases, 3);
    call.neighborhood.kernel_size = {window, window};
    natten::Problem p = natten::describe(call);
    p.op = Op::attention_backward;
    LaunchCounter counter;
    cuda::simt_grad_rpb<natten::bfloat16>(Job{p, call.tensors, nullptr}, nullptr, nullptr, counter);
    EXPECT_EQ(counter.launches, 3);  // what tokens see, weights by their offsets, parts
    EXPECT_GE(counter.most_warps, 4096);
    EXPECT_LE(cuda::simt_grad_rpb_workspace_bytes(p), std::size_t{65} << 20);
  }
}

TEST_P(CudaSimt, AllScoresInfinite) {
  expect_zeros_where_all_scores_are_infinite(dtype(), run_emulated);
}

/// The gradients of query and key by the formulas of attention, in float32: as frameworks compute
/// them from weights that are kept.
struct PlainGradients {
  Dense query, key;

  explicit PlainGradients(const oracle::FusedInputs& in)
      : query(in.query.shape), key(in.key.shape) {
    const oracle::Sizes& n = in.n;
    const auto dot = [](const Dense& a, std::int64_t i, const Dense& b, std::int64_t j,
                        std::int64_t dims) {
      float sum = 0;
      for (std::int64_t d = 0; d < dims; ++d)
        sum += static_cast<float>(a[i + d]) * static_cast<float>(b[j + d]);
      return sum;
    };
    const auto add = [](Dense& to, std::int64_t i, float factor, const Dense& from, std::int64_t j,
                        std::int64_t dims) {
      for (std::int64_t d = 0; d < dims; ++d)
        to[i + d] = static_cast<float>(to[i + d]) + factor * static_cast<float>(from[j + d]);
    };
    const auto scale = static_cast<float>(in.scale);
    for (std::int64_t row = 0; row < n.batch * n.queries * n.heads; ++row) {
      const std::int64_t head = row % n.heads, q = row / n.heads % n.queries;
      const std::int64_t first = row / n.heads / n.queries * n.keys;  // key of the batch entry
      const auto& pairs = in.pairs[index(q)];
      std::vector<float> weights, grads;
      const auto key_of = [&](std::size_t i) { return (first + pairs[i].key) * n.heads + head; };
      float largest = -std::numeric_limits<float>::infinity(), total = 0, term = 0;
      for (std::size_t i = 0; i < pairs.size(); ++i) {
        weights.push_back(scale * dot(in.query, row * n.dim, in.key, key_of(i) * n.dim, n.dim));
        grads.push_back(
            dot(in.grad_output, row * n.value_dim, in.value, key_of(i) * n.value_dim, n.value_dim));
        largest = std::max(largest, weights.back());
      }
      for (float& x : weights) total += x = std::exp(x - largest);
      for (float& x : weights) x /= total;
      for (std::size_t i = 0; i < pairs.size(); ++i) term += weights[i] * grads[i];
      for (std::size_t i = 0; i < pairs.size(); ++i) {
        const float grad_score = weights[i] * (grads[i] - term) * scale;
        add(query, row * n.dim, grad_score, in.key, key_of(i) * n.dim, n.dim);
        add(key, key_of(i) * n.dim, grad_score, in.query, row * n.dim, n.dim);
      }
    }
  }
};

/// Where scores are large, logsumexp rounds to some 1e-5 or more, and weights made with it do not
/// add up to 1. Gradients must not be worse for it than those by normalised weights, over several
/// problems: in a single one few rows make the whole error.
TEST(CudaSimtScores, AsGoodAsPlainAttentionAtAnyScale) {
  std::uint64_t seed = base_seed() + 600;
  for (const double scores : {1., 10., 30., 100., 300., 1e3, 3e3, 1e4}) {
    std::map<std::string, std::pair<double, double>> squares;  // of errors, and of those by plain
    for (int variant = 0; variant < 6; ++variant) {
      Case c;
      c.seed = ++seed;
      c.axes = {{18, 7, 1, 1, false}, {17, 7, 1, 1, false}};
      c.heads = c.kv_heads = 2;
      c.dim = c.value_dim = 16;
      c.scale = scores / std::sqrt(static_cast<double>(c.dim));
      FusedProblem problem(c);
      run_emulated(problem.forward());
      run_emulated(problem.backward());
      const oracle::FusedResults exact = problem.expected();
      const PlainGradients plain(problem.oracle_inputs());
      Buffers& b = problem.buffers;
      const auto add = [&](const char* name, const Dense& got, const Dense& by_plain,
                           const Dense& reference) {
        squares[name].first += std::pow(relative_error(got, reference), 2);
        squares[name].second += std::pow(relative_error(by_plain, reference), 2);
      };
      add("grad_query", b.grad_query.dense(), plain.query, exact.grad_query);
      add("grad_key", b.grad_key.dense(), plain.key, exact.grad_key);
    }
    for (const auto& [name, sums] : squares)
      EXPECT_LE(std::sqrt(sums.first), 10 * std::sqrt(sums.second))
          << name << ", scores of " << scores;
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaSimt, testing::ValuesIn(kDTypes),
                         [](const auto& info) { return std::string(name_of(info.param)); });

/// Numbers and places of rows and columns, and what rows see by them, are those of neighborhood.h.
TEST(CudaParts, PlacesAreThoseOfTheGrid) {
  Rng rng(base_seed());
  for (int i = 0; i < 20000; ++i) {
    natten::Problem p;
    natten::Axis& axis = p.axes[2];
    axis.boundary = static_cast<natten::Boundary>(uniform(rng, 0, 2));
    const bool is_circular = axis.boundary == natten::Boundary::circular;
    axis.dilation = uniform(rng, 1, 4);
    const std::int64_t n = uniform(rng, 1, 6);
    axis.grid_length = n * axis.dilation + (is_circular ? 0 : uniform(rng, 0, axis.dilation - 1));
    axis.kernel_size = uniform(rng, 1, n);
    if (axis.boundary == natten::Boundary::cut && chance(rng, 0.2))
      axis.dilation = uniform(rng, 1, 2 * axis.grid_length);
    axis.query_offset = uniform(rng, 0, axis.grid_length - 1);
    axis.query_length = uniform(rng, 1, axis.grid_length - axis.query_offset);
    const natten::Interval needed = natten::key_range(axis);
    axis.key_offset = needed.begin - (is_circular ? 0 : uniform(rng, 0, 3));
    axis.key_length = needed.end - axis.key_offset + (is_circular ? 0 : uniform(rng, 0, 3));
    if (is_circular) axis.key_offset += axis.grid_length * uniform(rng, -2, 2);

    const natten::Problem simple = cuda::simplified(p);
    for (const cuda::Rows rows : {cuda::Rows::queries, cuda::Rows::keys}) {
      const bool are_queries = rows == cuda::Rows::queries;
      const std::int64_t row_offset = are_queries ? axis.query_offset : axis.key_offset;
      const cuda::Places places = cuda::places_of(simple, 2, rows);
      for (int row = 0; row < places.row_length; ++row) {
        const std::int64_t token = row + row_offset, group = natten::group_of(axis, token);
        const cuda::Group of_row = places.group(row % places.dilation);
        const cuda::Sight sight =
            cuda::sight_of(simple.axes[2], rows, of_row, row / places.dilation);
        const std::int64_t position = natten::position_of(axis, token);
        const natten::Interval expected = are_queries
                                              ? natten::window(axis, group, position)
                                              : natten::inverse_window(axis, group, position);
        ASSERT_EQ(sight.end - sight.begin, expected.size()) << "case " << i;
        for (std::int64_t x = expected.begin; x < expected.end; ++x) {
          const int place = sight.begin + static_cast<int>(x - expected.begin);
          const std::int64_t seen = natten::token_at(axis, group, x);
          const int number = places.number(of_row.first_column, places.in_turn(place));
          ASSERT_EQ(number < places.column_length ? number : -1,
                    are_queries ? natten::key_index(axis, seen) : natten::query_index(axis, seen))
              << "case " << i;
          ASSERT_EQ(place - sight.own, x - position) << "case " << i;
          if (are_queries) {
            ASSERT_EQ(place - sight.slot, x - natten::first_slot(axis, group, position))
                << "case " << i;
          }
        }
      }
    }
  }
}

TEST(CudaSimtLimits, WorkspaceStaysSmall) {
  Case c;
  c.axes = {{500, 301, 1, 1, false}, {500, 301, 1, 1, false}};
  c.dim = c.value_dim = 1;
  c.rpb = true;
  FusedProblem problem(c);
  EXPECT_LT(cuda::simt_workspace_bytes(natten::describe(problem.backward())),
            std::size_t{80} << 20);
  EXPECT_LT(cuda::simt_workspace_bytes(natten::describe(problem.forward())), 20000u);
}

TEST(CudaSimtLimits, RefusesWhatDoesNotFit) {
  natten::Problem p;
  p.batch = p.heads = p.kv_heads = p.head_dim = p.value_dim = 1;
  p.rank = 1;
  p.axes[2] = {1000, 1000, 7, 1, 1, false};
  EXPECT_EQ(cuda::simt_refuse_reason(p), "");
  p.batch = std::int64_t{1} << 31;
  EXPECT_NE(cuda::simt_refuse_reason(p).find("split the batch"), std::string::npos);
  p.batch = 1;
  p.axes[2].query_length = p.axes[2].key_length = std::int64_t{1} << 31;
  EXPECT_NE(cuda::simt_refuse_reason(p).find("a grid has more than 2^31 - 1 tokens"),
            std::string::npos);
}

}  // namespace
}  // namespace natten_tests
