// The unfused operations on tensor cores, run on host memory (cuda_machine.h). The random cases of
// the suites of all backends are here too, shared out over the element types.

#include "../libnatten/src/cuda/gemm/gemm.h"
#include "cuda_machine.h"
#include "unfused_problem.h"

namespace natten_tests {
namespace {

using natten::Op;
namespace cuda = natten::detail::cuda;

void run_emulated(const natten::Call& call, std::uint64_t seed) {
  run_on_tiles(call, seed, cuda::gemm_workspace_bytes, cuda::run_gemm<TileLauncher>);
}

class CudaGemm : public testing::TestWithParam<Precision> {
 protected:
  static void TearDownTestSuite() { errors_.print("CUDA, unfused kernels for tensor cores"); }

  natten::DType dtype() const { return GetParam().dtype; }
  /// Whether the element type takes a case, of those that have numbers. Three types take all of
  /// them.
  bool takes(std::uint64_t number) const {
    return (number + static_cast<std::uint64_t>(dtype())) % 3 == 0;
  }

  void run(UnfusedProblem& problem, Op op, Buffers& buffers, bool zero, std::uint64_t seed) {
    natten::Call call = problem.call(op, buffers);
    if (zero) call.options.empty_slots = natten::EmptySlots::zero;
    ASSERT_EQ(cuda::gemm_refuse_reason(natten::describe(call)), "");
    ASSERT_NO_THROW(run_emulated(call, seed));
    buffers.expect_gaps_intact();
  }
  void expect(const char* what, UnfusedProblem& problem, const Dense& got, const Dense& expected) {
    errors_.expect(what, problem.c.precision(), problem.c.rank(), relative_error(got, expected));
  }

  /// The three operations against the reference.
  void expect_definition(Case c, std::uint64_t seed = 0) {
    c.dtype = dtype();
    c.allow_tf32 = GetParam().allow_tf32;
    UnfusedProblem problem(c);
    SCOPED_TRACE(testing::Message() << c);
    expect_qk(problem, seed);
    expect_av(problem, seed);
    expect_av_transpose(problem, seed);
  }
  void expect_qk(UnfusedProblem& problem, std::uint64_t seed) {
    Buffers b;
    b.query = problem.input(problem.tokens);
    b.key = problem.input(problem.keys);
    b.additional_keys = problem.additional_input();
    b.attn = problem.result(problem.slots);
    if (problem.c.rpb) b.rpb = problem.input(problem.bias);
    const bool zero = problem.flip();
    run(problem, Op::qk, b, zero, seed);
    const double empty = zero ? 0.0 : -std::numeric_limits<double>::infinity();
    Dense expected = oracle::qk(problem.n, problem.pairs, b.query.dense(), b.key.dense(),
                                b.rpb.dense(), b.additional_keys.dense(), empty);
    Dense got = b.attn.dense();
    for (std::int64_t i = 0; i < expected.size(); ++i)
      if (expected[i] == empty) {
        ASSERT_EQ(got[i], empty) << "slot " << i;
        got[i] = expected[i] = 0;
      }
    expect("qk", problem, got, expected);
  }
  void expect_av(UnfusedProblem& problem, std::uint64_t seed) {
    Buffers b;
    b.attn = problem.input(problem.slots);
    poison_empty_slots(problem, b.attn);
    b.value = problem.input(problem.keys);
    b.additional_values = problem.additional_input();
    b.output = problem.result(problem.tokens);
    run(problem, Op::av, b, false, seed);
    expect("av", problem, b.output.dense(),
           oracle::av(problem.n, problem.pairs, b.attn.dense(), b.value.dense(),
                      b.additional_values.dense()));
  }
  void expect_av_transpose(UnfusedProblem& problem, std::uint64_t seed) {
    Buffers b;
    b.attn = problem.input(problem.slots);
    poison_empty_slots(problem, b.attn);
    b.query = problem.input(problem.tokens);
    b.key = problem.result(problem.keys);
    b.additional_keys = problem.additional_result();
    run(problem, Op::av_transpose, b, false, seed);
    const oracle::KeySums expected =
        oracle::av_transpose(problem.n, problem.pairs, b.attn.dense(), b.query.dense());
    expect("grad_key (av_transpose)", problem, b.key.dense(), expected.key);
    if (b.additional_keys.view())
      expect("grad_additional_keys", problem, b.additional_keys.dense(), expected.additional_keys);
  }

