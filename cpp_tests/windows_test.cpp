#include <gtest/gtest.h>
#include <natten/natten.h>

#include <algorithm>
#include <set>
#include <sstream>
#include <vector>

#include "../libnatten/src/cpu/most_columns.h"
#include "oracle.h"

namespace natten_tests {
namespace {

using natten::Axis;
using natten::Boundary;
using natten::Interval;

/// An axis whose queries and keys are the whole grid.
constexpr Axis whole(std::int64_t length, std::int64_t kernel_size, std::int64_t stride = 1,
                     std::int64_t dilation = 1, bool is_causal = false,
                     Boundary boundary = Boundary::shift) {
  return {length, length, kernel_size, stride, dilation, is_causal, boundary, length, 0, 0};
}
/// General attention.
constexpr Axis all_of(std::int64_t queries, std::int64_t keys, bool is_causal) {
  return {queries, keys, keys, 1, 1, is_causal, Boundary::shift, keys, 0, 0};
}

// The whole neighborhood is usable at compile time, as kernels for devices need it.
constexpr Axis kPlain = whole(7, 3);
constexpr Axis kCausalDilated = whole(8, 3, 2, 2, true);
static_assert(natten::window(kPlain, 0, 0).begin == 0 && natten::window(kPlain, 0, 0).end == 3);
static_assert(natten::window(kPlain, 0, 3).begin == 2 && natten::window(kPlain, 0, 3).end == 5);
static_assert(natten::window(kPlain, 0, 6).begin == 4 && natten::window(kPlain, 0, 6).size() == 3);
static_assert(natten::window(kCausalDilated, 1, 0).begin == 0);
static_assert(natten::window(kCausalDilated, 1, 2).begin == 1);
static_assert(natten::window(kCausalDilated, 1, 2).end == 3);
static_assert(natten::inverse_window(kPlain, 0, 0).end == 2);
static_assert(natten::inverse_window(kPlain, 0, 2).contains(0));
static_assert(natten::key_range(kPlain).begin == 0 && natten::key_range(kPlain).end == 7);
static_assert(natten::group_of(kCausalDilated, 5) == 1 &&
              natten::position_of(kCausalDilated, 5) == 2 &&
              natten::token_at(kCausalDilated, 1, 2) == 5 &&
              natten::group_length(kCausalDilated, 1) == 4);

std::string text_of(const Axis& a) {
  std::ostringstream s;
  s << "queries " << a.query_length << " from " << a.query_offset << " keys " << a.key_length
    << " from " << a.key_offset << " grid " << a.grid_length << " kernel " << a.kernel_size
    << " stride " << a.stride << " dilation " << a.dilation << (a.is_causal ? " causal " : " ")
    << name_of(a.boundary);
  return s.str();
}

/// The axis as the oracle knows it; parts are left out.
oracle::Axis oracle_axis(const Axis& a) {
  oracle::Axis axis;
  axis.length = a.grid_length;
  axis.kernel_size = a.kernel_size;
  axis.stride = a.stride;
  axis.dilation = a.dilation;
  axis.is_causal = a.is_causal;
  axis.boundary = a.boundary;
  return axis;
}

/// All axes that are not refused, with kernels to the length and some beyond where they are cut.
template <class F>
void for_each_axis(std::int64_t longest, F&& f) {
  for (std::int64_t length = 1; length <= longest; ++length)
    for (Boundary boundary : {Boundary::shift, Boundary::cut, Boundary::circular})
      for (std::int64_t dilation = 1; dilation <= length + 1; ++dilation)
        for (std::int64_t kernel = 1; kernel <= length + 3; ++kernel)
          for (std::int64_t stride = 1; stride <= kernel; ++stride)
            for (bool is_causal : {false, true}) {
              const bool is_circular = boundary == Boundary::circular;
              if (boundary != Boundary::cut && kernel * dilation > length) continue;
              if (is_circular && (is_causal || length % dilation || length / dilation % stride))
                continue;
              const Axis axis = whole(length, kernel, stride, dilation, is_causal, boundary);
              SCOPED_TRACE(text_of(axis));
              f(axis);
              if (testing::Test::HasFailure()) return;
            }
}

TEST(Windows, AreThoseOfTheDefinition) {
  for_each_axis(13, [](const Axis& axis) {
    const oracle::Pairs pairs = oracle::pairs_of(oracle_axis(axis));
    for (std::int64_t token = 0; token < axis.query_length; ++token) {
      const std::int64_t group = group_of(axis, token), position = position_of(axis, token);
      ASSERT_EQ(token_at(axis, group, position), token);
      const Interval window = natten::window(axis, group, position);
      const std::int64_t slot0 = first_slot(axis, group, position);
      const auto& expected = pairs[index(token)];
      ASSERT_EQ(window.size(), static_cast<std::int64_t>(expected.size())) << "token " << token;
      for (std::int64_t i = 0; i < window.size(); ++i) {
        const oracle::Pair& pair = expected[index(i)];
        const std::int64_t key = window.begin + i;
        ASSERT_EQ(key_index(axis, token_at(axis, group, key)), pair.key) << "token " << token;
        ASSERT_EQ(key - slot0, pair.slot) << "token " << token;
        ASSERT_EQ(key - position + axis.kernel_size - 1, pair.offset) << "token " << token;
      }
    }
  });
}

TEST(Windows, StayInTheirGroupAndGrowWithTheQuery) {
  for_each_axis(13, [](const Axis& axis) {
    std::int64_t tokens = 0;
    for (std::int64_t group = 0; group < axis.dilation; ++group) {
      const std::int64_t n = group_length(axis, group);
      tokens += n;
      Interval previous = natten::window(axis, group, 0);
      for (std::int64_t position = 0; position < n; ++position) {
        const Interval window = natten::window(axis, group, position);
        ASSERT_GE(window.begin, previous.begin);
        ASSERT_GE(window.end, previous.end);
        ASSERT_GE(window.size(), 1);
        ASSERT_LE(window.size(), axis.kernel_size);
        if (axis.boundary != Boundary::circular) {
          ASSERT_GE(window.begin, 0);
          ASSERT_LE(window.end, n);
        }
        if (axis.is_causal) {
          ASSERT_EQ(window.end, position + 1);
        } else if (axis.boundary != Boundary::cut) {
          ASSERT_EQ(window.size(), axis.kernel_size);
        }
        for (std::int64_t key : {window.begin, window.end - 1}) {
          const std::int64_t offset = key - position + axis.kernel_size - 1;
          ASSERT_GE(offset, 0);
          ASSERT_LT(offset, 2 * axis.kernel_size - 1);
        }
        previous = window;
      }
    }
    ASSERT_EQ(tokens, axis.key_length);
  });
}

/// Against the windows of the queries that are given: each key that is given, from the grid or
/// beyond it.
void expect_inverse(const Axis& axis) {
  for (std::int64_t k = 0; k < axis.key_length; ++k) {
    const std::int64_t key = axis.key_offset + k;
    const std::int64_t group = group_of(axis, key), position = position_of(axis, key);
    const Interval found = natten::inverse_window(axis, group, position);
    ASSERT_LE(found.begin, found.end);
    std::vector<std::int64_t> seeing, expected;
    for (std::int64_t p = found.begin; p < found.end; ++p) {
      const std::int64_t query = query_index(axis, token_at(axis, group, p));
      if (query >= 0) seeing.push_back(query);
    }
    if (found.size() > 0) {
      for (std::int64_t p : {found.begin, found.end - 1})
        ASSERT_GE(query_index(axis, token_at(axis, group, p)), 0);
    }
    for (std::int64_t q = 0; q < axis.query_length; ++q) {
      const std::int64_t token = axis.query_offset + q;
      if (group_of(axis, token) != group) continue;
      const Interval window = natten::window(axis, group, position_of(axis, token));
      for (std::int64_t p = window.begin; p < window.end; ++p)
        if (key_index(axis, token_at(axis, group, p)) == k) expected.push_back(q);
    }
    std::sort(seeing.begin(), seeing.end());
    ASSERT_EQ(seeing, expected) << "key " << key;
  }
}

/// Calls `f` with parts of a grid: all queries, and keys that hold what they need and some more.
template <class F>
void for_each_part(const Axis& whole, F&& f) {
  for (std::int64_t first = 0; first < whole.grid_length; ++first)
    for (std::int64_t length = 1; first + length <= whole.grid_length; ++length) {
      Axis part = whole;
      part.query_offset = first;
      part.query_length = length;
      const Interval needed = natten::key_range(part);
      for (std::int64_t before : {0, 2})
        for (std::int64_t after : {0, 3}) {
          part.key_offset = needed.begin - before;
          part.key_length = needed.size() + before + after;
          if (part.boundary == Boundary::circular)
            part.key_length = std::min(part.key_length, part.grid_length);
          SCOPED_TRACE(text_of(part));
          f(part);
          if (testing::Test::HasFailure()) return;
        }
    }
}

TEST(Windows, KeyRangeIsWhatTheQueriesSee) {
  for_each_axis(8, [](const Axis& axis) {
    const oracle::Pairs pairs = oracle::pairs_of(oracle_axis(axis));
    for_each_part(axis, [&](const Axis& part) {
      const Interval range = natten::key_range(part);
      ASSERT_LE(range.size(), axis.grid_length);
      ASSERT_LE(range.begin, part.query_offset);
      std::set<std::int64_t> in_range, seen;
      for (std::int64_t t = range.begin; t < range.end; ++t)
        in_range.insert(natten::detail::floor_mod(t, axis.grid_length));
      for (std::int64_t q = 0; q < part.query_length; ++q)
        for (const oracle::Pair& pair : pairs[index(part.query_offset + q)]) seen.insert(pair.key);
      for (std::int64_t key : seen) ASSERT_TRUE(in_range.count(key)) << key;
      if (part.boundary != Boundary::circular) {
        ASSERT_EQ(range.begin, *seen.begin());
        ASSERT_EQ(range.end, *seen.rbegin() + 1);
      }
    });
  });
}

TEST(Windows, OfPartsAreThoseOfTheWholeGrid) {
  for_each_axis(7, [](const Axis& axis) {
    for_each_part(axis, [&](const Axis& part) {
      ASSERT_TRUE(has_all_keys(part));
      Axis whole_keys = axis;
      for (std::int64_t q = 0; q < part.query_length; ++q) {
        const std::int64_t token = part.query_offset + q;
        const std::int64_t group = group_of(part, token), position = position_of(part, token);
        const Interval window = natten::window(part, group, position);
        ASSERT_EQ(window.begin, natten::window(axis, group, position).begin);
        ASSERT_EQ(window.end, natten::window(axis, group, position).end);
        for (std::int64_t p = window.begin; p < window.end; ++p) {
          const std::int64_t key = key_index(part, token_at(part, group, p));
          ASSERT_GE(key, 0);
          ASSERT_EQ(natten::detail::floor_mod(key + part.key_offset, axis.grid_length),
                    key_index(whole_keys, token_at(axis, group, p)));
        }
      }
      expect_inverse(part);
      if (part.key_length <= 1 || part.key_length == part.grid_length) return;
      const Interval needed = natten::key_range(part);
      Axis lacking = part;  // one key too few on either side
      lacking.key_offset = needed.begin;
      lacking.key_length = needed.size() - 1;
      if (lacking.key_length > 0) {
        ASSERT_FALSE(has_all_keys(lacking));
      }
      lacking.key_offset = needed.begin + 1;
      if (lacking.key_length > 0 && needed.size() < part.grid_length) {
        ASSERT_FALSE(has_all_keys(lacking));
      }
    });
  });
}

TEST(Windows, InverseIsExact) { for_each_axis(13, expect_inverse); }

TEST(Windows, GeneralAttentionSeesAllKeys) {
  for (std::int64_t queries = 1; queries <= 9; ++queries)
    for (std::int64_t keys = 1; keys <= 9; ++keys)
      for (bool is_causal : {false, true}) {
        const Axis axis = all_of(queries, keys, is_causal);
        SCOPED_TRACE(text_of(axis));
        for (std::int64_t query = 0; query < queries; ++query) {
          const Interval window = natten::window(axis, 0, query);
          ASSERT_EQ(window.begin, 0);
          ASSERT_EQ(window.end, is_causal ? std::min(query + 1, keys) : keys);
        }
        expect_inverse(axis);
        if (HasFatalFailure()) return;
      }
}

/// What `most_columns` means: it visits all runs of rows of all groups.
std::int64_t most_of_all_columns(const Axis& axis, bool rows_are_keys, std::int64_t run) {
  std::int64_t most = 0;
  for (std::int64_t group = 0; group < axis.dilation; ++group) {
    const Interval rows = natten::detail::cpu::rows_of(axis, rows_are_keys, group);
    for (std::int64_t first = rows.begin; first < rows.end; first += run) {
      std::int64_t begin = 0, end = 0;
      for (std::int64_t row = first; row < std::min(first + run, rows.end); ++row) {
        const Interval seen = natten::detail::cpu::columns_of(axis, rows_are_keys, group, row);
        if (row == first) begin = seen.begin;
        end = seen.end;
      }
      most = std::max(most, end - begin);
    }
  }
  return most;
}

const std::int64_t kRuns[] = {1, 2, 3, 7, 16};

void expect_most_columns(const Axis& axis) {
  for (bool rows_are_keys : {false, true})
    for (std::int64_t run : kRuns)
      ASSERT_EQ(natten::detail::cpu::most_columns(axis, rows_are_keys, run),
                most_of_all_columns(axis, rows_are_keys, run))
          << text_of(axis) << (rows_are_keys ? " keys" : " queries") << " in runs of " << run;
}

TEST(MostColumns, IsThatOfAllRuns) {
  for_each_axis(12, expect_most_columns);
  Rng rng(7);
  for (int i = 0; i < 1500; ++i) {  // long enough for tokens to be left out
    const std::int64_t dilation = uniform(rng, 1, 3), kernel = uniform(rng, 1, 12);
    const std::int64_t stride = uniform(rng, 1, kernel);
    const std::int64_t length = dilation * kernel + uniform(rng, 0, 400);
    for (Boundary boundary : {Boundary::shift, Boundary::cut})
      expect_most_columns(whole(length, kernel, stride, dilation, chance(rng, 0.3), boundary));
    const std::int64_t period = dilation * stride;
    expect_most_columns(whole((length + period - 1) / period * period, kernel, stride, dilation,
                              false, Boundary::circular));
    expect_most_columns(all_of(uniform(rng, 1, 60), uniform(rng, 1, 60), chance(rng, 0.5)));
    if (HasFatalFailure()) return;
  }
}

TEST(MostColumns, AreEnoughForParts) {
  for_each_axis(7, [](const Axis& axis) {
    for_each_part(axis, [&](const Axis& part) {
      for (bool rows_are_keys : {false, true})
        for (std::int64_t run : kRuns)
          ASSERT_GE(natten::detail::cpu::most_columns(part, rows_are_keys, run),
                    most_of_all_columns(part, rows_are_keys, run))
              << (rows_are_keys ? " keys" : " queries") << " in runs of " << run;
    });
  });
}

TEST(MostColumns, DoesNotVisitLongAxes) {  // it would not end
  for (Boundary boundary : {Boundary::shift, Boundary::cut, Boundary::circular})
    for (bool rows_are_keys : {false, true})
      EXPECT_EQ(natten::detail::cpu::most_columns(
                    whole(std::int64_t{1} << 50, 13, 4, 2, false, boundary), rows_are_keys, 1),
                natten::detail::cpu::most_columns(whole(1 << 12, 13, 4, 2, false, boundary),
                                                  rows_are_keys, 1));
}

TEST(Windows, BlockedAndFullAttentionAreSpecialCases) {
  const Axis blocked = whole(12, 4, 4);
  for (std::int64_t i = 0; i < 12; ++i) EXPECT_EQ(natten::window(blocked, 0, i).begin, i / 4 * 4);
  const Axis full = whole(12, 12);
  for (std::int64_t i = 0; i < 12; ++i) EXPECT_EQ(natten::window(full, 0, i).size(), 12);
  // An even window reaches one further to the left.
  EXPECT_EQ(natten::window(whole(12, 4), 0, 6).begin, 4);
  EXPECT_EQ(natten::window(whole(12, 4), 0, 6).end, 8);
}

}  // namespace
}  // namespace natten_tests
