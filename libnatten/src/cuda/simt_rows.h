#pragma once

// What the kernels of simt.h are made of: tiles of rows, the columns that rows see, and products of
// their vectors.
//
// A block is one warp and its threads are rows of one compact tile, which see nearly the same
// columns. They go through the union of their windows in step, so that a warp reads a column's
// vector once, and a mask per row says which columns count. What the mask takes out gets the
// weight 0, so a NaN or infinity in a vector that is summed up may reach all rows of a tile; but
// those of hidden keys are never summed up.

#include <cmath>
#include <cstring>
#include <limits>

#include "../dispatch.h"
#include "../operand.h"
#include "examples.h"
#include "machine.h"
#include "parts.h"

namespace natten::detail::cuda::simt {

inline constexpr int kRowsLog2 = 5;
inline constexpr int kRows = 1 << kRowsLog2;  // of a tile
inline constexpr int kChunkColumns = 8;       // columns that a row handles at once

NATTEN_DEVICE double number(double x) { return x; }
NATTEN_DEVICE float number(float x) { return x; }
NATTEN_DEVICE float number(bfloat16 x) { return x; }
NATTEN_DEVICE float number(float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return x;
#endif
}

/// Reads `kCount` elements: one, or 16 aligned bytes. With `kTf32` they are rounded to TF32.
template <bool kTf32 = false, int kCount, class T, class Sum>
NATTEN_DEVICE void load(Sum (&to)[kCount], const T* from) {
  if constexpr (kCount == 1) {
    to[0] = number(*from);
  } else {
    static_assert(kCount * sizeof(T) == 16);
    T elements[kCount];
#if defined(__CUDA_ARCH__)
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    std::memcpy(elements, &words, sizeof words);
#else
    std::memcpy(elements, from, sizeof elements);
#endif
    NATTEN_EACH (i, kCount) to[i] = number(elements[i]);
  }
  if constexpr (kTf32) {
    NATTEN_EACH (i, kCount) to[i] = round_to_tf32(to[i]);
  }
}

/// Splits the lowest digit off an index, whose base is `n`.
NATTEN_DEVICE int take(std::uint32_t& index, int n) {
  const std::uint32_t digit = index % static_cast<std::uint32_t>(n);
  index /= static_cast<std::uint32_t>(n);
  return static_cast<int>(digit);
}

/// A grid has fewer than 2^31 tokens, so that 32 bits hold its coordinates. None is negative: what
/// is known to have no sign takes one register, not two.
NATTEN_DEVICE std::int64_t widened(int c) { return static_cast<std::uint32_t>(c); }
NATTEN_DEVICE Coordinate widened(const int (&c)[kMaxRank]) {
  return {widened(c[0]), widened(c[1]), widened(c[2])};
}

/// What the tokens of a grid see. Per axis and token; not given, tokens see everything.
struct Sights {
  const Sight* of[kMaxRank] = {};
};

/// Writes what queries see, then keys (the queries that see them), axis by axis. Kernels look it up
/// instead of dividing 64-bit numbers.
struct FillSights {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr Rows kSides[] = {Rows::queries, Rows::keys};
  Axis axes[kMaxRank];  // of examples, the last one is that of the longest
  Places places[2][kMaxRank];
  Examples examples;
  Sight* data;
  int sides;  // 1: of queries, 2: of keys too

