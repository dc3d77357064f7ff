#pragma once

// Copies from global to shared memory.

#include "pieces.h"
#include "worker.h"

namespace natten::detail::cuda {

/// Copies one chunk of a token of which `dims` elements exist; zeros where `from` is null.
template <class K, class Machine>
NATTEN_DEVICE void load_chunk(const Worker<K, Machine>& w, int to, const typename K::Element* from,
                              int chunk, int dims, int unit) {
  using T = typename K::Element;
  if (from && unit == kChunk<T> && (chunk + 1) * kChunk<T> <= dims)
    return w.gpu.copy_async(to, from + chunk * kChunk<T>);
  // Opaque: else compilers find out ahead of the usual case what only this one needs.
  const int left = w.gpu.opaque(dims) - chunk * kChunk<T>, given = left * int(sizeof(T));
  if (!from || left <= 0) return w.gpu.write_chunk(to, {0, 0, 0, 0});
  from += chunk * kChunk<T>;
  with_piece_bytes<T>(unit, [&](auto bytes) {
    if constexpr (bytes >= 4)
      copy_pieces<bytes>(w.gpu, to, from, given);
    else
      load_shifted<K::kAddsQueries>(w.gpu, to, from, left);
  });
}

template <class K, class Machine>
NATTEN_DEVICE void load_rows(const Worker<K, Machine>& w, int which, const typename K::Tile& to) {
  using T = typename K::Element;
  using Tile = typename K::Tile;
  const Tokens<const T>& x = w.a.rows[which];
  if constexpr (K::kTablesRows) {
    if (x.unit() == kChunk<T> && w.a.dims[which] % kChunk<T> == 0) {
      const int chunk = w.thread() % Tile::kUnit, row = w.thread() / Tile::kUnit;
      const T* const* from = w.template row_addresses<const T>(0) + row;
      const int slot = to.at(row, chunk);
      NATTEN_UNROLL
      for (int i = 0; i < K::kRows; i += K::kThreads / Tile::kUnit) NATTEN_UNROLL
      for (int j = 0; j < Tile::kChunks; j += Tile::kUnit) {
        const int element = (chunk + j) * kChunk<T>;
        w.gpu.template copy_async<kChunkBytes>(slot + i * Tile::kPitch + 16 * j, from[i] + element,
                                               element < w.a.dims[which] ? kChunkBytes : 0);
      }
      return;
    }
  }
  const RowPointers<const T> pointers = w.pointers_of_rows(x.tensor);
  NATTEN_DO_NOT_UNROLL
  for (unsigned item = w.thread(); item < K::kRows * Tile::kChunks; item += K::kThreads) {
    const int row = item / Tile::kChunks, chunk = item % Tile::kChunks;
    bool exists = w.state.rows.holds(w.a.grid.row_tile, row);
    if constexpr (!K::kRowsAreQueries) {
      Coordinate token;
      exists = exists && w.token_of_row(row, token) && !w.is_hidden(row, token);
    }
    load_chunk(w, to.at(row, chunk), exists ? pointers.at(w.a.grid.row_tile, row) : nullptr, chunk,
               w.a.dims[which], x.unit());
  }
}

template <class K, class Machine>
NATTEN_DEVICE void load_columns(const Worker<K, Machine>& w, int which, const typename K::Tile& to,
                                const typename K::Stop& stop) {
  using T = typename K::Element;
  using Tile = typename K::Tile;
  const int dims = w.a.dims[which];
  constexpr int kUnit = Tile::kUnit;
  const int thread = w.thread();
  const int chunk = thread % kUnit, column = thread / kUnit;
  const int slot = to.at(column, chunk), element = chunk * kChunk<T>;
  const int* offset = w.relative(which) + column;
  const T* const first = stop.first[which];
  if (stop.copies_whole[which]) {
    if (Tile::kChunks == kUnit && element >= dims) return;
    const char* const first_chunk = w.gpu.opaque(reinterpret_cast<const char*>(first + element));
    NATTEN_UNROLL
    for (int i = 0; i < K::kColumns; i += K::kThreads / kUnit) {
      const auto* from =
          reinterpret_cast<const T*>(first_chunk + std::int64_t{offset[i]} * kChunkBytes);
      NATTEN_UNROLL
      for (int j = 0; j < Tile::kChunks; j += kUnit)
        if (Tile::kChunks == kUnit || element + j * kChunk<T> < dims)
          w.gpu.copy_async(slot + i * Tile::kPitch + 16 * j, from + j * kChunk<T>);
    }
    return;
  }
  if (first && !w.a.copies_chunks[which]) {
    const Tokens<const T>& x = w.a.columns[which];
    NATTEN_DO_NOT_UNROLL
    for (int i = 0; i < K::kColumns; i += K::kThreads / kUnit) {
      const T* from = nullptr;
      if (stop.shown >> (column + i) & 1) {
        const int units = offset[i] - w.turned_back(which, stop.tile, column + i);
        from = first + (std::int64_t{units} << x.unit_log2);
      }
      NATTEN_DO_NOT_UNROLL
      for (int j = 0; j < Tile::kChunks; j += kUnit)
        if (element + j * kChunk<T> < dims)
          load_chunk(w, slot + i * Tile::kPitch + 16 * j, from, chunk + j, dims, x.unit());
    }
    return;
  }
  if (first) {
    NATTEN_DO_NOT_UNROLL
    for (int i = 0; i < K::kColumns; i += K::kThreads / kUnit) {
      const bool exists = stop.shown >> (column + i) & 1;
      const int chunks = offset[i] - w.turned_back(which, stop.tile, column + i);
      const T* from =
          exists ? first + std::int64_t{chunks} * kChunk<T> : w.a.columns[which].tensor.data;
      NATTEN_UNROLL
      for (int j = 0; j < Tile::kChunks; j += kUnit)
        if (element + j * kChunk<T> < dims)
          w.gpu.template copy_async<kChunkBytes>(slot + i * Tile::kPitch + 16 * j,
                                                 from + element + j * kChunk<T>,
                                                 exists ? kChunkBytes : 0);
    }
    return;
  }
  const ColumnTile& at = stop.tile;
  const Tokens<const T>& x = at.is_additional ? w.a.additional[which] : w.a.columns[which];
  NATTEN_DO_NOT_UNROLL
  for (int item = w.thread(); item < K::kColumns * Tile::kChunks; item += K::kThreads) {
    const int column = item / Tile::kChunks, chunk = item % Tile::kChunks;
    const T* from = nullptr;
    Coordinate token;
    if (at.is_additional) {
      const int n = at.origin[2] + column;
      if (n < w.a.additional_columns)
        from = x.tensor.at(w.state.batch, w.column_head(at), {0, 0, n});
    } else if (stop.shown >> column & 1) {
      w.token_of_column(at, column, token);
      from = x.tensor.at(w.state.batch, w.column_head(at), token);
    }
    load_chunk(w, to.at(column, chunk), from, chunk, dims, x.unit());
  }
}
/// B1 and what else is known about its columns.
template <class K, class Machine>
NATTEN_DEVICE void load_first_columns(const Worker<K, Machine>& w, int stage,
                                      const typename K::Stop& stop) {
  load_columns(w, 0, w.first_columns(stage), stop);
  if constexpr (!K::kRowsAreQueries) {
    if (w.thread() < K::kColumns) {
      const ColumnTile& at = stop.tile;
      Coordinate token;
      const bool exists = w.token_of_column(at, w.thread(), token);
      const auto copy = [&](const Operand<const float>& x, int which) {
        constexpr int kBytes = sizeof(float);
        w.gpu.template copy_async<kBytes>(
            w.statistics(which, stage) + w.thread() * kBytes,
            exists ? x.at(w.state.batch, w.query_head(at), token) : x.data, exists ? kBytes : 0);
      };
      copy(w.a.logsumexp, 0);
      if constexpr (K::kNeedsGradWeights) copy(w.a.row_term, 1);
    }
  }
}

/// Chunks past `dims`, which whole tiles' copies leave alone, are zero.
template <class K, class Machine>
NATTEN_DEVICE void clear_padding(const Worker<K, Machine>& w, const typename K::Tile& tile,
                                 int count, int dims) {
  using T = typename K::Element;
  using Tile = typename K::Tile;
  if (dims > K::kDims - kChunk<T>) return;
  for (int item = w.thread(); item < count * Tile::kChunks; item += K::kThreads)
    load_chunk(w, tile.at(item / Tile::kChunks, item % Tile::kChunks), nullptr, 0, 0, 1);
}

}  // namespace natten::detail::cuda