  static ErrorTable errors_;
};
ErrorTable CudaGemm::errors_;

TEST_P(CudaGemm, Small) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {7, 3, 1, 2, false}};
  c.dim = 32;
  c.seed = base_seed();
  expect_definition(c);
}

/// Around the numbers of dims that kernels are made for.
TEST_P(CudaGemm, HeadDims) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}, {13, 3, 1, 2, false}};
  c.heads = 2;
  c.additional = 3;
  std::uint64_t seed = base_seed();
  for (const std::int64_t dim : {1, 16, 24, 33, 64, 65, 96, 127, 128}) {
    c.seed = ++seed;
    c.dim = dim;
    if (takes(seed)) expect_definition(c);
  }
}

/// Several tiles of rows and columns along every axis, and several chunks of slots.
TEST_P(CudaGemm, TilesAndChunks) {
  using natten::Boundary;
  std::uint64_t seed = base_seed() + 100;
  for (const std::vector<oracle::Axis>& axes : std::vector<std::vector<oracle::Axis>>{
           {{101, 37, 1, 1, false}},
           {{270, 201, 1, 1, false}},
           {{230, 73, 4, 3, false}},
           {{230, 224, 1, 1, true}},
           {{197, 107, 1, 1, false, Boundary::circular}},
           {{197, 97, 1, 1, false, Boundary::circular, 11, -40, 60, 170}},
           {{170, 64, 1, 1, true, Boundary::cut, 80, 10, 60, 160}},
           {{104, 300, 7, 1, false, Boundary::cut, 40, -5, 24, 120}},
           {{21, 7, 2, 2, false}, {11, 9, 1, 1, false}},
           {{11, 10, 1, 1, false}, {23, 5, 5, 4, true}},
           {{15, 13, 1, 1, false}, {16, 15, 1, 1, false, Boundary::circular}},
           {{12, 11, 2, 1, false, Boundary::cut}, {20, 20, 1, 1, false, Boundary::circular}},
           {{5, 4, 1, 1, true}, {9, 3, 3, 2, false}, {9, 5, 1, 1, false}},
           {{7, 7, 1, 1, false}, {6, 6, 3, 1, false, Boundary::circular}, {9, 5, 2, 1, true}},
       }) {
    Case c;
    c.seed = ++seed;
    if (!takes(seed)) continue;
    c.axes = axes;
    c.heads = 2;
    c.dim = 24;
    c.rpb = seed % 2 == 0;
    c.key_mask = seed % 3 == 0;
    c.additional = static_cast<std::int64_t>(seed % 3) * 117;
    c.is_contiguous = seed % 4 == 0;
    expect_definition(c, seed % 3);
  }
}

/// Additional tokens' sums in parts.
TEST_P(CudaGemm, ManyQueriesOfAdditionalTokens) {
  Case c;
  c.seed = base_seed() + 200;
  c.axes = {{61, 3, 1, 1, false}, {37, 3, 1, 1, false}};
  c.additional = 70;
  c.dim = 24;
  c.dtype = dtype();
  c.allow_tf32 = GetParam().allow_tf32;
  UnfusedProblem problem(c);
  Buffers b;
  b.attn = problem.result(problem.slots);
  b.query = problem.result(problem.tokens);
  b.key = problem.result(problem.keys);
  b.additional_keys = problem.additional_result();
  EXPECT_EQ(cuda::additional_splits(natten::describe(problem.call(Op::av_transpose, b))), 2);
  expect_definition(c, 1);
}

TEST_P(CudaGemm, Random) {
  std::uint64_t seed = base_seed();
  for (int rank = 1; rank <= 3; ++rank)
    for (int i = 0; i < 20; ++i) {
      const Case c = random_case(++seed, dtype(), rank);
      if (takes(seed)) expect_definition(c, static_cast<std::uint64_t>(i % 3));
    }
}

TEST(CudaGemmChoice, SaysWhatItDoesNotRun) {
  Case c;
  c.axes = {{9, 5, 1, 1, false}};
  const auto refusal = [&](Op op = Op::qk) {
    UnfusedProblem problem(c);
    Buffers b;
    b.query = problem.input(problem.tokens);
    b.key = problem.input(problem.keys);
    b.attn = problem.input(problem.slots);
    if (op == Op::rpb_gather) b.rpb = problem.input(problem.bias);
    return cuda::gemm_refuse_reason(natten::describe(problem.call(op, b)));
  };
  EXPECT_EQ(refusal(), "computes float32 in TF32 only, which the call does not allow");
  c.allow_tf32 = true;
  EXPECT_EQ(refusal(), "");
  EXPECT_EQ(refusal(Op::rpb_gather), "computes qk, av and av_transpose only");
  c.dim = 129;
  EXPECT_EQ(refusal(), "head dim 129; the most is 128");
  c.dtype = natten::DType::float64;
  EXPECT_EQ(refusal(), "does not compute float64");
}

