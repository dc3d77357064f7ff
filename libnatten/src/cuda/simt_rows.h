#pragma once

// What the kernels of simt.h are made of: tiles of rows, the columns that rows see, and products of
// their vectors.
//
// A block is one warp and its threads are rows of one compact tile, which see nearly the same
// columns. They go through the union of their windows in step, so that a warp reads a column's
// vector once, and a mask per row says which columns count. What the mask takes out gets the
// weight 0, so a NaN or infinity in a vector that is summed up may reach all rows of a tile.

#include <cmath>
#include <cstring>

#include "../dispatch.h"
#include "../operand.h"
#include "machine.h"

namespace natten::detail::cuda::simt {

inline constexpr int kRowsLog2 = 5;
inline constexpr int kRows = 1 << kRowsLog2;  // of a tile
inline constexpr int kChunk = 8;              // columns that a row handles at once

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

/// A grid has fewer than 2^31 tokens, so that 32 bits hold its coordinates.
NATTEN_DEVICE Coordinate widened(const int (&c)[kMaxRank]) { return {c[0], c[1], c[2]}; }

/// Interval of positions.
struct Range {
  int begin, end;
};

/// The windows of the tokens of a grid. Per axis and token; not given, tokens see everything.
struct Windows {
  const Range* of[kMaxRank] = {};
};

/// Writes windows of queries, then of keys (the queries that see them), axis by axis. Kernels look
/// them up instead of dividing 64-bit numbers.
struct FillWindows {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  Axis axes[kMaxRank];
  Range* ranges;
  int sides;  // 1: of queries, 2: of keys too

  NATTEN_HOST_DEVICE static std::int64_t length(const Axis& axis, int side) {
    return side == 0 ? axis.query_length : axis.key_length;
  }
  /// Where the windows of a side begin.
  Windows windows(int which) const {
    Windows w;
    const Range* at = ranges;
    for (int side = 0; side <= which; ++side)
      for (int i = 0; i < kMaxRank; at += length(axes[i], side), ++i)
        if (side == which) w.of[i] = at;
    return w;
  }
  std::int64_t count() const {
    std::int64_t n = 0;
    for (int side = 0; side < sides; ++side)
      for (const Axis& axis : axes) n += length(axis, side);
    return n;
  }

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    const std::int64_t item = gpu.block() * kThreads + gpu.thread();
    std::int64_t token = item;
    for (int side = 0; side < sides; ++side)
      for (int i = 0; i < kMaxRank; ++i) {
        const Axis& axis = axes[i];
        if (token < length(axis, side)) {
          const std::int64_t group = group_of(axis, token), position = position_of(axis, token);
          const Interval w =
              side == 0 ? window(axis, group, position) : inverse_window(axis, group, position);
          ranges[item] = {static_cast<int>(w.begin), static_cast<int>(w.end)};
          return;
        }
        token -= length(axis, side);
      }
  }
};

/// One row of a tile and the columns that the rows of the tile see: a box of positions in the
/// dilation group of the rows.
struct Row {
  int position[kMaxRank];
  int group[kMaxRank];
  int token[kMaxRank];
  int origin[kMaxRank];  // of the box
  int extent[kMaxRank];  // of the box
  Range seen[kMaxRank];  // by this row, relative to the origin
  bool is_active;        // else it repeats another row

  NATTEN_DEVICE int origin_token(const int (&dilation)[kMaxRank], int axis) const {
    return origin[axis] * dilation[axis] + group[axis];
  }
};

/// Where the rows of a tile are, in positions of a dilation group per axis.
struct Tile {
  int group[kMaxRank], first[kMaxRank], last[kMaxRank];
  bool is_empty;  // as some are in shorter groups
};

/// A grid of rows cut into tiles. All rows of a tile are of the same dilation groups.
struct Tiles {
  int length[kMaxRank];
  int dilation[kMaxRank];
  int log2[kMaxRank];   // of a tile's shape
  int count[kMaxRank];  // per axis

  std::int64_t total() const { return static_cast<std::int64_t>(count[0]) * count[1] * count[2]; }

