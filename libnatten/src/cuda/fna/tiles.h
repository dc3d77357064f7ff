#pragma once

// Index logic of the tile kernels, for host and device.
//
// A pass has rows and columns. Rows are queries and columns the keys they see, or rows are keys (or
// additional tokens) and columns the queries that see them. A block owns a tile of rows, a box of
// positions of one dilation group, and visits the tiles of columns that cover the union of what its
// rows see. These start at the union's own first column, wherever that lies. Extents of tiles are
// powers of two, chosen at run time. Rows and columns go by their places (parts.h).

#include <natten/neighborhood.h>
#include <natten/problem.h>

#include "../machine.h"
#include "../parts.h"

namespace natten::detail::cuda {

/// A box of tokens whose extents are powers of two; token `i` of it in row-major order.
struct TileShape {
  int bits[kMaxRank];

  NATTEN_HOST_DEVICE int extent(int axis) const { return 1 << bits[axis]; }
  NATTEN_HOST_DEVICE int size() const { return 1 << (bits[0] + bits[1] + bits[2]); }
  /// The bits of a token's number below those of an axis.
  NATTEN_HOST_DEVICE int below(int axis) const {
    return axis == 2 ? 0 : axis == 1 ? bits[2] : bits[2] + bits[1];
  }
  /// Where token `i` lies along an axis, from the tile's first token.
  NATTEN_HOST_DEVICE int offset(int i, int axis) const {
    return (i >> below(axis)) & (extent(axis) - 1);
  }
};

/// The grid of a pass.
struct PassGrid {
  Axis axes[kMaxRank];
  Places places[kMaxRank];
  int groups[kMaxRank];  ///< that have a row
  Rows rows;
  TileShape row_tile, column_tile;
  int row_tiles[kMaxRank];  ///< along each axis, in the largest dilation group

  NATTEN_HOST_DEVICE std::int64_t blocks_per_head() const {
    std::int64_t blocks = 1;
    NATTEN_EACH (a, kMaxRank) blocks *= std::int64_t{row_tiles[a]} * groups[a];
    return blocks;
  }
  /// The most rows that a group has.
  NATTEN_HOST_DEVICE int longest(int axis) const {
    return places[axis].count(places[axis].row_length, 0);
  }
  /// The places of a group that have columns inside the grid, whose numbers end at `column_end`;
  /// those before it may hold anything. A circular axis goes on and on.
  NATTEN_HOST_DEVICE PlaceInterval columns(int axis, int column_end, const Group& group) const {
    const Places& along = places[axis];
    if (along.turn > 0) return {0, 1 << 30};
    const int before = group.column_position < 0 ? static_cast<int>(-group.column_position) : 0;
    return {before, along.count(column_end, group.first_column)};
  }
  /// How many of the rows from `origin` on, of a group that has `count`, a tile holds.
  NATTEN_HOST_DEVICE int valid(int axis, int count, int origin) const {
    const int left = count - origin, extent = row_tile.extent(axis);
    return left < 0 ? 0 : left < extent ? left : extent;
  }
  /// What the row at a place of a group sees along an axis, which is `along`. `kind` is that of the
  /// rows: a kernel that knows it holds less code.
  NATTEN_HOST_DEVICE PlaceInterval seen(Rows kind, int axis, const Axis& along, const Group& group,
                                        int place) const {
    if (kind == Rows::additional) return {0, places[axis].column_length};
    const Sight sight = sight_of(along, kind, group, place);
    return {sight.begin, sight.end};
  }
};

/// The rows of one block.
struct RowTile {
  Group group[kMaxRank];
  int origin[kMaxRank];  ///< place of the first row...
  int own[kMaxRank];     ///< ...and where it is among places of columns
  int valid[kMaxRank];   ///< rows that exist, along each axis; may be 0

