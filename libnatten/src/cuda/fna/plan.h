#pragma once

// Choices of the tile kernels that are made on the host: which problems they take, tile shapes and
// arguments.

#include <natten/problem.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "../../backend.h"
#include "../../dispatch.h"
#include "../../operand.h"
#include "kernel.h"

namespace natten::detail::cuda {

/// The most dims that there are kernels for, by the bytes of an element: shared memory limits those
/// for float32, registers the others. Of all; of those with 32 rows per warp.
constexpr int most_dims(std::size_t element_bytes) { return element_bytes == 4 ? 128 : 256; }
constexpr int most_wide_dims(std::size_t element_bytes) { return element_bytes == 4 ? 96 : 128; }

/// Why tile kernels do not run a simplified problem on its element type, or its grid; or empty.
inline std::string dtype_refusal(const Problem& p) {
  if (p.dtype == DType::float64) return "does not compute float64";
  if (p.dtype == DType::float32 && !p.allow_tf32)
    return "computes float32 in TF32 only, which the call does not allow";
  return {};
}
inline std::string grid_refusal(const Problem& p) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (p.keys() == 0) return "there are no keys";
  for (const Axis& axis : p.axes) {
    if (std::max(axis.query_length, axis.key_length) > kMost / 2)
      return "an axis has more than 2^30 tokens";
    if (axis.dilation > kMost / 256) return "a dilation is more than 2^23 - 1";  // see `number`
    // Places go around a few times.
    if (axis.boundary == Boundary::circular && axis.grid_length > kMost / 8)
      return "a circular axis has more than 2^28 - 1 tokens";
  }
  if (p.rpb_span > kMost)
    return "rpb: its strides span " + std::to_string(p.rpb_span) +
           " elements within a head; the most is 2^31 - 1";
  return {};
}

/// The grid of a pass of a simplified problem, but for its tiles.
inline PassGrid grid_of(const Problem& p, Rows rows) {
  PassGrid grid{};
  grid.rows = rows;
  for (int a = 0; a < kMaxRank; ++a) {
    grid.axes[a] = p.axes[a];
    grid.places[a] = places_of(p, a, rows);
    grid.groups[a] = grid.places[a].groups();
  }
  return grid;
}

/// Blocks that a multiprocessor with `shared_bytes` has room for, each with `of_block` of them; up
/// to two, for which kernels leave registers.
constexpr int blocks_beside(int of_block, int shared_bytes) {
  return std::min(2, shared_bytes / (of_block + kReservedSharedBytes));
}

inline void set_row_tile(PassGrid& grid, const TileShape& tile) {
  grid.row_tile = tile;
  for (int a = 0; a < kMaxRank; ++a) {
    grid.row_tiles[a] = (grid.longest(a) + tile.extent(a) - 1) >> tile.bits[a];
  }
}

template <class E>
Tokens<E> tokens(Operand<E> x, bool is_additional = false) {
  if (is_additional) x.grid = {0, 0, x.token};
  const auto is_unit = [&](int unit) {
    const std::int64_t strides[] = {x.batch, x.head, x.grid[0], x.grid[1], x.grid[2]};
    return reinterpret_cast<std::uintptr_t>(x.data) % (unit * sizeof(E)) == 0 &&
           std::all_of(std::begin(strides), std::end(strides),
                       [unit](std::int64_t stride) { return stride % unit == 0; });
  };
  Tokens<E> result{x};
  for (int unit = 2; unit <= kChunk<E> && is_unit(unit); unit *= 2) ++result.unit_log2;
  return result;
}

/// How columns are copied, once they are set.
template <class T>
void set_copies(Arguments<T>& a, int which) {
  std::int64_t furthest = 0;  // of a tile's columns, in elements
  const int unit = a.columns[which].unit();
  for (int i = 0; i < kMaxRank; ++i) {
    const Places& places = a.grid.places[i];
    const std::int64_t step = a.columns[which].tensor.grid[i] * places.dilation;
    const std::int64_t turn = places.turn * step;
    a.turn_units[which][i] = static_cast<int>(turn / unit);
    furthest += std::max(std::abs(step) * (a.grid.column_tile.extent(i) - 1), std::abs(turn));
  }
  a.has_offsets[which] = furthest / unit <= std::numeric_limits<std::int32_t>::max();
  a.copies_chunks[which] =
      a.has_offsets[which] && unit == kChunk<T> && a.dims[which] % kChunk<T> == 0;
}