  FillSights(const Problem& p, int side_count) : data(nullptr), sides(side_count) {
    for (int i = 0; i < kMaxRank; ++i) {
      axes[i] = p.axes[i];
      for (int side = 0; side < 2; ++side) places[side][i] = places_of(p, i, kSides[side]);
    }
  }
  /// Tells examples apart. `p` is that of the longest.
  void set_examples(const Examples& some, const Problem& p) {
    if (!some) return;
    constexpr int kAxis = kMaxRank - 1;
    examples = some;
    axes[kAxis] = p.axes[kAxis];
    for (Places(&side)[kMaxRank] : places)
      side[kAxis].dilation = static_cast<int>(axes[kAxis].dilation);
  }
  /// Where those of a side begin.
  Sights sights(Rows rows) const {
    Sights s;
    const Sight* at = data;
    for (int side = 0; side < sides; ++side)
      for (int i = 0; i < kMaxRank; at += places[side][i].row_length, ++i)
        if (kSides[side] == rows) s.of[i] = at;
    return s;
  }
  std::int64_t count() const {
    std::int64_t n = 0;
    for (int side = 0; side < sides; ++side)
      for (const Places& axis : places[side]) n += axis.row_length;
    return n;
  }

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    const std::int64_t item = gpu.block() * kThreads + gpu.thread();
    std::int64_t number = item;
    for (int side = 0; side < sides; ++side)
      for (int i = 0; i < kMaxRank; ++i) {
        const Places& along = places[side][i];
        if (number < along.row_length) {
          int row = static_cast<int>(number);
          const Rows rows = side == 0 ? Rows::queries : Rows::keys;  // device code has no kSides
          Axis axis = axes[i];
          if (examples && i == kMaxRank - 1) {
            const Example e = example_of(rows, row);
            axis = axis_of_example(axis, e.queries, e.keys);
            row -= side == 0 ? e.first_query : e.first_key;
          }
          const Group group = along.group(row % along.dilation);
          data[item] = sight_of(axis, rows, group, row / along.dilation);
          return;
        }
        number -= along.row_length;
      }
  }

 private:
  /// The example that has a row: the last of those that begin no later.
  NATTEN_DEVICE Example example_of(Rows side, int row) const {
    int first = 0;
    for (int end = examples.count; end - first > 1;) {
      const int middle = first + (end - first) / 2;
      const Example& e = examples.data[middle];
      if ((side == Rows::queries ? e.first_query : e.first_key) <= row)
        first = middle;
      else
        end = middle;
    }
    return examples.data[first];
  }
};

/// A box of columns of a dilation group, by their places. On a circular axis it is a run of columns
/// that are given, those that are not, the first run again, and so on.
struct Box {
  int origin[kMaxRank];  // place of its first column
  int extent[kMaxRank];
  int run[kMaxRank];  // places before the first that is not given, or the seam

  NATTEN_DEVICE bool is_empty() const { return extent[0] <= 0 || extent[1] <= 0 || extent[2] <= 0; }
};
inline constexpr int kNoEnd = std::numeric_limits<std::int32_t>::max();

/// One row of a tile.
struct Row {
  int token[kMaxRank];   // its number
  int place[kMaxRank];   // among the rows of its group
  int column[kMaxRank];  // number of the first column of the group that is given
  bool is_active;        // else it repeats another row
};

/// The columns that the rows of a tile see, and which of them one row does.
struct View {
  Box box;
  // By offsets in the box:
  PlaceInterval seen[kMaxRank];
  int slot[kMaxRank];  // slot 0 of the row's window, where it is a query
  int own[kMaxRank];   // the row itself
};

/// Additional tokens lie along the last axis, and all rows see them.
NATTEN_DEVICE View view_of_additional(int count) {
  View view{};
  view.box = {{0, 0, 0}, {1, 1, count}, {kNoEnd, kNoEnd, kNoEnd}};
  NATTEN_EACH (i, kMaxRank) view.seen[i] = {0, view.box.extent[i]};
  return view;
}

/// Where the rows of a tile are: of which groups, by their first rows' numbers, and their places.
struct Tile {
  int group[kMaxRank], first[kMaxRank], last[kMaxRank];
  bool is_empty;  // as some are in shorter groups
};

/// Where the rows and columns of one grid begin along the last axis, and how many rows there are.
struct Span {
  int first_row, rows, first_column;
};

/// What is seen of what lies near some rows, from the first to the last.
NATTEN_DEVICE PlaceInterval overlap(const PlaceInterval& seen, const PlaceInterval& near, int first,
                                    int last) {
  const int begin = first + near.begin, end = last + near.end;
  return {seen.begin > begin ? seen.begin : begin, seen.end < end ? seen.end : end};
}

/// A grid of rows cut into tiles. All rows of a tile are of the same dilation groups.
struct Tiles {
  Places axes[kMaxRank];
  int groups[kMaxRank];
  int log2[kMaxRank];   // of a tile's shape
  int count[kMaxRank];  // per axis

  NATTEN_HOST_DEVICE std::int64_t total() const {
    return static_cast<std::int64_t>(count[0]) * count[1] * count[2];
  }

