#include "cases.h"

namespace natten_tests {
namespace {

using natten::Call;
using natten::DType;
using natten::Op;
using natten::TensorView;
using natten::Tuple;

#if defined(_WIN32)
void setenv(const char* name, const char* value, int) { _putenv_s(name, value); }
void unsetenv(const char* name) { _putenv_s(name, ""); }
#endif

/// Sets an environment variable for the life of a scope.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~Environment() {
    if (old_)
      setenv(name_, old_->c_str(), 1);
    else
      unsetenv(name_);
  }

 private:
  const char* name_;
  std::optional<std::string> old_;
};

Case sample_case(int rank, std::uint64_t seed, DType dtype = DType::float32) {
  Case c;
  c.seed = base_seed() + seed;
  c.dtype = dtype;
  const std::int64_t length = rank == 1 ? 17 : rank == 2 ? 7 : 5;
  for (int i = 0; i < rank; ++i) c.axes.push_back({length + i, 2 + i, 1, 1 + i % 2, i == 0});
  c.batch = 2;
  c.heads = 2;
  c.kv_heads = 2;
  c.dim = c.value_dim = 5;
  c.scale = 0.7;
  c.rpb = true;
  return c;
}

struct Tuples {
  Tuple kernel_size, dilation, is_causal;
};
Tuples tuples_of(const Case& c) {
  Shape kernel, dilation, causal;
  for (const oracle::Axis& axis : c.axes) {
    kernel.push_back(axis.kernel_size);
    dilation.push_back(axis.dilation);
    causal.push_back(axis.is_causal);
  }
  return {Tuple(kernel.begin(), c.rank()), Tuple(dilation.begin(), c.rank()),
          Tuple(causal.begin(), c.rank())};
}

bool is_accepted_by(const std::string& backend, const Call& call) {
  for (const natten::Verdict& verdict : natten::explain(natten::describe(call)))
    if (verdict.backend == backend) return verdict.refusal.empty();
  return false;
}

void expect_same(const char* name, const Buffer& got, const Buffer& expected) {
  EXPECT_EQ(got.bytes(), expected.bytes()) << name;
}

/// The operations of one rank by their names.
template <int Rank>
struct Names;
template <>
struct Names<1> {
  static constexpr auto& forward = natten::na1d_forward;
  static constexpr auto& backward = natten::na1d_backward;
  static constexpr auto& qk_forward = natten::na1d_qk_forward;
  static constexpr auto& qk_backward = natten::na1d_qk_backward;
  static constexpr auto& av_forward = natten::na1d_av_forward;
  static constexpr auto& av_backward = natten::na1d_av_backward;
};
template <>
struct Names<2> {
  static constexpr auto& forward = natten::na2d_forward;
  static constexpr auto& backward = natten::na2d_backward;
  static constexpr auto& qk_forward = natten::na2d_qk_forward;
  static constexpr auto& qk_backward = natten::na2d_qk_backward;
  static constexpr auto& av_forward = natten::na2d_av_forward;
  static constexpr auto& av_backward = natten::na2d_av_backward;
};
template <>
struct Names<3> {
  static constexpr auto& forward = natten::na3d_forward;
  static constexpr auto& backward = natten::na3d_backward;
  static constexpr auto& qk_forward = natten::na3d_qk_forward;
  static constexpr auto& qk_backward = natten::na3d_qk_backward;
  static constexpr auto& av_forward = natten::na3d_av_forward;
  static constexpr auto& av_backward = natten::na3d_av_backward;
};

template <class Rank>
class NamesOfRank : public testing::Test {};
using Ranks = testing::Types<std::integral_constant<int, 1>, std::integral_constant<int, 2>,
                             std::integral_constant<int, 3>>;
TYPED_TEST_SUITE(NamesOfRank, Ranks);

