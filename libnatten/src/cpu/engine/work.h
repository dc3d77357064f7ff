#pragma once

#include "plan.h"

namespace natten::detail::cpu::engine {

/// Where a thread is in a pass. A value: each level of the engine fills in its part and hands a
/// copy down.
struct Work {
  // The unit. Heads are those of rows.
  std::int64_t batch = 0, first_head = 0, head_count = 0;
  std::int64_t unit = 0;  // of these heads
  // The item, and the lines of rows in it that are at hand: a strip of each.
  std::int64_t strip = 0, sweep = 0, slab = 0;  // numbers
  Coordinate group{};                           // dilation group
  Coordinate first{};                           // position in the group of the first row
  std::int64_t line_count = 0;                  // along axis 1
  std::int64_t row_count = 0;                   // of each line
  // The run of these rows over their columns.
  std::int64_t column_head = 0;  // first of the columns
  std::int64_t column_head_count = 0;
  std::int64_t query_head = 0;  // first of the queries, which are rows or columns
  int round = 0;
  std::int64_t piece = 0;  // of the columns
  // The block of rows.
  std::int64_t head = 0;  // whose turn it is, of head_count
  std::int64_t row = 0;   // of row_count, the first of the block

  /// The block's first row, in operands by row.
  std::int64_t row_index(const Plan& plan) const { return head * plan.head_rows + row; }

  /// The token at a position in the dilation group.
  std::int64_t token(const Plan& plan, int axis, std::int64_t position) const {
    return token_at(plan.problem().axes[axis], group[axis], position);
  }
  /// The number of the row at a position, among the rows that are given.
  Coordinate row_at(const Plan& plan, const Coordinate& position) const {
    Coordinate c;
    for (int i = 0; i < kMaxRank; ++i) c[i] = token(plan, i, position[i]) - plan.grid.row_offset(i);
    return c;
  }
  /// Likewise of a column; -1 along axes on which it is not given.
  Coordinate column_at(const Plan& plan, const Coordinate& position) const {
    Coordinate c;
    for (int i = 0; i < kMaxRank; ++i)
      c[i] = plan.grid.column_index(i, token(plan, i, position[i]));
    return c;
  }
};

/// The batches that are kept of a block and a piece of its columns.
struct KeptPart {
  std::int64_t count = 0;
  std::int64_t first = 0, first_step = 0;  // of those of all blocks; in that batch

  KeptPart(const Plan& plan, const Work& work) {
    const KeptBatches& kept = plan.kept;
    if (kept.count == 0) return;
    const std::int64_t blocks = (plan.strip + plan.block_rows() - 1) / plan.block_rows();
    const std::int64_t block =
        plan.has_pieces() ? work.head * blocks + work.row / plan.block_rows() : 0;
    first = block * kept.of_block + work.piece / kept.pieces * kept.of_piece;
    first_step = work.piece % kept.pieces * kept.piece_steps;
    count = std::clamp<std::int64_t>(kept.count - first, 0, kept.of_piece);
  }
};

/// The lines of columns that the lines of rows at hand see.
struct LinesSeen {
  Interval axis0;                      // by all
  Interval axis1[simd::kMostVectors];  // by each line of rows; the rest repeats the last
  Interval any1;                       // by any
  // Where rows have slots, the position of slot 0 of their windows.
  std::int64_t first_slot0 = 0;
  std::int64_t first_slot1[simd::kMostVectors] = {};

  LinesSeen(const Plan& plan, const Work& work)
      : axis0(plan.grid.columns(0, work.group[0], work.first[0])) {
    for (std::int64_t n = 0; n < simd::kMostVectors; ++n)
      axis1[n] = n < work.line_count ? plan.grid.columns(1, work.group[1], work.first[1] + n)
                                     : axis1[n - 1];
    // Of neighboring lines each begins and ends no earlier than the one before.
    any1 = {axis1[0].begin, axis1[work.line_count - 1].end};
    if (!rows_have_slots(plan.kind())) return;
    const Axis* axes = plan.problem().axes;
    first_slot0 = first_slot(axes[0], work.group[0], work.first[0]);
    for (std::int64_t n = 0; n < simd::kMostVectors; ++n)
      first_slot1[n] = n < work.line_count ? first_slot(axes[1], work.group[1], work.first[1] + n)
                                           : first_slot1[n - 1];
  }

  std::int64_t count() const { return axis0.size() * any1.size(); }
  /// The position of a line, the innermost one being 0.
  Coordinate line(std::int64_t number) const {
    return {axis0.begin + number / any1.size(), any1.begin + number % any1.size(), 0};
  }
};

/// Columns that rows are run over: a part of some lines, or some additional tokens.
template <class T>
struct Columns {
  const simd::Line<T>* lines;
  std::int64_t line_count;
  Interval part;          // positions on the innermost axis, or numbers of additional tokens
  const LinesSeen* seen;  // null for additional tokens, which every row sees

  bool are_additional() const { return !seen; }
};

/// Visits the rows at hand in all of their lines and heads: `f(row, its head, its number among the
/// rows that are given)`.
template <class F>
void for_each_row(const Plan& plan, const Work& work, F&& f) {
  for (std::int64_t line = 0; line < work.line_count; ++line)
    for (std::int64_t r = 0; r < work.row_count; ++r) {
      const Coordinate at =
          work.row_at(plan, {work.first[0], work.first[1] + line, work.first[2] + r});
      for (std::int64_t h = 0; h < work.head_count; ++h)
        f(h * plan.head_rows + line * plan.line_rows + r, work.first_head + h, at);
    }
}

/// Visits `count` columns of a line from `first` on in runs of which all or none are given:
/// `f(number of the first of a run or null, columns before it, columns)`. Numbers of a run are a
/// dilation apart.
template <class F>
void for_each_run(const Plan& plan, const Work& work, const Coordinate& first, std::int64_t count,
                  F&& f) {
  const Axis& axis = plan.problem().axes[2];
  Coordinate at = work.column_at(plan, first);
  if (at[0] < 0 || at[1] < 0) return f(nullptr, std::int64_t{0}, count);
  // Of the other axes what rows see between two columns that are given is given.
  if (axis.boundary != Boundary::circular) return f(&at, std::int64_t{0}, count);
  const std::int64_t length = plan.grid.column_length(2);
  const std::int64_t offset = rows_are_keys(plan.kind()) ? axis.query_offset : axis.key_offset;
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t ahead =
        floor_mod(work.token(plan, 2, first[2] + done) - offset, axis.grid_length);
    const bool is_given = ahead < length;
    const std::int64_t until = is_given ? length : axis.grid_length;
    const std::int64_t run =
        std::min(count - done, (until - ahead + axis.dilation - 1) / axis.dilation);
    at[2] = ahead;
    f(is_given ? &at : nullptr, done, run);
    done += run;
  }
}

}  // namespace natten::detail::cpu::engine