  /// Of a grid that is alone.
  NATTEN_DEVICE Span whole() const { return {0, axes[kMaxRank - 1].row_length, 0}; }

  /// A tile by its number, the lowest digits of `index`, which loses them.
  NATTEN_DEVICE Tile tile(std::uint32_t& index, const Span& span) const {
    Tile t{};
    for (int i = kMaxRank - 1; i >= 0; --i) {
      const int number = take(index, count[i]);
      t.group[i] = number % groups[i];
      t.first[i] = number / groups[i] << log2[i];
      const int length = i == kMaxRank - 1 ? span.rows : axes[i].row_length;
      const int rows = axes[i].count(length, t.group[i]);
      const int size = 1 << log2[i];
      t.last[i] = (rows - t.first[i] < size ? rows : t.first[i] + size) - 1;
      t.is_empty = t.is_empty || t.last[i] < t.first[i];
    }
    return t;
  }

  /// A row of a tile that is not empty.
  NATTEN_DEVICE Row row(const Tile& t, int thread, const Span& span) const {
    Row row;
    row.is_active = true;
    for (int i = kMaxRank - 1; i >= 0; --i) {
      const int place = t.first[i] + (thread & ((1 << log2[i]) - 1));
      thread >>= log2[i];
      row.is_active = row.is_active && place <= t.last[i];
      row.place[i] = place < t.last[i] ? place : t.last[i];
      row.token[i] = axes[i].number(t.group[i], row.place[i]);
      row.column[i] = axes[i].group(t.group[i]).first_column;
    }
    row.token[kMaxRank - 1] += span.first_row;
    row.column[kMaxRank - 1] += span.first_column;
    return row;
  }
  /// What the rows of a tile see. Keys see queries of which some may not be given (`kHasGaps`).
  /// Where `near_axis` is one, what they see along it of what lies `near` each row.
  template <bool kHasGaps>
  NATTEN_DEVICE View view(const Tile& t, const Row& row, const Span& span, const Sights& sights,
                          int near_axis = -1, const PlaceInterval& near = {0, 0}) const {
    View view;
    NATTEN_UNROLL
    for (int i = kMaxRank - 1; i >= 0; --i) {
      const Places& axis = axes[i];
      Sight own{0, axis.column_length, 0, 0};
      int begin = own.begin, end = own.end;
      if (const Sight* of = sights.of[i]) {
        own = of[row.token[i]];
        const int before = i == kMaxRank - 1 ? span.first_row : 0;
        begin = of[before + axis.number(t.group[i], t.first[i])].begin;
        end = of[before + axis.number(t.group[i], t.last[i])].end;
        if (i == near_axis) {
          const int first = own.own - (row.place[i] - t.first[i]);
          const int last = first + t.last[i] - t.first[i];
          const PlaceInterval of_row = overlap({own.begin, own.end}, near, own.own, own.own);
          const PlaceInterval of_tile = overlap({begin, end}, near, first, last);
          own.begin = of_row.begin;
          own.end = of_row.end;
          begin = of_tile.begin;
          end = of_tile.end;
        }
      }
      int origin = begin, run = kNoEnd;
      if (axis.turn > 0) {
        run = kHasGaps ? axis.count(axis.column_length, row.column[i]) : axis.turn;
        origin = axis.in_turn(begin);
        if (origin >= run) {
          begin += axis.turn - origin;
          origin = 0;
        }
        if (run == 0) end = begin;
      }
      view.box.origin[i] = origin;
      view.box.extent[i] = end - begin;
      view.box.run[i] = run;
      view.seen[i] = {own.begin - begin, own.end - begin};
      view.slot[i] = own.slot - begin;
      view.own[i] = own.own - begin;
    }
    return view;
  }
};