TYPED_TEST(NamesOfRank, FusedForwardAndBackward) {
  using N = Names<TypeParam::value>;
  for (bool with_options : {false, true}) {
    Case c = sample_case(TypeParam::value, 1);
    c.rpb = with_options;
    FusedProblem expected(c), named(c);
    expected.forward_with_logsumexp();
    natten::run(expected.backward());

    const Tuples t = tuples_of(c);
    const natten::Tensors v = (named.provide_logsumexp(), named.buffers.views());
    const auto optional = [&](const TensorView& view) {
      return with_options ? std::optional<TensorView>(view) : std::nullopt;
    };
    if (with_options) {
      const Tuple tile(Shape(3, 4).begin(), c.rank()), splits(Shape(3, 1).begin(), c.rank());
      N::forward(v.output, v.query, v.key, v.value, v.rpb, v.logsumexp, t.kernel_size, t.dilation,
                 t.is_causal, *c.scale, tile, tile);
      N::backward(v.grad_query, v.grad_key, v.grad_value, v.query, v.key, v.value, v.output,
                  v.grad_output, v.logsumexp, t.kernel_size, t.dilation, t.is_causal, *c.scale,
                  tile, tile, splits, true, optional(v.rpb), optional(v.grad_rpb));
    } else {
      N::forward(v.output, v.query, v.key, v.value, std::nullopt, std::nullopt, t.kernel_size,
                 t.dilation, t.is_causal, *c.scale);
      EXPECT_TRUE(named.buffers.logsumexp.is_untouched());
      N::forward(v.output, v.query, v.key, v.value, {}, v.logsumexp, t.kernel_size, t.dilation,
                 t.is_causal, *c.scale);
      N::backward(v.grad_query, v.grad_key, v.grad_value, v.query, v.key, v.value, v.output,
                  v.grad_output, v.logsumexp, t.kernel_size, t.dilation, t.is_causal, *c.scale);
    }
    expect_same("output", named.buffers.output, expected.buffers.output);
    expect_same("logsumexp", named.buffers.logsumexp, expected.buffers.logsumexp);
    expect_same("grad_query", named.buffers.grad_query, expected.buffers.grad_query);
    expect_same("grad_key", named.buffers.grad_key, expected.buffers.grad_key);
    expect_same("grad_value", named.buffers.grad_value, expected.buffers.grad_value);
    expect_same("grad_rpb", named.buffers.grad_rpb, expected.buffers.grad_rpb);
  }
}

/// Their backward passes against the reference, which composes them otherwise.
TYPED_TEST(NamesOfRank, UnfusedForwardAndBackward) {
  using N = Names<TypeParam::value>;
  const Case c = sample_case(TypeParam::value, 2, DType::float64);
  const Tuples t = tuples_of(c);
  const oracle::Sizes n = sizes_of(c);
  const oracle::Pairs pairs = pairs_of(c);
  const Shape lengths = lengths_of(c);
  const Shape tokens = join({{c.batch, c.heads}, lengths, {c.dim}});
  const Shape slots = join({{c.batch, c.heads}, lengths, {n.window}});
  const Shape bias = join({{c.heads}, offsets_of(c)});
  Rng rng(c.seed);
  const auto input = [&](const Shape& shape) { return Buffer(c.dtype, normal(rng, shape)); };
  const auto result = [&](const Shape& shape) { return Buffer(c.dtype, shape); };
  const auto expect_close = [](const char* name, const Buffer& got, const Dense& reference) {
    EXPECT_LE(relative_error(got.dense(), reference), 1e-13) << name;
  };
  constexpr double kEmpty = -std::numeric_limits<double>::infinity();
  Buffer query = input(tokens), key = input(tokens), value = input(tokens), rpb = input(bias);
  Buffer attn = result(slots), d_attn = input(slots), d_out = input(tokens);
  Call qk;
  qk.op = Op::qk;
  qk.neighborhood.kernel_size = t.kernel_size;
  qk.tensors.query = query.view();
  qk.tensors.key = key.view();
  if (!is_runnable(qk)) GTEST_SKIP() << "NATTEN_BACKEND names one without unfused operations";

  for (bool with_bias : {true, false}) {
    const auto optional = [&](Buffer& b) {
      return with_bias ? std::optional<TensorView>(b.view()) : std::nullopt;
    };
    N::qk_forward(attn.view(), query.view(), key.view(), optional(rpb), t.kernel_size, t.dilation,
                  t.is_causal);
    const Dense expected = oracle::qk(n, pairs, query.dense(), key.dense(),
                                      with_bias ? rpb.dense() : Dense(), Dense(), kEmpty);
    for (std::int64_t i = 0; i < expected.size(); ++i) {
      if (expected[i] == kEmpty)
        ASSERT_EQ(attn.get(i), kEmpty);
      else
        ASSERT_NEAR(attn.get(i), expected[i], 1e-12);
    }

    Buffer d_query = result(tokens), d_key = result(tokens), d_bias = result(bias);
    N::qk_backward(d_query.view(), d_key.view(), optional(d_bias), d_attn.view(), query.view(),
                   key.view(), t.kernel_size, t.dilation, t.is_causal);
    expect_close("d_query", d_query, oracle::av(n, pairs, d_attn.dense(), key.dense(), {}));
    expect_close("d_key", d_key, oracle::av_transpose(n, pairs, d_attn.dense(), query.dense()).key);
    if (with_bias)
      expect_close("d_rpb", d_bias, oracle::rpb_scatter(n, pairs, d_attn.dense()));
    else
      EXPECT_TRUE(d_bias.is_untouched());
  }

  Buffer weights = input(slots), output = result(tokens);
  N::av_forward(output.view(), weights.view(), value.view(), t.kernel_size, t.dilation,
                t.is_causal);
  expect_close("output", output, oracle::av(n, pairs, weights.dense(), value.dense(), {}));
  Buffer d_weights = result(slots), d_value = result(tokens);
  N::av_backward(d_weights.view(), d_value.view(), d_out.view(), weights.view(), value.view(),
                 t.kernel_size, t.dilation, t.is_causal);
  expect_close("d_attn", d_weights,
               oracle::qk(n, pairs, d_out.dense(), value.dense(), Dense(), Dense(), 0));
  expect_close("d_value", d_value,
               oracle::av_transpose(n, pairs, weights.dense(), d_out.dense()).key);
}

