#include "unfused_problem.h"

namespace natten_tests {
namespace {

using natten::Op;

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

class Unfused : public Property {
 protected:
  static void TearDownTestSuite() { errors_.print("unfused operations"); }

  /// Runs what `prepare(problem, buffers)` returns, then calls `check(problem, buffers, call)`.
  template <class Prepare, class Check>
  void for_each_call(int count, std::uint64_t salt, Prepare prepare, Check check) {
    int accepted = 0;
    for_each_case(count, salt, [&](const Case& c) {
      UnfusedProblem problem(c);
      Buffers buffers;
      const natten::Call call = prepare(problem, buffers);
      if (!accepts(call)) return;
      ++accepted;
      errors_.add(c);
      ASSERT_NO_THROW(run(call));
      check(problem, buffers, call);
      buffers.expect_gaps_intact();
    });
    expect_accepted(accepted, case_count(count));
  }

  /// Attention weights: empty slots hold exactly what they must, the others are compared.
  void expect_weights(const char* what, Buffer& got, Dense expected) {
    Dense weights = got.dense();
    ASSERT_EQ(weights.size(), expected.size());
    for (std::int64_t i = 0; i < weights.size(); ++i) {
      if (expected[i] != kMinusInfinity) continue;
      ASSERT_EQ(weights[i], kMinusInfinity) << what << " slot " << i;
      weights[i] = expected[i] = 0;
    }
    errors_.expect(what, dtype(), rank(), relative_error(weights, expected));
  }
  void expect_close(const char* what, Buffer& got, const Dense& expected) {
    errors_.expect(what, dtype(), rank(), relative_error(got.dense(), expected));
  }