/// What is hidden of the rows and columns of a simplified problem.
template <class T>
void set_masks(Arguments<T>& a, const Problem& p, const Tensors& tensors) {
  const KeyMask mask = key_mask(p, tensors);
  const Rows rows = a.grid.rows;
  a.row_mask = rows == Rows::keys ? mask : KeyMask{};
  a.column_mask = rows == Rows::queries ? mask : KeyMask{};
  a.hides_rows = rows == Rows::keys && !is_plain(p);
  a.hides_columns = bool(a.column_mask);
  for (int i = 0; i < kMaxRank; ++i)  // what keys of a circular axis see has gaps
    a.hides_columns = a.hides_columns || (rows == Rows::keys && a.grid.places[i].turn > 0 &&
                                          p.axes[i].query_length < p.axes[i].grid_length);
}

/// Calls `f(TileShape)` with every shape of 2^bits tokens for a problem of a rank.
template <class F>
void for_each_tile_shape(int rank, int bits, F&& f) {
  for (int x = rank > 1 ? 0 : bits; x <= bits; ++x)
    for (int y = rank > 2 ? 0 : bits - x; x + y <= bits; ++y) f(TileShape{{bits - x - y, y, x}});
}

/// What tiles of a shape cost, for a head and dilation group: blocks of rows, tiles of columns that
/// these visit, and those that warps multiply, as they skip what their rows do not see.
struct TileVisits {
  double blocks = 1, tiles = 1, warp_tiles = 1;
};

/// The same along an axis, over all the axis's blocks of 2^row_bits rows, estimated from a few of
/// them; by the column tile's bits.
struct AxisCost {
  static constexpr int kMostBits = 7;
  /// Four warps share a block's rows along an axis in up to four parts.
  static constexpr int kMostPartBits = 2;
  double blocks;
  double visits[kMostBits + 1];
  double part_visits[kMostPartBits + 1][kMostBits + 1];  ///< by the bits of the number of parts

  AxisCost(const PassGrid& grid, int axis, int row_bits) {
    constexpr int kSamples = 4, kMostParts = 1 << kMostPartBits;
    const int rows = grid.longest(axis);
    const Group group = grid.places[axis].group(0);
    const int extent = 1 << row_bits, count = (rows + extent - 1) / extent;
    const int samples = std::min(count, kSamples);
    std::fill(visits, visits + kMostBits + 1, 0.0);
    for (auto& of_parts : part_visits) std::fill(of_parts, of_parts + kMostBits + 1, 0.0);
    for (int i = 0; i < samples; ++i) {
      // The middles of equal parts, so that borders count no more than they are.
      const int block =
          static_cast<int>((std::int64_t{2} * i + 1) * count / (std::int64_t{2} * samples));
      const int first = block * extent, last = std::min(first + extent, rows) - 1;
      const auto seen_by = [&](int row) {
        return grid.seen(grid.rows, axis, grid.axes[axis], group, row);
      };
      const PlaceInterval of_first = seen_by(first), of_last = seen_by(last);
      const int seen = std::max(of_last.end - of_first.begin, 0);
      for (int bits = 0; bits <= kMostBits; ++bits)
        visits[bits] += static_cast<double>((seen + (1 << bits) - 1) >> bits);
      // What keys see takes long to find out: their warps count as if they saw all of it.
      if (grid.rows != Rows::queries) continue;
      for (int part_bits = 0; part_bits <= std::min(kMostPartBits, row_bits); ++part_bits)
        for (int part = 0; part < kMostParts >> (kMostPartBits - part_bits); ++part) {
          const int from = first + (part << (row_bits - part_bits));
          const int to = std::min(from + (1 << (row_bits - part_bits)) - 1, last);
          if (from > last) continue;
          const int begin = (from == first ? of_first : seen_by(from)).begin - of_first.begin;
          const int end = (to == last ? of_last : seen_by(to)).end - of_first.begin;
          if (begin >= end) continue;
          for (int bits = 0; bits <= kMostBits; ++bits)
            part_visits[part_bits][bits] += ((end - 1) >> bits) - (begin >> bits) + 1;
        }
    }
    blocks = count;
    for (double& x : visits) x *= blocks / samples;
    for (int part_bits = 0; part_bits <= kMostPartBits; ++part_bits)
      for (int bits = 0; bits <= kMostBits; ++bits) {
        double& x = part_visits[part_bits][bits];
        x = grid.rows == Rows::queries ? x * blocks / samples : visits[bits] * (1 << part_bits);
      }
  }
};