TYPED_TEST(NamesOfRank, RefuseTuplesOfAnotherRank) {
  using N = Names<TypeParam::value>;
  const int other = TypeParam::value % 3 + 1;
  FusedProblem problem(sample_case(other, 3));
  const Tuples t = tuples_of(problem.c);
  const natten::Tensors v = (problem.provide_logsumexp(), problem.buffers.views());
  const auto expect_refused = [&](auto&& f) {
    try {
      f();
      ADD_FAILURE() << "accepted a tuple of " << other;
    } catch (const natten::Error& error) {
      EXPECT_EQ(error.kind(), natten::ErrorKind::invalid_value);
      EXPECT_EQ(std::string(error.what()).rfind("kernel_size:", 0), 0u) << error.what();
    }
  };
  expect_refused([&] {
    N::forward(v.output, v.query, v.key, v.value, {}, {}, t.kernel_size, t.dilation, t.is_causal,
               1.0);
  });
  expect_refused([&] {
    N::backward(v.grad_query, v.grad_key, v.grad_value, v.query, v.key, v.value, v.output,
                v.grad_output, v.logsumexp, t.kernel_size, t.dilation, t.is_causal, 1.0);
  });
  expect_refused(
      [&] { N::qk_forward(v.output, v.query, v.key, {}, t.kernel_size, t.dilation, t.is_causal); });
  expect_refused(
      [&] { N::av_forward(v.output, v.query, v.key, t.kernel_size, t.dilation, t.is_causal); });
  EXPECT_TRUE(problem.buffers.output.is_untouched());
}

/// Calls of all ranks, types and directions, one of them empty.
std::vector<FusedProblem> mixed_problems() {
  std::vector<FusedProblem> problems;
  for (int i = 0; i < 12; ++i)
    problems.emplace_back(
        random_case(base_seed() + 900 + static_cast<std::uint64_t>(i), kDTypes[i % 4], 1 + i % 3));
  Case empty = sample_case(2, 4);
  empty.batch = 0;
  problems.emplace_back(empty);
  return problems;
}

TEST(Lists, GiveWhatSingleCallsGive) {
  std::vector<FusedProblem> alone = mixed_problems(), listed = mixed_problems();
  std::vector<Call> forward, backward;
  for (FusedProblem& problem : alone) {
    problem.forward_with_logsumexp();
    natten::run(problem.backward());
  }
  for (FusedProblem& problem : listed) {
    problem.provide_logsumexp();
    forward.push_back(problem.forward());
    backward.push_back(problem.backward());
  }
  natten::run(forward);
  natten::run(backward);
  for (std::size_t i = 0; i < alone.size(); ++i) {
    SCOPED_TRACE(testing::Message() << alone[i].c);
    Buffers& a = alone[i].buffers;
    Buffers& b = listed[i].buffers;
    expect_same("output", b.output, a.output);
    expect_same("logsumexp", b.logsumexp, a.logsumexp);
    expect_same("grad_query", b.grad_query, a.grad_query);
    expect_same("grad_key", b.grad_key, a.grad_key);
    expect_same("grad_value", b.grad_value, a.grad_value);
    expect_same("grad_rpb", b.grad_rpb, a.grad_rpb);
    expect_same("grad_additional_keys", b.grad_additional_keys, a.grad_additional_keys);
    expect_same("grad_additional_values", b.grad_additional_values, a.grad_additional_values);
  }
  EXPECT_NO_THROW(natten::run(std::vector<Call>{})) << "a list may be empty";
  EXPECT_EQ(natten::workspace_bytes(std::vector<Call>{}), 0u);
}