  /// A tile by its number, the lowest digits of `index`, which loses them.
  NATTEN_DEVICE Tile tile(std::uint32_t& index) const {
    Tile t{};
    for (int i = kMaxRank - 1; i >= 0; --i) {
      const int number = take(index, count[i]);
      t.group[i] = number % dilation[i];
      t.first[i] = number / dilation[i] << log2[i];
      const int rows = (length[i] - t.group[i] + dilation[i] - 1) / dilation[i];
      const int size = 1 << log2[i];
      t.last[i] = (rows - t.first[i] < size ? rows : t.first[i] + size) - 1;
      t.is_empty = t.is_empty || t.last[i] < t.first[i];
    }
    return t;
  }

  /// A row of a tile that is not empty.
  NATTEN_DEVICE Row row(const Tile& t, int thread, const Windows& windows,
                        const int (&columns)[kMaxRank]) const {
    Row row;
    row.is_active = true;
    for (int i = kMaxRank - 1; i >= 0; --i) {
      const int own = t.first[i] + (thread & ((1 << log2[i]) - 1));
      thread >>= log2[i];
      row.is_active = row.is_active && own <= t.last[i];
      row.position[i] = own < t.last[i] ? own : t.last[i];
      row.group[i] = t.group[i];
      const auto token = [&](int position) { return position * dilation[i] + t.group[i]; };
      row.token[i] = token(row.position[i]);
      Range seen{0, columns[i]}, all = seen;
      if (const Range* of = windows.of[i]) {
        seen = of[row.token[i]];
        all = {of[token(t.first[i])].begin, of[token(t.last[i])].end};
      }
      row.origin[i] = all.begin;
      row.extent[i] = all.end - all.begin;
      row.seen[i] = {seen.begin - all.begin, seen.end - all.begin};
    }
    return row;
  }
};

/// Cuts a grid into the tiles whose rows have the fewest columns to go through. `kernel` is the
/// size of the windows.
inline Tiles cut(const Coordinate& lengths, const Coordinate& dilations, const Coordinate& kernel) {
  Tiles best{};
  double least = 0;
  for (int a = 0; a <= kRowsLog2; ++a)
    for (int b = 0; a + b <= kRowsLog2; ++b) {
      Tiles t{};
      double columns = 1;
      const int log2[kMaxRank] = {a, b, kRowsLog2 - a - b};
      for (int i = 0; i < kMaxRank; ++i) {
        const std::int64_t size = std::int64_t{1} << log2[i], d = dilations[i];
        const std::int64_t rows = (lengths[i] + d - 1) / d;  // of the longest group
        const std::int64_t unit = i == kMaxRank - 1 ? kChunk : 1;
        const std::int64_t seen = kernel[i] + detail::min(size, rows) - 1;
        t.length[i] = static_cast<int>(lengths[i]);
        t.dilation[i] = static_cast<int>(d);
        t.log2[i] = log2[i];
        t.count[i] = static_cast<int>(d * ((rows + size - 1) / size));
        columns *=
            static_cast<double>(t.count[i]) * static_cast<double>((seen + unit - 1) / unit * unit);
      }
      if (a + b == 0 || columns < least) {
        best = t;
        least = columns;
      }
    }
  return best;
}

/// Something per column of a box: `base` belongs to its origin.
template <class T>
struct Columns {
  T* base;
  std::int64_t stride[kMaxRank];
};

/// A tensor of columns, and what it holds of additional tokens.
template <class T>
struct ColumnOperand {
  Operand<T> grid, extra;
  Coordinate step{};  // strides of positions in a dilation group

  ColumnOperand() = default;
  ColumnOperand(const Operand<T>& of_grid, const Operand<T>& of_extra = {})
      : grid(of_grid), extra(of_extra) {}
  NATTEN_HOST_DEVICE explicit operator bool() const { return bool(grid); }
  void set_step(const int (&dilation)[kMaxRank]) {
    for (int i = 0; i < kMaxRank; ++i) step[i] = grid.grid[i] * dilation[i];
  }
  /// The columns of the box at `origin`, or the additional tokens, which lie along the last axis.
  NATTEN_DEVICE Columns<T> at(bool is_extra, std::int64_t batch, std::int64_t head,
                              const int (&origin)[kMaxRank]) const {
    return {is_extra ? extra.at(batch, head, 0) : grid.at(batch, head, widened(origin)),
            {step[0], step[1], is_extra ? extra.token : step[2]}};
  }
};

