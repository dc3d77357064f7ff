#pragma once

// What rows see of a tile of columns. The rest gets the score -inf.

#include "worker.h"

namespace natten::detail::cuda {

template <class K, class Machine>
NATTEN_DEVICE Overlap overlap(const Worker<K, Machine>& w, const ColumnTile& at, int of_warp) {
  if (at.is_additional)
    return at.origin[2] + K::kColumns <= w.a.additional_columns ? Overlap::all : Overlap::some;
  return overlap_of(w.state.bounds[of_warp], w.a.grid.column_tile, at.origin);
}

/// The columns of a tile that are given and not hidden, a bit for each. Four lanes find out a
/// quarter each for a tile of theirs; all lanes of a warp take part.
template <class K, class Machine>
NATTEN_DEVICE std::uint64_t shown_columns(const Worker<K, Machine>& w, const ColumnTile& at,
                                          bool exists) {
  constexpr int kPart = K::kColumns / K::kWarps, kBatch = K::State::kBatch;
  const int first = w.lane() / kBatch * kPart;
  std::uint32_t bits = 0;
  if (exists) {
    NATTEN_DO_NOT_UNROLL
    for (int i = 0; i < kPart; i += 4)
      NATTEN_EACH (j, 4) {
        Coordinate token;
        const bool is_shown = at.is_additional || (w.token_of_column(at, first + i + j, token) &&
                                                   !w.a.column_mask.hides(w.state.batch, token));
        bits |= static_cast<std::uint32_t>(is_shown) << (i + j);
      }
  }
  std::uint64_t word = 0;
  NATTEN_EACH (part, K::kWarps)
    word |= std::uint64_t{w.gpu.shuffle(bits, w.lane() % kBatch + kBatch * part)} << kPart * part;
  return word;
}

/// The columns that a row sees, a bit for each.
template <class K, class Machine>
NATTEN_DEVICE std::uint64_t seen_by(const Worker<K, Machine>& w, int row, const ColumnTile& at) {
  if (at.is_additional) return low_bits(w.a.additional_columns - at.origin[2]);
  const TileShape& shape = w.a.grid.row_tile;
  const PlaceInterval seen[kMaxRank] = {w.seen_intervals().at(0, shape.offset(row, 0)),
                                        w.seen_intervals().at(1, shape.offset(row, 1)),
                                        w.seen_intervals().at(2, shape.offset(row, 2))};
  return w.a.mask.word(w.a.grid.column_tile, seen, at.origin);
}
/// The same for this thread's columns: bit 8 n + j is element j of block n.
template <class K>
using Mask = std::uint32_t[K::kN / 4];
template <int kWords>
NATTEN_DEVICE bool bit(const std::uint32_t (&mask)[kWords], int n, int j) {
  return mask[n / 4] >> (8 * (n % 4) + j) & 1;
}

/// Finds out `axis_words`, before there is a tile: a row's word is what three of them have in
/// common, and many rows share each.
template <class K, class Machine>
NATTEN_DEVICE void find_axis_words(const Worker<K, Machine>& w) {
  if constexpr (K::kSharesWords) {
    const TileShape &rows = w.a.grid.row_tile, &columns = w.a.grid.column_tile;
    NATTEN_DO_NOT_UNROLL
    for (int i = w.thread(); i < w.state.word_count; i += K::kThreads) {
      const int axis = i < w.state.first_words[1] ? 0 : i < w.state.first_words[2] ? 1 : 2;
      const int word = i - w.state.first_words[axis];
      const int tile = word >> rows.bits[axis];
      const PlaceInterval seen = w.seen_intervals().at(axis, word & (rows.extent(axis) - 1));
      w.axis_words()[i] = w.a.mask.word_of_axis(
          columns, axis, seen, w.state.tiles.low[axis] + (tile << columns.bits[axis]));
    }
  }
}
/// Those of tile `i`, if it has a mask and there is no room for those of all. The warps take turns.
template <class K, class Machine>
NATTEN_DEVICE void find_axis_words(const Worker<K, Machine>& w, int i) {
  if (!K::kSharesWords || w.state.word_count > 0 || w.warp() != i % K::kWarps) return;
  const typename K::Stop& stop = w.stop_of(i);
  if (!stop.has_masks) return;
  const SeenIntervals seen = w.seen_intervals();
  std::uint64_t* const words = w.axis_words() + w.words_of_tile(i);
  seen.for_each(w.lane(), kLanes, [&](int index, int axis, int) {
    words[index] = w.a.mask.word_of_axis(w.a.grid.column_tile, axis, seen.intervals[index],
                                         stop.tile.origin[axis]);
  });
}

/// Four threads share their rows, and what rows see: each finds it out for one of them.
template <class K, class Machine>
NATTEN_DEVICE int own_row(const Worker<K, Machine>& w) {
  return w.row_of(0, 0) + 8 * (w.lane() % (2 * K::kM));
}
template <class K, class Machine>
NATTEN_DEVICE void set_own_offsets(const Worker<K, Machine>& w) {
  if constexpr (K::kSharesWords) {
    std::uint32_t offsets = 0;
    NATTEN_EACH (a, kMaxRank)
      offsets |= static_cast<std::uint32_t>(w.a.grid.row_tile.offset(own_row(w), a)) << 10 * a;
    w.own_offsets()[w.thread()] = offsets;
  }
}
/// The columns of a tile that the row sees, if they are shown.
template <class K, class Machine>
NATTEN_DEVICE std::uint64_t seen_by_own(const Worker<K, Machine>& w, const typename K::Stop& stop,
                                        int i) {
  if constexpr (!K::kSharesWords) return seen_by(w, own_row(w), stop.tile);
  if (stop.tile.is_additional) return low_bits(w.a.additional_columns - stop.tile.origin[2]);
  const std::uint32_t numbers = w.first_words(i) + w.own_offsets()[w.thread()];
  std::uint64_t word = ~std::uint64_t{0};
  NATTEN_EACH (a, kMaxRank) word &= w.axis_words()[numbers >> 10 * a & 0x3ff];
  return word;
}
template <class K, class Machine>
NATTEN_DEVICE std::uint64_t own_word(const Worker<K, Machine>& w, const typename K::Stop& stop,
                                     int i, Overlap overlap) {
  std::uint64_t word = ~std::uint64_t{0};
  if (overlap == Overlap::some) word = seen_by_own(w, stop, i) & stop.shown;
  return word;
}
/// Then it is known to all four, each for its columns.
template <class K, class Machine>
NATTEN_DEVICE void spread(const Worker<K, Machine>& w, std::uint64_t word, int m, int half,
                          Mask<K>& mask) {
  NATTEN_EACH (i, K::kN / 4)
    mask[i] = w.gpu.shuffle(static_cast<std::uint32_t>(word >> (32 * i)),
                            (w.lane() & ~3) + 2 * m + half) >>
              (2 * (w.lane() % 4));
}

/// The 16 things that a thread's elements of a block of columns may start at: element i is seen
/// where bit i of the number is set.
template <class K, class Machine>
NATTEN_DEVICE void set_mask_starts(const Worker<K, Machine>& w) {
  const int i = w.thread();
  if (i < 4 * kMaskPatterns)
    w.gpu.template shared<float>(K::Layout::kMaskStarts)[i] = i / 4 >> i % 4 & 1 ? 0.0f : kNone;
}
/// Starts scores at 0, and those of columns that are not seen at -inf.
template <class K, class Machine>
NATTEN_DEVICE void start_scores(const Worker<K, Machine>& w, typename K::Scores& scores,
                                const typename K::Stop& stop, int i) {
  const std::uint64_t word = own_word(w, stop, i, Overlap::some);
  NATTEN_EACH (m, K::kM) {
    Mask<K> masks[2];
    NATTEN_EACH (half, 2) spread(w, word, m, half, masks[half]);
    NATTEN_EACH (part, K::kN / 4) {
      // A byte for each block of columns.
      const std::uint32_t numbers =
          (masks[0][part] & 0x03030303u) + 4 * (masks[1][part] & 0x03030303u);
      NATTEN_EACH (n, 4) {
        std::uint32_t start[4];
        w.gpu.read_chunk(start, K::Layout::kMaskStarts +
                                    static_cast<int>(numbers >> 8 * n & 0xff) * kChunkBytes);
        NATTEN_EACH (j, 4) scores[m][4 * part + n][j] = natten::detail::float_of(start[j]);
      }
    }
  }
}

/// The biases of a row and a tile's columns, where it has some.
template <class K, class Machine>
struct RowBias {
  using T = typename K::Element;
  const Worker<K, Machine>& w;
  bool exists;
  int offset;
  const T* of_head;