/// Query, key and value, and their gradients, as slices [:, :, i] of one tensor [B, T, 3, H, D]:
/// they interleave in memory and share none of it.
TEST(Memory, SlicesOfOneBufferAreSeparate) {
  Case c;
  c.seed = base_seed() + 12;
  c.axes = {{17, 5, 1, 1, false}};
  c.batch = c.heads = c.kv_heads = 2;
  FusedProblem problem(c);
  problem.forward_with_logsumexp();
  const Call separate = problem.backward();
  natten::run(separate);
  Buffers& b = problem.buffers;
  const Shape whole{2, 17, 3, 2, c.dim};
  Buffer packed(c.dtype, whole), gradients(c.dtype, whole);
  const auto slice = [&](Buffer& of, std::int64_t i) {
    TensorView v = of.view();
    v.data = static_cast<float*>(v.data) + i * v.strides[2];
    v.ndim = 4;
    for (std::size_t d : {2u, 3u}) {
      v.shape[d] = v.shape[d + 1];
      v.strides[d] = v.strides[d + 1];
    }
    return v;
  };
  const std::int64_t row = 2 * c.dim;
  Buffer* inputs[] = {&b.query, &b.key, &b.value};
  Buffer* results[] = {&b.grad_query, &b.grad_key, &b.grad_value};
  for (std::int64_t i = 0; i < 3; ++i)
    for (std::int64_t j = 0; j < 2 * 17 * row; ++j)
      packed.set((j / row * 3 + i) * row + j % row, inputs[i]->get(j));
  Call call = separate;
  natten::Tensors& t = call.tensors;
  t.query = slice(packed, 0);
  t.key = slice(packed, 1);
  t.value = slice(packed, 2);
  t.grad_query = slice(gradients, 0);
  t.grad_key = slice(gradients, 1);
  t.grad_value = slice(gradients, 2);
  ASSERT_NO_THROW(natten::run(call));
  for (std::int64_t i = 0; i < 3; ++i)
    for (std::int64_t j = 0; j < 2 * 17 * row; ++j)
      ASSERT_EQ(gradients.get((j / row * 3 + i) * row + j % row), results[i]->get(j));
  // One element further, slice 0 and slice 1 overlap.
  t.grad_query.data = static_cast<float*>(t.grad_query.data) + 1;
  EXPECT_THROW(natten::run(call), natten::Error);
}

TEST(Workspace, ListsNeedTheSumAndStayInside) {
  std::vector<FusedProblem> owned = mixed_problems(), lent = mixed_problems();
  std::vector<Call> calls;
  std::size_t separate = 0;
  for (std::size_t i = 0; i < owned.size(); ++i) {
    owned[i].forward_with_logsumexp();
    natten::run(owned[i].backward());
    lent[i].forward_with_logsumexp();
    calls.push_back(lent[i].backward());
    separate += natten::workspace_bytes(calls.back());
  }
  const std::size_t needed = natten::workspace_bytes(calls);
  EXPECT_EQ(needed, separate);

  constexpr std::size_t kAlignment = 64, kFence = 256;
  std::vector<unsigned char> memory(needed + kAlignment + 2 * kFence, 0x5a);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  const std::size_t first = kFence + (kAlignment - (address + kFence) % kAlignment) % kAlignment;
  natten::Context context;
  context.workspace = memory.data() + first;
  context.workspace_size = needed;
  natten::run(calls, context);
  for (std::size_t i = 0; i < memory.size(); ++i) {
    const bool is_inside = i >= first && i < first + needed;
    ASSERT_TRUE(is_inside || memory[i] == 0x5a) << "written outside the workspace";
  }
  for (std::size_t i = 0; i < owned.size(); ++i) {
    expect_same("grad_query", lent[i].buffers.grad_query, owned[i].buffers.grad_query);
    expect_same("grad_key", lent[i].buffers.grad_key, owned[i].buffers.grad_key);
  }
}

