#include "packed.h"

namespace natten_tests {
namespace {

using natten::TensorView;

/// Attention over all keys, with as many queries as one likes.
Case general_case(std::uint64_t seed, natten::DType dtype) {
  Case c = random_case(seed, dtype, 1);
  Rng rng(seed + 5);
  c.axes = {{uniform(rng, chance(rng, 0.1) ? 0 : 1, 20), 1, 1, 1, chance(rng, 0.5)}};
  c.keys = chance(rng, 0.2) ? std::max<std::int64_t>(1, c.axes[0].length) : uniform(rng, 1, 20);
  c.rpb = c.gives_grid = false;
  return c;
}

class General : public Property {
 protected:
  static void TearDownTestSuite() { errors_.print("general attention"); }
  static ErrorTable errors_;
};
ErrorTable General::errors_;

TEST_P(General, ForwardAndBackward) {
  int longer = 0, shorter = 0;
  for (std::uint64_t i = 0; i < 60; ++i) {
    const Case c = general_case(base_seed() * 77 + i, dtype());
    std::ostringstream text;
    text << c << " (NATTEN_TEST_SEED=" << base_seed() << ")";
    SCOPED_TRACE(text.str());
    FusedProblem problem(c);
    natten::Call forward =
        natten::attention_call(problem.buffers.views(), c.axes[0].is_causal, c.scale);
    if (!accepts(forward) || !accepts(problem.backward())) continue;
    ++(c.axes[0].length > *c.keys ? longer : shorter);
    problem.provide_logsumexp();
    forward = natten::attention_call(problem.buffers.views(), c.axes[0].is_causal, c.scale);
    ASSERT_NO_THROW(run(forward));
    natten::Call backward = forward;
    backward.op = natten::Op::attention_backward;
    ASSERT_NO_THROW(run(backward));
    const oracle::FusedResults expected = problem.expected();
    errors_.expect("output", dtype(), 1,
                   relative_error(problem.buffers.output.dense(), expected.output));
    errors_.expect("logsumexp", dtype(), 1,
                   logsumexp_error(problem.buffers.logsumexp.dense(), expected.logsumexp));
    for_each_gradient(
        problem.buffers, expected, [&](const char* name, Buffer& got, const Dense& reference) {
          if (got.view())
            errors_.expect(name, dtype(), 1,
                           relative_error(got.dense(), reference, problem.incoming_gradient()));
        });
    problem.buffers.expect_gaps_intact();
  }
  expect_accepted(longer + shorter, 60);
}

TEST_P(General, SelfAttentionIsANeighborhoodOfEverything) {
  const Case c = [&] {
    Case c = random_case(base_seed() + 3, dtype(), 1);
    c.axes = {{11, 11, 1, 1, false}};
    c.rpb = false;
    c.batch = 2;
    return c;
  }();
  FusedProblem neighborhood(c), general(c);
  if (!accepts(neighborhood.forward())) GTEST_SKIP() << backend() << " refuses it";
  ASSERT_NO_THROW(run(neighborhood.forward()));
  ASSERT_NO_THROW(run(natten::attention_call(general.buffers.views(), false, c.scale)));
  EXPECT_LE(relative_error(general.buffers.output.dense(), neighborhood.buffers.output.dense()),
            2 * bounds_of(dtype()).forward);
}

/// More terms than sequential float32 sums add up well enough: these would err by 1.5e-6.
TEST_P(General, LongSumsStayExact) {
  Case c;
  c.seed = base_seed() + 5;
  c.dtype = dtype();
  c.axes = {{8, 1, 1, 1, false}};
  c.keys = 7000;
  c.dim = c.value_dim = 8;
  FusedProblem problem(c);
  if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses it";
  expect_definition(problem, errors_, [&](const natten::Call& call) { run(call); });
}

/// Queries whose scores all are -inf, here those of batch entry 0.
TEST_P(General, QueriesThatSeeNothing) {
  Case c;
  c.seed = base_seed() + 4;
  c.dtype = dtype();
  c.axes = {{5, 1, 1, 1, false}};
  c.keys = 7;
  c.batch = 2;
  c.heads = c.kv_heads = 2;
  FusedProblem problem(c);
  if (!accepts(problem.backward())) GTEST_SKIP() << backend() << " refuses it";
  Buffers& b = problem.buffers;
  for (std::int64_t i = 0; i < 5 * 2; ++i) b.query.set(i * c.dim, 1);
  for (std::int64_t i = 0; i < 7 * 2; ++i) b.key.set(i * c.dim, -HUGE_VAL);
  ASSERT_NO_THROW(run(problem.forward()));
  ASSERT_NO_THROW(run(problem.backward()));
  for (std::int64_t i = 0; i < b.output.view().size() / 2; ++i) ASSERT_EQ(b.output.get(i), 0);
  for (std::int64_t i = 0; i < 5 * 2; ++i) ASSERT_EQ(b.logsumexp.get(i), -HUGE_VAL);
  for (Buffer* gradient : {&b.grad_key, &b.grad_value})
    for (std::int64_t i = 0; i < gradient->view().size(); ++i) {
      ASSERT_TRUE(std::isfinite(gradient->get(i)));
      ASSERT_EQ(gradient->get(i) == 0, i < gradient->view().size() / 2);
    }
}

/// Examples that lie one after another, some of them without queries or without keys; then those of
/// neighborhoods.
TEST_P(General, ExamplesOfDifferentLengths) {
  int accepted = 0;
  const int cases = 16;
  for (int i = 0; i < cases; ++i) {
    const bool is_neighborhood = i % 2 == 1;
    const PackedCase packed =
        packed_case(base_seed() * 53 + static_cast<std::uint64_t>(i), dtype(), 12, is_neighborhood);
    FusedProblem problem(packed.c);
    bool is_accepted = true;
    for (const natten::Op op : {natten::Op::attention_forward, natten::Op::attention_backward}) {
      natten::Call call = problem.call(op);
      call.tensors.grad_rpb = {};
      call.options.allow_no_keys = true;
      const std::vector<natten::Call> examples = natten::examples_of(call, packed.packing);
      EXPECT_EQ(examples.size(), packed.packing.cumulative_seqlen_Q.size() - 1);
      is_accepted = is_accepted && accepts(call);
      if (!provided())
        for (const natten::Call& example : examples) is_accepted = is_accepted && accepts(example);
    }
    if (!is_accepted || (provided() && !packed.is_one_job())) continue;
    ++accepted;
    expect_examples(packed, errors_, [&](const natten::Call& call, const natten::Packing& packing) {
      if (const ProvidedBackend* b = provided()) return b->run_packed(call, packing);
      natten::run(call, packing, context());
    });
    if (HasFatalFailure()) return;
  }
  if (!provided()) expect_accepted(accepted, cases);
}

TEST(Examples, OfBadLengthsAreRefused) {
  float x[64] = {};
  natten::Tensors tensors;
  tensors.query = natten::view(x, {1, 7, 1, 2});
  tensors.key = tensors.value = natten::view(x, {1, 6, 1, 2});
  const natten::Call packed = natten::attention_call(tensors);
  EXPECT_EQ(natten::examples_of(packed, {{0, 2, 7}, {0, 0, 6}, 5, 6}).size(), 2u);
  const auto message = [&](const natten::Call& call, const natten::Packing& packing) {
    try {
      natten::examples_of(call, packing);
    } catch (const natten::Error& e) {
      return std::string(e.kind() == natten::ErrorKind::invalid_value ? e.what() : "");
    }
    return std::string("accepted");
  };
  const std::pair<natten::Packing, const char*> bad[] = {
      {{{}, {}, {}, {}}, "cumulative_seqlen_Q: got 0 numbers"},
      {{{0}, {0}, {}, {}}, "cumulative_seqlen_Q: got 1 numbers"},
      {{{0, 7}, {0, 3, 6}, {}, {}}, "cumulative_seqlen_KV: got 3 numbers; must be 2"},
      {{{1, 7}, {0, 6}, {}, {}}, "cumulative_seqlen_Q: got 1 as its first number"},
      {{{0, 9, 7}, {0, 3, 6}, {}, {}}, "cumulative_seqlen_Q: got 7 after 9 for example 1"},
      {{{0, 7}, {0, 5}, {}, {}}, "cumulative_seqlen_KV: got 5 as its last number"},
      {{{0, 3, 7}, {0, 3, 6}, 3, {}}, "max_seqlen_Q: got 3; must be at least 4"},
      {{{0, 3, 7}, {0, 3, 6}, {}, 2}, "max_seqlen_KV: got 2; must be at least 3"},
  };
  for (const auto& [packing, text] : bad)
    EXPECT_EQ(message(packed, packing).rfind(text, 0), 0u) << message(packed, packing);
  const auto changed = [&](auto&& change) {
    natten::Call call = packed;
    change(call);
    return call;
  };
  const auto neighborhood = [&](natten::Call& call) {
    call.options.separate_key_grid = false;
    call.neighborhood.kernel_size = {3};
    call.tensors.key = call.tensors.value = tensors.query;
  };
  const natten::Packing alike{{0, 3, 7}, {0, 3, 7}, {}, {}};
  EXPECT_EQ(natten::examples_of(changed(neighborhood), alike).size(), 2u);
  const std::tuple<natten::Call, natten::Packing, const char*> refused[] = {
      {changed(neighborhood), {{0, 3, 7}, {0, 4, 7}, {}, {}}, "cumulative_seqlen_KV: must be as"},
      {changed(neighborhood),
       {{0, 0, 7}, {0, 0, 7}, {}, {}},
       "cumulative_seqlen_Q: got no tokens for example 0"},
      {changed(neighborhood),
       {{0, 5, 7}, {0, 5, 7}, {}, {}},
       "kernel_size: got [3] with dilation 1 on axis 0; kernel_size * dilation must not exceed the "
       "axis, 2 tokens here, unless its border cuts windows (boundary \"cut\") (example 1)"},
      {changed([&](natten::Call& call) {
         neighborhood(call);
         call.neighborhood.grid_size = {7};
       }),
       alike, "packed: got a part of a grid"},
      {changed([&](natten::Call& call) {
         call.tensors.additional_keys = call.tensors.additional_values = tensors.query;
       }),
       {{0, 7}, {0, 6}, {}, {}},
       "additional_keys: got a tensor for examples"},
      {changed([&](natten::Call& call) {
         neighborhood(call);
         call.op = natten::Op::qk;
         call.tensors.query = call.tensors.key = natten::view(x, {1, 1, 7, 2});
       }),
       alike, "packed: got qk of rank 1"},
  };
  for (const auto& [call, packing, text] : refused)
    EXPECT_EQ(message(call, packing).rfind(text, 0), 0u) << message(call, packing);
}

INSTANTIATE_TEST_SUITE_P(Registry, General,
                         testing::Combine(testing::ValuesIn(tested_backends()),
                                          testing::ValuesIn(kDTypes), testing::Values(1)),
                         Property::name);

/// Merging takes results over parts of the keys. Cuts keys at random places, runs every part and
/// merges; the same through the derivatives.
class Merge : public testing::TestWithParam<natten::DType> {
 protected:
  struct Parts {
    FusedProblem whole;
    std::vector<FusedProblem> parts;
    std::vector<std::int64_t> first;  // key of each part, then the number of keys
  };

