#pragma once

// What a block finds out before it computes: its rows, the tiles of columns that these see, and
// where they are.

#include "loads.h"
#include "masks.h"

namespace natten::detail::cuda {

/// Finds out where the tokens of a batch of tiles are. One warp does it for the block.
template <class K, class Machine>
NATTEN_DEVICE void locate(const Worker<K, Machine>& w, int first_tile) {
  constexpr std::uint64_t kAll = low_bits(K::kColumns);
  const int i = first_tile + w.lane() % K::State::kBatch, of_warp = w.lane() / K::State::kBatch;
  const bool exists = i < w.state.count;
  ColumnTile tile{};
  Coordinate token{};
  bool is_whole = true;
  if (exists) {
    tile = w.state.tiles.at(w.state.first + i, w.a.grid);
    is_whole = tile.is_additional || w.is_whole(tile, token);
  }
  std::uint64_t shown = kAll;
  if (w.a.hides_columns || !w.gpu.all(is_whole)) shown = shown_columns(w, tile, exists);
  Overlap seen = Overlap::none;
  if (exists && shown != 0) seen = overlap(w, tile, of_warp);
  if (seen == Overlap::all && shown != kAll) seen = Overlap::some;
  const std::uint32_t has_mask = seen == Overlap::some;
  std::uint32_t has_masks = 0;
  NATTEN_EACH (warp, K::kWarps)
    has_masks |= w.gpu.shuffle(has_mask, w.lane() % K::State::kBatch + K::State::kBatch * warp);
  if (!exists) return;
  typename K::Stop& stop = w.stop_of(i);
  stop.seen[of_warp] = seen;
  if (of_warp != 0) return;
  stop.has_masks = has_masks != 0;
  stop.tile = tile;
  stop.shown = shown;
  stop.is_last = i + 1 == w.state.count;
  if constexpr (K::kSharesWords) {
    const bool has_all = w.state.word_count > 0;
    std::uint32_t words = 0;
    NATTEN_EACH (a, kMaxRank) {
      const int before = tile.origin[a] - w.state.tiles.low[a];
      const int word = has_all
                           ? w.state.first_words[a] + (before >> w.a.grid.column_tile.bits[a]
                                                                     << w.a.grid.row_tile.bits[a])
                           : w.words_of_tile(i) + w.seen_intervals().index(a, 0);
      words |= static_cast<std::uint32_t>(word) << 10 * a;
    }
    w.first_words(i) = words;
  }
  NATTEN_EACH (which, 2) {
    stop.copies_whole[which] =
        is_whole && shown == kAll && !tile.is_additional && w.a.copies_chunks[which];
    stop.first[which] =
        w.a.has_offsets[which] && !tile.is_additional
            ? w.a.columns[which].tensor.at(w.state.batch, w.column_head(tile), token)
            : nullptr;
  }
}

/// Moves the block, which has the first rows and columns of all examples, to one of them.
template <class K, class Machine>
NATTEN_DEVICE void enter_example(const Worker<K, Machine>& w) {
  constexpr int kAxis = kMaxRank - 1;
  constexpr bool kQueries = K::kRowsAreQueries;
  const auto number = static_cast<std::uint32_t>(w.state.batch);
  const auto count = static_cast<std::uint32_t>(w.a.examples.count);
  w.state.batch = number / count;
  const Example e = w.state.example = w.a.examples.data[number % count];
  const int first_row = kQueries ? e.first_query : e.first_key;
  const int first_column = kQueries ? e.first_key : e.first_query;
  RowTile& rows = w.state.rows;
  Group& group = rows.group[kAxis];
  const int in_group = w.a.grid.places[kAxis].count(kQueries ? e.queries : e.keys, group.first_row);
  rows.valid[kAxis] = w.a.grid.valid(kAxis, in_group, rows.origin[kAxis]);
  group.first_row += first_row;
  group.first_column += first_column;
  w.state.column_end = first_column + (kQueries ? e.keys : e.queries);
}

/// An axis of the grid that the block is at work on.
template <class K, class Machine>
NATTEN_DEVICE Axis axis_of_block(const Worker<K, Machine>& w, int axis) {
  const Axis along = w.a.grid.axes[axis];
  if (!w.a.examples || axis != kMaxRank - 1) return along;
  return axis_of_example(along, w.state.example.queries, w.state.example.keys);
}

/// Finds out which rows the block has. Returns false where it has none.
template <class K, class Machine>
NATTEN_DEVICE bool find_rows(const Worker<K, Machine>& w) {
  if (w.thread() == 0) {
    const auto block = static_cast<std::uint32_t>(w.gpu.block());
    const auto per_head = static_cast<std::uint32_t>(w.a.blocks_per_head);
    w.state.rows = row_tile(w.a.grid, block % per_head);
    const auto splits = static_cast<std::uint32_t>(w.a.splits);
    const auto heads = static_cast<std::uint32_t>(w.a.heads);
    w.state.split = static_cast<int>(block / per_head % splits);
    w.state.head = static_cast<int>(block / per_head / splits % heads);
    w.state.batch = block / per_head / splits / heads;
    w.state.first_column_head =
        K::kRowsAreQueries ? w.state.head / w.a.queries_per_kv : w.state.head * w.a.queries_per_kv;
    w.state.tiles.additional = (w.a.additional_columns + K::kColumns - 1) / K::kColumns;
    w.state.tiles.heads = K::kRowsAreQueries ? 1 : w.a.queries_per_kv;
    w.state.column_end = w.a.grid.places[kMaxRank - 1].column_length;
    if (w.a.examples) enter_example(w);
  }
  w.gpu.sync();
  const RowTile& rows = w.state.rows;
  return rows.valid[0] > 0 && rows.valid[1] > 0 && rows.valid[2] > 0;
}

/// Finds out what rows see.
template <class K, class Machine>
NATTEN_DEVICE void see(const Worker<K, Machine>& w) {
  const Rows kind = K::kRowsAreQueries                  ? Rows::queries
                    : w.a.grid.rows == Rows::additional ? Rows::additional
                                                        : Rows::keys;
  w.seen_intervals().compute(w.a.grid, kind, w.state.rows, w.thread(), K::kThreads,
                             [&](int axis) { return axis_of_block(w, axis); });
}

/// Bounds of that, and the tiles of columns that cover it. One warp does it for the block.
template <class K, class Machine>
NATTEN_DEVICE void find_bounds(const Worker<K, Machine>& w) {
  const RowTile& rows = w.state.rows;
  const int axis = w.lane() % 4, of_warp = w.lane() / 4, first = 16 * K::kM * of_warp;
  if (axis < kMaxRank && of_warp <= K::kWarps) {
    const bool is_warp = of_warp < K::kWarps;
    const Bounds bounds =
        bounds_of(w.seen_intervals(), w.a.grid.row_tile, rows, axis, is_warp ? first : 0,
                  (is_warp ? first + 16 * K::kM : K::kRows) - 1);
    if (is_warp)
      w.state.bounds[of_warp][axis] = bounds;
    else
      w.state.tiles.set_axis(axis, bounds,
                             w.a.grid.columns(axis, w.column_end(axis), rows.group[axis]),
                             w.a.grid.column_tile);
  }
  w.gpu.sync_warp();
}

/// Finds the block's part of these tiles. One warp does it for the block.
template <class K, class Machine>
NATTEN_DEVICE void find_columns(const Worker<K, Machine>& w) {
  find_bounds(w);
  if (w.lane() == 0) {
    w.state.first = 0;
    w.state.count = w.state.tiles.count();
    if (w.a.splits > 1) {  // divisions of 64 bits take long
      const std::int64_t count = w.state.count;
      w.state.first = static_cast<int>(count * w.state.split / w.a.splits);
      w.state.count = static_cast<int>(count * (w.state.split + 1) / w.a.splits) - w.state.first;
    }
  }
  w.gpu.sync_warp();
}

/// Says where `axis_words` has the words of all tiles, if it has room for them.
template <class K, class Machine>
NATTEN_DEVICE void plan_axis_words(const Worker<K, Machine>& w) {
  if (w.lane() == 0) {
    std::int64_t count = 0;
    NATTEN_EACH (a, kMaxRank) {
      w.state.first_words[a] = static_cast<int>(count);
      count += std::int64_t{w.state.tiles.counts[a]} << w.a.grid.row_tile.bits[a];
    }
    w.state.word_count = count <= w.kAxisWords ? static_cast<int>(count) : 0;
  }
  w.gpu.sync_warp();
}

/// Fills the tables of columns of a tile, relative to its first. `kOperands`: of columns.
template <class K, int kOperands, class Machine>
NATTEN_DEVICE void set_relative(const Worker<K, Machine>& w) {
  if (w.thread() >= K::kColumns) return;
  std::int64_t offsets[kOperands] = {};
  int bias = 0;
  NATTEN_EACH (i, kMaxRank) {
    const int offset = w.a.grid.column_tile.offset(w.thread(), i);
    NATTEN_EACH (which, kOperands)
      offsets[which] += w.a.columns[which].tensor.grid[i] * w.a.grid.places[i].dilation * offset;
    bias += (K::kRowsAreQueries ? 1 : -1) * offset * static_cast<int>(w.a.rpb.grid[i]);
  }
  NATTEN_EACH (which, kOperands)
    w.relative(which)[w.thread()] =
        static_cast<int>(offsets[which] >> w.a.columns[which].unit_log2);
  w.relative_bias()[w.thread()] = bias;
}

/// Fills the tables of rows' addresses.
template <class K, class Machine>
NATTEN_DEVICE void set_row_addresses(const Worker<K, Machine>& w) {
  using T = typename K::Element;
  NATTEN_UNROLL
  for (int first = 0; first < 2 * K::kRows; first += K::kThreads) {
    const int item = first + w.thread(), row = item % K::kRows;
    Coordinate token;
    bool exists = true;
    NATTEN_EACH (i, kMaxRank) {
      int offset = w.a.grid.row_tile.offset(row, i);
      const int valid = w.state.rows.valid[i];
      exists = exists && offset < valid;
      offset = offset < valid ? offset : 0;
      token[i] = w.a.grid.places[i].number(w.state.rows.group[i].first_row,
                                           w.state.rows.origin[i] + offset);
    }
    if (item < K::kRows) {
      w.template row_addresses<const T>(0)[row] =
          w.a.rows[0].tensor.at(w.state.batch, w.state.head, token);
      continue;
    }
    const auto address = [&](const auto& x) {
      return exists && x ? x.at(w.state.batch, w.state.head, token) : nullptr;
    };
    w.template row_addresses<T>(1)[row] = address(w.a.sums[1].tensor);
    w.template row_addresses<float>(2)[row] = address(w.a.statistic);
  }
}

/// Fills `state` and the tables. Returns false where the block has no rows.
template <class K, class Machine>
NATTEN_DEVICE bool prepare(const Worker<K, Machine>& w) {
  if (!find_rows(w)) return false;
  see(w);
  set_own_offsets(w);
  set_relative<K, 2>(w);
  if constexpr (K::kTablesRows) set_row_addresses(w);
  if constexpr (K::kStartsAtMasks) set_mask_starts(w);
  if constexpr (K::kPass == TilePass::forward) {
    for (int row = w.thread(); row < K::kRows; row += K::kThreads) {
      w.references()[row] = kNone;
    }
  }
  clear_padding(w, {K::Layout::kColumns1}, K::kStages * K::kColumns, w.a.dims[0]);
  if constexpr (!K::kHoldsRows) clear_padding(w, {K::Layout::kColumns2}, K::kColumns, w.a.dims[1]);
  w.gpu.sync();
  if constexpr (K::kAddsQueries) {
    for (int row = w.thread(); row < K::kRows; row += K::kThreads) {
      Coordinate token;
      w.live()[row] = w.token_of_row(row, token) && !w.is_hidden(row, token);
    }
  }
  if (w.warp() == 0) {
    find_columns(w);
    if constexpr (K::kSharesWords) plan_axis_words(w);
    locate(w, 0);
  }
  w.gpu.sync();
  return true;
}

}  // namespace natten::detail::cuda