TEST(Workspace, TooSmallIsRefused) {
  FusedProblem problem(sample_case(2, 5));
  problem.forward_with_logsumexp();
  const Call call = problem.backward();
  const std::size_t needed = natten::workspace_bytes(call);
  if (needed == 0) GTEST_SKIP() << "the chosen backend needs none";
  std::vector<double> memory(needed / sizeof(double) + 64);
  natten::Context context;
  context.workspace = memory.data();
  context.workspace_size = needed - 1;
  try {
    natten::run(call, context);
    ADD_FAILURE() << "accepted";
  } catch (const natten::Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.kind(), natten::ErrorKind::invalid_value);
    EXPECT_EQ(message.rfind("workspace:", 0), 0u) << message;
    EXPECT_NE(message.find(std::to_string(needed - 1)), std::string::npos) << message;
    EXPECT_NE(message.find(std::to_string(needed)), std::string::npos) << message;
  }
  EXPECT_TRUE(problem.buffers.grad_query.is_untouched());
}

TEST(Workspace, MustBeAligned) {
  FusedProblem problem(sample_case(2, 5));
  problem.forward_with_logsumexp();
  const Call call = problem.backward();
  const std::size_t needed = natten::workspace_bytes(call);
  if (needed == 0) GTEST_SKIP() << "the chosen backend needs none";
  std::vector<char> memory(needed + 128);
  const std::size_t first = 64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
  natten::Context context;
  context.workspace = memory.data() + first + 32;
  context.workspace_size = needed;
  try {
    natten::run(call, context);
    ADD_FAILURE() << "accepted";
  } catch (const natten::Error& error) {
    EXPECT_EQ(error.kind(), natten::ErrorKind::invalid_value);
    EXPECT_NE(std::string(error.what()).find("workspace: got memory"), std::string::npos);
  }
  EXPECT_TRUE(problem.buffers.grad_query.is_untouched());
}

/// Beyond inputs, outputs and logsumexp: one float per token and head, and scratch that does not
/// grow with tokens times window. Needs no data.
TEST(Workspace, IsSmall) {
  constexpr std::int64_t kSide = 512, kHeads = 8;
  for (const std::string& backend : natten::backends(natten::DeviceType::cpu))
    for (DType dtype : kDTypes)
      for (std::int64_t kernel : {3, 63}) {
        const auto shaped = [&](DType type, std::initializer_list<std::int64_t> shape) {
          return natten::contiguous_view(nullptr, type, {}, shape.begin(),
                                         static_cast<int>(shape.size()));
        };
        Call call;
        call.neighborhood.kernel_size = {kernel, kernel};
        natten::Tensors& t = call.tensors;
        t.query = t.key = t.value = t.output = t.grad_output = t.grad_query = t.grad_key =
            t.grad_value = shaped(dtype, {1, kSide, kSide, kHeads, 32});
        t.logsumexp = shaped(statistic_of(dtype), {1, kSide, kSide, kHeads});
        natten::Context context;
        context.backend = backend.c_str();
        const std::size_t statistic = natten::size_of(statistic_of(dtype));
        const std::size_t rows = kSide * kSide * kHeads * statistic, scratch = 16 << 20;
        for (Op op : {Op::attention_forward, Op::attention_backward}) {
          call.op = op;
          if (!is_accepted_by(backend, call)) continue;
          EXPECT_LE(natten::workspace_bytes(call, context), rows + scratch)
              << backend << " " << name_of(op) << " " << name_of(dtype) << " kernel " << kernel;
        }
      }
}

TEST(Registry, ListsBackendsBestFirstAndTheReadableOneLast) {
  const std::vector<std::string> names = natten::backends(natten::DeviceType::cpu);
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names.back(), "naive");
  EXPECT_TRUE(natten::built_for(natten::DeviceType::cpu));
}

/// The properties leave out what a backend refuses; one that refused everything would be untested.
TEST(Registry, EveryBackendRunsPlainAttention) {
  for (const std::string& backend : natten::backends(natten::DeviceType::cpu))
    for (int rank = 1; rank <= natten::kMaxRank; ++rank)
      for (DType dtype : kDTypes) {
        Case c = sample_case(rank, 20, dtype);
        FusedProblem problem(c);
        EXPECT_TRUE(is_accepted_by(backend, problem.forward())) << backend << " " << c;
        EXPECT_TRUE(is_accepted_by(backend, problem.backward())) << backend << " " << c;
      }
}