/// Calls `f(visits, shape of rows, shape of columns)` with all pairs of 2^row_bits rows and
/// 2^column_bits columns.
template <class F>
void for_each_tile_pair(const PassGrid& grid, int rank, int row_bits, int column_bits, F&& f) {
  std::optional<AxisCost> costs[kMaxRank][AxisCost::kMostBits + 1];
  for (int a = 0; a < kMaxRank; ++a)
    for (int bits = 0; bits <= row_bits; ++bits) {
      const bool is_used = a >= kMaxRank - rank ? rank > 1 || bits == row_bits : bits == 0;
      if (is_used) costs[a][bits].emplace(grid, a, bits);
    }
  for_each_tile_shape(rank, row_bits, [&](const TileShape& rows) {
    // The numbers of a warp's rows have their upper bits in common, which outer axes have first.
    int part_bits[kMaxRank], left = AxisCost::kMostPartBits;
    for (int a = 0; a < kMaxRank; ++a) {
      part_bits[a] = std::min(left, rows.bits[a]);
      left -= part_bits[a];
    }
    for_each_tile_shape(rank, column_bits, [&](const TileShape& columns) {
      TileVisits visits;
      for (int a = 0; a < kMaxRank; ++a) {
        const AxisCost& cost = *costs[a][rows.bits[a]];
        visits.blocks *= cost.blocks;
        visits.tiles *= cost.visits[columns.bits[a]];
        visits.warp_tiles *= cost.part_visits[part_bits[a]][columns.bits[a]];
      }
      f(visits, rows, columns);
    });
  });
}

/// Instructions of all warps, roughly, by the interpreter of PTX (docs/performance.md): they decide
/// where windows are small.
struct TileCost {
  double of_block, of_tile, of_warp_tile;

  TileCost(int row_blocks, int dims)
      : of_block(2000 + row_blocks * (500 + 20.0 * dims)),
        of_tile(300 + 2.0 * dims),
        of_warp_tile(100 + row_blocks * (140 + 2.9 * dims)) {}
  double operator()(const TileVisits& visits) const {
    return visits.blocks * of_block + visits.tiles * of_tile + visits.warp_tiles * of_warp_tile;
  }
};

/// Chooses the shapes of tiles, 2^row_bits rows and 2^column_bits columns, that cost least by
/// `cost(visits)`; returns their visits.
template <class Cost>
TileVisits choose_tiles(PassGrid& grid, int rank, int row_bits, int column_bits, const Cost& cost) {
  double least = std::numeric_limits<double>::infinity();
  TileVisits best;
  TileShape row_tile{}, column_tile{};
  for_each_tile_pair(
      grid, rank, row_bits, column_bits,
      [&](const TileVisits& visits, const TileShape& rows, const TileShape& columns) {
        const double x = cost(visits);
        if (!(x < least)) return;
        least = x;
        best = visits;
        row_tile = rows;
        column_tile = columns;
      });
  grid.column_tile = column_tile;
  set_row_tile(grid, row_tile);
  return best;
}
/// Those with which blocks visit the fewest tiles.
inline double fewest_tiles(const TileVisits& visits) { return visits.tiles; }

inline int bits_of(std::int64_t size) {
  int bits = 0;
  while ((std::int64_t{1} << bits) < size) ++bits;
  return bits;
}

/// A tile shape that the caller demands.
inline TileShape tile_of(const Tuple& tuple) {
  TileShape tile{};
  for (int i = 0; i < tuple.size; ++i) tile.bits[kMaxRank - tuple.size + i] = bits_of(tuple[i]);
  return tile;
}

/// Tokens of a tile of queries or keys that kernels exist for, as powers of two: from, to.
struct TileBits {
  int least, most;
};
inline int padded_dims(const Problem& p) {
  const auto dims = static_cast<int>(std::max(p.head_dim, p.value_dim));
  const int buckets[] = {32, 64, 96, 128, 192};
  for (int bucket : buckets)
    if (dims <= bucket) return bucket;
  return 256;
}
/// 64 queries, and where a kernel with 32 rows per warp takes the problem also 128.
inline bool takes_wide_rows(const Problem& p) {
  return p.op == Op::attention_forward && padded_dims(p) <= most_wide_dims(size_of(p.dtype)) &&
         !p.has_rpb && p.scale > 0;
}
inline TileBits query_bits(const Problem& p) { return {6, takes_wide_rows(p) ? 7 : 6}; }