  static Parts cut(std::uint64_t seed, natten::DType dtype) {
    Case c = general_case(seed, dtype);
    Rng rng(seed + 9);
    c.axes[0].is_causal = false;
    c.axes[0].length = std::max<std::int64_t>(1, c.axes[0].length);
    c.batch = std::max<std::int64_t>(1, c.batch);
    c.additional.reset();
    c.key_mask = false;
    c.logsumexp = c.grad_logsumexp = true;
    c.is_contiguous = true;
    Parts cut{FusedProblem(c), {}, {0}};
    while (cut.first.back() < *c.keys)
      cut.first.push_back(cut.first.back() + uniform(rng, 1, *c.keys - cut.first.back()));
    for (std::size_t i = 0; i + 1 < cut.first.size(); ++i) {
      Case part = c;
      part.keys = cut.first[i + 1] - cut.first[i];
      cut.parts.emplace_back(part);
      Buffers& to = cut.parts.back().buffers;
      Buffers& from = cut.whole.buffers;
      to.query = from.query;
      const auto copy = [&](Buffer& part_of, Buffer& all, std::int64_t dim) {
        const std::int64_t row = c.kv_heads * dim;
        for (std::int64_t b = 0; b < c.batch; ++b)
          for (std::int64_t j = 0; j < *part.keys * row; ++j)
            part_of.set(b * *part.keys * row + j, all.get((b * *c.keys + cut.first[i]) * row + j));
      };
      copy(to.key, from.key, c.dim);
      copy(to.value, from.value, c.value_dim);
    }
    return cut;
  }