/// Up to kChunk columns of a box, on a line along its last axis.
struct Chunk {
  int at[kMaxRank];  // the first one, from the origin of the box
  int count;

  /// Chunk number `i` of a box, row-major.
  static NATTEN_DEVICE Chunk find(int i, const int (&extent)[kMaxRank]) {
    std::uint32_t index = static_cast<std::uint32_t>(i);
    Chunk chunk;
    chunk.at[2] = take(index, per_line(extent)) * kChunk;
    chunk.at[1] = take(index, extent[1]);
    chunk.at[0] = static_cast<int>(index);
    chunk.set_count(extent);
    return chunk;
  }
  static NATTEN_DEVICE int per_line(const int (&extent)[kMaxRank]) {
    return (extent[2] + kChunk - 1) / kChunk;
  }
  NATTEN_DEVICE void advance(const int (&extent)[kMaxRank]) {
    at[2] += kChunk;
    if (at[2] >= extent[2]) {
      at[2] = 0;
      if (++at[1] == extent[1]) {
        at[1] = 0;
        ++at[0];
      }
    }
    set_count(extent);
  }
  NATTEN_DEVICE void set_count(const int (&extent)[kMaxRank]) {
    count = extent[2] - at[2] < kChunk ? extent[2] - at[2] : kChunk;
  }

  /// One bit per column: whether it is in a box.
  NATTEN_DEVICE std::uint32_t mask(const Range (&box)[kMaxRank]) const {
    for (int i = 0; i < kMaxRank - 1; ++i)
      if (at[i] < box[i].begin || at[i] >= box[i].end) return 0;
    const auto below = [&](int end) {
      const int bits = end - at[2] < 0 ? 0 : end - at[2] < count ? end - at[2] : count;
      return (1u << bits) - 1;
    };
    return below(box[2].end) & ~below(box[2].begin);
  }

  /// Calls `f(j, offset of column j by the strides)` for kChunk columns. Past the end the last
  /// column comes again, so that there is something to read.
  template <class F>
  NATTEN_DEVICE void for_each(const std::int64_t (&stride)[kMaxRank], F&& f) const {
    std::int64_t offset = at[0] * stride[0] + at[1] * stride[1] + at[2] * stride[2];
    NATTEN_EACH (j, kChunk) {
      f(j, offset);
      if (j + 1 < count) offset += stride[2];
    }
  }
};

/// The vectors of a chunk, from element `first` on.
template <class T>
NATTEN_DEVICE void find_vectors(const T* (&vectors)[kChunk], const Chunk& chunk,
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
NATTEN_DEVICE void add_products(Sum (&sums)[kChunk], const T* row,
                                const T* const (&vectors)[kChunk], int d) {
  Sum x[kBlock][kVector];
  NATTEN_EACH (v, kBlock) load<kTf32>(x[v], row + d + v * kVector);
  NATTEN_EACH (j, kChunk) {
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
NATTEN_DEVICE void dot(Sum (&sums)[kChunk], const T* row, const T* const (&vectors)[kChunk],
                       int dims) {
  constexpr int kLongest = 512;  // longer sums are sums of sums, which round less
  constexpr int kBlock = 2;
  NATTEN_EACH (j, kChunk) sums[j] = 0;
  for (int d = 0; d < dims;) {
    const int end = dims - d < kLongest ? dims : d + kLongest;
    Sum part[kChunk] = {};
    for (; d + kBlock * kVector <= end; d += kBlock * kVector)
      add_products<kBlock, kVector, kTf32>(part, row, vectors, d);
    for (; d < end; d += kVector) add_products<1, kVector, kTf32>(part, row, vectors, d);
    NATTEN_EACH (j, kChunk) sums[j] += part[j];
  }
}

}  // namespace natten::detail::cuda::simt
