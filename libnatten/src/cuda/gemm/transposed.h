#pragma once

// The weights of a tile by keys, of the transposed operation: rows are keys or additional tokens,
// and columns queries, whose slots lie in as many places of attn. Lanes take neighboring keys,
// which have neighboring slots of a query.

#include "../fna/masks.h"
#include "slots.h"

namespace natten::detail::cuda {

/// Weights of one row for this thread, on their way to shared memory: half of a tile's columns.
template <class K>
using Fetched = std::uint32_t[K::kColumns / 2];

/// A thread's row and columns: lanes of a warp have neighboring rows and the same columns.
template <class K, class Machine>
struct Share {
  static constexpr int kCount = K::kColumns / 2;
  int row, first_column;
  bool is_live;
  std::uint32_t relative;  ///< slots from the block's first row to this

  NATTEN_DEVICE explicit Share(const Worker<K, Machine>& w)
      : row(w.thread() % K::kRows), first_column(w.thread() / K::kRows * kCount), relative(0) {
    Coordinate token;
    is_live = w.token_of_row(row, token) && !w.is_hidden(row, token);
    const bool is_additional = w.a.grid.rows == Rows::additional;
    NATTEN_EACH (i, kMaxRank)
      relative += static_cast<std::uint32_t>(w.a.grid.row_tile.offset(row, i)) *
                  static_cast<std::uint32_t>(is_additional ? i == 2 : w.a.slots.step(i));
  }
};

/// The slot of a column for the block's first row, which may lie outside of it; null where there is
/// no such column.
template <class K, class Machine>
NATTEN_DEVICE const typename K::Element* slot_of_first_row(const Worker<K, Machine>& w,
                                                           const ColumnTile& at, int column) {
  Coordinate token;
  if (column >= K::kColumns || !w.token_of_column(at, column, token)) return nullptr;
  const auto* slot = w.a.weights.at(w.state.batch, w.state.head, token);
  if (w.a.grid.rows == Rows::additional)
    return slot + w.a.slots.window_size() + w.state.rows.origin[2];
  NATTEN_EACH (i, kMaxRank) {
    // A query of a circular axis is another for each turn that lies between it and the key.
    const int turned =
        at.origin[i] + w.a.grid.column_tile.offset(column, i) - w.place_of_column(at, column, i);
    const int first = w.a.sights.of[i][token[i]].slot + turned;
    slot += (std::int64_t{w.state.rows.origin[i]} - first) * w.a.slots.step(i);
  }
  return slot;
}

/// Begins to read this thread's weights of a tile.
template <class K, class Machine>
NATTEN_DEVICE void fetch(const Worker<K, Machine>& w, const Share<K, Machine>& share, Fetched<K>& x,
                         const typename K::Stop& stop) {
  using T = typename K::Element;
  std::uint32_t seen = 0;
  if (share.is_live)
    seen = static_cast<std::uint32_t>((seen_by(w, share.row, stop.tile) & stop.shown) >>
                                      share.first_column);
  const auto own = reinterpret_cast<std::uint64_t>(
      slot_of_first_row(w, stop.tile, share.first_column + w.lane()));
  const auto low = static_cast<std::uint32_t>(own), high = static_cast<std::uint32_t>(own >> 32);
  NATTEN_EACH (i, (Share<K, Machine>::kCount)) {
    const std::uint64_t first = std::uint64_t{w.gpu.shuffle(high, i)} << 32 | w.gpu.shuffle(low, i);
    x[i] = 0;
    if (seen >> i & 1) x[i] = element_bits(reinterpret_cast<const T*>(first)[share.relative]);
  }
}
/// Puts them where all warps find them.
template <class K, class Machine>
NATTEN_DEVICE void store(const Worker<K, Machine>& w, const Share<K, Machine>& share,
                         const Fetched<K>& x, int stage) {
  using T = typename K::Element;
  using Bits = std::conditional_t<std::is_same_v<T, float>, std::uint32_t, std::uint16_t>;
  const typename K::Transposed to = K::transposed(stage);
  NATTEN_EACH (i, (Share<K, Machine>::kCount))
    w.gpu.template shared<Bits>(
        to.at(share.first_column + i, share.row / kChunk<T>))[share.row % kChunk<T>] =
        static_cast<Bits>(x[i]);
}

/// Takes the weights of the warp's rows from there.
template <class K, class Machine>
NATTEN_DEVICE void read(const Worker<K, Machine>& w, typename K::Weights& weights, int stage) {
  using T = typename K::Element;
  const typename K::Transposed from = K::transposed(stage);
  if constexpr (std::is_same_v<T, float>) {
    NATTEN_EACH (half, 2) {
      const int row = w.row_of(0, half);
      NATTEN_EACH (n, K::kN) {
        std::uint32_t x[2];
        NATTEN_EACH (j, 2)
          x[j] = w.gpu.template shared<std::uint32_t>(
              from.at(w.column_of(n) + j, row / kChunk<T>))[row % kChunk<T>];
        set_weights<T>(weights, n, half, x[0], x[1]);
      }
    }
  } else {
    const int first = from.at(w.lane() / 16 * 8 + w.lane() % 8, 2 * w.warp() + w.lane() / 8 % 2);
    NATTEN_EACH (k, K::kColumns / 16)
      w.gpu.load_matrices_transposed(weights[0][k], first + 16 * k * from.kPitch);
  }
}

}  // namespace natten::detail::cuda
