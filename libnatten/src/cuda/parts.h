#pragma once

// Rows and columns of a pass: queries and keys, keys and queries, or additional tokens and queries.
// Either may be a part of the grid. Kernels number those that are given, and within a dilation
// group count places: positions, from the group's first row or column that is given. Where all of
// the grid is given places are positions.
//
// Along a circular axis places of columns go on: after `turn` of them the first comes again. Where
// a part is given only, the last ones of each turn are not.

#include <natten/problem.h>

#include <algorithm>
#include <cstdint>

namespace natten::detail::cuda {

enum class Rows : std::uint8_t { queries, keys, additional };

/// A dilation group along an axis.
struct Group {
  std::int64_t of_grid;                        ///< as the grid counts groups
  int first_row, first_column;                 ///< numbers of its first ones that are given...
  std::int64_t row_position, column_position;  ///< ...and their positions
};

/// How rows and columns are numbered along an axis.
struct Places {
  struct Origin {
    std::int64_t group, position;
  };
  int dilation = 1;
  int row_length = 1, column_length = 1;  ///< how many are given; of keys, up to the grid's end
  int turn = 0;                           ///< of columns; 0 where the axis is not circular
  Origin row{0, 0}, column{0, 0};         ///< where the first ones are

  /// Groups that have a row; these have the numbers of their first rows.
  int groups() const { return std::min(dilation, row_length); }
  NATTEN_HOST_DEVICE Group group(int first_row) const {
    Group g{row.group + first_row, first_row, 0, row.position, column.position};
    if (g.of_grid >= dilation) {
      g.of_grid -= dilation;
      ++g.row_position;
    }
    std::int64_t first_column = g.of_grid - column.group;
    if (first_column < 0) {
      first_column += dilation;
      ++g.column_position;
    }
    g.first_column = static_cast<int>(first_column);
    return g;
  }
  /// How many of `length` tokens are in the group whose first one is number `first`.
  NATTEN_HOST_DEVICE int count(int length, int first) const {
    return first < length ? (length - first - 1) / dilation + 1 : 0;
  }
  /// The number of a token of the group whose first one is number `first`. Tiles reach some places
  /// past the last one, which backends leave room for.
  NATTEN_HOST_DEVICE int number(int first, int place) const { return place * dilation + first; }
  /// The place of a column in its first turn.
  NATTEN_HOST_DEVICE int in_turn(int place) const {
    if (turn == 0) return place;
    place %= turn;
    return place < 0 ? place + turn : place;
  }
};

/// `p` as kernels take it: keys of circular axes begin in the grid, and dilations are no longer
/// than the axis, beyond which each token is a group anyway.
inline Problem simplified(Problem p) {
  for (Axis& axis : p.axes) {
    // There may be no keys at all.
    axis.dilation = std::min(axis.dilation, std::max<std::int64_t>(axis.grid_length, 1));
    if (axis.boundary == Boundary::circular)
      axis.key_offset = detail::floor_mod(axis.key_offset, axis.grid_length);
  }
  return p;
}

/// Of a simplified problem.
inline Places places_of(const Problem& p, int axis, Rows rows) {
  const Axis& a = p.axes[axis];
  const auto queries = static_cast<int>(a.query_length), keys = static_cast<int>(a.key_length);
  Places places;
  if (rows == Rows::additional) {  // they lie along the last axis, and each sees all queries
    places.row_length = axis == kMaxRank - 1 ? static_cast<int>(p.additional) : 1;
    places.column_length = queries;
    return places;
  }
  const Places::Origin query{group_of(a, a.query_offset), position_of(a, a.query_offset)};
  const Places::Origin key{group_of(a, a.key_offset), position_of(a, a.key_offset)};
  const bool are_queries = rows == Rows::queries;
  places.dilation = static_cast<int>(a.dilation);
  const bool is_circular = a.boundary == Boundary::circular;
  const std::int64_t in_grid =
      is_circular ? keys : std::min<std::int64_t>(keys, a.grid_length - a.key_offset);
  places.row_length = are_queries ? queries : keys;
  places.column_length = are_queries ? static_cast<int>(in_grid) : queries;
  places.row = are_queries ? query : key;
  places.column = are_queries ? key : query;
  if (is_circular) places.turn = static_cast<int>(a.grid_length / a.dilation);
  return places;
}

/// An `Interval` of places, or of offsets from one, which take 32 bits.
struct PlaceInterval {
  int begin, end;
};

/// What a row sees along an axis, in places of columns.
struct Sight {
  int begin, end;  ///< the columns
  int slot;        ///< slot 0 of its window, where rows are queries
  int own;         ///< the row itself
};

/// Of the row at a place of a group.
NATTEN_HOST_DEVICE inline Sight sight_of(const Axis& axis, Rows rows, const Group& group,
                                         int place) {
  const std::int64_t position = group.row_position + place;
  const bool are_queries = rows == Rows::queries;
  const Interval seen = are_queries ? window(axis, group.of_grid, position)
                                    : inverse_window(axis, group.of_grid, position);
  const std::int64_t slot =
      are_queries ? first_slot(axis, group.of_grid, position) : group.column_position;
  const auto place_of = [&](std::int64_t x) { return static_cast<int>(x - group.column_position); };
  return {place_of(seen.begin), place_of(seen.end), place_of(slot), place_of(position)};
}

}  // namespace natten::detail::cuda