  NATTEN_DEVICE RowBias(const Worker<K, Machine>& worker, int row, const ColumnTile& at)
      : w(worker),
        exists(worker.a.rpb && !at.is_additional && worker.a.grid.rows != Rows::additional &&
               worker.state.rows.holds(worker.a.grid.row_tile, row)),
        offset(0),
        of_head(worker.a.rpb.data + worker.query_head(at) * worker.a.rpb.head) {
    constexpr int kSign = K::kRowsAreQueries ? 1 : -1;  // offsets are key - query
    NATTEN_EACH (i, kMaxRank) {
      const int own = w.state.rows.own[i] + w.a.grid.row_tile.offset(row, i);
      offset +=
          (kSign * (at.origin[i] - own) + static_cast<int>(w.a.grid.axes[i].kernel_size) - 1) *
          static_cast<int>(w.a.rpb.grid[i]);
    }
  }
  NATTEN_DEVICE explicit operator bool() const { return exists; }
  /// Of element `j` of block `n` of columns.
  NATTEN_DEVICE float at(int n, int j) const {
    return static_cast<float>(of_head[offset + w.relative_bias()[w.column_of(n) + j]]);
  }
};

/// Scales a row and adds its biases.
template <class K, class Machine>
NATTEN_DEVICE void scale_row(const Worker<K, Machine>& w, FragmentC (&scores)[K::kN], int half,
                             int row, const ColumnTile& at, const Mask<K>& mask) {
  constexpr int kTogether = K::kHoldsRows ? 2 : 4;
  const RowBias<K, Machine> bias(w, row, at);
  NATTEN_EACH (n, K::kN) {
    if (n % kTogether == 0) w.gpu.sync_warp();  // reads ahead would take registers
    NATTEN_EACH (j, 2) {
      float& score = scores[n][2 * half + j];
      score *= w.a.scale * kLog2E;
      if (bias && bit(mask, n, j)) score += bias.at(n, j) * kLog2E;
    }
  }
}

/// Scales where that comes first, adds biases, and gives unseen columns the score -inf.
template <class K, class Machine>
NATTEN_DEVICE void finish_scores(const Worker<K, Machine>& w, typename K::Scores& scores,
                                 const typename K::Stop& stop, int i, Overlap overlap) {
  const ColumnTile& at = stop.tile;
  const bool scales_first = K::kScalesFirst && w.a.scales_first;
  if (overlap == Overlap::all && !scales_first) return;
  const int first_row = w.row_of(0, 0);
  const std::uint64_t word = own_word(w, stop, i, overlap);
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      Mask<K> mask;
      spread(w, word, m, half, mask);
      if (scales_first) scale_row(w, scores[m], half, first_row + 16 * m + 8 * half, at, mask);
      NATTEN_EACH (n, K::kN)
        NATTEN_EACH (j, 2) {
          float& score = scores[m][n][2 * half + j];
          score = bit(mask, n, j) ? score : kNone;
        }
    }
}

}  // namespace natten::detail::cuda
