#include "count.h"

#include <natten/error.h>

#include <algorithm>
#include <string>

#include "fna/fna.h"

// The host enqueues kernels on a launcher that counts where others launch, so tiles are those that
// it chooses. What blocks visit follows from the functions that they call: rows form grids and see
// boxes, so that along each axis tiles are counted by themselves, and numbers multiply.

namespace natten::detail::cuda {
namespace {

/// Of all tiles of rows along one axis.
struct Visits {
  double tiles = 0;   ///< of columns, that a tile of rows visits
  double parts = 0;   ///< and that some part of its rows sees; each part counts
  double wholes = 0;  ///< likewise, where all of the rows see all of the columns
};

/// Bounds along an axis under which nothing that other axes do is seen.
constexpr Bounds kEverything{0, 0, 1 << 30, 1 << 30};

/// `parts` of `rows_of_part` rows each, a warp's, make a tile of rows.
Visits visits_along(const PassGrid& grid, Rows kind, int axis, int parts, int rows_of_part) {
  Visits visits;
  std::int64_t step = 1, tiles = 1;  // in numbers of blocks, see row_tile
  for (int a = kMaxRank - 1; a >= 0; --a) {
    if (a > axis) step *= grid.row_tiles[a];
    tiles *= grid.row_tiles[a];
  }
  std::int64_t group_step = tiles;
  for (int a = kMaxRank - 1; a > axis; --a) group_step *= grid.groups[a];
  const TileShape& shape = grid.row_tile;
  std::vector<PlaceInterval> memory(static_cast<std::size_t>(shape.size()) + 2);
  const SeenIntervals intervals{memory.data(), shape};
  for (std::int64_t group = 0; group < grid.groups[axis]; ++group)
    for (std::int64_t i = 0; i < grid.row_tiles[axis]; ++i) {
      const RowTile rows =
          row_tile(grid, static_cast<std::uint32_t>(group * group_step + i * step));
      if (rows.valid[axis] == 0) continue;
      intervals.compute(grid, kind, rows, 0, 1, [&](int a) { return grid.axes[a]; });
      ColumnTiles columns{};
      columns.set_axis(axis, bounds_of(intervals, shape, rows, axis, 0, shape.size() - 1),
                       grid.columns(axis, grid.places[axis].column_length, rows.group[axis]),
                       grid.column_tile);
      visits.tiles += columns.counts[axis];
      int last = -1;
      for (int part = 0; part < parts; ++part) {
        // Parts lie on a grid: along this axis some are at the same place.
        const int first = part * rows_of_part;
        if (shape.offset(first, axis) <= last) continue;
        last = shape.offset(first, axis);
        Bounds bounds[kMaxRank] = {kEverything, kEverything, kEverything};
        bounds[axis] = bounds_of(intervals, shape, rows, axis, first, first + rows_of_part - 1);
        for (int c = 0; c < columns.counts[axis]; ++c) {
          int origin[kMaxRank] = {0, 0, 0};
          origin[axis] = columns.low[axis] + c * grid.column_tile.extent(axis);
          const Overlap overlap = overlap_of(bounds, grid.column_tile, origin);
          visits.parts += overlap != Overlap::none;
          visits.wholes += overlap == Overlap::all;
        }
      }
    }
  return visits;
}

constexpr const char* pass_name(TilePass pass) {
  switch (pass) {
    case TilePass::forward: return "forward";
    case TilePass::row_term: return "row_term";
    case TilePass::grad_query: return "grad_query";
    case TilePass::grad_key_value: return "grad_key_value";
    case TilePass::grad_key: return "grad_key";
    case TilePass::grad_value: return "grad_value";
    case TilePass::grad_all: return "grad_all";
  }
  return "";
}

/// Takes the place of a Launcher.
class Counter {
 public:
  explicit Counter(const Problem& p) : p_(p) {}

