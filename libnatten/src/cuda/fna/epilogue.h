#pragma once

// What a block writes once it has seen all of its columns.

#include "masks.h"
#include "pieces.h"
#include "softmax.h"
#include "worker.h"

namespace natten::detail::cuda {

/// Writes a row's logsumexp or, less the gradient of logsumexp, its row term.
template <class K, class Machine>
NATTEN_DEVICE void write_statistic(const Worker<K, Machine>& w, int row, float x) {
  Coordinate token;
  if (!w.token_of_row(row, token)) return;
  if (K::kPass != TilePass::forward && w.a.grad_logsumexp)
    x -= *w.a.grad_logsumexp.at(w.state.batch, w.state.head, token);
  *w.a.statistic.at(w.state.batch, w.state.head, token) = x;
}

/// Writes the sums of this thread's rows over a part of the columns.
template <class K, class Machine>
NATTEN_DEVICE void write_partial(const Worker<K, Machine>& w, int which,
                                 const typename K::RowSums& sums,
                                 const typename K::PerRow& factors) {
  using T = typename K::Element;
  const int dims = w.a.dims[which];
  const Coordinate lengths = w.a.row_lengths();
  const std::int64_t before = (w.state.batch * w.a.heads + w.state.head) * volume(lengths);
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      Coordinate token;
      if (!w.token_of_row(w.row_of(m, half), token)) continue;
      float* to = w.a.partial[which].data + w.state.split * w.a.partial[which].part +
                  (before + ravel(token, lengths)) * dims;
      NATTEN_EACH (n, K::kDims / 8)
        NATTEN_EACH (j, 2) {
          const int d = dim_of<T>(w.lane(), n, j);
          if (d < dims) to[d] = sums[m][n][2 * half + j] * factors[m][half];
        }
    }
}

/// Writes the sums of the warp's rows, times a factor of each, in whole rows by way of the memory
/// that A1 had.
template <class K, class Machine, int kSums>
NATTEN_DEVICE void write(const Worker<K, Machine>& w, int which,
                         const FragmentC (&sums)[kSums][K::kDims / 8],
                         const typename K::PerRow& factors) {
  using T = typename K::Element;
  using Tile = typename K::Tile;
  const Tokens<T>& to = w.a.sums[which];
  if (!to.tensor) return;
  if constexpr (!K::kRowsAreQueries)
    if (w.a.splits > 1) return write_partial(w, which, sums, factors);
  const int dims = w.a.dims[which];
  constexpr Tile staging{K::Layout::kRows1};
  w.gpu.sync_warp();
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2)
      store_sums(w.gpu, w.lane(), sums[m], half, factors[m][half], staging, w.row_of(m, half));
  w.gpu.sync_warp();
  if constexpr (K::kTablesRows) {
    if (to.unit() == kChunk<T> && dims % kChunk<T> == 0) {
      constexpr int kStep = kLanes / Tile::kUnit;
      const int chunk = w.lane() % Tile::kUnit;
      const int row = 16 * K::kM * w.warp() + w.lane() / Tile::kUnit;
      T* const* rows = w.template row_addresses<T>(1) + row;
      const int from = staging.at(row, chunk);
      NATTEN_UNROLL
      for (int i = 0; i < 16 * K::kM; i += kStep) {
        T* const slot = rows[i];
        if (!slot) continue;
        NATTEN_UNROLL
        for (int j = 0; j < Tile::kChunks; j += Tile::kUnit) {
          const int element = (chunk + j) * kChunk<T>;
          if (element < dims)
            w.gpu.template copy<kChunkBytes>(
                slot + element, w.gpu.template shared<T>(Tile::rows_on(from, i) + 16 * j));
        }
      }
      return;
    }
  }
  const RowPointers<T> pointers = w.pointers_of_rows(to.tensor);
  NATTEN_DO_NOT_UNROLL
  for (unsigned item = w.lane(); item < 16 * K::kM * Tile::kChunks; item += kLanes) {
    const int in_warp = item / Tile::kChunks, chunk = item % Tile::kChunks;
    const int row = 16 * K::kM * w.warp() + in_warp;
    if (chunk * kChunk<T> >= dims || !w.state.rows.holds(w.a.grid.row_tile, row)) continue;
    T* slot = pointers.at(w.a.grid.row_tile, row) + chunk * kChunk<T>;
    const int from = staging.at(row, chunk);
    if (to.unit() == kChunk<T> && (chunk + 1) * kChunk<T> <= dims) {
      w.gpu.template copy<kChunkBytes>(slot, w.gpu.template shared<T>(from));
      continue;
    }
    const int count = w.gpu.opaque(dims) - chunk * kChunk<T>;  // as in load_chunk
    with_piece_bytes<T>(to.unit(), [&](auto bytes) {
      if constexpr (bytes >= 4)
        store_pieces<(bytes < kChunkBytes ? bytes : kChunkBytes / 2)>(
            w.gpu, slot, w.gpu.template shared<T>(from), count);
      else
        store_shifted(w.gpu, slot, from, count);
    });
  }
}

