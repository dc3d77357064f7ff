#pragma once

// A thread that computes a pass: the sizes of its tile, its part of it, and the memory that its
// block shares.

#include "arguments.h"
#include "matrices.h"

namespace natten::detail::cuda {

/// A tile of columns and where its tokens are.
template <class T, int kWarps>
struct ColumnStop {
  ColumnTile tile;
  Overlap seen[kWarps];  ///< by the rows of each warp
  /// Of B1 and B2: all columns are shown, lie one after another and are copied in whole chunks.
  bool copies_whole[2];
  bool is_last;    ///< of the block's
  bool has_masks;  ///< some warp's rows see a part of it
  /// The first token of B1 and B2 where the others have offsets from it, else null.
  const T* first[2];
  std::uint64_t shown;  ///< a bit for each column: given, and not hidden
};

/// Where a block is at work, in shared memory: it is read now and then, by all threads.
template <class T, int kWarps>
struct BlockState {
  /// Tiles of columns are located `kBatch` at a time, each lane of a warp one for one of the warps,
  /// while the block is at the batch before.
  static constexpr int kBatch = kLanes / kWarps;
  ColumnStop<T, kWarps> stops[2 * kBatch];  ///< of tile i at i modulo their number
  RowTile rows;
  ColumnTiles tiles;
  int first, count;  ///< of tiles of columns: those of this block
  int split, head, first_column_head;
  int column_end;                         ///< number past the last column along the last axis
  int first_words[kMaxRank], word_count;  ///< of `axis_words`, where it has those of all tiles
  std::int64_t batch;
  Example example;  ///< where there are several
  Bounds bounds[kWarps][kMaxRank];
};

/// What a thread's four elements of a block of columns start at (masks.h): one of so many.
inline constexpr int kMaskPatterns = 16;

/// The constants of the kernel of a pass: of elements of type `T`, up to `kDims` of them per token,
/// with 16 `kM` rows per warp.
template <class T, int kPaddedDims, int kRowBlocks, TilePass kThePass>
struct TileTraits {
  using Element = T;
  using Given = Arguments<T>;
  static constexpr int kDims = kPaddedDims;
  static constexpr int kM = kRowBlocks;
  static constexpr TilePass kPass = kThePass;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr bool kRowsAreQueries = rows_are_queries(kPass);
  static constexpr bool kAddsQueries = kPass == TilePass::grad_all;
  static constexpr bool kSumsFirst = kPass == TilePass::grad_query ||
                                     kPass == TilePass::grad_key_value ||
                                     kPass == TilePass::grad_key || kAddsQueries;
  static constexpr bool kSumsSecond = kPass == TilePass::forward ||
                                      kPass == TilePass::grad_key_value ||
                                      kPass == TilePass::grad_value || kAddsQueries;
  static constexpr bool kNeedsGradWeights = kSumsFirst || kPass == TilePass::row_term;
  /// Whether it finds out the row term on the way, by a second sum.
  static constexpr bool kFindsTerm = kPass == TilePass::grad_query && kDims <= kMostDimsOfTwo;
  /// Whether registers hold what is the same for all tiles of columns; else it is cheaper to
  /// compute that again.
  static constexpr bool kKeepsIndices = kPass == TilePass::forward && kM * kDims <= 64;
  /// Whether scores can be scaled, and biased, before all else. Kernels with 32 rows per warp leave
  /// that to those with 16: they have no registers to spare.
  static constexpr bool kScalesFirst = kM == 1;
  static constexpr int kRows = 16 * kM * kWarps;
  using Tile = SharedTile<T, kDims>;
  /// Whether registers hold the warp's rows of A1, whose memory B2 takes then: so two blocks of 128
  /// dims fit into 100 KiB.
  static constexpr bool kHoldsRows = kPass == TilePass::forward && kM == 1 && sizeof(T) == 2 &&
                                     !kKeepsIndices && kDims <= kMostDimsOfTwo;
  /// That a multiprocessor has registers for, as many as the kernel can do with.
  static constexpr int kBlocks = kM > 1                                                 ? 2
                                 : kKeepsIndices || (kDims == 32 && !kFindsTerm)        ? 4
                                 : kHoldsRows || (Tile::kPitch <= 128 && !kAddsQueries) ? 3
                                                                                        : 2;
  /// As many as shared memory has room for beside the rows.
  static constexpr bool kIsCrowded = Tile::kPitch > 256 && (kPass != TilePass::forward || kM > 1);
  static constexpr int kColumns = kIsCrowded ? 32 : 64;
  static constexpr int kN = kColumns / 8;
  static_assert(kN % 4 == 0, "a word of a thread's mask is of four blocks of columns");
  /// Tiles of B1 in shared memory. Where it serves twice per tile, the next one is loaded beside
  /// it.
  static constexpr int kStages = kSumsFirst && Tile::kPitch <= 384 ? 2 : 1;
  /// Whether masks are made of words that rows share (masks.h): where shared memory has room for
  /// these, and there are registers to spare.
  static constexpr bool kSharesWords = Tile::kPitch <= 384 && kM * kDims <= 192;
  /// Whether masks are what products start at, -inf where a row does not see a column: where that
  /// takes no registers that blocks beside this one need.
  static constexpr bool kStartsAtMasks =
      kPass == TilePass::forward && kSharesWords &&
      (sizeof(T) == 2 ? kM * kDims <= 128 : kDims <= 64 && kM == 1);
  /// Whether a table has the addresses of rows, which all threads of a row would compute else.
  static constexpr bool kTablesRows = kPass == TilePass::forward && Tile::kPitch <= 256;
  using State = BlockState<T, kWarps>;
  using Stop = ColumnStop<T, kWarps>;

