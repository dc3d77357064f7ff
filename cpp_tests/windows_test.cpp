#include <gtest/gtest.h>
#include <natten/neighborhood.h>

#include <sstream>

#include "../libnatten/src/cpu/most_columns.h"
#include "oracle.h"

namespace natten_tests {
namespace {

using natten::Axis;
using natten::Interval;

// The whole neighborhood is usable at compile time, as kernels for devices need it.
constexpr Axis kPlain{7, 7, 3, 1, 1, false};
constexpr Axis kCausalDilated{8, 8, 3, 2, 2, true};
static_assert(natten::window(kPlain, 0, 0).begin == 0 && natten::window(kPlain, 0, 0).end == 3);
static_assert(natten::window(kPlain, 0, 3).begin == 2 && natten::window(kPlain, 0, 3).end == 5);
static_assert(natten::window(kPlain, 0, 6).begin == 4 && natten::window(kPlain, 0, 6).size() == 3);
static_assert(natten::window(kCausalDilated, 1, 0).begin == 0);
static_assert(natten::window(kCausalDilated, 1, 2).begin == 1);
static_assert(natten::window(kCausalDilated, 1, 2).end == 3);
static_assert(natten::inverse_window(kPlain, 0, 0).end == 2);
static_assert(natten::inverse_window(kPlain, 0, 2).contains(0));
static_assert(natten::group_of(kCausalDilated, 5) == 1 &&
              natten::position_of(kCausalDilated, 5) == 2 &&
              natten::token_at(kCausalDilated, 1, 2) == 5 &&
              natten::group_length(kCausalDilated, 8, 1) == 4);

std::string text_of(const Axis& a) {
  std::ostringstream s;
  s << "queries " << a.query_length << " keys " << a.key_length << " kernel " << a.kernel_size
    << " stride " << a.stride << " dilation " << a.dilation << (a.is_causal ? " causal" : "");
  return s.str();
}

template <class F>
void for_each_axis(std::int64_t longest, F&& f) {
  for (std::int64_t length = 1; length <= longest; ++length)
    for (std::int64_t dilation = 1; dilation <= length; ++dilation)
      for (std::int64_t kernel = 1; kernel * dilation <= length; ++kernel)
        for (std::int64_t stride = 1; stride <= kernel; ++stride)
          for (bool is_causal : {false, true}) {
            const Axis axis{length, length, kernel, stride, dilation, is_causal};
            SCOPED_TRACE(text_of(axis));
            f(axis);
            if (testing::Test::HasFailure()) return;
          }
}

TEST(Windows, AreThoseOfTheDefinition) {
  for_each_axis(16, [](const Axis& axis) {
    const oracle::Pairs pairs = oracle::pairs_of(oracle::Axis{
        axis.query_length, axis.kernel_size, axis.stride, axis.dilation, axis.is_causal});
    for (std::int64_t token = 0; token < axis.query_length; ++token) {
      const std::int64_t group = group_of(axis, token), position = position_of(axis, token);
      ASSERT_EQ(token_at(axis, group, position), token);
      const Interval window = natten::window(axis, group, position);
      const auto& expected = pairs[index(token)];
      ASSERT_EQ(window.size(), static_cast<std::int64_t>(expected.size())) << "token " << token;
      for (const oracle::Pair& pair : expected) {
        ASSERT_EQ(token_at(axis, group, window.begin + pair.slot), pair.key) << "token " << token;
        ASSERT_EQ(window.begin + pair.slot - position + axis.kernel_size - 1, pair.offset);
      }
    }
  });
}

TEST(Windows, StayInTheirGroupAndGrowWithTheQuery) {
  for_each_axis(16, [](const Axis& axis) {
    std::int64_t tokens = 0;
    for (std::int64_t group = 0; group < axis.dilation; ++group) {
      const std::int64_t n = group_length(axis, axis.key_length, group);
      tokens += n;
      Interval previous{0, 0};
      for (std::int64_t position = 0; position < n; ++position) {
        const Interval window = natten::window(axis, group, position);
        ASSERT_GE(window.begin, previous.begin);
        ASSERT_GE(window.end, previous.end);
        ASSERT_LE(window.end, n);
        ASSERT_GE(window.size(), 1);
        if (axis.is_causal) {
          ASSERT_EQ(window.end, position + 1);
          ASSERT_LE(window.size(), axis.kernel_size);
        } else {
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

void expect_inverse(const Axis& axis) {
  for (std::int64_t group = 0; group < axis.dilation; ++group)
    for (std::int64_t key = 0; key < group_length(axis, axis.key_length, group); ++key) {
      const Interval queries = natten::inverse_window(axis, group, key);
      ASSERT_GE(queries.begin, 0);
      ASSERT_LE(queries.begin, queries.end);
      ASSERT_LE(queries.end, group_length(axis, axis.query_length, group));
      for (std::int64_t query = 0; query < group_length(axis, axis.query_length, group); ++query)
        ASSERT_EQ(queries.contains(query), natten::window(axis, group, query).contains(key))
            << "query " << query << " key " << key;
    }
}

TEST(Windows, InverseIsExact) { for_each_axis(16, expect_inverse); }

TEST(Windows, GeneralAttentionSeesAllKeys) {
  for (std::int64_t queries = 1; queries <= 9; ++queries)
    for (std::int64_t keys = 1; keys <= 9; ++keys)
      for (bool is_causal : {false, true}) {
        const Axis axis{queries, keys, keys, 1, 1, is_causal};
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
  const std::int64_t length = rows_are_keys ? axis.key_length : axis.query_length;
  std::int64_t most = 0;
  for (std::int64_t group = 0; group < std::min(axis.dilation, length); ++group) {
    const std::int64_t rows = group_length(axis, length, group);
    for (std::int64_t first = 0; first < rows; first += run) {
      std::int64_t begin = 0, end = 0;
      for (std::int64_t row = first; row < std::min(first + run, rows); ++row) {
        const Interval seen = rows_are_keys ? natten::inverse_window(axis, group, row)
                                            : natten::window(axis, group, row);
        if (row == first) begin = seen.begin;
        end = seen.end;
      }
      most = std::max(most, end - begin);
    }
  }
  return most;
}

TEST(MostColumns, IsThatOfAllRuns) {
  const auto expect = [](const Axis& axis) {
    for (bool rows_are_keys : {false, true})
      for (std::int64_t run : {1, 2, 3, 7, 16})
        ASSERT_EQ(natten::detail::cpu::most_columns(axis, rows_are_keys, run),
                  most_of_all_columns(axis, rows_are_keys, run))
            << text_of(axis) << (rows_are_keys ? " keys" : " queries") << " in runs of " << run;
  };
  for_each_axis(14, expect);
  Rng rng(7);
  for (int i = 0; i < 1500; ++i) {  // long enough for tokens to be left out
    const std::int64_t dilation = uniform(rng, 1, 3), kernel = uniform(rng, 1, 12);
    const std::int64_t length = dilation * kernel + uniform(rng, 0, 400);
    expect({length, length, kernel, uniform(rng, 1, kernel), dilation, chance(rng, 0.3)});
    const std::int64_t queries = uniform(rng, 1, 60), keys = uniform(rng, 1, 60);
    expect({queries, keys, keys, 1, 1, chance(rng, 0.5)});
    if (HasFatalFailure()) return;
  }
}

TEST(MostColumns, DoesNotVisitLongAxes) {
  for (std::int64_t run : {1, 3, 256}) {
    const Axis axis{1 << 20, 1 << 20, 13, 4, 2, false};
    EXPECT_LE(natten::detail::cpu::shortened(axis, run).key_length,
              2 * (4 * 17 + 6 * run + 8 * run))
        << "runs of " << run;
  }
}

TEST(Windows, BlockedAndFullAttentionAreSpecialCases) {
  const Axis blocked{12, 12, 4, 4, 1, false};
  for (std::int64_t i = 0; i < 12; ++i) EXPECT_EQ(natten::window(blocked, 0, i).begin, i / 4 * 4);
  const Axis full{12, 12, 12, 1, 1, false};
  for (std::int64_t i = 0; i < 12; ++i) EXPECT_EQ(natten::window(full, 0, i).size(), 12);
  // An even window reaches one further to the left.
  EXPECT_EQ(natten::window(Axis{12, 12, 4, 1, 1, false}, 0, 6).begin, 4);
  EXPECT_EQ(natten::window(Axis{12, 12, 4, 1, 1, false}, 0, 6).end, 8);
}

}  // namespace
}  // namespace natten_tests