  /// The views of one tensor of all parts.
  static std::vector<TensorView> views(Parts& cut, Buffer Buffers::*member) {
    std::vector<TensorView> views;
    for (FusedProblem& part : cut.parts) views.push_back((part.buffers.*member).view());
    return views;
  }
};

TEST_P(Merge, OfPartsIsAttentionOverTheirUnion) {
  const Bounds bounds = bounds_of(GetParam());
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Parts cut = Merge::cut(base_seed() * 31 + seed, GetParam());
    Buffers& whole = cut.whole.buffers;
    SCOPED_TRACE(testing::Message() << cut.whole.c << " in " << cut.parts.size() << " parts");
    for (FusedProblem& part : cut.parts) natten::run(part.forward());
    ASSERT_NO_THROW(natten::merge_attentions(views(cut, &Buffers::output),
                                             views(cut, &Buffers::logsumexp), whole.output.view(),
                                             whole.logsumexp.view()));
    const oracle::FusedResults expected = cut.whole.expected();
    // The parts are rounded before they are merged: one rounding more than attention itself.
    EXPECT_LE(relative_error(whole.output.dense(), expected.output), bounds.forward);
    EXPECT_LE(logsumexp_error(whole.logsumexp.dense(), expected.logsumexp),
              bounds_of(statistic_of(GetParam())).forward);

    for (FusedProblem& part : cut.parts)
      part.buffers.grad_logsumexp =
          Buffer(statistic_of(GetParam()), part.buffers.logsumexp.dense().shape);
    ASSERT_NO_THROW(natten::merge_attentions_backward(
        views(cut, &Buffers::output), views(cut, &Buffers::logsumexp), whole.grad_output.view(),
        whole.grad_logsumexp.view(), views(cut, &Buffers::grad_output),
        views(cut, &Buffers::grad_logsumexp)));
    Dense grad_query(whole.query.dense().shape);
    for (std::size_t i = 0; i < cut.parts.size(); ++i) {
      FusedProblem& part = cut.parts[i];
      natten::run(part.backward());
      for (std::int64_t j = 0; j < grad_query.size(); ++j)
        grad_query[j] += part.buffers.grad_query.get(j);
      const Case& c = cut.whole.c;
      const auto expect_part = [&](Buffer& got, const Dense& all, std::int64_t dim) {
        const std::int64_t row = c.kv_heads * dim, keys = *part.c.keys;
        Dense of_part({c.batch, keys, c.kv_heads, dim});
        for (std::int64_t b = 0; b < c.batch; ++b)
          for (std::int64_t j = 0; j < keys * row; ++j)
            of_part[b * keys * row + j] = all[(b * *c.keys + cut.first[i]) * row + j];
        const double error = distance(got.dense(), of_part);
        EXPECT_LE(error,
                  bounds.gradient * std::max(norm(all), 0.1 * cut.whole.incoming_gradient()));
      };
      expect_part(part.buffers.grad_key, expected.grad_key, c.dim);
      expect_part(part.buffers.grad_value, expected.grad_value, c.value_dim);
    }
    EXPECT_LE(
        distance(grad_query, expected.grad_query),
        bounds.gradient * std::max(norm(expected.grad_query), 0.1 * cut.whole.incoming_gradient()));
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, Merge, testing::ValuesIn(kDTypes),
                         [](const auto& info) { return std::string(name_of(info.param)); });

/// Merges `count` random results of rows [2, 3, heads 2] and dim 4.
struct MergeProblem {
  static constexpr std::int64_t kDim = 4;
  std::vector<Buffer> outputs, logsumexps, grad_outputs, grad_logsumexps;
  Buffer output, logsumexp, grad_output, grad_logsumexp;