  /// What a thread holds: scores of its rows, weights packed for products, sums over the columns,
  /// and one number per row.
  using Scores = FragmentC[kM][kN];
  using Weights = cuda::Weights<T, kM, kN>;
  using RowSums = FragmentC[kM][kDims / 8];
  using PerRow = float[kM][2];
  using HeldRows = cuda::HeldRows<kM, kHoldsRows ? kDims / kDepth<T> : 1>;

  /// Shared memory, in order: offsets in bytes.
  struct Layout {
    static constexpr int kRows1 = 0;
    static constexpr int kRows2 = kRows1 + Tile::bytes(kRows);
    static constexpr int kColumns1 = kRows2 + (kNeedsGradWeights ? Tile::bytes(kRows) : 0);
    static constexpr int kAfterColumns1 = kColumns1 + kStages * Tile::bytes(kColumns);
    static_assert(!kHoldsRows || kColumns == kRows);
    static constexpr int kColumns2 = kHoldsRows ? kRows1 : kAfterColumns1;
    static constexpr int kGradScores = kAfterColumns1 + (kHoldsRows ? 0 : Tile::bytes(kColumns));
    static constexpr int kStatistics =
        kGradScores + (kAddsQueries ? SharedTile<T, kColumns>::bytes(kRows) : 0);
    static constexpr int kMaskStarts =
        kStatistics + (kRowsAreQueries ? 0 : 2 * kStages * kColumns * int(sizeof(float)));
    static constexpr int kState = kMaskStarts + (kStartsAtMasks ? kMaskPatterns * kChunkBytes : 0);
    static constexpr int kRelativeBias = kState + int(sizeof(State));
    static constexpr int kRelative = kRelativeBias + kColumns * int(sizeof(int));
    static constexpr int kReferences = kRelative + 2 * kColumns * int(sizeof(int));
    static constexpr int kSeenIntervals =
        kReferences + (kPass == TilePass::forward ? kRows * int(sizeof(float)) : 0);
    static constexpr int kAxisWords = kSeenIntervals + (kRows + 2) * int(sizeof(PlaceInterval));
    static_assert(kAxisWords % int(sizeof(std::uint64_t)) == 0, "words are aligned");
    static constexpr int kRowAddresses =
        kAxisWords + (kSharesWords ? 2 * (kRows + 2) * int(sizeof(std::uint64_t)) : 0);
    static constexpr int kOwnOffsets =
        kRowAddresses + (kTablesRows ? 3 * kRows * int(sizeof(void*)) : 0);
    static constexpr int kFirstWords =
        kOwnOffsets + (kSharesWords ? kThreads * int(sizeof(std::uint32_t)) : 0);
    static constexpr int kLive =
        kFirstWords + (kSharesWords ? 2 * State::kBatch * int(sizeof(std::uint32_t)) : 0);
    static constexpr int kBytes = kLive + (kAddsQueries ? kRows : 0);
  };
};

template <class E, int kRowBlocks, int kColumnBlocks>
NATTEN_DEVICE void clear(E (&x)[kRowBlocks][kColumnBlocks][4]) {
  NATTEN_EACH (m, kRowBlocks)
    NATTEN_EACH (n, kColumnBlocks)
      NATTEN_EACH (i, 4) x[m][n][i] = 0;
}

/// What a thread sums up over the columns.
template <class K>
struct Accumulators {
  /// Weights times B1; where the row term is not known before, and then P times B1.
  FragmentC first[K::kFindsTerm ? 2 * K::kM : K::kSumsFirst ? K::kM : 1][K::kDims / 8];
  FragmentC second[K::kSumsSecond ? K::kM : 1][K::kDims / 8];  ///< weights times B2
  /// Weights, and P dP: this thread's shares, or where it finds the row term, those of all four.
  typename K::PerRow totals, products;

