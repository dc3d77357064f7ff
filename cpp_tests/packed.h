#pragma once

// Examples of different lengths that lie one after another in the tensors of one call.

#include <functional>
#include <utility>

#include "cases.h"

namespace natten_tests {

/// Attention over all keys of an example or, without `Case::keys`, a neighborhood.
struct PackedCase {
  Case c;  ///< of all tokens
  natten::Packing packing;

  /// Examples on circular axes are a job each on CUDA.
  bool is_one_job() const { return c.axes[0].boundary != natten::Boundary::circular; }
};

inline std::ostream& operator<<(std::ostream& s, const PackedCase& p) {
  s << p.c << " ends of queries";
  for (std::int64_t end : p.packing.cumulative_seqlen_Q) s << " " << end;
  s << " ends of keys";
  for (std::int64_t end : p.packing.cumulative_seqlen_KV) s << " " << end;
  return s;
}

/// Some examples have no queries or no keys, where that is allowed.
inline PackedCase packed_case(std::uint64_t seed, const Precision& precision, std::int64_t longest,
                              bool is_neighborhood) {
  Rng rng(seed + 7);
  PackedCase p{random_case(seed, precision.dtype, 1), {{0}, {0}, {}, {}}};
  Case& c = p.c;
  c.allow_tf32 = precision.allow_tf32;
  c.additional.reset();
  c.logsumexp = true;
  c.gives_grid = false;
  c.batch = uniform(rng, 1, 2);
  c.rpb = is_neighborhood && chance(rng, 0.4);
  oracle::Axis axis{0};
  axis.is_causal = chance(rng, 0.4);
  std::int64_t shortest = 0;
  if (is_neighborhood) {
    axis.dilation = chance(rng, 0.4) ? uniform(rng, 2, 3) : 1;
    if (!axis.is_causal && chance(rng, 0.2)) axis.boundary = natten::Boundary::circular;
    if (axis.boundary == natten::Boundary::shift && chance(rng, 0.4))
      axis.boundary = natten::Boundary::cut;
    axis.kernel_size = uniform(rng, 1, std::max<std::int64_t>(1, longest / 4));
    axis.stride = chance(rng, 0.4) ? uniform(rng, 1, axis.kernel_size) : 1;
    shortest = axis.boundary == natten::Boundary::cut ? 1 : axis.kernel_size * axis.dilation;
  }
  const std::int64_t unit =
      axis.boundary == natten::Boundary::circular ? axis.dilation * axis.stride : 1;
  const auto draw = [&] {
    const std::int64_t length = uniform(rng, shortest, std::max(shortest, longest));
    if (!is_neighborhood) return chance(rng, 0.25) ? 0 : std::max<std::int64_t>(1, length);
    return (length + unit - 1) / unit * unit;
  };
  for (std::int64_t i = uniform(rng, 1, 5); i > 0; --i) {
    auto& queries = p.packing.cumulative_seqlen_Q;
    auto& keys = p.packing.cumulative_seqlen_KV;
    queries.push_back(queries.back() + draw());
    keys.push_back(is_neighborhood ? queries.back() : keys.back() + draw());
  }
  axis.length = p.packing.cumulative_seqlen_Q.back();
  if (!is_neighborhood) c.keys = p.packing.cumulative_seqlen_KV.back();
  c.axes = {axis};
  return p;
}

/// Runs the forward and the backward pass by `run(call, packing)` and compares with the reference,
/// which knows one example at a time. What is NaN in one reaches no other.
inline void expect_examples(
    const PackedCase& packed, ErrorTable& errors,
    const std::function<void(const natten::Call&, const natten::Packing&)>& run) {
  const Case& c = packed.c;
  SCOPED_TRACE(testing::Message() << packed << " (NATTEN_TEST_SEED=" << base_seed() << ")");
  const std::vector<std::int64_t>&ends_q = packed.packing.cumulative_seqlen_Q,
        &ends_kv = packed.packing.cumulative_seqlen_KV;
  FusedProblem problem(c);
  Buffers& b = problem.buffers;

  // Elements of a tensor [batch, tokens, row] that are those of some tokens.
  struct Side {
    Buffer Buffers::*tensor;
    bool is_of_keys;
    std::int64_t row;
  };
  const Side inputs[] = {
      {&Buffers::query, false, c.heads * c.dim},
      {&Buffers::key, true, c.kv_heads * c.dim},
      {&Buffers::value, true, c.kv_heads * c.value_dim},
      {&Buffers::grad_output, false, c.heads * c.value_dim},
      {&Buffers::grad_logsumexp, false, c.heads},
      {&Buffers::key_mask, true, 1},
  };
  const auto for_each_element = [&](std::size_t example, bool is_of_keys, std::int64_t batches,
                                    std::int64_t row, auto&& f) {
    const auto& ends = is_of_keys ? ends_kv : ends_q;
    std::int64_t i = 0;
    for (std::int64_t batch = 0; batch < batches; ++batch)
      for (std::int64_t at = ends[example] * row; at < ends[example + 1] * row; ++at)
        f(batch * ends.back() * row + at, i++);
  };

  const std::size_t count = ends_q.size() - 1;
  Rng rng(c.seed + 9);
  const std::size_t poisoned =
      chance(rng, 0.3) ? index(uniform(rng, 0, static_cast<std::int64_t>(count) - 1)) : count;
  const bool is_poisoned = poisoned < count;
  std::vector<FusedProblem> examples;
  std::vector<Dense> masks(count);
  for (std::size_t e = 0; e < count; ++e) {
    Case of_example = c;
    of_example.axes[0].length = ends_q[e + 1] - ends_q[e];
    if (c.keys) of_example.keys = ends_kv[e + 1] - ends_kv[e];
    of_example.key_mask = false;
    examples.emplace_back(of_example);
    if (c.rpb) examples[e].buffers.rpb = Buffer(c.dtype, b.rpb.dense());
    for (const Side& side : inputs) {
      Buffer& whole = b.*side.tensor;
      if (!whole.view()) continue;
      const bool is_mask = side.tensor == &Buffers::key_mask;
      const std::int64_t batches = whole.view().shape[0];
      Dense part = is_mask ? Dense({batches, ends_kv[e + 1] - ends_kv[e]})
                           : (examples[e].buffers.*side.tensor).dense();
      for_each_element(e, side.is_of_keys, batches, side.row,
                       [&](std::int64_t at, std::int64_t i) { part[i] = whole.get(at); });
      if (is_mask)
        masks[e] = part;
      else
        examples[e].buffers.*side.tensor = Buffer(whole.view().dtype, part);
    }
  }
  if (is_poisoned)
    for (const Side& side : inputs)
      if (side.tensor != &Buffers::key_mask && (b.*side.tensor).view())
        for_each_element(poisoned, side.is_of_keys, c.batch, side.row,
                         [&](std::int64_t at, std::int64_t) {
                           (b.*side.tensor).set(at, std::numeric_limits<double>::quiet_NaN());
                         });

  for (const natten::Op op : {natten::Op::attention_forward, natten::Op::attention_backward}) {
    natten::Call call = problem.call(op);
    call.tensors.grad_rpb = {};
    call.options.deterministic = c.seed % 3 != 0;
    ASSERT_NO_THROW(run(call, packed.packing));
  }
  b.expect_gaps_intact();

  struct Result {
    const char* name;
    Buffer Buffers::*tensor;
    Dense oracle::FusedResults::*expected;
    bool is_of_keys;
    std::int64_t row;
  };
  const Result results[] = {
      {"output", &Buffers::output, &oracle::FusedResults::output, false, c.heads * c.value_dim},
      {"logsumexp", &Buffers::logsumexp, &oracle::FusedResults::logsumexp, false, c.heads},
      {"grad_query", &Buffers::grad_query, &oracle::FusedResults::grad_query, false,
       c.heads * c.dim},
      {"grad_key", &Buffers::grad_key, &oracle::FusedResults::grad_key, true, c.kv_heads * c.dim},
      {"grad_value", &Buffers::grad_value, &oracle::FusedResults::grad_value, true,
       c.kv_heads * c.value_dim},
  };
  std::vector<oracle::FusedResults> expected;
  for (std::size_t e = 0; e < count; ++e) {
    expected.emplace_back();
    if (ends_kv[e + 1] == ends_kv[e]) {  // the reference knows no attention without keys
      for (const Result& r : results)
        expected[e].*r.expected = (examples[e].buffers.*r.tensor).dense();
      for (const Result& r : results)
        for (double& x : (expected[e].*r.expected).data)
          x = r.tensor == &Buffers::logsumexp ? -HUGE_VAL : 0;
      continue;
    }
    oracle::FusedInputs of_example = examples[e].oracle_inputs();
    if (c.key_mask)
      of_example.pairs = oracle::masked(of_example.pairs, masks[e], c.batch, of_example.n.keys);
    expected[e] = oracle::fused(of_example);
  }
  for (const Result& r : results) {
    Dense got = (b.*r.tensor).dense(), all(got.shape);
    for (std::size_t e = 0; e < count; ++e)
      for_each_element(e, r.is_of_keys, c.batch, r.row, [&](std::int64_t at, std::int64_t i) {
        all[at] = (expected[e].*r.expected)[i];
        if (e == poisoned) got[at] = all[at] = 0;
      });
    const double error =
        r.tensor == &Buffers::logsumexp ? logsumexp_error(got, all)
        : std::string(r.name).rfind("grad_", 0) == 0
            ? relative_error(got, all, is_poisoned ? norm(all) : problem.incoming_gradient())
            : relative_error(got, all);
    errors.expect(r.name, c.precision(), 1, error);
  }
}

}  // namespace natten_tests