/// Chunks hold every slot once, in order, and are boxes of a window.
TEST(CudaGemmChunks, HoldEverySlotOnce) {
  Rng rng(base_seed());
  for (int i = 0; i < 2000; ++i) {
    natten::Problem p;
    for (natten::Axis& axis : p.axes)
      axis.kernel_size = uniform(rng, 1, pick<std::int64_t>(rng, {1, 5, 14, 60}));
    p.additional = uniform(rng, 0, pick<std::int64_t>(rng, {0, 5, 400}));
    const int most = pick(rng, {96, 192}), unit = pick(rng, {32, 64});
    const cuda::SlotChunks chunks = cuda::cut_slots(p, most, unit);
    std::int64_t next = 0;
    for (int n = 0; n < chunks.count(); ++n) {
      const cuda::SlotChunk chunk = chunks.at(n);
      ASSERT_EQ(chunk.first, next) << "case " << i;
      ASSERT_GT(chunk.count, 0);
      ASSERT_LE(chunk.count, most);
      next += chunk.count;
      ASSERT_EQ(chunk.is_additional, chunk.first >= p.window_size());
      if (chunk.is_additional) {
        ASSERT_EQ(chunk.begin[2] % unit, 0);
        continue;
      }
      std::int64_t slot = chunk.first;
      for (int z = 0; z < chunk.extent[0]; ++z)
        for (int y = 0; y < chunk.extent[1]; ++y)
          for (int x = 0; x < chunk.extent[2]; ++x)
            ASSERT_EQ(((chunk.begin[0] + z) * p.axes[1].kernel_size + chunk.begin[1] + y) *
                              p.axes[2].kernel_size +
                          chunk.begin[2] + x,
                      slot++);
    }
    ASSERT_EQ(next, p.slots());
  }
}

INSTANTIATE_TEST_SUITE_P(Precisions, CudaGemm,
                         testing::Values(Precision(natten::DType::bfloat16),
                                         Precision(natten::DType::float16),
                                         Precision(natten::DType::float32, true)),
                         [](const auto& info) { return info.param.name(); });

#ifdef NATTEN_PTX_FILES
/// No more instructions than there were, with a tenth to spare (docs/performance.md).
TEST(CudaGemmCounts, OfPublishedWindows) {
  struct Example {
    std::int64_t length, window, dim;
    double qk, av, av_transpose;  // thousands of instructions
  };
  for (const Example& e : {Example{56, 7, 32, 964, 897, 947}, Example{40, 13, 64, 820, 763, 763},
                           Example{40, 13, 128, 911, 863, 861}}) {
    Case c;
    c.dtype = natten::DType::bfloat16;
    c.axes = {{e.length, e.window, 1, 1, false}, {e.length, e.window, 1, 1, false}};
    c.dim = c.value_dim = e.dim;
    c.seed = base_seed();
    UnfusedProblem problem(c);
    Buffers b;
    b.query = problem.input(problem.tokens);
    b.key = problem.input(problem.keys);
    b.value = problem.input(problem.keys);
    b.attn = problem.input(problem.slots);
    b.output = problem.result(problem.tokens);
    for (const auto& [op, name, thousands] :
         {std::tuple(Op::qk, "qk", e.qk), std::tuple(Op::av, "av", e.av),
          std::tuple(Op::av_transpose, "av_transpose", e.av_transpose)}) {
      const std::uint64_t before = ptx::warp_counts().instructions;
      ASSERT_NO_THROW(run_emulated(problem.call(op, b), 0));
      const auto count = static_cast<double>(ptx::warp_counts().instructions - before);
      std::cout << "bfloat16, " << e.length << "^2, window " << e.window << "^2, head dim " << e.dim
                << ", " << name << ": " << count / 1e3 << " thousand instructions\n";
      EXPECT_LE(count, 1.1 * 1e3 * thousands);
    }
  }
}
#endif

}  // namespace
}  // namespace natten_tests
