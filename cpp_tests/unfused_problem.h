#pragma once

#include "cases.h"

namespace natten_tests {

/// The unfused operations on random data. All of them read and write the same few tensors, so each
/// call picks its own inputs and a fresh result.
class UnfusedProblem {
 public:
  Case c;
  oracle::Sizes n;
  oracle::Pairs pairs;

  explicit UnfusedProblem(Case a_case) : c(std::move(a_case)), rng_(c.seed + 1) {
    c.kv_heads = c.heads;
    c.value_dim = c.dim;
    n = sizes_of(c);
    pairs = pairs_of(c);
    neighborhood_ = neighborhood_of(c, rng_);
    const Shape lengths = lengths_of(c);
    tokens = join({{c.batch, c.heads}, lengths, {c.dim}});
    keys = join({{c.batch, c.heads}, key_lengths_of(c), {c.dim}});
    slots = join({{c.batch, c.heads}, lengths, {n.window + n.additional}});
    additional = {c.batch, c.heads, n.additional, c.dim};
    bias = join({{c.heads}, offsets_of(c)});
  }

  Shape tokens, keys, slots, additional, bias;

  Buffer input(const Shape& shape) { return Buffer(c.dtype, normal(rng_, shape), layout(true)); }
  Buffer result(const Shape& shape) { return Buffer(c.dtype, shape, layout(false)); }
  /// A tensor for the additional tokens, if the case has any.
  Buffer additional_input() { return c.additional ? input(additional) : Buffer(); }
  Buffer additional_result() { return c.additional ? result(additional) : Buffer(); }
  bool flip() { return chance(rng_, 0.5); }

  /// With the case's mask.
  natten::Call call(natten::Op op, Buffers& buffers) {
    if (c.key_mask) buffers.key_mask = Buffer(natten::DType::boolean, mask_of(c), layout(false));
    natten::Call call;
    call.op = op;
    call.neighborhood = neighborhood_;
    call.tensors = buffers.views();
    call.options.allow_tf32 = c.allow_tf32;
    return call;
  }

 private:
  Layout layout(bool is_input) { return {c.is_contiguous ? nullptr : &rng_, is_input}; }

  Rng rng_;
  natten::Neighborhood neighborhood_;
};

/// Weights of slots that a window leaves empty may be anything: -inf and NaN must not count.
inline void poison_empty_slots(UnfusedProblem& problem, Buffer& attn) {
  const std::int64_t slots = problem.n.window + problem.n.additional;
  Dense used({problem.n.batch, problem.n.heads, problem.n.queries, slots});
  oracle::for_each_slot(problem.n, problem.pairs, [&](auto row, auto slot, auto, bool, auto) {
    used[row * slots + slot] = 1;
  });
  if (std::find(used.data.begin(), used.data.end(), 0.0) == used.data.end()) return;
  // A stride of 0 would make one element of memory serve a used and an empty slot.
  const Dense values = attn.dense();
  attn = Buffer(problem.c.dtype, values);
  for (std::int64_t i = 0; i < used.size(); ++i)
    if (used[i] == 0) attn.set(i, i % 2 ? -std::numeric_limits<double>::infinity() : std::nan(""));
}

}  // namespace natten_tests