/// Cuts the grid of a pass into the tiles whose rows have the fewest columns to go through.
inline Tiles cut(const Problem& p, Rows rows) {
  Tiles best{};
  double least = 0;
  for (int a = 0; a <= kRowsLog2; ++a)
    for (int b = 0; a + b <= kRowsLog2; ++b) {
      Tiles t{};
      double columns = 1;
      const int log2[kMaxRank] = {a, b, kRowsLog2 - a - b};
      for (int i = 0; i < kMaxRank; ++i) {
        t.axes[i] = places_of(p, i, rows);
        t.groups[i] = t.axes[i].groups();
        t.log2[i] = log2[i];
        const std::int64_t size = std::int64_t{1} << log2[i];
        const std::int64_t length = t.axes[i].count(t.axes[i].row_length, 0);  // the longest group
        const std::int64_t kernel = rows == Rows::additional ? 1 : p.axes[i].kernel_size;
        const std::int64_t unit = i == kMaxRank - 1 ? kChunkColumns : 1;
        const std::int64_t seen = kernel + detail::min(size, length) - 1;
        t.count[i] = static_cast<int>(t.groups[i] * ((length + size - 1) / size));
        const std::int64_t read = (seen + unit - 1) / unit * unit;
        columns *= static_cast<double>(t.count[i]) * static_cast<double>(read);
      }
      if (a + b == 0 || columns < least) {
        best = t;
        least = columns;
      }
    }
  return best;
}

/// Something per column of a dilation group: `base` belongs to the first that is given.
template <class T>
struct Columns {
  T* base;
  std::int64_t stride[kMaxRank];
};

/// A tensor of columns, and what it holds of additional tokens.
template <class T>
struct ColumnOperand {
  Operand<T> grid, additional;
  Coordinate step{};  // strides of places

  ColumnOperand() = default;
  ColumnOperand(const Operand<T>& of_grid, const Operand<T>& of_additional = {})
      : grid(of_grid), additional(of_additional) {}
  NATTEN_HOST_DEVICE explicit operator bool() const { return bool(grid); }
  void set_step(const Tiles& tiles) {
    for (int i = 0; i < kMaxRank; ++i) step[i] = grid.grid[i] * tiles.axes[i].dilation;
  }
  /// The columns of the group that a row is of.
  NATTEN_DEVICE Columns<T> at(std::int64_t batch, std::int64_t head, const Row& row) const {
    return {grid.at(batch, head, widened(row.column)), {step[0], step[1], step[2]}};
  }
  /// Additional tokens, whose first steps do not matter.
  NATTEN_DEVICE Columns<T> additional_at(std::int64_t batch, std::int64_t head) const {
    return {additional.at(batch, head, 0), {step[0], step[1], additional.token}};
  }
};

/// Up to kChunkColumns columns of a box, on a line along its last axis.
struct Chunk {
  int at[kMaxRank];      // the first one, from the origin of the box
  int origin[kMaxRank];  // that place, less a turn for each time that `at` has crossed a seam
  int count;

  /// Chunk number `i` of a box that is not empty, row-major. Only the first has a number where an
  /// axis is circular.
  static NATTEN_DEVICE Chunk find(int i, const Box& box) {
    std::uint32_t index = static_cast<std::uint32_t>(i);
    Chunk chunk;
    chunk.at[2] = take(index, per_line(box)) * kChunkColumns;
    chunk.at[1] = take(index, box.extent[1]);
    chunk.at[0] = static_cast<int>(index);
    NATTEN_EACH (axis, kMaxRank) chunk.origin[axis] = box.origin[axis];
    chunk.set_count(box);
    return chunk;
  }
  static NATTEN_DEVICE int per_line(const Box& box) {
    return (box.extent[2] + kChunkColumns - 1) / kChunkColumns;
  }
  NATTEN_DEVICE bool is_in(const Box& box) const { return at[0] < box.extent[0]; }
  NATTEN_DEVICE void advance(const Box& box, const Tiles& tiles) {
    step(2, count, box, tiles);
    if (at[2] >= box.extent[2]) {
      reset(2, tiles);
      step(1, 1, box, tiles);
      if (at[1] >= box.extent[1]) {
        reset(1, tiles);
        step(0, 1, box, tiles);
      }
    }
    set_count(box);
  }
  NATTEN_DEVICE int place(int axis) const { return origin[axis] + at[axis]; }

  /// One bit per column: whether it is in a box.
  NATTEN_DEVICE std::uint32_t mask(const PlaceInterval (&box)[kMaxRank]) const {
    for (int i = 0; i < kMaxRank - 1; ++i)
      if (at[i] < box[i].begin || at[i] >= box[i].end) return 0;
    const auto below = [&](int end) {
      const int bits = end - at[2] < 0 ? 0 : end - at[2] < count ? end - at[2] : count;
      return (1u << bits) - 1;
    };
    return below(box[2].end) & ~below(box[2].begin);
  }