TEST(Registry, ExplainsItsChoice) {
  FusedProblem problem(sample_case(2, 6));
  const natten::Problem described = natten::describe(problem.forward());
  {
    const Environment none("NATTEN_BACKEND", "");
    const auto verdicts = natten::explain(described);
    ASSERT_EQ(verdicts.size(), natten::backends(natten::DeviceType::cpu).size());
    int chosen = 0;
    bool accepted_before = false;
    for (const natten::Verdict& verdict : verdicts) {
      chosen += verdict.chosen;
      EXPECT_EQ(verdict.chosen, verdict.refusal.empty() && !accepted_before) << verdict.backend;
      accepted_before = accepted_before || verdict.refusal.empty();
    }
    EXPECT_EQ(chosen, 1);
    EXPECT_TRUE(verdicts.back().refusal.empty()) << "the readable backend runs everything";
  }
  natten::Context forced;
  forced.backend = "naive";
  for (const natten::Verdict& verdict : natten::explain(described, forced))
    EXPECT_EQ(verdict.chosen, verdict.backend == "naive");
  forced.backend = "fused";  // any but the reference
  int chosen = 0;
  for (const natten::Verdict& verdict : natten::explain(described, forced)) {
    chosen += verdict.chosen;
    EXPECT_FALSE(verdict.chosen && verdict.backend == "naive");
  }
  EXPECT_EQ(chosen, 1);
  forced.backend = "abacus";
  for (const natten::Verdict& verdict : natten::explain(described, forced))
    EXPECT_FALSE(verdict.chosen);
}

void expect_unknown_backend(const std::function<void()>& f, const char* name) {
  try {
    f();
    ADD_FAILURE() << "accepted backend " << name;
  } catch (const natten::Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.kind(), natten::ErrorKind::invalid_value);
    EXPECT_EQ(message.rfind("backend:", 0), 0u) << message;
    EXPECT_NE(message.find(name), std::string::npos) << message;
    EXPECT_NE(message.find("naive"), std::string::npos) << "must list those that are: " << message;
  }
}

TEST(Registry, ForcedBackends) {
  FusedProblem problem(sample_case(2, 7));
  const Call call = problem.forward();
  natten::Context context;
  context.backend = "abacus";
  expect_unknown_backend([&] { natten::run(call, context); }, "abacus");
  expect_unknown_backend([&] { natten::workspace_bytes(call, context); }, "abacus");
  EXPECT_TRUE(problem.buffers.output.is_untouched());
  context.backend = "";
  EXPECT_NO_THROW(natten::run(call, context));
  context.backend = "naive";
  EXPECT_NO_THROW(natten::run(call, context));
}

TEST(Registry, EnvironmentForcesABackendAndTheContextGoesFirst) {
  FusedProblem problem(sample_case(1, 8));
  const Call call = problem.forward();
  const natten::Problem described = natten::describe(call);
  {
    const Environment unknown("NATTEN_BACKEND", "abacus");
    expect_unknown_backend([&] { natten::run(call); }, "abacus");
    for (const natten::Verdict& verdict : natten::explain(described)) EXPECT_FALSE(verdict.chosen);
    natten::Context context;
    context.backend = "naive";
    EXPECT_NO_THROW(natten::run(call, context));
  }
  {
    const Environment naive("NATTEN_BACKEND", "naive");
    EXPECT_NO_THROW(natten::run(call));
    for (const natten::Verdict& verdict : natten::explain(described))
      EXPECT_EQ(verdict.chosen, verdict.backend == "naive");
  }
  const Environment empty("NATTEN_BACKEND", "");
  EXPECT_NO_THROW(natten::run(call)) << "an empty variable forces nothing";
}

