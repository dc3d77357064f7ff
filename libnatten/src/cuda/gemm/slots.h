#pragma once

// The slots of a block's queries: from attn to shared memory and to operands of products, or from
// products to shared memory and to attn.

#include "../fna/masks.h"
#include "../fna/prepare.h"
#include "worker.h"

namespace natten::detail::cuda {

/// Fills the tables of a chunk of slots, and finds the tiles of columns that rows see by these.
template <class K, class Machine>
NATTEN_DEVICE void find_chunk(const Worker<K, Machine>& w, int index) {
  using T = typename K::Element;
  if (w.thread() == 0) w.state.chunk = w.a.slots.at(index);
  w.gpu.sync();  // all warps are done with the chunk before
  const SlotChunk& chunk = w.state.chunk;
  const RowTile& rows = w.state.rows;
  const TileShape& shape = w.a.grid.row_tile;
  const SeenIntervals intervals = w.seen_intervals();
  int* first_slots = w.gpu.template shared<int>(K::Layout::kFirstSlots);
  intervals.for_each(w.thread(), K::kThreads, [&](int i, int a, int offset) {
    intervals.intervals[i] = {0, 0};
    first_slots[i] = 0;
    if (chunk.is_additional || offset >= rows.valid[a]) return;
    const Sight sight =
        sight_of(w.a.grid.axes[a], Rows::queries, rows.group[a], rows.origin[a] + offset);
    const int begin = sight.slot + chunk.begin[a], end = begin + chunk.extent[a];
    first_slots[i] = sight.slot;
    intervals.intervals[i] = {begin > sight.begin ? begin : sight.begin,
                              end < sight.end ? end : sight.end};
  });
  if (w.thread() < K::kColumns) {
    std::uint32_t slot = 0;
    NATTEN_EACH (i, kMaxRank)
      slot += static_cast<std::uint32_t>(w.a.grid.column_tile.offset(w.thread(), i)) *
              static_cast<std::uint32_t>(w.a.slots.step(i));
    relative_slots(w)[w.thread()] =
        chunk.is_additional ? static_cast<std::uint32_t>(w.thread()) : slot;
  }
  w.gpu.sync();
  if (w.thread() < K::kRows) {
    Coordinate token;
    const int row = w.thread();
    T* line = nullptr;
    std::uint32_t before =
        static_cast<std::uint32_t>(chunk.is_additional ? chunk.begin[2] : chunk.first);
    if (w.token_of_row(row, token)) {
      if constexpr (K::kOp == Op::qk)
        line = w.a.scores.at(w.state.batch, w.state.head, token);
      else
        line = const_cast<T*>(w.a.weights.at(w.state.batch, w.state.head, token));
      line += chunk.first;
    }
    NATTEN_EACH (i, kMaxRank)
      before += static_cast<std::uint32_t>(first_slots[intervals.index(i, shape.offset(row, i))]) *
                static_cast<std::uint32_t>(w.a.slots.step(i));
    lines(w)[row] = line;
    row_slots(w)[row] = static_cast<std::uint32_t>(misalignment(line)) - before;
  }
  if (w.warp() == 0) {
    if (w.lane() == 0)
      w.state.tiles.additional = chunk.is_additional ? (chunk.count - 1) / K::kColumns + 1 : 0;
    find_bounds(w);
    if (w.lane() == 0) {
      ColumnTiles& tiles = w.state.tiles;
      w.state.first = chunk.is_additional ? chunk.begin[2] / K::kColumns : 0;
      w.state.count = tiles.count();
      tiles.additional += w.state.first;
    }
  }
  w.gpu.sync();
}

/// Calls `f(shared, memory, first)` for this lane's part of the 16-byte pieces that hold slots
/// of the warp's rows: `shared` and `memory` say where one begins, which is slot `first` of the
/// chunk and may lie before it.
template <class K, class Machine, class F>
NATTEN_DEVICE void for_each_piece(const Worker<K, Machine>& w, F&& f) {
  using T = typename K::Element;
  constexpr int kSlots = kChunk<T>;
  const int pieces = (w.state.chunk.count + 2 * kSlots - 2) / kSlots;  // of a row, at most
  constexpr int kRows = 16 * K::kM;
  NATTEN_DO_NOT_UNROLL
  for (int item = w.lane(); item < kRows * pieces; item += kLanes) {
    const int row = kRows * w.warp() + item / pieces, piece = item % pieces;
    T* line = lines(w)[row];
    if (!line) continue;
    const int first = piece * kSlots - misalignment(line);
    if (first < w.state.chunk.count) f(K::slots_of(row) + piece * kChunkBytes, line + first, first);
  }
}
/// Calls `f(j)` for the slots of a piece that are of the chunk.
template <class K, class Machine, class F>
NATTEN_DEVICE void for_each_of_piece(const Worker<K, Machine>& w, int first, F&& f) {
  NATTEN_DO_NOT_UNROLL
  for (int j = 0; j < kChunk<typename K::Element>; ++j)
    if (first + j >= 0 && first + j < w.state.chunk.count) f(j);
}
template <class K, class Machine>
NATTEN_DEVICE bool is_full(const Worker<K, Machine>& w, int first) {
  return first >= 0 && first + kChunk<typename K::Element> <= w.state.chunk.count;
}

/// Begins to copy the warp's rows of attn to shared memory.
template <class K, class Machine>
NATTEN_DEVICE void load_slots(const Worker<K, Machine>& w) {
  using T = typename K::Element;
  for_each_piece(w, [&](int shared, const T* memory, int first) {
    if (is_full(w, first)) return w.gpu.copy_async(shared, memory);
    T* to = w.gpu.template shared<T>(shared);
    for_each_of_piece(w, first, [&](int j) { to[j] = memory[j]; });
  });
}
template <class K, class Machine>
NATTEN_DEVICE void store_slots(const Worker<K, Machine>& w) {
  using T = typename K::Element;
  w.gpu.sync_warp();
  for_each_piece(w, [&](int shared, T* memory, int first) {
    const T* from = w.gpu.template shared<T>(shared);
    if (is_full(w, first)) return w.gpu.template copy<kChunkBytes>(memory, from);
    for_each_of_piece(w, first, [&](int j) { memory[j] = from[j]; });
  });
}
/// Empties the slots of the warp's rows in shared memory; before a barrier.
template <class K, class Machine>
NATTEN_DEVICE void clear_slots(const Worker<K, Machine>& w) {
  using T = typename K::Element;
  std::uint32_t word = natten::detail::bits_of(w.a.empty);
  if constexpr (!std::is_same_v<T, float>) word = w.gpu.template pack<T>(w.a.empty, w.a.empty);
  const std::uint32_t piece[4] = {word, word, word, word};
  for_each_piece(w, [&](int shared, const T*, int) { w.gpu.write_chunk(shared, piece); });
}

/// What one of the thread's two rows sees; nothing where there is no such row. See `spread`.
template <class K, class Machine>
NATTEN_DEVICE std::uint64_t word_of_own(const Worker<K, Machine>& w, const typename K::Stop& stop) {
  const int row = own_row(w);
  if (!w.state.rows.holds(w.a.grid.row_tile, row)) return 0;
  if (stop.seen[w.warp()] == Overlap::all) return ~std::uint64_t{0};
  return seen_by(w, row, stop.tile) & stop.shown;
}

/// Where the slots are of one of this thread's rows and the columns of a tile.
template <class K, class Machine>
struct RowSlots {
  const Worker<K, Machine>& w;
  std::uint32_t before;
  int memory;