  /// Calls `f(j, offset in memory of column j by the strides)` for kChunkColumns columns. Past the
  /// end the last column comes again, so that there is something to read.
  template <class F>
  NATTEN_DEVICE void for_each(const std::int64_t (&stride)[kMaxRank], F&& f) const {
    for_each_from({place(0), place(1), place(2)}, stride, f);
  }
  /// The same by strides of a box, from its origin.
  template <class F>
  NATTEN_DEVICE void for_each_in_box(const std::int64_t (&stride)[kMaxRank], F&& f) const {
    for_each_from(at, stride, f);
  }

 private:
  NATTEN_DEVICE void step(int axis, int columns, const Box& box, const Tiles& tiles) {
    at[axis] += columns;
    if (place(axis) == box.run[axis]) {
      const int turn = tiles.axes[axis].turn;
      at[axis] += turn - box.run[axis];
      origin[axis] -= turn;
    }
  }
  NATTEN_DEVICE void reset(int axis, const Tiles& tiles) {
    at[axis] = 0;
    while (origin[axis] < 0) origin[axis] += tiles.axes[axis].turn;
  }
  NATTEN_DEVICE void set_count(const Box& box) {
    count = box.extent[2] - at[2] < kChunkColumns ? box.extent[2] - at[2] : kChunkColumns;
    const int left = box.run[2] - place(2);
    if (left < count) count = left;
  }
  template <class F>
  NATTEN_DEVICE void for_each_from(const int (&first)[kMaxRank],
                                   const std::int64_t (&stride)[kMaxRank], F&& f) const {
    std::int64_t offset = widened(first[0]) * stride[0] + widened(first[1]) * stride[1] +
                          widened(first[2]) * stride[2];
    NATTEN_EACH (j, kChunkColumns) {
      f(j, offset);
      if (j + 1 < count) offset += stride[2];
    }
  }
};

/// The vectors of a chunk, from element `first` on.
template <class T>
NATTEN_DEVICE void find_vectors(const T* (&vectors)[kChunkColumns], const Chunk& chunk,
                                const Columns<const T>& columns, int first) {
  chunk.for_each(columns.stride, [&](int j, std::int64_t offset) {
    vectors[j] = columns.base + offset + first;
#if defined(__CUDA_ARCH__)
    asm("" : "+l"(vectors[j]));  // else the compiler finds it again for every element
#endif
  });
}

/// Adds products of elements `d`, ... of `kBlock` vectors of `kVector` elements.
template <int kBlock, int kVector, bool kTf32, class T, class Sum>
NATTEN_DEVICE void add_products(Sum (&sums)[kChunkColumns], const T* row,
                                const T* const (&vectors)[kChunkColumns], int d) {
  Sum x[kBlock][kVector];
  NATTEN_EACH (v, kBlock) load<kTf32>(x[v], row + d + v * kVector);
  NATTEN_EACH (j, kChunkColumns) {
    const T* const at = vectors[j] + d;
    NATTEN_EACH (v, kBlock) {
      Sum y[kVector];
      load<kTf32>(y, at + v * kVector);
      NATTEN_EACH (e, kVector) sums[j] += x[v][e] * y[e];
    }
  }
}

/// sums[j] = <row, vectors[j]>
template <int kVector, bool kTf32, class T, class Sum>
NATTEN_DEVICE void dot(Sum (&sums)[kChunkColumns], const T* row,
                       const T* const (&vectors)[kChunkColumns], int dims) {
  constexpr int kLongest = 512;  // longer sums are sums of sums, which round less
  constexpr int kBlock = 2;
  NATTEN_EACH (j, kChunkColumns) sums[j] = 0;
  for (int d = 0; d < dims;) {
    const int end = dims - d < kLongest ? dims : d + kLongest;
    Sum part[kChunkColumns] = {};
    for (; d + kBlock * kVector <= end; d += kBlock * kVector)
      add_products<kBlock, kVector, kTf32>(part, row, vectors, d);
    for (; d < end; d += kVector) add_products<1, kVector, kTf32>(part, row, vectors, d);
    NATTEN_EACH (j, kChunkColumns) sums[j] += part[j];
  }
}

}  // namespace natten::detail::cuda::simt