TEST(Description, SaysWhatTheCallSays) {
  Case c = sample_case(2, 9, DType::bfloat16);
  c.heads = 6;
  c.value_dim = 3;
  c.additional = 3;
  c.grad_logsumexp = true;
  FusedProblem problem(c);
  problem.buffers.grad_key = Buffer();
  Call call = problem.backward();
  call.neighborhood.stride = {2, 3};
  call.options.query_tile = {1, 1};
  call.options.backward_query_tile = {2, 4};
  call.options.key_splits = {1, 2};
  natten::TensorView& rpb = call.tensors.rpb;  // as if each of its axes had gaps, one reversed
  rpb.strides = {1000, -100, 1};
  const natten::Problem p = natten::describe(call);
  EXPECT_EQ(p.op, Op::attention_backward);
  EXPECT_EQ(p.dtype, DType::bfloat16);
  EXPECT_EQ(p.rpb_span, 100 * (rpb.shape[1] - 1) + rpb.shape[2] - 1);
  EXPECT_EQ(p.rank, 2);
  EXPECT_EQ(p.axes[0].query_length, 1);
  EXPECT_EQ(p.axes[0].kernel_size, 1);
  for (int i = 0; i < 2; ++i) {
    const oracle::Axis& axis = c.axes[index(i)];
    EXPECT_EQ(p.axes[1 + i].query_length, axis.length);
    EXPECT_EQ(p.axes[1 + i].key_length, axis.length);
    EXPECT_EQ(p.axes[1 + i].kernel_size, axis.kernel_size);
    EXPECT_EQ(p.axes[1 + i].dilation, axis.dilation);
    EXPECT_EQ(p.axes[1 + i].stride, 2 + i);
    EXPECT_EQ(p.axes[1 + i].is_causal, axis.is_causal);
  }
  EXPECT_EQ(p.batch, 2);
  EXPECT_EQ(p.heads, 6);
  EXPECT_EQ(p.kv_heads, 2);
  EXPECT_EQ(p.head_dim, 5);
  EXPECT_EQ(p.value_dim, 3);
  EXPECT_EQ(p.additional, 3);
  EXPECT_EQ(p.scale, 0.7);
  EXPECT_TRUE(p.has_rpb && p.has_logsumexp && p.has_grad_logsumexp);
  EXPECT_TRUE(p.wants_grad_query && p.wants_grad_value && p.wants_grad_rpb &&
              p.wants_grad_additional);
  EXPECT_FALSE(p.wants_grad_key);
  EXPECT_EQ(p.query_tile[1], 4);
  EXPECT_EQ(p.key_splits[1], 2);
  EXPECT_EQ(p.queries(), 56);
  EXPECT_EQ(p.window_size(), 6);
  EXPECT_EQ(p.slots(), 9);
}

TEST(Description, DefaultScaleAndTuples) {
  Case c = sample_case(1, 10);
  c.scale.reset();
  c.dim = 16;
  FusedProblem problem(c);
  Call call = problem.forward();
  call.neighborhood.dilation = call.neighborhood.stride = call.neighborhood.is_causal = {};
  const natten::Problem p = natten::describe(call);
  EXPECT_EQ(p.scale, 0.25);
  EXPECT_EQ(p.axes[2].dilation, 1);
  EXPECT_EQ(p.axes[2].stride, 1);
  EXPECT_FALSE(p.axes[2].is_causal);
}

/// What does not depend on offsets is checked and described without them.
TEST(Description, OffsetsThatAreNotKnownYet) {
  const auto tensor = [](std::int64_t tokens) {
    const std::int64_t shape[] = {1, 1, tokens, 4};
    return natten::contiguous_view(nullptr, DType::float32, {}, shape, 4);
  };
  const auto refusal = [](const Call& call, auto function) -> std::string {
    try {
      function(call);
    } catch (const natten::Error& error) {
      return error.what();
    }
    return {};
  };
  const auto describe = [](const Call& call) { natten::describe(call); };
  const auto run = [](const Call& call) { natten::run(call); };
  Call call;
  call.op = Op::qk;
  call.neighborhood.kernel_size = {3};
  call.neighborhood.grid_size = {9};
  call.neighborhood.key_offset = {7};  // which the windows of no queries fit
  call.tensors.query = tensor(2);
  call.tensors.key = tensor(4);
  EXPECT_EQ(refusal(call, describe).find("key: got tokens 7 to 10"), 0u);
  call.options.unknown_offsets = true;
  EXPECT_EQ(natten::describe(call).axes[2].key_length, 4);
  EXPECT_EQ(natten::expected(call, &natten::Tensors::attn).shape[2], 2);
  EXPECT_NO_THROW(natten::workspace_bytes(call));
  EXPECT_EQ(refusal(call, run).find("query_offset, key_offset: not known"), 0u);

  Call whole = call;
  whole.neighborhood.grid_size = {};  // the keys then are all of it
  EXPECT_EQ(natten::describe(whole).axes[2].grid_length, 4);
  Call bad = call;
  bad.tensors.query = tensor(10);
  EXPECT_EQ(refusal(bad, describe).find("query_offset: got 0 with 10 queries"), 0u);
  bad = call;
  bad.neighborhood.kernel_size = {10};
  EXPECT_EQ(refusal(bad, describe).find("kernel_size: got [10]"), 0u);
  bad = call;
  bad.neighborhood.boundary = {2};
  bad.tensors.key = tensor(10);
  EXPECT_EQ(refusal(bad, describe).find("key: got 10 keys on axis 0, which is circular"), 0u);
}

