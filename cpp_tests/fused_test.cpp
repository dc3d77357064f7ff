#include "cases.h"

namespace natten_tests {
namespace {

class Fused : public Property {
 protected:
  static void TearDownTestSuite() { errors_.print("fused attention"); }

  void expect_gradients(FusedProblem& problem, const oracle::FusedResults& expected) {
    const double incoming = problem.incoming_gradient();
    for_each_gradient(
        problem.buffers, expected, [&](const char* name, Buffer& got, const Dense& reference) {
          if (!got.view()) return;
          errors_.expect(name, dtype(), rank(), relative_error(got.dense(), reference, incoming));
        });
  }

  static ErrorTable errors_;
};
ErrorTable Fused::errors_;

TEST_P(Fused, ForwardIsTheDefinition) {
  int accepted = 0;
  for_each_case(50, 1, [&](const Case& c) {
    FusedProblem problem(c);
    const natten::Call call = problem.forward();
    if (!accepts(call)) return;
    ++accepted;
    errors_.add(c);
    ASSERT_NO_THROW(run(call));
    const oracle::FusedResults expected = problem.expected();
    errors_.expect("output", dtype(), rank(),
                   relative_error(problem.buffers.output.dense(), expected.output));
    if (c.logsumexp)
      errors_.expect("logsumexp", dtype(), rank(),
                     logsumexp_error(problem.buffers.logsumexp.dense(), expected.logsumexp));
    problem.buffers.expect_gaps_intact();
  });
  expect_accepted(accepted, case_count(50));
}

TEST_P(Fused, BackwardIsTheDerivative) {
  int accepted = 0;
  for_each_case(50, 2, [&](const Case& c) {
    FusedProblem problem(c);
    if (!accepts(problem.forward()) || !accepts(problem.backward())) return;
    ++accepted;
    errors_.add(c);
    ASSERT_NO_THROW(run_forward_with_logsumexp(problem));
    ASSERT_NO_THROW(run(problem.backward()));
    expect_gradients(problem, problem.expected());
    problem.buffers.expect_gaps_intact();
  });
  expect_accepted(accepted, case_count(50));
}

TEST_P(Fused, EveryGradientCanBeLeftOut) {
  for_each_case(12, 3, [&](Case c) {
    c.rpb = true;
    c.additional = 2;
    FusedProblem problem(c);
    if (!accepts(problem.backward())) return;
    run_forward_with_logsumexp(problem);
    const oracle::FusedResults expected = problem.expected();
    Rng rng(c.seed);
    for_each_gradient(problem.buffers, expected, [&](const char*, Buffer& gradient, const Dense&) {
      if (chance(rng, 0.5)) gradient = Buffer();
    });
    ASSERT_NO_THROW(run(problem.backward()));
    expect_gradients(problem, expected);
  });
}

/// More columns than backends handle at a time. Sums of many more are tested where there are few
/// queries (General).
TEST_P(Fused, LongWindows) {
  Case c;
  c.seed = base_seed();
  c.dtype = dtype();
  const std::int64_t length = rank() == 1 ? 600 : rank() == 2 ? 24 : 9;
  c.axes.assign(index(rank()), {length, length, 1, 1, false});
  c.axes.back().kernel_size = length - 1;  // two windows, so that bounds matter
  c.dim = 3;
  c.value_dim = 2;
  c.rpb = rank() == 3;
  FusedProblem problem(c);
  if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses";
  run_forward_with_logsumexp(problem);
  run(problem.backward());
  const oracle::FusedResults expected = problem.expected();
  errors_.expect("output", dtype(), rank(),
                 relative_error(problem.buffers.output.dense(), expected.output));
  errors_.expect("logsumexp", dtype(), rank(),
                 logsumexp_error(problem.buffers.logsumexp.dense(), expected.logsumexp));
  expect_gradients(problem, expected);
}

/// More dims than are summed in one go.
TEST_P(Fused, ManyDims) {
  Case c;
  c.seed = base_seed() + 50;
  c.dtype = dtype();
  c.axes.assign(index(rank()), {6, 3, 1, 1, false});
  c.dim = 3001;
  c.value_dim = 2047;
  FusedProblem problem(c);
  if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses";
  expect_definition(problem, errors_, [&](const natten::Call& call) { run(call); });
}

/// Rows that lie side by side on a long line and see few of its columns, of several lines: between
/// the columns of two vectors of rows there are some that none sees.
TEST_P(Fused, FewColumnsOfLongLines) {
  if (rank() == 1) GTEST_SKIP() << "there is one line";
  for (const std::int64_t kernel_size : {1, 2, 5}) {
    Case c;
    c.seed = base_seed() + 60 + static_cast<std::uint64_t>(kernel_size);
    c.dtype = dtype();
    c.axes.assign(index(rank()), {2, 1, 1, 1, false});
    c.axes.front() = {6, 3, 1, 1, false};
    c.axes.back() = {70, kernel_size, 1, 1, false};
    if (rank() == 2) {  // one row of it
      c.axes.front().given_queries = 1;
      c.axes.front().query_offset = 2;
    }
    c.dim = c.value_dim = 4;
    FusedProblem problem(c);
    if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses";
    run_forward_with_logsumexp(problem);
    run(problem.backward());
    const oracle::FusedResults expected = problem.expected();
    errors_.expect("output", dtype(), rank(),
                   relative_error(problem.buffers.output.dense(), expected.output));
    expect_gradients(problem, expected);
  }
}

/// One new token, a few, or a row, against a cache that its windows reach far back into.
TEST_P(Fused, FewQueriesOfLongWindows) {
  if (provided()) GTEST_SKIP() << "takes minutes on emulated threads";
  for (std::uint64_t i = 0; i < 4; ++i) {
    Case c = random_case(base_seed() + 4000 + i, dtype(), 1);
    Rng rng(c.seed);
    c.batch = 1;
    c.rpb = i % 2 == 0;
    oracle::Axis far;
    far.boundary =
        pick(rng, {natten::Boundary::cut, natten::Boundary::shift, natten::Boundary::circular});
    far.is_causal = far.boundary != natten::Boundary::circular && chance(rng, 0.5);
    far.dilation = uniform(rng, 1, 2);
    far.kernel_size = rank() == 1   ? pick<std::int64_t>(rng, {520, 777, 1030})
                      : rank() == 2 ? uniform(rng, 64, 90)
                                    : 11;
    far.length = far.dilation * (far.kernel_size + uniform(rng, 0, 20));
    draw_keys(rng, far, uniform(rng, 0, far.length - 8), rank() == 1 ? uniform(rng, 1, 8) : 1);
    c.axes = {far};
    if (rank() == 3) {
      c.axes.push_back({12, 9, 1, 1, false});
      draw_keys(rng, c.axes.back(), uniform(rng, 0, 11), 1);
    }
    if (rank() > 1) {
      oracle::Axis line;
      line.dilation = uniform(rng, 1, 2);
      line.kernel_size = uniform(rng, 2, 6);
      line.stride = uniform(rng, 1, line.kernel_size);
      line.length = line.dilation * (line.kernel_size + uniform(rng, 0, 30));
      if (chance(rng, 0.5)) draw_border(rng, line);
      if (chance(rng, 0.5)) draw_part(rng, line);
      c.axes.push_back(line);
    }
    FusedProblem problem(c);
    if (!accepts(problem.backward())) continue;
    SCOPED_TRACE(testing::Message() << c);
    run_forward_with_logsumexp(problem);
    run(problem.backward());
    const oracle::FusedResults expected = problem.expected();
    errors_.expect("output", dtype(), rank(),
                   relative_error(problem.buffers.output.dense(), expected.output));
    errors_.expect("logsumexp", dtype(), rank(),
                   logsumexp_error(problem.buffers.logsumexp.dense(), expected.logsumexp));
    expect_gradients(problem, expected);
    problem.buffers.expect_gaps_intact();
  }
}

/// Scores so large that one weight of most rows is all of it: gradients are what differences of
/// nearly equal numbers leave. Float32 itself is worth little then, so dense attention in float32
/// is the measure, over several problems: in a single one few rows make the whole error.
TEST_P(Fused, GradientsOfSaturatedRowsAreThoseOfDenseAttention) {
  if (dtype() != natten::DType::float32) GTEST_SKIP() << "the measure is for float32";
  for (const double size : {1.0, 10.0, 100.0, 1e3, 1e4}) {
    std::map<std::string, std::pair<double, double>>
        squares;  // of our errors and of those of dense
    for (int variant = 0; variant < 6; ++variant) {
      Case c;
      c.seed = base_seed() + 40 + static_cast<std::uint64_t>(variant);
      const std::int64_t length = rank() == 1 ? 120 : rank() == 2 ? 11 : 5;
      c.axes.assign(index(rank()), {length, rank() == 1 ? 31 : 4, 1, 1, variant == 1});
      if (variant == 2) c.axes.back().stride = 2;
      if (variant == 3 && rank() == 1) c.keys = 150;
      c.rpb = variant == 4;
      if (variant == 5) c.additional = 9;
      c.grad_logsumexp = variant % 2 == 0;
      c.heads = c.kv_heads = 2;
      c.dim = c.value_dim = 24;
      c.scale = size / std::sqrt(static_cast<double>(c.dim));
      FusedProblem problem(c);
      if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses";
      // Some keys nearly equal the one before, so that many rows have more than one weight.
      Buffer& key = problem.buffers.key;
      const std::int64_t token = c.heads * c.dim;
      for (std::int64_t i = token; i < key.view().size(); ++i)
        if (i / token % 4 == 0) key.set(i, key.get(i - token) + key.get(i) / size);
      run_forward_with_logsumexp(problem);
      run(problem.backward());
      const oracle::FusedInputs inputs = problem.oracle_inputs();
      const oracle::FusedResults expected = oracle::fused(inputs);
      std::map<std::string, Dense> dense;
      for_each_gradient(problem.buffers, oracle::fused<float>(inputs),
                        [&](const char* name, Buffer&, const Dense& x) { dense[name] = x; });
      for_each_gradient(problem.buffers, expected,
                        [&](const std::string& name, Buffer& got, const Dense& exact) {
                          if (name != "grad_query" && name != "grad_key") return;
                          squares[name].first += std::pow(relative_error(got.dense(), exact), 2);
                          squares[name].second += std::pow(relative_error(dense[name], exact), 2);
                        });
    }
    for (const auto& [name, sums] : squares) {
      const double ratio = std::sqrt(sums.first / sums.second);
      EXPECT_LE(ratio, 10) << name << ", scores of " << size;
      std::cout << "  " << name << ", scores of " << size << ": " << ratio
                << " times the error of dense float32\n";
    }
  }
}

/// Which elements are finite must agree with the reference: exactly where a backend promises it,
/// and no less spread anywhere.
void expect_spread(const std::string& backend, const char* name, const Dense& got,
                   const Dense& expected) {
  ASSERT_EQ(got.size(), expected.size()) << name;
  for (std::int64_t i = 0; i < got.size(); ++i) {
    if (backend == "naive") {
      ASSERT_EQ(std::isfinite(got[i]), std::isfinite(expected[i])) << name << " element " << i;
    } else if (!std::isfinite(expected[i])) {
      ASSERT_FALSE(std::isfinite(got[i])) << name << " element " << i;
    }
  }
}

TEST_P(Fused, NanAndInfinityReachWhoSeesThemAndNobodyElse) {
  for_each_case(40, 4, [&](Case c) {
    c.is_contiguous = true;  // one element in memory is one element of the tensor
    FusedProblem problem(c);
    if (c.batch == 0 || !accepts(problem.backward())) return;
    Rng rng(c.seed);
    Buffers& b = problem.buffers;
    const double poison = chance(rng, 0.6) ? std::nan("") : HUGE_VAL;
    std::vector<Buffer*> victims{&b.query, &b.key, &b.value, &b.grad_output};
    for (Buffer* optional : {&b.rpb, &b.additional_keys, &b.additional_values})
      if (optional->view() && optional->view().size() > 0) victims.push_back(optional);
    Buffer& victim =
        *victims[index(uniform(rng, 0, static_cast<std::int64_t>(victims.size()) - 1))];
    victim.set(uniform(rng, 0, victim.view().size() - 1), poison);

    run_forward_with_logsumexp(problem);
    const oracle::FusedResults expected = problem.expected();
    expect_spread(backend(), "output", b.output.dense(), expected.output);
    expect_spread(backend(), "logsumexp", b.logsumexp.dense(), expected.logsumexp);
    run(problem.backward());
    for_each_gradient(b, expected, [&](const char* name, Buffer& got, const Dense& reference) {
      if (got.view()) expect_spread(backend(), name, got.dense(), reference);
    });
  });
}

TEST_P(Fused, NanInAValueReachesTheQueriesWhoseWindowHoldsIt) {
  for_each_case(20, 5, [&](Case c) {
    c.is_contiguous = true;
    c.batch = c.heads = c.kv_heads = 1;
    FusedProblem problem(c);
    if (!accepts(problem.forward())) return;
    const oracle::Pairs pairs = pairs_of(c);
    Rng rng(c.seed);
    const std::int64_t token = uniform(rng, 0, sizes_of(c).keys - 1);
    const std::int64_t column = uniform(rng, 0, c.value_dim - 1);
    run(problem.forward());
    const Dense clean = problem.buffers.output.dense();
    problem.buffers.value.set(token * c.value_dim + column, std::nan(""));
    run(problem.forward());
    for (std::int64_t query = 0; query < sizes_of(c).queries; ++query) {
      bool sees = false;
      for (const oracle::Pair& pair : pairs[index(query)]) sees = sees || pair.key == token;
      for (std::int64_t d = 0; d < c.value_dim; ++d) {
        const double got = problem.buffers.output.get(query * c.value_dim + d);
        if (sees && d == column) {
          ASSERT_TRUE(std::isnan(got)) << "query " << query;
        } else if (backend() == "naive") {
          ASSERT_EQ(got, clean[query * c.value_dim + d]) << "query " << query;
        }
      }
    }
  });
}

/// A bias of -inf masks a key, as it does in other attention functions.
TEST_P(Fused, InfiniteNegativeBiasMasks) {
  Case c;
  c.seed = base_seed() + 9;
  c.dtype = dtype();
  c.axes.assign(index(rank()), {5, 3, 1, 1, false});
  c.rpb = true;
  FusedProblem problem(c);
  if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses";
  problem.buffers.rpb.set(0, -HUGE_VAL);
  run_forward_with_logsumexp(problem);
  run(problem.backward());
  const oracle::FusedResults expected = problem.expected();
  errors_.expect("output", dtype(), rank(),
                 relative_error(problem.buffers.output.dense(), expected.output));
  expect_gradients(problem, expected);
}

/// A query all of whose scores are -inf has no weights: output 0, logsumexp -inf, and it gives no
/// gradients. Here all queries of head 0; head 1 does not notice.
TEST_P(Fused, QueriesThatSeeNothing) {
  Case c;
  c.seed = base_seed() + 10;
  c.dtype = dtype();
  c.axes.assign(index(rank()), {7, 3, 1, 1, false});
  c.heads = c.kv_heads = 2;
  c.rpb = c.grad_logsumexp = true;
  FusedProblem problem(c), ordinary(c);
  if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses";
  Buffers& b = problem.buffers;
  const std::int64_t biases = volume(offsets_of(c));
  for (std::int64_t i = 0; i < biases; ++i) b.rpb.set(i, -HUGE_VAL);
  for (FusedProblem* p : {&problem, &ordinary}) {
    run_forward_with_logsumexp(*p);
    run(p->backward());
  }
  const auto expect_head_0 = [](const char* name, const Buffer& got, const Buffer& other,
                                std::int64_t head_size, double expected) {
    const Dense values = got.dense();
    for (std::int64_t i = 0; i < values.size(); ++i)
      ASSERT_EQ(values[i], i / head_size % 2 == 0 ? expected : other.get(i)) << name << " " << i;
  };
  Buffers& o = ordinary.buffers;
  expect_head_0("output", b.output, o.output, c.value_dim, 0);
  expect_head_0("logsumexp", b.logsumexp, o.logsumexp, 1, -HUGE_VAL);
  expect_head_0("grad_query", b.grad_query, o.grad_query, c.dim, 0);
  expect_head_0("grad_key", b.grad_key, o.grad_key, c.dim, 0);
  expect_head_0("grad_value", b.grad_value, o.grad_value, c.value_dim, 0);
  expect_head_0("grad_rpb", b.grad_rpb, o.grad_rpb, biases, 0);

  b.query.set(0, std::nan(""));  // of token 0 and head 0: no score of its is -inf now
  run_forward_with_logsumexp(problem);
  EXPECT_TRUE(std::isnan(b.logsumexp.get(0)));
  EXPECT_TRUE(std::isnan(b.output.get(0)));
}

INSTANTIATE_TEST_SUITE_P(Registry, Fused, every_property(), Property::name);

natten::Context vectorized() {
  natten::Context context;
  context.backend = "vectorized";
  return context;
}

/// Runs forward and backward with each number of threads.
void expect_same_bits(FusedProblem& problem, std::initializer_list<int> threads) {
  std::vector<std::vector<unsigned char>> first;
  for (int count : threads) {
    natten::set_num_threads(count);
    std::vector<std::vector<unsigned char>> bytes;
    problem.provide_logsumexp();
    natten::run(problem.forward(), vectorized());
    natten::run(problem.backward(), vectorized());
    problem.buffers.for_each(
        [&](const char*, Buffer& buffer, natten::TensorView natten::Tensors::*) {
          bytes.push_back(buffer.bytes());
        });
    if (first.empty()) first = bytes;
    EXPECT_EQ(bytes, first) << problem.c << " with " << count << " threads";
  }
}

/// More than are packed at a time, and so many that their gradients are not added up from partial
/// sums: alone, with few biases, and with dilated queries.
TEST(ManyAdditionalTokens, AreTheDefinitionForAnyNumberOfThreads) {
  const int threads = natten::num_threads();
  ErrorTable errors;
  for (int variant = 0; variant < 3; ++variant) {
    Case c;
    c.seed = base_seed() + 70 + static_cast<std::uint64_t>(variant);
    c.axes.assign(index(1 + variant), {1, 1, 1, 1, false});
    if (variant > 0) c.axes[index(variant - 1)] = {2, 2, 1, 1, false};
    c.axes.back() = {4, 2, 1, 1 + variant % 2, false};
    c.heads = 18;
    c.kv_heads = variant == 1 ? 9 : 18;
    c.dim = variant == 2 ? 17 : 32;
    c.value_dim = variant == 2 ? 48 : 32;
    c.additional = 4100;
    c.rpb = variant > 0;
    c.grad_logsumexp = variant > 1;
    FusedProblem problem(c);
    expect_same_bits(problem, {1, 3});
    expect_definition(problem, errors, [](const natten::Call&) {});  // has run
  }
  natten::set_num_threads(threads);
}

/// Keys get their gradients from queries of one or two items of work, on whatever threads these
/// run: of sweeps of lines, of strips of a long line, and of planes.
TEST(BackwardInOnePass, IsTheDerivativeForAnyNumberOfThreads) {
  const int threads = natten::num_threads();
  constexpr auto circular = natten::Boundary::circular;
  const std::vector<std::vector<oracle::Axis>> grids = {
      {{700, 65, 1, 1, false}},
      {{1300, 40, 3, 2, true}},
      {{41, 5, 1, 1, false}, {20, 7, 2, 1, false}},
      {{64, 3, 1, 3, false}, {19, 5, 1, 1, true}},
      {{70, 9, 4, 1, true}, {9, 4, 1, 1, false, natten::Boundary::cut}},
      {{6, 3, 1, 1, false}, {30, 5, 2, 1, false}, {12, 3, 1, 1, true}},
      // Strips, sweeps and planes that meet again after a turn; a line that goes around once more.
      {{600, 31, 1, 1, false, circular}},
      {{900, 20, 3, 2, false, circular}},
      {{60, 5, 1, 2, false, circular}, {10, 7, 2, 1, false, circular}},
      {{60, 7, 2, 1, false, circular}, {5, 5, 1, 1, false, circular}},
      {{4, 3, 1, 1, false, circular},
       {30, 5, 1, 1, false, circular},
       {4, 3, 1, 1, false, circular}},
      {{3, 3, 1, 1, false, circular},
       {30, 3, 1, 1, false, circular},
       {5, 5, 1, 1, false, circular}},
      // Strips and sweeps: keys that four items see.
      {{6, 3, 1, 1, false}, {270, 3, 1, 1, false}},
      {{9, 3, 1, 1, false, circular}, {261, 3, 1, 1, false, circular}},
      // Parts: some keys are seen by no query.
      {{41, 5, 1, 1, false, natten::Boundary::shift, 10, 0, 30, -1}, {20, 7, 2, 1, false}},
      {{90, 7, 3, 2, false, circular, 50, 40, 40, 70},
       {20, 5, 1, 1, false, natten::Boundary::cut, 3, 0, 9, 25}},
      {{1300, 40, 3, 2, true, natten::Boundary::cut, 600, 500, 700, 820}},
  };
  ErrorTable errors;
  int number = 0;
  for (const std::vector<oracle::Axis>& grid : grids)
    for (const natten::DType dtype : {natten::DType::float32, natten::DType::float64,
                                      natten::DType::bfloat16, natten::DType::float16}) {
      Case c;
      c.seed = base_seed() + 700 + static_cast<std::uint64_t>(number);
      c.dtype = dtype;
      c.axes = grid;
      c.heads = number % 7 == 3 ? 15 : 5;
      c.kv_heads = 5;
      c.dim = 12 + number % 3;
      c.value_dim = 8;
      c.key_mask = number % 4 == 1;
      c.rpb = number % 3 == 1;
      c.additional = number % 5 == 1 ? 3 : 0;
      c.grad_logsumexp = number % 2 == 1;
      ++number;
      FusedProblem problem(c);
      if (!c.key_mask && !c.rpb && *c.additional == 0) {
        EXPECT_EQ(natten::work_of(problem.backward()).size(), 1U) << c;
      }
      expect_same_bits(problem, {1, 3, 16});
      expect_definition(problem, errors, [](const natten::Call&) {});  // has run
    }
  natten::set_num_threads(threads);
}

/// Windows with whose sums a ring takes more than 4 MiB: queries see them piece by piece, twice.
TEST(BackwardInOnePass, OfLargeWindowsIsTheDerivative) {
  const int threads = natten::num_threads();
  constexpr auto circular = natten::Boundary::circular;
  const std::vector<std::vector<oracle::Axis>> grids = {
      {{6, 6, 1, 1, false}, {7, 5, 1, 1, false}, {8, 7, 1, 1, false}},
      {{14, 12, 2, 1, false, circular}, {12, 9, 1, 1, false, circular}},
      {{6, 5, 1, 1, false}, {11, 5, 1, 2, false}, {9, 7, 2, 1, true}},
      {{20, 17, 1, 1, true}, {12, 11, 1, 1, false, natten::Boundary::cut}},
  };
  ErrorTable errors;
  int number = 0;
  for (const std::vector<oracle::Axis>& grid : grids)
    for (const natten::DType dtype : {natten::DType::float32, natten::DType::float64,
                                      natten::DType::bfloat16, natten::DType::float16}) {
      if (number >= 4 && dtype == natten::DType::float16) continue;
      Case c;
      c.seed = base_seed() + 1000 + static_cast<std::uint64_t>(number);
      c.dtype = dtype;
      c.axes = grid;
      c.heads = number % 2 == 0 ? 2 : 1;
      c.kv_heads = 1;
      c.dim = 901;
      c.value_dim = 700;
      c.key_mask = number % 4 == 3;
      c.rpb = number % 3 == 1;
      c.additional = number % 5 == 2 ? 3 : 0;
      c.grad_logsumexp = number % 2 == 1;
      ++number;
      FusedProblem problem(c);
      if (!c.rpb && !c.key_mask && *c.additional == 0) {
        EXPECT_EQ(natten::work_of(problem.backward()).size(), 1U) << c;
      }
      expect_same_bits(problem, {1, 3});
      expect_definition(problem, errors, [](const natten::Call&) {});  // has run
    }
  natten::set_num_threads(threads);
}

/// Heads that are alike: of the first all weights are kept from the first visit of its keys to the
/// second, of the last none.
TEST(BackwardInOnePass, DoesNotDependOnWhatIsKept) {
  Case c;
  c.seed = base_seed() + 1100;
  c.axes = {{3, 3, 1, 1, false}, {200, 199, 1, 1, false}};
  c.heads = 6;
  c.kv_heads = 1;
  c.dim = 260;
  c.value_dim = 150;
  FusedProblem problem(c);
  Buffers& b = problem.buffers;
  const auto at = [&](std::int64_t i, std::int64_t head, std::int64_t dim) {
    return (i / dim * c.heads + head) * dim + i % dim;
  };
  const std::int64_t tokens = 600;
  for (std::int64_t i = 0; i < tokens * c.dim; ++i)
    b.query.set(at(i, 5, c.dim), b.query.get(at(i, 0, c.dim)));
  for (std::int64_t i = 0; i < tokens * c.value_dim; ++i)
    b.grad_output.set(at(i, 5, c.value_dim), b.grad_output.get(at(i, 0, c.value_dim)));
  EXPECT_EQ(natten::work_of(problem.backward()).size(), 1U) << c;
  natten::run(problem.forward(), vectorized());
  natten::run(problem.backward(), vectorized());
  std::int64_t differences = 0;
  for (std::int64_t i = 0; i < tokens * c.dim; ++i)
    differences += b.grad_query.get(at(i, 0, c.dim)) != b.grad_query.get(at(i, 5, c.dim));
  EXPECT_EQ(differences, 0) << c;
}

/// From 8 MiB on, whole cache lines are written past the caches, where they begin with an element.
TEST(LargeOutputs, HaveTheSameBitsWhereverTheyLie) {
  Case c;
  c.seed = base_seed() + 900;
  c.axes = {{1 << 14, 2, 1, 1, false}};
  c.heads = c.kv_heads = 4;
  c.value_dim = 32;
  FusedProblem problem(c);
  natten::Call call = problem.forward();
  const std::size_t bytes = 8 << 20;
  ASSERT_EQ(static_cast<std::size_t>(call.tensors.output.size()) * sizeof(float), bytes);
  std::vector<unsigned char> memory(bytes + 128), results[2];
  const std::uintptr_t line = (reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64;
  for (std::uintptr_t i : {0, 1}) {
    auto* output = reinterpret_cast<unsigned char*>(line + 16 * i);
    call.tensors.output.data = output;
    natten::run(call, vectorized());
    results[i].assign(output, output + bytes);
  }
  EXPECT_TRUE(results[0] == results[1]) << c;
}

/// Beyond one number per query and head, memory is bounded: by 16 MiB, or what one set of biases'
/// gradients per batch entry takes.
TEST(Workspace, OfPartialSumsIsBounded) {
  for (std::int64_t tokens : {16, 4096, 1 << 20})
    for (std::int64_t heads : {1, 8, 64})
      for (std::int64_t dim : {1, 64, 256})
        for (std::int64_t additional : {0, 1, 100, 4096, 1 << 20})
          for (std::int64_t kernel : {0, 3, 1000}) {  // 0: without biases
            if (kernel > tokens) continue;
            const auto view = [](std::initializer_list<std::int64_t> shape) {
              return natten::contiguous_view(nullptr, natten::DType::float32, {}, shape.begin(),
                                             static_cast<int>(shape.size()));
            };
            natten::Call call;
            call.op = natten::Op::attention_backward;
            call.neighborhood.kernel_size = {std::max<std::int64_t>(kernel, 3)};
            natten::Tensors& t = call.tensors;
            t.query = t.key = t.value = t.grad_output = t.grad_query =
                view({2, tokens, heads, dim});
            t.logsumexp = view({2, tokens, heads});
            if (kernel > 0) t.rpb = t.grad_rpb = view({heads, 2 * kernel - 1});
            t.additional_keys = t.additional_values = t.grad_additional_keys =
                t.grad_additional_values = view({2, additional, heads, dim});
            const std::int64_t rows = 2 * tokens * heads * 4;
            const std::int64_t biases = kernel > 0 ? 2 * heads * (2 * kernel - 1 + 128) * 4 : 0;
            EXPECT_LE(static_cast<std::int64_t>(natten::workspace_bytes(call, vectorized())),
                      rows + std::max<std::int64_t>(16 << 20, biases) + 64)
                << tokens << " tokens, " << heads << " heads of " << dim << ", " << additional
                << " additional tokens, kernel size " << kernel;
          }
}

/// The reference's gradients are the derivative of the reference's forward pass: the two are
/// written by hand, so a mistake shared by library and reference would show here.
TEST(Oracle, GradientsAgreeWithFiniteDifferences) {
  for (int rank = 1; rank <= natten::kMaxRank; ++rank)
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      Case c = random_case(base_seed() + 77 * seed, natten::DType::float64, rank);
      c.batch = 1;
      c.rpb = c.grad_logsumexp = c.is_contiguous = true;
      c.additional = 2;
      FusedProblem problem(c);
      oracle::FusedInputs in = problem.oracle_inputs();
      const oracle::FusedResults results = oracle::fused(in);
      Dense grad_output = in.grad_output;
      in.grad_output = Dense();  // forward only from here on
      const auto objective = [&] {
        const oracle::FusedResults r = oracle::fused(in);
        double sum = 0;
        for (std::int64_t i = 0; i < r.output.size(); ++i) sum += r.output[i] * grad_output[i];
        for (std::int64_t i = 0; i < r.logsumexp.size(); ++i)
          sum += r.logsumexp[i] * in.grad_logsumexp[i];
        return sum;
      };
      Rng rng(seed);
      for (auto& [input, gradient] :
           {std::pair(&in.query, &results.grad_query), std::pair(&in.key, &results.grad_key),
            std::pair(&in.value, &results.grad_value), std::pair(&in.rpb, &results.grad_rpb),
            std::pair(&in.additional_keys, &results.grad_additional_keys),
            std::pair(&in.additional_values, &results.grad_additional_values)}) {
        const Dense direction = normal(rng, input->shape), start = *input;
        double along = 0;
        for (std::int64_t i = 0; i < direction.size(); ++i) along += direction[i] * (*gradient)[i];
        const double step = 1e-5;
        double difference = 0;
        for (double sign : {1.0, -1.0}) {
          for (std::int64_t i = 0; i < direction.size(); ++i)
            (*input)[i] = start[i] + sign * step * direction[i];
          difference += sign * objective();
        }
        *input = start;
        EXPECT_NEAR(difference / (2 * step), along, 1e-6 * (1 + std::fabs(along))) << c;
      }
    }
}

}  // namespace
}  // namespace natten_tests