  template <class T, int kDims, int kM, TilePass kPass>
  void operator()(const TileKernel<T, kDims, kM, kPass>& kernel, std::int64_t blocks, int) {
    using K = typename TileKernel<T, kDims, kM, kPass>::Traits;
    const Arguments<T>& a = kernel.a;
    const PassGrid& grid = a.grid;
    const Rows kind = grid.rows;
    double tiles = 1, parts = 1, wholes = 1;
    for (int axis = 0; axis < kMaxRank; ++axis) {
      const Visits v = visits_along(grid, kind, axis, K::kWarps, K::kRows / K::kWarps);
      tiles *= v.tiles;
      parts *= v.parts;
      wholes *= v.wholes;
    }
    const double heads = static_cast<double>(p_.batch) * a.heads;
    const double column_heads = K::kRowsAreQueries ? heads : heads * a.queries_per_kv;
    constexpr int kRowsOfWarp = K::kRows / K::kWarps;
    const double of_part = static_cast<double>(kRowsOfWarp) * K::kColumns;
    // Products of this kernel, see kernel.h. That for queries is of whole blocks of rows.
    const int products = 1 + K::kNeedsGradWeights + K::kSumsFirst + K::kSumsSecond + K::kFindsTerm;
    const double of_block = K::kAddsQueries ? static_cast<double>(K::kRows) * K::kColumns : 0;
    PassWork work;
    work.name = pass_name(kPass);
    work.units = blocks;
    work.tiles = column_heads * tiles;
    work.weights = column_heads * parts * of_part;
    work.masked = column_heads * (parts - wholes) * of_part;
    work.executed = (work.weights * products + work.tiles * of_block) * kDims;
    double rows = 1;
    for (int axis = 0; axis < kMaxRank; ++axis)
      rows *= static_cast<double>(grid.places[axis].row_length);
    const double dims = static_cast<double>(a.dims[0] + a.dims[1]) * sizeof(T);
    const double row_dims =
        (a.dims[0] + (K::kNeedsGradWeights ? a.dims[1] : 0)) * static_cast<double>(sizeof(T));
    work.packed = work.tiles * K::kColumns * dims + heads * rows * row_dims;
    work.read = work.packed;
    const double sums = (K::kSumsFirst ? a.dims[0] : 0) + (K::kSumsSecond ? a.dims[1] : 0);
    work.written = heads * rows * (sums * sizeof(T) + (K::kRowsAreQueries ? sizeof(float) : 0));
    if (K::kAddsQueries)
      work.written += work.tiles * K::kColumns * a.dims[0] * static_cast<double>(sizeof(float));
    passes.push_back(std::move(work));
  }
  /// Small kernels, which multiply nothing.
  template <class Kernel>
  void operator()(const Kernel&, std::int64_t, int = 0) {}
  void clear(void*, std::size_t) {}
  static int shared_bytes() { return kSharedBytesOfLargest; }

  std::vector<PassWork> passes;

 private:
  const Problem p_;
};

/// Along one axis, of tiles of columns on a grid of their own, which begins at position 0.
Visits fixed_visits_along(const Axis& axis, std::int64_t row_extent, std::int64_t column_extent) {
  Visits visits;
  for (std::int64_t group = 0; group < std::min(axis.dilation, axis.query_length); ++group) {
    const std::int64_t n = group_length(axis, group);
    for (std::int64_t first = 0; first < n; first += row_extent) {
      const std::int64_t last = std::min(first + row_extent, n) - 1;
      const Interval low = window(axis, group, first), high = window(axis, group, last);
      const std::int64_t from = natten::detail::floor_div(low.begin, column_extent);
      const std::int64_t to =
          natten::detail::floor_div(high.end + column_extent - 1, column_extent);
      visits.tiles += static_cast<double>(to - from);
      for (std::int64_t tile = from; tile < to; ++tile)
        visits.wholes +=
            high.begin <= tile * column_extent && (tile + 1) * column_extent <= low.end;
    }
  }
  return visits;
}

}  // namespace

std::vector<PassWork> count_passes(const Job& job) {
  std::string refusal = tile_refusal(job.problem);
  if (refusal.empty()) refusal = fna_refuse_reason(job.problem);
  if (!refusal.empty())
    throw Error(ErrorKind::unsupported,
                "work_of: on CUDA it counts the backend fna, which does not run this: " + refusal);
  Counter counter(simplified(job.problem));
  run_fna(job, counter);
  return std::move(counter.passes);
}

PassWork count_fixed_tiles(const Problem& p, const Tuple& query_tile, const Tuple& key_tile) {
  PassWork work;
  work.name = "forward";
  double tiles = 1, wholes = 1, blocks = 1, rows = 1, columns = 1;
  for (int i = 0; i < p.rank; ++i) {
    const Axis& axis = p.axes[kMaxRank - p.rank + i];
    const Visits v = fixed_visits_along(axis, query_tile[i], key_tile[i]);
    tiles *= v.tiles;
    wholes *= v.wholes;
    rows *= static_cast<double>(query_tile[i]);
    columns *= static_cast<double>(key_tile[i]);
    double of_axis = 0;
    for (std::int64_t g = 0; g < std::min(axis.dilation, axis.query_length); ++g) {
      const std::int64_t of_group = (group_length(axis, g) + query_tile[i] - 1) / query_tile[i];
      of_axis += static_cast<double>(of_group);
    }
    blocks *= of_axis;
  }
  const auto heads = static_cast<double>(p.batch * p.heads);
  const auto dims = static_cast<double>(p.head_dim + p.value_dim);
  const auto bytes = static_cast<double>(size_of(p.dtype));
  work.units = static_cast<std::int64_t>(heads * blocks);
  work.tiles = heads * tiles;
  work.weights = work.tiles * rows * columns;
  work.masked = heads * (tiles - wholes) * rows * columns;
  work.executed = work.weights * dims;
  work.packed = work.read =
      (work.tiles * columns * dims + heads * blocks * rows * static_cast<double>(p.head_dim)) *
      bytes;
  work.written = heads * blocks * rows * static_cast<double>(p.value_dim) * bytes;
  return work;
}

}  // namespace natten::detail::cuda