  NATTEN_DEVICE RowSlots(const Worker<K, Machine>& worker, int row, const ColumnTile& at)
      : w(worker),
        before(row_slots(worker)[row] + slot_of_tile(worker, at)),
        memory(K::slots_of(row)) {}
  /// Of element `j` of block `n` of columns.
  template <class E>
  NATTEN_DEVICE E& at(int n, int j) const {
    const std::uint32_t slot = before + relative_slots(w)[w.column_of(n) + j];
    return *w.gpu.template shared<E>(memory + static_cast<int>(slot) * int(sizeof(E)));
  }
};

/// Puts a tile's scores where rows that see the columns have their slots.
template <class K, class Machine>
NATTEN_DEVICE void scatter(const Worker<K, Machine>& w, const typename K::Scores& scores,
                           const typename K::Stop& stop) {
  using T = typename K::Element;
  const ColumnTile& at = stop.tile;
  const std::uint64_t word = word_of_own(w, stop);
  NATTEN_EACH (half, 2) {
    Mask<K> mask;
    spread(w, word, 0, half, mask);
    const int row = w.row_of(0, half);
    const RowSlots<K, Machine> slots(w, row, at);
    const RowBias<K, Machine> bias(w, row, at);
    NATTEN_EACH (n, K::kN) {
      float x[2];
      NATTEN_EACH (j, 2) {
        x[j] = scores[0][n][2 * half + j];
        if (bias && bit(mask, n, j)) x[j] += bias.at(n, j);
      }
      if constexpr (std::is_same_v<T, float>) {
        NATTEN_EACH (j, 2)
          if (bit(mask, n, j)) slots.template at<float>(n, j) = x[j];
      } else {
        const std::uint32_t both = w.gpu.template pack<T>(x[0], x[1]);
        NATTEN_EACH (j, 2)
          if (bit(mask, n, j))
            slots.template at<std::uint16_t>(n, j) = static_cast<std::uint16_t>(both >> (16 * j));
      }
    }
  }
}

template <class T>
NATTEN_DEVICE std::uint32_t element_bits(T x) {
  if constexpr (std::is_same_v<T, float>)
    return natten::detail::bits_of(x);
  else
    return x.bits;
}
/// Two neighbors of a row's weights, as bits of elements, as operand A.
template <class T, int kK>
NATTEN_DEVICE void set_weights(FragmentA (&x)[1][kK], int n, int half, std::uint32_t first,
                               std::uint32_t second) {
  if constexpr (std::is_same_v<T, float>) {
    x[0][n][half] = tf32_bits(natten::detail::float_of(first));
    x[0][n][2 + half] = tf32_bits(natten::detail::float_of(second));
  } else {
    x[0][n / 2][n % 2 * 2 + half] = first | second << 16;
  }
}

/// Takes the weights of a tile from where rows that see the columns have their slots.
template <class K, class Machine>
NATTEN_DEVICE void gather(const Worker<K, Machine>& w, typename K::Weights& weights,
                          const typename K::Stop& stop) {
  using T = typename K::Element;
  const std::uint64_t word = word_of_own(w, stop);
  NATTEN_EACH (half, 2) {
    Mask<K> mask;
    spread(w, word, 0, half, mask);
    const RowSlots<K, Machine> slots(w, w.row_of(0, half), stop.tile);
    NATTEN_EACH (n, K::kN) {
      std::uint32_t x[2] = {0, 0};
      NATTEN_EACH (j, 2)
        if (bit(mask, n, j)) x[j] = element_bits(slots.template at<T>(n, j));
      set_weights<T>(weights, n, half, x[0], x[1]);
    }
  }
}

}  // namespace natten::detail::cuda