  NATTEN_DEVICE void clear() {
    cuda::clear(first);
    cuda::clear(second);
    NATTEN_EACH (m, K::kM)
      NATTEN_EACH (half, 2) totals[m][half] = products[m][half] = 0;
  }
};

/// Where a block's rows are in a tensor: from the first one, so many elements further for each row
/// along an axis.
template <class E>
struct RowPointers {
  E* first;
  std::int64_t step[kMaxRank];

  NATTEN_DEVICE E* at(const TileShape& tile, int row) const {
    return first + tile.offset(row, 0) * step[0] + tile.offset(row, 1) * step[1] +
           tile.offset(row, 2) * step[2];
  }
};

/// One thread at work on one tile of rows: what it is given, which rows and columns of matrices it
/// holds, and where tokens and tables are. `K` is the TileTraits of the kernel, here and in all
/// functions that take a worker.
template <class K, class Machine>
struct Worker {
  using Tile = typename K::Tile;
  Machine& gpu;
  const typename K::Given& a;
  typename K::State& state;

  /// `x`, from which nothing is computed ahead of where it is used, unless registers are at hand.
  NATTEN_DEVICE int opaque(int x) const { return K::kKeepsIndices ? x : gpu.opaque(x); }
  NATTEN_DEVICE int thread() const { return opaque(gpu.thread()) & (K::kThreads - 1); }
  NATTEN_DEVICE int lane() const { return thread() % kLanes; }
  NATTEN_DEVICE int warp() const { return thread() / kLanes; }
  /// The row of a C fragment's elements 2 half and 2 half + 1.
  NATTEN_DEVICE int row_of(int m, int half) const {
    return 16 * K::kM * warp() + 16 * m + 8 * half + lane() / 4;
  }
  /// The first column of a C fragment's two.
  NATTEN_DEVICE int column_of(int n) const { return 8 * n + 2 * (lane() % 4); }
  NATTEN_DEVICE static Tile first_columns(int stage) {
    return {K::Layout::kColumns1 + stage * Tile::bytes(K::kColumns)};
  }
  /// logsumexp (0), times log2 e once `scale_statistics` has been there, and row term (1) of the
  /// columns.
  NATTEN_DEVICE static int statistics(int which, int stage) {
    return K::Layout::kStatistics + (which * K::kStages + stage) * K::kColumns * int(sizeof(float));
  }
  /// Where the columns of a tile lie, from its first, in units of `a.columns[which]`.
  NATTEN_DEVICE int* relative(int which) const {
    return gpu.template shared<int>(K::Layout::kRelative) + which * K::kColumns;
  }
  /// How far before that a column lies for turns of circular axes.
  NATTEN_DEVICE int turned_back(int which, const ColumnTile& at, int column) const {
    int back = 0;
    NATTEN_EACH (i, kMaxRank) {
      const int turn = a.grid.places[i].turn;
      if (turn == 0) continue;
      int place = at.place[i] + a.grid.column_tile.offset(column, i);
      for (; place >= turn; place -= turn) back += a.turn_units[which][i];
    }
    return back;
  }
  /// And in elements of the bias.
  NATTEN_DEVICE int* relative_bias() const {
    return gpu.template shared<int>(K::Layout::kRelativeBias);
  }
  /// Of the softmax, by row. Not in registers, of which sums leave too few.
  NATTEN_DEVICE float* references() const {
    return gpu.template shared<float>(K::Layout::kReferences);
  }
  NATTEN_DEVICE SeenIntervals seen_intervals() const {
    return {gpu.template shared<PlaceInterval>(K::Layout::kSeenIntervals), a.grid.row_tile};
  }

  /// What is seen of a tile of columns by each of these intervals alone, a bit for each column. Of
  /// all tiles, or where these are too many, of tile i from `words_of_tile(i)` on.
  static constexpr int kAxisWords = 2 * (K::kRows + 2);
  NATTEN_DEVICE std::uint64_t* axis_words() const {
    return gpu.template shared<std::uint64_t>(K::Layout::kAxisWords);
  }
  NATTEN_DEVICE static int words_of_tile(int i) { return (i & 1) * (K::kRows + 2); }

