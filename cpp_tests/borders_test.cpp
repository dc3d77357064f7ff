#include <natten/natten.h>

#include "cases.h"

// What parts of a grid and masks promise beyond the definition.

namespace natten_tests {
namespace {

using natten::Boundary;
using Indices = std::vector<std::vector<std::int64_t>>;

/// Where element `i` of a tensor of a shape lies in one of shape `whole`, of which the first has
/// some indices along some neighboring axes, from `first_axis` on; -1 where an index is.
std::int64_t place_in(const Shape& whole, const Shape& shape, std::size_t first_axis,
                      const Indices& indices, std::int64_t i) {
  std::int64_t place = 0, stride = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    std::int64_t at = i % shape[axis];
    i /= shape[axis];
    if (axis >= first_axis && axis < first_axis + indices.size())
      at = indices[axis - first_axis][index(at)];
    if (at < 0) return -1;
    place += at * stride;
    stride *= whole[axis];
  }
  return place;
}

/// The elements of `x` at some indices; NaN where an index is -1.
Dense take(const Dense& x, std::size_t first_axis, const Indices& indices) {
  Shape shape = x.shape;
  for (std::size_t i = 0; i < indices.size(); ++i)
    shape[first_axis + i] = static_cast<std::int64_t>(indices[i].size());
  Dense taken(shape);
  for (std::int64_t i = 0; i < taken.size(); ++i) {
    const std::int64_t from = place_in(x.shape, shape, first_axis, indices, i);
    taken[i] = from >= 0 ? x[from] : std::nan("");
  }
  return taken;
}

/// Adds elements to where `take` takes them from.
void add_at(Dense& to, std::size_t first_axis, const Indices& indices, const Dense& from) {
  for (std::int64_t i = 0; i < from.size(); ++i) {
    const std::int64_t at = place_in(to.shape, from.shape, first_axis, indices, i);
    if (at >= 0) {
      to[at] += from[i];
    } else {
      EXPECT_EQ(from[i], 0) << "the gradient of padding";
    }
  }
}

/// A case of a whole grid, of windows that are processed in one piece.
Case whole_case(std::uint64_t seed, natten::DType dtype, int rank) {
  for (;; seed += 7919) {
    Case c = random_case(seed, dtype, rank);
    if (c.is_part() || c.batch == 0) continue;
    c.gives_grid = false;
    c.is_contiguous = c.logsumexp = true;
    return c;
  }
}

class Parts : public Property {};

/// The queries of a grid in parts along each axis, with the keys that they need.
TEST_P(Parts, AddUpToTheWhole) {
  int parts = 0;
  for (std::uint64_t i = 0; i < 12; ++i) {
    const Case c = whole_case(base_seed() + 100 * i + 31 * static_cast<std::uint64_t>(dtype()),
                              dtype(), rank());
    std::ostringstream text;
    text << c;
    SCOPED_TRACE(text.str());
    FusedProblem whole(c);
    if (!accepts(whole.backward())) continue;
    run(whole.forward());
    run(whole.backward());
    Buffers& w = whole.buffers;
    Rng rng(c.seed + 3);
    Dense grad_key(w.key.dense().shape), grad_value(w.value.dense().shape);
    Dense grad_rpb = w.grad_rpb.view() ? Dense(w.rpb.dense().shape) : Dense();

    std::vector<std::vector<std::pair<std::int64_t, std::int64_t>>> cuts;  // begin and length
    std::int64_t count = 1;
    for (const oracle::Axis& axis : c.axes) {
      cuts.emplace_back();
      for (std::int64_t begin = 0; begin < axis.length;) {
        const std::int64_t length =
            std::min(axis.length - begin, uniform(rng, 1, std::max<std::int64_t>(1, axis.length)));
        cuts.back().emplace_back(begin, length);
        begin += length;
      }
      count *= static_cast<std::int64_t>(cuts.back().size());
    }
    for (std::int64_t part = 0; part < count; ++part) {
      Case p = c;
      std::int64_t rest = part;
      Indices queries, keys;
      for (std::size_t a = 0; a < p.axes.size(); ++a) {
        oracle::Axis& axis = p.axes[a];
        const auto& [begin, length] =
            cuts[a][index(rest % static_cast<std::int64_t>(cuts[a].size()))];
        rest /= static_cast<std::int64_t>(cuts[a].size());
        draw_keys(rng, axis, begin, length);
        queries.emplace_back();
        for (std::int64_t q = 0; q < length; ++q) queries.back().push_back(begin + q);
        keys.emplace_back();
        for (std::int64_t k = 0; k < axis.given_keys; ++k) {
          std::int64_t token = axis.key_offset + k;
          if (axis.boundary == Boundary::circular)
            token = natten::detail::floor_mod(token, axis.length);
          keys.back().push_back(token >= 0 && token < axis.length ? token : -1);
        }
      }
      FusedProblem problem(p);
      Buffers& b = problem.buffers;
      const auto copy = [&](Buffer& to, Buffer& from, const Indices& indices) {
        to = Buffer(from.view().dtype, take(from.dense(), 1, indices));
      };
      copy(b.query, w.query, queries);
      copy(b.key, w.key, keys);
      copy(b.value, w.value, keys);
      copy(b.grad_output, w.grad_output, queries);
      if (b.grad_logsumexp.view()) copy(b.grad_logsumexp, w.grad_logsumexp, queries);
      if (b.key_mask.view()) copy(b.key_mask, w.key_mask, keys);
      b.rpb = w.rpb;
      b.additional_keys = w.additional_keys;
      b.additional_values = w.additional_values;
      run(problem.forward());
      run(problem.backward());
      ++parts;
      const auto expect_same = [&](const char* name, Buffer& got, Buffer& of_whole) {
        const Dense expected = take(of_whole.dense(), 1, queries), result = got.dense();
        if (backend() == "vectorized" || backend() == "naive") {
          EXPECT_EQ(result.data, expected.data) << name << ": other bits";
        } else {
          const double error = &got == &b.logsumexp
                                   ? logsumexp_error(result, expected)
                                   : relative_error(result, expected, whole.incoming_gradient());
          EXPECT_LE(error, ErrorTable::bound_of(name, dtype())) << name;
        }
      };
      expect_same("output", b.output, w.output);
      expect_same("logsumexp", b.logsumexp, w.logsumexp);
      expect_same("grad_query", b.grad_query, w.grad_query);
      add_at(grad_key, 1, keys, b.grad_key.dense());
      add_at(grad_value, 1, keys, b.grad_value.dense());
      if (grad_rpb.is_given())
        for (std::int64_t j = 0; j < grad_rpb.size(); ++j) grad_rpb[j] += b.grad_rpb.get(j);
      if (HasFailure()) return;
    }
    const auto expect_sum = [&](const char* name, const Dense& got, Buffer& of_whole) {
      if (!of_whole.view()) return;
      // Each part's gradients are rounded to the element type.
      EXPECT_LE(relative_error(got, of_whole.dense(), whole.incoming_gradient()),
                2 * bounds_of(dtype()).gradient)
          << name;
    };
    expect_sum("grad_key", grad_key, w.grad_key);
    expect_sum("grad_value", grad_value, w.grad_value);
    expect_sum("grad_rpb", grad_rpb, w.grad_rpb);
  }
  if (parts == 0) GTEST_SKIP() << backend() << " refuses all cases";
}

class Masks : public Property {};

/// Whatever hidden keys and values hold, results are the same and their gradients 0.
TEST_P(Masks, WhatIsHiddenMayBeNoNumber) {
  int cases = 0;
  for (std::uint64_t i = 0; i < 10; ++i) {
    Case c = whole_case(base_seed() + 100 * i + 77, dtype(), rank());
    c.key_mask = true;
    std::ostringstream text;
    text << c;
    SCOPED_TRACE(text.str());
    FusedProblem problem(c);
    if (!accepts(problem.backward())) continue;
    ++cases;
    Buffers& b = problem.buffers;
    run(problem.forward());
    run(problem.backward());
    const std::vector<std::pair<const char*, Buffer*>> results = {
        {"output", &b.output},     {"logsumexp", &b.logsumexp},   {"grad_query", &b.grad_query},
        {"grad_key", &b.grad_key}, {"grad_value", &b.grad_value}, {"grad_rpb", &b.grad_rpb}};
    std::vector<Dense> finite;
    for (const auto& [name, buffer] : results) finite.push_back(buffer->dense());
    const std::int64_t keys = volume(key_lengths_of(c));
    const auto is_hidden = [&](std::int64_t element, std::int64_t per_token) {
      const std::int64_t token = element / per_token;
      return b.key_mask.get(c.shares_mask ? token % keys : token) == 0;
    };
    const std::int64_t per_key = c.kv_heads * c.dim, per_value = c.kv_heads * c.value_dim;
    for (std::int64_t j = 0; j < b.key.view().size(); ++j)
      if (is_hidden(j, per_key)) b.key.set(j, j % 3 ? std::nan("") : -HUGE_VAL);
    for (std::int64_t j = 0; j < b.value.view().size(); ++j)
      if (is_hidden(j, per_value)) b.value.set(j, j % 3 ? HUGE_VAL : std::nan(""));
    run(problem.forward());
    run(problem.backward());
    for (std::size_t j = 0; j < results.size(); ++j)
      EXPECT_EQ(results[j].second->dense().data, finite[j].data) << results[j].first;
    for (std::int64_t j = 0; j < b.key.view().size(); ++j)
      if (is_hidden(j, per_key)) {
        ASSERT_EQ(b.grad_key.get(j), 0) << "grad_key " << j;
      }
    for (std::int64_t j = 0; j < b.value.view().size(); ++j)
      if (is_hidden(j, per_value)) {
        ASSERT_EQ(b.grad_value.get(j), 0) << "grad_value " << j;
      }
  }
  if (cases == 0) GTEST_SKIP() << backend() << " refuses all cases";
}

INSTANTIATE_TEST_SUITE_P(Registry, Parts, every_property(), Property::name);
INSTANTIATE_TEST_SUITE_P(Registry, Masks, every_property(), Property::name);

TEST(KeyRange, IsPublic) {
  natten::Neighborhood n;
  n.kernel_size = {3, 5};
  n.dilation = {1, 2};
  n.boundary = {static_cast<std::int64_t>(Boundary::cut),
                static_cast<std::int64_t>(Boundary::circular)};
  const auto ranges = natten::key_range({0, 1}, {4, 2}, {8, 20}, n);
  ASSERT_EQ(ranges.size(), 2u);
  EXPECT_EQ(ranges[0].begin, 0);
  EXPECT_EQ(ranges[0].end, 5);
  EXPECT_EQ(ranges[1].begin, -3);
  EXPECT_EQ(ranges[1].end, 7);
  // All around: the whole axis.
  EXPECT_EQ(natten::key_range({0, 0}, {8, 20}, {8, 20}, n)[1].begin, 0);
  EXPECT_EQ(natten::key_range({0, 0}, {8, 20}, {8, 20}, n)[1].end, 20);
}

}  // namespace
}  // namespace natten_tests