  static ErrorTable errors_;
};
ErrorTable Unfused::errors_;

TEST_P(Unfused, QkForward) {
  for_each_call(
      45, 11,
      [](UnfusedProblem& problem, Buffers& b) {
        b.query = problem.input(problem.tokens);
        b.key = problem.input(problem.keys);
        b.additional_keys = problem.additional_input();
        b.attn = problem.result(problem.slots);
        if (problem.c.rpb) b.rpb = problem.input(problem.bias);
        natten::Call call = problem.call(Op::qk, b);
        if (problem.flip()) call.options.empty_slots = natten::EmptySlots::zero;
        return call;
      },
      [&](UnfusedProblem& problem, Buffers& b, const natten::Call& call) {
        const bool zero = call.options.empty_slots == natten::EmptySlots::zero;
        expect_weights(
            "qk", b.attn,
            oracle::qk(problem.n, problem.pairs, b.query.dense(), b.key.dense(), b.rpb.dense(),
                       b.additional_keys.dense(), zero ? 0.0 : kMinusInfinity));
      });
}

TEST_P(Unfused, AvForward) {
  for_each_call(
      45, 12,
      [](UnfusedProblem& problem, Buffers& b) {
        b.attn = problem.input(problem.slots);
        poison_empty_slots(problem, b.attn);
        b.value = problem.input(problem.keys);
        b.additional_values = problem.additional_input();
        b.output = problem.result(problem.tokens);
        return problem.call(Op::av, b);
      },
      [&](UnfusedProblem& problem, Buffers& b, const natten::Call&) {
        expect_close("av", b.output,
                     oracle::av(problem.n, problem.pairs, b.attn.dense(), b.value.dense(),
                                b.additional_values.dense()));
      });
}

TEST_P(Unfused, AvTranspose) {
  for_each_call(
      45, 13,
      [](UnfusedProblem& problem, Buffers& b) {
        b.attn = problem.input(problem.slots);
        poison_empty_slots(problem, b.attn);
        b.query = problem.input(problem.tokens);
        b.key = problem.result(problem.keys);
        b.additional_keys = problem.additional_result();
        return problem.call(Op::av_transpose, b);
      },
      [&](UnfusedProblem& problem, Buffers& b, const natten::Call&) {
        const oracle::KeySums expected =
            oracle::av_transpose(problem.n, problem.pairs, b.attn.dense(), b.query.dense());
        expect_close("grad_key (av_transpose)", b.key, expected.key);
        if (b.additional_keys.view())
          expect_close("grad_additional_keys", b.additional_keys, expected.additional_keys);
      });
}

TEST_P(Unfused, RpbGather) {
  for_each_call(
      30, 14,
      [](UnfusedProblem& problem, Buffers& b) {
        b.rpb = problem.input(problem.bias);
        b.attn = problem.result(problem.slots);
        natten::Call call = problem.call(Op::rpb_gather, b);
        if (problem.flip()) call.options.empty_slots = natten::EmptySlots::zero;
        return call;
      },
      [&](UnfusedProblem& problem, Buffers& b, const natten::Call& call) {
        const bool zero = call.options.empty_slots == natten::EmptySlots::zero;
        const Dense expected = oracle::rpb_gather(problem.n, problem.pairs, b.rpb.dense(),
                                                  zero ? 0.0 : kMinusInfinity);
        EXPECT_EQ(b.attn.dense().data, expected.data) << "copied, not computed";
      });
}

TEST_P(Unfused, RpbScatter) {
  for_each_call(
      45, 15,
      [](UnfusedProblem& problem, Buffers& b) {
        b.attn = problem.input(problem.slots);
        poison_empty_slots(problem, b.attn);
        b.grad_rpb = problem.result(problem.bias);
        return problem.call(Op::rpb_scatter, b);
      },
      [&](UnfusedProblem& problem, Buffers& b, const natten::Call&) {
        expect_close("grad_rpb", b.grad_rpb,
                     oracle::rpb_scatter(problem.n, problem.pairs, b.attn.dense()));
      });
}

/// In float64 only: other types round the results in between.
class UnfusedChain : public Property {};

/// qk, softmax, av and their derivatives chained by hand are fused attention.
TEST_P(UnfusedChain, IsFusedAttention) {
  int accepted = 0;
  for_each_case(15, 16, [&](Case c) {
    c.kv_heads = c.heads;
    c.value_dim = c.dim;
    c.scale = 1.0;
    c.is_contiguous = true;
    c.grad_logsumexp = false;
    UnfusedProblem problem(c);
    const auto swapped = [&](const Dense& x, const Shape& shape, bool to_heads_first) {
      const std::int64_t tokens = x.size() / std::max<std::int64_t>(1, c.batch * c.heads * c.dim);
      Dense y(shape);
      for (std::int64_t b = 0; b < c.batch; ++b)
        for (std::int64_t t = 0; t < tokens; ++t)
          for (std::int64_t h = 0; h < c.heads; ++h)
            for (std::int64_t d = 0; d < c.dim; ++d) {
              const std::int64_t last = ((b * tokens + t) * c.heads + h) * c.dim + d;
              const std::int64_t first = ((b * c.heads + h) * tokens + t) * c.dim + d;
              y[to_heads_first ? first : last] = x[to_heads_first ? last : first];
            }
      return y;
    };
    FusedProblem fused(c);
    natten::Context reference;
    reference.backend = "naive";
    fused.forward_with_logsumexp(reference);
    natten::run(fused.backward(), reference);
    Buffers& f = fused.buffers;
    const auto heads_first = [&](Buffer& x, const Shape& shape) {
      return x.view() ? Buffer(c.dtype, swapped(x.dense(), shape, true)) : Buffer();
    };
    const auto run = [&](Op op, Buffers& b, natten::EmptySlots empty) {
      natten::Call call = problem.call(op, b);
      call.options.empty_slots = empty;
      // Some links of the chain are the reference's alone.
      if (accepts(call)) return Property::run(call);
      natten::run(call, reference);
    };
    const auto expect_same = [&](const char* name, Buffer& got, Buffer& expected) {
      if (!expected.view()) return;
      EXPECT_LE(relative_error(swapped(got.dense(), expected.dense().shape, false),
                               expected.dense(), fused.incoming_gradient()),
                1e-12)
          << name;
    };

    Buffers qk;
    qk.query = heads_first(f.query, problem.tokens);
    qk.key = heads_first(f.key, problem.keys);
    qk.additional_keys = heads_first(f.additional_keys, problem.additional);
    qk.rpb = f.rpb;
    qk.attn = problem.result(problem.slots);
    if (!accepts(problem.call(Op::qk, qk))) return;
    ++accepted;
    run(Op::qk, qk, natten::EmptySlots::negative_infinity);

    const std::int64_t slots = problem.n.window + problem.n.additional;
    Dense weights = qk.attn.dense();
    for (std::int64_t row = 0; row < weights.size() / slots; ++row) {
      double total = 0;
      for (std::int64_t s = 0; s < slots; ++s) total += std::exp(weights[row * slots + s]);
      for (std::int64_t s = 0; s < slots; ++s)
        weights[row * slots + s] = std::exp(weights[row * slots + s]) / (total == 0 ? 1 : total);
    }
    Buffers av;
    av.attn = Buffer(c.dtype, weights);
    av.value = heads_first(f.value, problem.keys);
    av.additional_values = heads_first(f.additional_values, problem.additional);
    av.output = problem.result(problem.tokens);
    run(Op::av, av, natten::EmptySlots::zero);
    expect_same("output", av.output, f.output);

    Buffers d_value;  // transpose of av with respect to values
    d_value.attn = av.attn;
    d_value.query = heads_first(f.grad_output, problem.tokens);
    d_value.key = problem.result(problem.keys);
    d_value.additional_keys = problem.additional_result();
    run(Op::av_transpose, d_value, natten::EmptySlots::zero);
    expect_same("grad_value", d_value.key, f.grad_value);
    expect_same("grad_additional_values", d_value.additional_keys, f.grad_additional_values);

    Buffers d_attn;  // transpose of av with respect to weights
    d_attn.query = d_value.query;
    d_attn.key = av.value;
    d_attn.additional_keys = av.additional_values;
    d_attn.attn = problem.result(problem.slots);
    run(Op::qk, d_attn, natten::EmptySlots::zero);
    Dense grad_scores = d_attn.attn.dense();
    for (std::int64_t row = 0; row < weights.size() / slots; ++row) {
      double sum = 0;
      for (std::int64_t s = row * slots; s < (row + 1) * slots; ++s)
        sum += weights[s] * grad_scores[s];
      for (std::int64_t s = row * slots; s < (row + 1) * slots; ++s)
        grad_scores[s] = weights[s] * (grad_scores[s] - sum);
    }
    Buffers d_query;
    d_query.attn = Buffer(c.dtype, grad_scores);
    d_query.value = qk.key;
    d_query.additional_values = qk.additional_keys;
    d_query.output = problem.result(problem.tokens);
    run(Op::av, d_query, natten::EmptySlots::zero);
    expect_same("grad_query", d_query.output, f.grad_query);
    Buffers d_key;
    d_key.attn = d_query.attn;
    d_key.query = qk.query;
    d_key.key = problem.result(problem.keys);
    d_key.additional_keys = problem.additional_result();
    run(Op::av_transpose, d_key, natten::EmptySlots::zero);
    expect_same("grad_key", d_key.key, f.grad_key);
    expect_same("grad_additional_keys", d_key.additional_keys, f.grad_additional_keys);
    if (!c.rpb) return;
    Buffers d_rpb;
    d_rpb.attn = d_query.attn;
    d_rpb.grad_rpb = problem.result(problem.bias);
    run(Op::rpb_scatter, d_rpb, natten::EmptySlots::zero);
    EXPECT_LE(relative_error(d_rpb.grad_rpb.dense(), f.grad_rpb.dense(), fused.incoming_gradient()),
              1e-12);
  });
  expect_accepted(accepted, case_count(15));
}

INSTANTIATE_TEST_SUITE_P(Registry, Unfused, every_property(), Property::name);

/// More additional tokens than are packed at a time.
TEST(ManyAdditionalTokens, OfTheUnfusedOperations) {
  natten::Context context;
  context.backend = "vectorized";
  ErrorTable errors;
  for (int rank = 1; rank <= natten::kMaxRank; ++rank) {
    Case c;
    c.seed = base_seed() + static_cast<std::uint64_t>(rank);
    for (int i = 0; i < rank; ++i) c.axes.push_back({3, 2, 1, 1, rank == 2});
    c.heads = 2;
    c.dim = 5;
    c.additional = 8200;
    UnfusedProblem problem(c);
    Buffers b;
    b.query = b.key = b.value = problem.input(problem.tokens);
    b.additional_keys = b.additional_values = problem.input(problem.additional);
    b.attn = problem.result(problem.slots);
    b.output = problem.result(problem.tokens);
    natten::Call call = problem.call(Op::qk, b);
    call.options.empty_slots = natten::EmptySlots::zero;
    natten::run(call, context);
    const Dense attn = oracle::qk(problem.n, problem.pairs, b.query.dense(), b.key.dense(), Dense(),
                                  b.additional_keys.dense(), 0.0);
    errors.expect("qk", c.dtype, rank, relative_error(b.attn.dense(), attn));
    natten::run(problem.call(Op::av, b), context);
    errors.expect(
        "av", c.dtype, rank,
        relative_error(b.output.dense(), oracle::av(problem.n, problem.pairs, b.attn.dense(),
                                                    b.value.dense(), b.additional_values.dense())));
    Buffers sums;
    sums.attn = b.attn;
    sums.query = b.query;
    sums.key = problem.result(problem.tokens);
    sums.additional_keys = problem.result(problem.additional);
    natten::run(problem.call(Op::av_transpose, sums), context);
    const oracle::KeySums expected =
        oracle::av_transpose(problem.n, problem.pairs, b.attn.dense(), b.query.dense());
    errors.expect("av_transpose", c.dtype, rank, relative_error(sums.key.dense(), expected.key));
    errors.expect("av_transpose", c.dtype, rank,
                  relative_error(sums.additional_keys.dense(), expected.additional_keys));
  }
}
INSTANTIATE_TEST_SUITE_P(Registry, UnfusedChain,
                         testing::Combine(testing::ValuesIn(tested_backends()),
                                          testing::Values(natten::DType::float64),
                                          testing::Values(1, 2, 3)),
                         Property::name);

}  // namespace
}  // namespace natten_tests