  NATTEN_HOST_DEVICE bool holds(const TileShape& tile, int row) const {
    return tile.offset(row, 0) < valid[0] && tile.offset(row, 1) < valid[1] &&
           tile.offset(row, 2) < valid[2];
  }
};

/// Block `index` of a head. Neighboring blocks take neighboring tiles, which share columns.
NATTEN_HOST_DEVICE inline RowTile row_tile(const PassGrid& grid, std::uint32_t index) {
  const auto take = [&](int count) {
    const std::uint32_t digit = index % static_cast<std::uint32_t>(count);
    index /= static_cast<std::uint32_t>(count);
    return static_cast<int>(digit);
  };
  RowTile tile;
  NATTEN_UNROLL
  for (int a = kMaxRank - 1; a >= 0; --a)
    tile.origin[a] = take(grid.row_tiles[a]) << grid.row_tile.bits[a];
  NATTEN_UNROLL
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const Places& places = grid.places[a];
    const Group group = places.group(take(grid.groups[a]));
    tile.group[a] = group;
    tile.own[a] = tile.origin[a] + static_cast<int>(group.row_position - group.column_position);
    tile.valid[a] = grid.valid(a, places.count(places.row_length, group.first_row), tile.origin[a]);
  }
  return tile;
}

/// What the rows of a tile see, one interval for each place along each axis: rows lie on a grid and
/// see boxes, so no more is needed. Rows that do not exist see nothing.
struct SeenIntervals {
  PlaceInterval* intervals;  ///< at most rows + 2: of axis 0, then axis 1, then axis 2
  const TileShape& tile;

  NATTEN_HOST_DEVICE int index(int axis, int offset) const {
    const int before = axis == 0 ? 0 : axis == 1 ? tile.extent(0) : tile.extent(0) + tile.extent(1);
    return before + offset;
  }
  NATTEN_HOST_DEVICE PlaceInterval& at(int axis, int offset) const {
    return intervals[index(axis, offset)];
  }
  /// Calls `f(index, axis, offset)` for the part of one of `threads` threads.
  template <class F>
  NATTEN_HOST_DEVICE void for_each(int thread, int threads, F&& f) const {
    const int after[] = {tile.extent(0), tile.extent(0) + tile.extent(1)};
    const int count = after[1] + tile.extent(2);
    NATTEN_DO_NOT_UNROLL
    for (int i = thread; i < count; i += threads) {
      const int a = i < after[0] ? 0 : i < after[1] ? 1 : 2;
      f(i, a, a == 0 ? i : a == 1 ? i - after[0] : i - after[1]);
    }
  }
  /// Computes the part of one of `threads` threads, of all axes at once: a window takes divisions.
  /// `axis_at(a)` is axis `a` of the rows' grid.
  template <class AxisAt>
  NATTEN_HOST_DEVICE void compute(const PassGrid& grid, Rows kind, const RowTile& rows, int thread,
                                  int threads, const AxisAt& axis_at) const {
    for_each(thread, threads, [&](int i, int a, int offset) {
      intervals[i] = offset < rows.valid[a]
                         ? grid.seen(kind, a, axis_at(a), rows.group[a], rows.origin[a] + offset)
                         : PlaceInterval{0, 0};
    });
  }
};

/// Bounds of the intervals of some rows along one axis. Both ends of intervals grow with the row.
struct Bounds {
  int least_begin, greatest_begin, least_end, greatest_end;
};

/// Bounds of rows `first` .. `last`, which form a box. Where none exists nothing is seen.
NATTEN_HOST_DEVICE inline Bounds bounds_of(const SeenIntervals& intervals, const TileShape& tile,
                                           const RowTile& rows, int axis, int first, int last) {
  const int from = tile.offset(first, axis);
  int to = tile.offset(last, axis);
  if (to >= rows.valid[axis]) to = rows.valid[axis] - 1;
  if (from > to) return {0, 0, 0, 0};
  const PlaceInterval low = intervals.at(axis, from), high = intervals.at(axis, to);
  return {low.begin, high.begin, low.end, high.end};
}

/// What a tile of columns is to a set of rows.
enum class Overlap : std::uint8_t { none, some, all };

NATTEN_HOST_DEVICE inline Overlap overlap_of(const Bounds (&bounds)[kMaxRank],
                                             const TileShape& tile, const int (&origin)[kMaxRank]) {
  bool none = false, all = true;
  NATTEN_EACH (a, kMaxRank) {
    const int begin = origin[a], end = origin[a] + tile.extent(a);
    none = none || end <= bounds[a].least_begin || begin >= bounds[a].greatest_end;
    all = all && bounds[a].greatest_begin <= begin && end <= bounds[a].least_end;
  }
  return none ? Overlap::none : all ? Overlap::all : Overlap::some;
}