/// What `expected` says can be allocated is what the operation takes, and neither data nor outputs
/// need exist to ask.
TEST(Description, ExpectedTensorsAreThoseThatRun) {
  for (Op op : {Op::attention_forward, Op::attention_backward}) {
    Case c = sample_case(3, 11, DType::float16);
    c.additional = 2;
    c.kv_heads = 1;
    FusedProblem problem(c);
    problem.provide_logsumexp();
    const Call whole = problem.call(op);
    Call call = whole;
    for (const natten::Role& role : natten::roles_of(op)) {
      (call.tensors.*role.tensor).data = nullptr;
      if (role.is_output) call.tensors.*role.tensor = TensorView{};
    }
    const natten::Problem described = natten::describe(call);
    for (const natten::Role& role : natten::roles_of(op)) {
      const TensorView view = natten::expected(described, role.tensor);
      const TensorView& given = whole.tensors.*role.tensor;
      if (!given) continue;
      EXPECT_EQ(view.ndim, given.ndim) << role.name;
      EXPECT_EQ(view.shape, given.shape) << role.name;
      EXPECT_EQ(view.strides, given.strides) << role.name;
      EXPECT_EQ(view.dtype, given.dtype) << role.name;
      EXPECT_EQ(view.data, nullptr) << role.name;
    }
  }
}

TEST(Description, RolesNameEveryTensorOnce) {
  for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk, Op::av, Op::av_transpose,
                Op::rpb_gather, Op::rpb_scatter}) {
    std::map<std::string, int> names;
    bool seen_output = false;
    for (const natten::Role& role : natten::roles_of(op)) {
      EXPECT_EQ(++names[role.name], 1) << role.name;
      EXPECT_STREQ(natten::dims_of(op, role.tensor), role.dims);
      EXPECT_TRUE(role.is_output || !seen_output) << "inputs come first";
      seen_output = seen_output || role.is_output;
    }
    EXPECT_TRUE(seen_output) << name_of(op);
  }
  EXPECT_EQ(natten::dims_of(Op::qk, &natten::Tensors::logsumexp), nullptr);
}

TEST(Views, AreRowMajor) {
  double data[24];
  const TensorView v = natten::view(data, {2, 3, 4});
  EXPECT_EQ(v.data, data);
  EXPECT_EQ(v.ndim, 3);
  EXPECT_EQ(v.dtype, DType::float64);
  EXPECT_EQ(v.size(), 24);
  EXPECT_EQ(v.strides[0], 12);
  EXPECT_EQ(v.strides[1], 4);
  EXPECT_EQ(v.strides[2], 1);
  const float constant[1] = {};
  EXPECT_EQ(natten::view(constant, {1}).dtype, DType::float32);
  EXPECT_FALSE(bool(TensorView{}));
  EXPECT_EQ(natten::view(data, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}).ndim, 10);
}

TEST(BuildInfo, NamesOneInstructionSetThatRuns) {
  const natten::BuildInfo info = natten::build_info();
  EXPECT_FALSE(info.compiler.empty());
  EXPECT_FALSE(info.system.empty());
  EXPECT_EQ(info.cuda_architectures.empty(), !natten::built_for(natten::DeviceType::cuda));
  EXPECT_EQ(info.cuda_compiler.empty(), info.cuda_architectures.empty());
  ASSERT_FALSE(info.instruction_sets.empty());
  EXPECT_EQ(info.instruction_sets.back().name, "base");
  int chosen = 0;
  for (const natten::InstructionSetInfo& isa : info.instruction_sets) {
    if (!isa.chosen) continue;
    ++chosen;
    EXPECT_TRUE(isa.available) << isa.name;
    const char* forced = std::getenv("NATTEN_CPU_ISA");
    if (forced && *forced) {
      EXPECT_EQ(isa.name, forced);
    }
  }
  EXPECT_EQ(chosen, 1);
}

TEST(Names, OfTypesAndOperations) {
  EXPECT_STREQ(name_of(DType::bfloat16), "bfloat16");
  EXPECT_STREQ(name_of(natten::DeviceType::cpu), "cpu");
  EXPECT_STREQ(name_of(Op::av_transpose), "av_transpose");
  EXPECT_EQ(natten::size_of(DType::float64), 8u);
  EXPECT_EQ(natten::size_of(DType::float32), 4u);
  EXPECT_EQ(natten::size_of(DType::float16), 2u);
}

}  // namespace
}  // namespace natten_tests