  MergeProblem(std::size_t count, std::uint64_t seed, natten::DType dtype, bool strided) {
    Rng rng(seed);
    const Shape wide{2, 3, 2, kDim}, narrow{2, 3, 2};
    const auto input = [&](natten::DType type, const Shape& shape) {
      return Buffer(type, normal(rng, shape), {strided ? &rng : nullptr, true});
    };
    const auto result = [&](natten::DType type, const Shape& shape) {
      return Buffer(type, shape, {strided ? &rng : nullptr, false});
    };
    const natten::DType statistic = statistic_of(dtype);
    for (std::size_t i = 0; i < count; ++i) {
      outputs.push_back(input(dtype, wide));
      logsumexps.push_back(input(statistic, narrow));
      grad_outputs.push_back(result(dtype, wide));
      grad_logsumexps.push_back(result(statistic, narrow));
    }
    output = result(dtype, wide);
    logsumexp = result(statistic, narrow);
    grad_output = input(dtype, wide);
    grad_logsumexp = input(statistic, narrow);
  }
  static std::vector<TensorView> views(std::vector<Buffer>& buffers) {
    std::vector<TensorView> views;
    for (Buffer& buffer : buffers) views.push_back(buffer.view());
    return views;
  }
  void forward() {
    natten::merge_attentions(views(outputs), views(logsumexps), output.view(), logsumexp.view());
  }
  void backward(bool with_logsumexp = true) {
    natten::merge_attentions_backward(views(outputs), views(logsumexps), grad_output.view(),
                                      with_logsumexp ? grad_logsumexp.view() : TensorView{},
                                      views(grad_outputs), views(grad_logsumexps));
  }
};

/// The cases of tests/cases.py: logsumexps and outputs of two sets, and what they merge to.
TEST(MergeRows, SpecialValues) {
  constexpr double kInf = HUGE_VAL;
  const double kNan = std::nan("");
  struct Row {
    double lse[2], output[2], merged_lse, merged;
  };
  const Row rows[] = {
      {{0, 0}, {1, 3}, std::log(2.0), 2},
      {{1000, 1000}, {1, 3}, 1000 + std::log(2.0), 2},  // beyond exp
      {{-1000, -1000}, {1, 3}, -1000 + std::log(2.0), 2},
      {{-kInf, 0.5}, {7, 3}, 0.5, 3},
      {{-kInf, 0.5}, {kNan, 3}, 0.5, 3},  // an empty set's output is ignored
      {{0.5, -kInf}, {3, kInf}, 0.5, 3},
      {{-kInf, -kInf}, {7, 3}, -kInf, 0},
      {{-kInf, -kInf}, {kNan, kInf}, -kInf, 0},
      {{0, -1000}, {3, kNan}, 0, kNan},  // small, not empty
      {{0, 0}, {kNan, 3}, std::log(2.0), kNan},
      {{0, 0}, {kInf, 3}, std::log(2.0), kInf},
      {{kNan, 0}, {1, 3}, kNan, kNan},
      {{-kInf, kNan}, {1, 3}, kNan, kNan},
      {{kInf, 0}, {1, 3}, kInf, kNan},
      {{kInf, -kInf}, {1, 3}, kInf, kNan},
      {{kInf, kNan}, {1, 3}, kNan, kNan},
  };
  for (natten::DType dtype : kDTypes)
    for (bool swapped : {false, true})
      for (const Row& row : rows) {
        const auto number = [&](double x, natten::DType type) {
          return Buffer(type, Dense({1}, x));
        };
        const int first = swapped ? 1 : 0, second = 1 - first;
        const natten::DType statistic = statistic_of(dtype);
        Buffer outputs[] = {Buffer(dtype, Dense({1, 1}, row.output[first])),
                            Buffer(dtype, Dense({1, 1}, row.output[second]))};
        Buffer lses[] = {number(row.lse[first], statistic), number(row.lse[second], statistic)};
        Buffer output(dtype, Shape{1, 1}), lse(statistic, Shape{1});
        natten::merge_attentions({outputs[0].view(), outputs[1].view()},
                                 {lses[0].view(), lses[1].view()}, output.view(), lse.view());
        SCOPED_TRACE(testing::Message()
                     << name_of(dtype) << " lse " << row.lse[first] << ", " << row.lse[second]
                     << " output " << row.output[first] << ", " << row.output[second]);
        const auto expect_same = [](double got, double expected) {
          if (std::isfinite(expected))
            EXPECT_NEAR(got, expected, 1e-6 * std::max(1.0, std::fabs(expected)));
          else
            EXPECT_TRUE(std::isnan(expected) ? std::isnan(got) : got == expected) << got;
        };
        expect_same(output.get(0), row.merged);
        expect_same(lse.get(0), row.merged_lse);
        // An empty set has no part in the result, so it has no gradients.
        Buffer grad_outputs[] = {output, output}, grad_lses[] = {lse, lse};
        Buffer grad = Buffer(dtype, Dense({1, 1}, 1)), grad_lse = number(1, statistic);
        natten::merge_attentions_backward(
            {outputs[0].view(), outputs[1].view()}, {lses[0].view(), lses[1].view()}, grad.view(),
            grad_lse.view(), {grad_outputs[0].view(), grad_outputs[1].view()},
            {grad_lses[0].view(), grad_lses[1].view()});
        for (int i : {0, 1}) {
          const bool is_empty = lses[i].get(0) == -kInf;
          if (is_empty || std::isfinite(row.merged)) {
            EXPECT_TRUE(std::isfinite(grad_outputs[i].get(0)));
            EXPECT_TRUE(std::isfinite(grad_lses[i].get(0)));
          }
          if (is_empty) {
            EXPECT_EQ(grad_outputs[i].get(0), 0);
            EXPECT_EQ(grad_lses[i].get(0), 0);
          }
        }
      }
}

TEST(MergeRows, GradientsAgreeWithFiniteDifferences) {
  for (bool with_logsumexp : {true, false})
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      MergeProblem problem(1 + seed % 3, base_seed() + seed, natten::DType::float64, false);
      problem.backward(with_logsumexp);
      const auto objective = [&] {
        problem.forward();
        double sum = 0;
        const Dense out = problem.output.dense(), lse = problem.logsumexp.dense();
        for (std::int64_t i = 0; i < out.size(); ++i) sum += out[i] * problem.grad_output.get(i);
        for (std::int64_t i = 0; with_logsumexp && i < lse.size(); ++i)
          sum += lse[i] * problem.grad_logsumexp.get(i);
        return sum;
      };
      const auto expect_derivative = [&](std::vector<Buffer>& inputs, std::vector<Buffer>& grads) {
        for (std::size_t i = 0; i < inputs.size(); ++i)
          for (std::int64_t j = 0; j < inputs[i].view().size(); ++j) {
            const double x = inputs[i].get(j), step = 1e-5;
            inputs[i].set(j, x + step);
            double difference = objective();
            inputs[i].set(j, x - step);
            difference -= objective();
            inputs[i].set(j, x);
            ASSERT_NEAR(difference / (2 * step), grads[i].get(j), 1e-8) << "result " << i;
          }
      };
      expect_derivative(problem.outputs, problem.grad_outputs);
      expect_derivative(problem.logsumexps, problem.grad_logsumexps);
    }
}

TEST(MergeRows, StridedTensorsGiveTheSame) {
  for (natten::DType dtype : kDTypes)
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      MergeProblem strided(3, base_seed() + seed, dtype, true);
      MergeProblem plain(3, 0, dtype, false);
      const auto copy = [](Buffer& to, Buffer& from) {
        for (std::int64_t i = 0; i < from.view().size(); ++i) to.set(i, from.get(i));
      };
      for (std::size_t i = 0; i < 3; ++i) {
        copy(plain.outputs[i], strided.outputs[i]);
        copy(plain.logsumexps[i], strided.logsumexps[i]);
      }
      copy(plain.grad_output, strided.grad_output);
      copy(plain.grad_logsumexp, strided.grad_logsumexp);
      for (MergeProblem* problem : {&strided, &plain}) {
        problem->forward();
        problem->backward();
      }
      EXPECT_EQ(strided.output.dense().data, plain.output.dense().data);
      EXPECT_EQ(strided.logsumexp.dense().data, plain.logsumexp.dense().data);
      EXPECT_TRUE(strided.output.gaps_are_intact() && strided.logsumexp.gaps_are_intact());
      for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_EQ(strided.grad_outputs[i].dense().data, plain.grad_outputs[i].dense().data);
        EXPECT_EQ(strided.grad_logsumexps[i].dense().data, plain.grad_logsumexps[i].dense().data);
        EXPECT_TRUE(strided.grad_outputs[i].gaps_are_intact() &&
                    strided.grad_logsumexps[i].gaps_are_intact());
      }
    }
}