  /// The numbers of the first of them along each axis for tile i, ten bits each,
  NATTEN_DEVICE std::uint32_t& first_words(int i) const {
    return gpu.template shared<std::uint32_t>(
        K::Layout::kFirstWords)[static_cast<unsigned>(i) % (2 * K::State::kBatch)];
  }
  /// and how far from these are those of the row whose mask a thread finds out.
  NATTEN_DEVICE std::uint32_t* own_offsets() const {
    return gpu.template shared<std::uint32_t>(K::Layout::kOwnOffsets);
  }
  static_assert(kAxisWords <= 1 << 10);

  /// Where rows lie in A1 (0), the output (1) and logsumexp (2). Null where nothing is written; of
  /// A1 another row where there is none.
  template <class E>
  NATTEN_DEVICE E** row_addresses(int which) const {
    return gpu.template shared<E*>(K::Layout::kRowAddresses) + which * K::kRows;
  }

  /// Whether rows exist and somebody sees them, where that is asked for each tile of columns.
  NATTEN_DEVICE bool* live() const { return gpu.template shared<bool>(K::Layout::kLive); }

  /// Whether there is such a row, and its number.
  NATTEN_DEVICE bool token_of_row(int row, Coordinate& token) const {
    NATTEN_EACH (i, kMaxRank)
      token[i] = a.grid.places[i].number(state.rows.group[i].first_row,
                                         state.rows.origin[i] + a.grid.row_tile.offset(row, i));
    return state.rows.holds(a.grid.row_tile, row);
  }
  template <class E>
  NATTEN_DEVICE RowPointers<E> pointers_of_rows(const Operand<E>& x) const {
    RowPointers<E> rows;
    Coordinate first;
    token_of_row(0, first);
    rows.first = x.at(state.batch, state.head, first);
    NATTEN_EACH (i, kMaxRank) rows.step[i] = x.grid[i] * a.grid.places[i].dilation;
    return rows;
  }
  /// Whether nobody sees a row, so that its gradients are 0 whatever it holds.
  NATTEN_DEVICE bool is_hidden(int row, const Coordinate& token) const {
    if (K::kRowsAreQueries || !a.hides_rows) return false;
    bool is_hidden = a.row_mask.hides(state.batch, token);
    NATTEN_EACH (i, kMaxRank) {
      const PlaceInterval seen = seen_intervals().at(i, a.grid.row_tile.offset(row, i));
      is_hidden = is_hidden || seen.begin >= seen.end;
    }
    return is_hidden;
  }
  /// The number past the last column that is given.
  NATTEN_DEVICE int column_end(int axis) const {
    return axis == kMaxRank - 1 ? state.column_end : a.grid.places[axis].column_length;
  }
  /// The place of a column in the first turn of an axis.
  NATTEN_DEVICE int place_of_column(const ColumnTile& at, int column, int axis) const {
    const int turn = a.grid.places[axis].turn;
    int place = at.place[axis] + a.grid.column_tile.offset(column, axis);
    if (turn > 0)
      while (place >= turn) place -= turn;
    return place;
  }
  NATTEN_DEVICE bool token_of_column(const ColumnTile& at, int column, Coordinate& token) const {
    bool exists = true;
    NATTEN_EACH (i, kMaxRank) {
      const Places& places = a.grid.places[i];
      const int number =
          places.number(state.rows.group[i].first_column, place_of_column(at, column, i));
      token[i] = number;
      exists = exists && number < column_end(i);
    }
    return exists;
  }
  /// Whether all columns of a tile are given, one after another; and the first.
  NATTEN_DEVICE bool is_whole(const ColumnTile& at, Coordinate& first) const {
    bool is_whole = true;
    NATTEN_EACH (i, kMaxRank) {
      const Places& places = a.grid.places[i];
      const int of_group = state.rows.group[i].first_column;
      first[i] = places.number(of_group, at.place[i]);
      // A turn is no shorter than what is given of it.
      const int last = at.place[i] + a.grid.column_tile.extent(i) - 1;
      is_whole = is_whole && places.number(of_group, last) < column_end(i);
    }
    return is_whole;
  }
  NATTEN_DEVICE int column_head(const ColumnTile& at) const {
    return state.first_column_head + at.head;
  }
  NATTEN_DEVICE int query_head(const ColumnTile& at) const {
    return K::kRowsAreQueries ? state.head : column_head(at);
  }
  NATTEN_DEVICE typename K::Stop& stop_of(int i) const {
    return state.stops[static_cast<unsigned>(i) % (2 * K::State::kBatch)];
  }
};

}  // namespace natten::detail::cuda