/// Says which shapes there are, where a demanded one is none of them.
inline std::string tile_refusal(const char* name, const Problem& p, const Tuple& tile,
                                const TileBits& supported) {
  if (tile.size == 0) return {};
  std::int64_t size = 1;
  bool is_power = true;
  for (int i = 0; i < tile.size; ++i) {
    is_power = is_power && (tile[i] & (tile[i] - 1)) == 0;
    size = tile[i] > (1 << supported.most) ? 0 : size * tile[i];
  }
  if (is_power && size >= 1 << supported.least && size <= 1 << supported.most) return {};
  const auto text = [&](const auto& value) {
    std::string s = "(";
    for (int i = 0; i < p.rank; ++i) s += (i ? ", " : "") + std::to_string(value(i));
    return s + ")";
  };
  std::string shapes;
  for (int bits = supported.least; bits <= supported.most; ++bits)
    for_each_tile_shape(p.rank, bits, [&](const TileShape& shape) {
      shapes += (shapes.empty() ? "" : ", ") +
                text([&](int i) { return shape.extent(kMaxRank - p.rank + i); });
    });
  return std::string(name) + ": got " + text([&](int i) { return tile[i]; }) + "; supported are " +
         shapes;
}

/// Names the shape that no CUDA kernel has, among those that the caller demands.
inline std::string tile_refusal(const Problem& p) {
  const bool backward = p.op == Op::attention_backward;
  std::string refusal = tile_refusal(backward ? "backward_q_tile_shape" : "q_tile_shape", p,
                                     p.query_tile, query_bits(p));
  if (!refusal.empty()) return refusal;
  return tile_refusal(backward ? "backward_kv_tile_shape" : "kv_tile_shape", p, p.key_tile, {6, 6});
}

/// What the tuner may try: the default, then pairs of tiles, those first that visit the fewest. A
/// backward pass goes over queries and over keys with the same pair.
inline std::vector<Configuration> tile_candidates(const Problem& problem, bool thorough) {
  std::vector<Configuration> found(1);
  const Problem p = simplified(problem);
  if (problem.query_tile.size > 0 || problem.key_tile.size > 0 || p.batch == 0) return found;
  const auto tuple = [&](const TileShape& shape) {
    Tuple tile;
    tile.size = problem.rank;
    for (int i = 0; i < tile.size; ++i)
      tile.values[i] = std::int64_t{1} << shape.bits[kMaxRank - tile.size + i];
    return tile;
  };
  struct Pair {
    double cost;  // tokens of columns that are read for a row
    Configuration configuration;
  };
  std::vector<Pair> pairs;
  const TileBits rows = query_bits(p);
  for (int bits = rows.least; bits <= rows.most; ++bits)
    for_each_tile_pair(grid_of(p, Rows::queries), problem.rank, bits, 6,
                       [&](const TileVisits& visits, const TileShape& query, const TileShape& key) {
                         Configuration pair;
                         pair.query_tile = tuple(query);
                         pair.key_tile = tuple(key);
                         pairs.push_back({visits.tiles * (1 << bits), pair});
                       });
  if (p.op == Op::attention_backward) {
    std::size_t at = 0;
    std::vector<double> by_keys;  // in the order of keys, then of queries
    for_each_tile_pair(grid_of(p, Rows::keys), problem.rank, 6, 6,
                       [&](const TileVisits& visits, const TileShape&, const TileShape&) {
                         by_keys.push_back(visits.tiles);
                       });
    std::size_t shapes = 0;
    for_each_tile_shape(problem.rank, 6, [&](const TileShape&) { ++shapes; });
    for (Pair& pair : pairs) {
      pair.cost += by_keys[at % shapes * shapes + at / shapes] * (1 << 6);
      ++at;
    }
  }
  std::stable_sort(pairs.begin(), pairs.end(),
                   [](const Pair& a, const Pair& b) { return a.cost < b.cost; });
  const std::size_t most = thorough ? 32 : 8;
  for (std::size_t i = 0; i < std::min(most, pairs.size()); ++i)
    found.push_back(pairs[i].configuration);
  return found;
}

}  // namespace natten::detail::cuda