TEST(MergeRows, EmptyResultsHaveNoShare) {
  constexpr double kEmpty = -std::numeric_limits<double>::infinity();
  MergeProblem problem(2, base_seed(), natten::DType::float32, false);
  const Dense first = problem.outputs[0].dense(), lse = problem.logsumexps[0].dense();
  for (std::int64_t i = 0; i < lse.size(); ++i) problem.logsumexps[1].set(i, kEmpty);
  problem.forward();
  EXPECT_EQ(problem.output.dense().data, first.data);
  EXPECT_EQ(problem.logsumexp.dense().data, lse.data);
  problem.backward();
  EXPECT_EQ(norm(problem.grad_outputs[1].dense()), 0);
  EXPECT_EQ(norm(problem.grad_logsumexps[1].dense()), 0);

  for (std::int64_t i = 0; i < lse.size(); ++i) problem.logsumexps[0].set(i, kEmpty);
  problem.forward();
  EXPECT_EQ(norm(problem.output.dense()), 0);
  EXPECT_EQ(problem.logsumexp.get(0), kEmpty);
}

TEST(MergeRows, NanReachesItsRowOnly) {
  constexpr double kEmpty = -std::numeric_limits<double>::infinity();
  for (std::size_t first : {0, 1})
    for (double other : {0.5, std::nan(""), kEmpty}) {
      MergeProblem problem(2, base_seed(), natten::DType::float32, false);
      problem.logsumexps[first].set(4, std::nan(""));
      problem.logsumexps[1 - first].set(4, other);
      problem.forward();
      for (std::int64_t row = 0; row < problem.logsumexp.view().size(); ++row) {
        EXPECT_EQ(std::isnan(problem.logsumexp.get(row)), row == 4) << "beside " << other;
        EXPECT_EQ(std::isnan(problem.output.get(row * MergeProblem::kDim)), row == 4);
      }
    }
}

TEST(MergeRows, LargeLogsumexpsDoNotOverflow) {
  MergeProblem problem(2, base_seed(), natten::DType::float32, false);
  for (std::int64_t i = 0; i < problem.logsumexp.view().size(); ++i)
    for (Buffer& lse : problem.logsumexps) lse.set(i, 1000);
  problem.forward();
  EXPECT_NEAR(problem.logsumexp.get(0), 1000 + std::log(2.0), 1e-4);
  EXPECT_NEAR(problem.output.get(0), (problem.outputs[0].get(0) + problem.outputs[1].get(0)) / 2,
              1e-6);
}

}  // namespace
}  // namespace natten_tests