/// Gradients of keys that nobody sees are 0.
template <class K, class Machine>
NATTEN_DEVICE void clear_hidden_rows(const Worker<K, Machine>& w, Accumulators<K>& sums) {
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      Coordinate token;
      const int row = w.row_of(m, half);
      if (!w.token_of_row(row, token) || !w.is_hidden(row, token)) continue;
      NATTEN_EACH (n, K::kDims / 8)
        NATTEN_EACH (j, 2) {
          if constexpr (K::kSumsFirst) sums.first[m][n][2 * half + j] = 0;
          if constexpr (K::kSumsSecond) sums.second[m][n][2 * half + j] = 0;
        }
    }
}

/// Writes what the pass computes.
template <class K, class Machine>
NATTEN_DEVICE void write_results(const Worker<K, Machine>& w, Accumulators<K>& sums) {
  typename K::PerRow first_factors, second_factors;
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      first_factors[m][half] = w.a.scale;
      second_factors[m][half] = 1;
    }
  constexpr bool kWritesTerm = K::kPass == TilePass::row_term || K::kFindsTerm;
  if constexpr (K::kPass == TilePass::forward || kWritesTerm) {
    // Four threads have a row's totals, and each writes the statistic of another of their rows.
    float own_total = 0, own_product = 0;
    const int own = w.lane() % 4;
    NATTEN_EACH (m, K::kM)
      NATTEN_EACH (half, 2) {
        const auto whole = [&](float x) { return K::kFindsTerm ? x : row_sum(w, x); };
        const float total = whole(sums.totals[m][half]);
        second_factors[m][half] = 1 / divisor(total);
        if (own == 2 * m + half) own_total = total;
        if constexpr (kWritesTerm) {
          const float product = whole(sums.products[m][half]);
          if (own == 2 * m + half) own_product = product;
        }
      }
    if (w.a.statistic && own < 2 * K::kM) {
      const int row = own_row(w);
      if constexpr (K::kPass == TilePass::forward) {
        const float logsumexp = w.references()[row] * kLn2 + w.gpu.log(own_total);
        if constexpr (!K::kTablesRows)
          write_statistic(w, row, logsumexp);
        else if (float* const to = w.template row_addresses<float>(2)[row])
          *to = logsumexp;
      } else
        write_statistic(w, row, own_product / divisor(own_total));
    }
  }
  if constexpr (!K::kRowsAreQueries)
    if (w.a.hides_rows) clear_hidden_rows(w, sums);
  if constexpr (K::kSumsFirst) write(w, 0, sums.first, first_factors);
  if constexpr (K::kSumsSecond) write(w, 1, sums.second, second_factors);
}

}  // namespace natten::detail::cuda