NATTEN_HOST_DEVICE constexpr std::uint64_t low_bits(int count) {
  return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

/// Turns intervals into words with one bit per column of a tile. Along an axis the columns of an
/// interval are a run of bits that repeats with the period of the axis above it; a product with the
/// word that has one bit per period repeats it.
struct MaskWords {
  std::uint64_t repeat[kMaxRank];

  NATTEN_HOST_DEVICE explicit MaskWords(const TileShape& tile) {
    int period = 0;
    NATTEN_UNROLL
    for (int a = kMaxRank - 1; a >= 0; --a) {
      period += tile.bits[a];
      repeat[a] = period >= 6 ? 1 : ~std::uint64_t{0} / low_bits(1 << period);
    }
  }
  /// The columns of a tile from `origin` on along an axis that lie in an interval along it.
  NATTEN_HOST_DEVICE std::uint64_t word_of_axis(const TileShape& tile, int axis,
                                                const PlaceInterval& seen, int origin) const {
    const int extent = tile.extent(axis), below = tile.below(axis);
    int begin = seen.begin - origin, end = seen.end - origin;
    begin = begin < 0 ? 0 : begin;
    end = end > extent ? extent : end;
    const std::uint64_t run =
        begin < end ? low_bits(end << below) & ~low_bits(begin << below) : std::uint64_t{0};
    return run * repeat[axis];
  }
  /// The columns of the tile at `origin` that lie in a row's intervals.
  NATTEN_HOST_DEVICE std::uint64_t word(const TileShape& tile,
                                        const PlaceInterval (&seen)[kMaxRank],
                                        const int (&origin)[kMaxRank]) const {
    std::uint64_t word = ~std::uint64_t{0};
    NATTEN_EACH (a, kMaxRank) word &= word_of_axis(tile, a, seen[a], origin[a]);
    return word;
  }
};

/// One tile of columns.
struct ColumnTile {
  int origin[kMaxRank];  ///< place of the first column; of additional tokens the last counts
  int place[kMaxRank];   ///< the same in the first turn of a circular axis
  int head;
  bool is_additional;
};

/// The columns that a block visits: for each of `heads` heads the tiles that cover a box, then
/// those that cover additional tokens.
struct ColumnTiles {
  int low[kMaxRank];
  int counts[kMaxRank];  ///< of tiles along each axis
  int additional;        ///< tiles of additional tokens
  int heads;

  /// The tiles that cover `seen` begin with it; but they lie among the group's `columns`, if they
  /// can: then they are copied without a look at each column.
  NATTEN_HOST_DEVICE void set_axis(int axis, const Bounds& seen, const PlaceInterval& columns,
                                   const TileShape& tile) {
    const int bits = tile.bits[axis];
    const int extent = seen.greatest_end - seen.least_begin;
    counts[axis] = extent > 0 ? (extent + (1 << bits) - 1) >> bits : 0;
    const int last = columns.end - (counts[axis] << bits);
    low[axis] = last >= columns.begin && last < seen.least_begin ? last : seen.least_begin;
  }
  NATTEN_HOST_DEVICE int per_head() const { return counts[0] * counts[1] * counts[2] + additional; }
  NATTEN_HOST_DEVICE int count() const { return heads * per_head(); }
  /// Tile `index`, less than `count()`.
  NATTEN_HOST_DEVICE ColumnTile at(int index, const PassGrid& grid) const {
    const TileShape& shape = grid.column_tile;
    ColumnTile tile{{0, 0, 0}, {0, 0, 0}, index / per_head(), false};
    index %= per_head();
    const int of_box = per_head() - additional;
    if (index >= of_box) {
      tile.is_additional = true;
      tile.origin[kMaxRank - 1] = (index - of_box) * shape.size();
      return tile;
    }
    NATTEN_UNROLL
    for (int a = kMaxRank - 1; a >= 0; --a) {
      tile.origin[a] = low[a] + (index % counts[a] << shape.bits[a]);
      tile.place[a] = grid.places[a].in_turn(tile.origin[a]);
      index /= counts[a];
    }
    return tile;
  }
};

}  // namespace natten::detail::cuda
