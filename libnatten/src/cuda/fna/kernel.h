#pragma once

// Fused neighborhood attention on tensor cores, forward and backward, in one kernel: all passes are
//
//   S = A1 B1^T, weights of S, dP = A2 B2^T, sums += weights B
//
// over tiles of columns (tiles.h), with
//
//   pass            rows       A1  A2  columns  B1  B2  computes
//   forward         queries    Q       keys     K   V   output = sum P V, logsumexp
//   row_term        queries    Q   dO  keys     K   V   sum P dP / sum P - gradient of logsumexp
//   grad_query      queries    Q   dO  keys     K   V   dQ = scale sum dS K
//   grad_key_value  keys       K   V   queries  Q   dO  dK = scale sum dS Q, dV = sum P dO
//   grad_key                                            the first of them
//   grad_value                                          the second
//   grad_all                                            both, and dQ / scale by atomic additions
//
// where P = exp(S - logsumexp) and dS = P (dP - row term). The sum of P is 1 but for logsumexp's
// own rounding, which is large where scores are; the row term is divided by it, for dP and the row
// term nearly cancel where one key takes nearly all weight. Four warps share the columns in shared
// memory and own 16 or 32 rows each, so a row's sums stay in the registers of four threads. Every
// row is summed by one warp, in an order that depends on the problem alone; but in grad_all, which
// saves two of nine products, many blocks add to a query's gradient in any order.

#include <natten/types.h>

#include <cmath>
#include <cstdint>

#include "../../operand.h"
#include "../machine.h"
#include "matrices.h"
#include "tiles.h"

namespace natten::detail::cuda {

enum class Pass : std::uint8_t {
  forward,
  row_term,
  grad_query,
  grad_key_value,
  grad_key,
  grad_value,
  grad_all,
};

constexpr bool rows_are_queries(Pass pass) {
  return pass == Pass::forward || pass == Pass::row_term || pass == Pass::grad_query;
}

inline constexpr float kNone = -__builtin_huge_valf();  ///< the score of what is not seen
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

/// A tensor on the rows or columns of a pass. One of additional tokens counts them along the last
/// axis.
template <class T>
struct Tokens {
  Operand<T> tensor;
  bool is_aligned = false;  ///< tokens lie at multiples of 16 bytes
};

/// Sums over parts of the columns, contiguous: [splits, B, heads, rows, dims].
struct Partial {
  float* data = nullptr;
  std::int64_t part = 0;  ///< elements of one
};

/// What all passes take.
template <class T>
struct Arguments {
  Grid grid;
  MaskWords mask;
  std::int64_t blocks_per_head;
  int heads;               ///< of the rows
  int queries_per_kv;      ///< heads of queries that share one of keys
  int dims[2];             ///< of A1, B1 and of A2, B2
  int additional_columns;  ///< tokens
  Tokens<const T> rows[2], columns[2], additional[2];
  /// Whether whole tiles of columns can be copied by chunks, with offsets that fit into 32 bits.
  bool copies_chunks[2];
  Operand<const T> rpb;  ///< offsets within a head fit into 32 bits
  Operand<const float> logsumexp, row_term, grad_logsumexp;
  Operand<float> statistic;  ///< written: logsumexp or row term
  Tokens<T> sums[2];         ///< written: of weights times B1 and B2
  int splits = 1;            ///< blocks for a tile of rows, each for a part of the columns
  Partial partial[2];        ///< written in place of `sums` where there are several
  float* query_sums;         ///< added to by grad_all: contiguous [B, H, queries, D]
  float scale;
  /// Scores are scaled, and biased, before all else; otherwise `factor` scales them.
  bool scales_first;
  float factor;  ///< scores times it are logarithms to base 2

  explicit Arguments(const Grid& g) : grid(g), mask(g.column_tile) {}
};

/// A tile of columns and where its tokens are.
template <class T, int kWarps>
struct ColumnStop {
  ColumnTile tile;
  Overlap seen[kWarps];  ///< by the rows of each warp
  /// The first token of B1 and B2 where all of the tile can be copied by chunks, else null.
  const T* first[2];
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
  std::int64_t batch;
  Bounds bounds[kWarps][kMaxRank];
};

template <class T, int kDims, int kM, Pass kPass>
struct TileKernel {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kBlocks = 2;
  static constexpr bool kRowsAreQueries = rows_are_queries(kPass);
  static constexpr bool kAddsQueries = kPass == Pass::grad_all;
  static constexpr bool kSumsFirst = kPass == Pass::grad_query || kPass == Pass::grad_key_value ||
                                     kPass == Pass::grad_key || kAddsQueries;
  static constexpr bool kSumsSecond = kPass == Pass::forward || kPass == Pass::grad_key_value ||
                                      kPass == Pass::grad_value || kAddsQueries;
  static constexpr bool kNeedsGradWeights = kSumsFirst || kPass == Pass::row_term;
  /// Whether scores can be scaled, and biased, before all else. Kernels with 32 rows per warp leave
  /// that to those with 16: they have no registers to spare.
  static constexpr bool kScalesFirst = kM == 1;
  static constexpr int kRows = 16 * kM * kWarps;
  using Tile = SharedTile<T, kDims>;
  /// As many as shared memory has room for beside the rows.
  static constexpr bool kIsCrowded = Tile::kPitch > 256 && (kPass != Pass::forward || kM > 1);
  static constexpr int kColumns = kIsCrowded ? 32 : 64;
  static constexpr int kN = kColumns / 8;
  /// Tiles of B1 in shared memory. Where it serves twice per tile, the next one is loaded beside
  /// it.
  static constexpr int kStages = kSumsFirst && Tile::kPitch <= 384 ? 2 : 1;

  using State = BlockState<T, kWarps>;
  using Stop = ColumnStop<T, kWarps>;

  Arguments<T> a;

  /// Shared memory, in order: offsets in bytes.
  struct Layout {
    static constexpr int kRows1 = 0;
    static constexpr int kRows2 = kRows1 + Tile::bytes(kRows);
    static constexpr int kColumns1 = kRows2 + (kNeedsGradWeights ? Tile::bytes(kRows) : 0);
    static constexpr int kColumns2 = kColumns1 + kStages * Tile::bytes(kColumns);
    static constexpr int kGradScores = kColumns2 + Tile::bytes(kColumns);
    static constexpr int kStatistics =
        kGradScores + (kAddsQueries ? SharedTile<T, kColumns>::bytes(kRows) : 0);
    static constexpr int kState =
        kStatistics + (kRowsAreQueries ? 0 : 2 * kStages * kColumns * int(sizeof(float)));
    static constexpr int kRelativeBias = kState + int(sizeof(State));
    static constexpr int kRelative = kRelativeBias + kColumns * int(sizeof(int));
    static constexpr int kReferences = kRelative + 2 * kColumns * int(sizeof(int));
    static constexpr int kSpans =
        kReferences + (kPass == Pass::forward ? kRows * int(sizeof(float)) : 0);
    static constexpr int kBytes = kSpans + (kRows + 2) * int(sizeof(Span));
  };
  static constexpr int kSharedBytes = Layout::kBytes;
  static_assert(kSharedBytes <= 99 * 1024, "more than compute capabilities 8.6 and 8.9 have");

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    Worker<Machine>{gpu, a, *gpu.template shared<State>(Layout::kState)}.run();
  }

  /// One thread at work on one tile of rows.
  template <class Machine>
  struct Worker {
    Machine& gpu;
    const Arguments<T>& a;
    State& state;

    /// Opaque, for what follows from it is cheaper to compute again than to keep in a register.
    NATTEN_DEVICE int thread() const { return gpu.opaque(gpu.thread()) & (kThreads - 1); }
    NATTEN_DEVICE int lane() const { return thread() % kLanes; }
    NATTEN_DEVICE int warp() const { return thread() / kLanes; }
    /// The row of a C fragment's elements 2 half and 2 half + 1.
    NATTEN_DEVICE int row_of(int m, int half) const {
      return 16 * kM * warp() + 16 * m + 8 * half + lane() / 4;
    }
    /// The first column of a C fragment's two.
    NATTEN_DEVICE int column_of(int n) const { return 8 * n + 2 * (lane() % 4); }
    NATTEN_DEVICE static Tile first_columns(int stage) {
      return {Layout::kColumns1 + stage * Tile::bytes(kColumns)};
    }
    /// logsumexp (0), times log2 e once `scale_statistics` has been there, and row term (1) of the
    /// columns.
    NATTEN_DEVICE static int statistics(int which, int stage) {
      return Layout::kStatistics + (which * kStages + stage) * kColumns * int(sizeof(float));
    }
    /// Where the columns of a tile lie, from its first, in chunks of `a.columns[which]`.
    NATTEN_DEVICE int* relative(int which) const {
      return gpu.template shared<int>(Layout::kRelative) + which * kColumns;
    }
    /// And in elements of the bias.
    NATTEN_DEVICE int* relative_bias() const {
      return gpu.template shared<int>(Layout::kRelativeBias);
    }
    /// Of the softmax, by row. Not in registers, of which sums leave too few.
    NATTEN_DEVICE float* references() const {
      return gpu.template shared<float>(Layout::kReferences);
    }
    NATTEN_DEVICE Spans spans() const {
      return {gpu.template shared<Span>(Layout::kSpans), a.grid.row_tile};
    }

    /// Whether there is such a row, and where.
    NATTEN_DEVICE bool token_of_row(int row, Coordinate& token) const {
      NATTEN_EACH (i, kMaxRank)
        token[i] = token_at(a.grid.axes[i], state.rows.group[i],
                            state.rows.origin[i] + a.grid.row_tile.offset(row, i));
      return state.rows.holds(a.grid.row_tile, row);
    }
    NATTEN_DEVICE bool token_of_column(const ColumnTile& at, int column, Coordinate& token) const {
      bool exists = true;
      NATTEN_EACH (i, kMaxRank) {
        const int position = at.origin[i] + a.grid.column_tile.offset(column, i);
        token[i] = token_at(a.grid.axes[i], state.rows.group[i], position);
        exists = exists && token[i] < a.grid.column_lengths[i];
      }
      return exists;
    }
    NATTEN_DEVICE int column_head(const ColumnTile& at) const {
      return state.first_column_head + at.head;
    }
    NATTEN_DEVICE int query_head(const ColumnTile& at) const {
      return kRowsAreQueries ? state.head : column_head(at);
    }

    /// Copies one chunk of a token of which `dims` elements exist; zeros where `from` is null.
    NATTEN_DEVICE void load_chunk(int to, const T* from, int chunk, int dims,
                                  bool is_aligned) const {
      if (from && is_aligned && (chunk + 1) * kChunk<T> <= dims)
        return gpu.copy_async(to, from + chunk * kChunk<T>);
      // Not unrolled: it is slow anyway, and registers are scarce where it is called.
      NATTEN_DO_NOT_UNROLL
      for (int j = 0; j < kChunk<T>; ++j) {
        const int d = chunk * kChunk<T> + j;
        gpu.template shared<T>(to)[j] = from && d < dims ? from[d] : T();
      }
    }

    NATTEN_DEVICE void load_rows(int which, const Tile& to) const {
      const Tokens<const T>& x = a.rows[which];
      NATTEN_DO_NOT_UNROLL
      for (int item = thread(); item < kRows * Tile::kChunks; item += kThreads) {
        const int row = item / Tile::kChunks, chunk = item % Tile::kChunks;
        Coordinate token;
        const bool exists = token_of_row(row, token);
        load_chunk(to.at(row, chunk),
                   exists ? x.tensor.at(state.batch, state.head, token) : nullptr, chunk,
                   a.dims[which], x.is_aligned);
      }
    }

    NATTEN_DEVICE Stop& stop_of(int i) const { return state.stops[i % (2 * State::kBatch)]; }
    /// Finds out where the tokens of a batch of tiles are. One warp does it for the block.
    NATTEN_DEVICE void locate(int first_tile) const {
      const int i = first_tile + lane() % State::kBatch, of_warp = lane() / State::kBatch;
      if (i >= state.count) return;
      Stop& stop = stop_of(i);
      const ColumnTile tile = state.tiles.at(state.first + i, a.grid.column_tile);
      stop.seen[of_warp] = overlap(tile, of_warp);
      if (of_warp != 0) return;
      stop.tile = tile;
      Coordinate token;
      const bool is_whole = token_of_column(tile, kColumns - 1, token);
      token_of_column(tile, 0, token);
      NATTEN_EACH (which, 2)
        stop.first[which] = a.copies_chunks[which] && is_whole && !tile.is_additional
                                ? a.columns[which].tensor.at(state.batch, column_head(tile), token)
                                : nullptr;
    }

    NATTEN_DEVICE void load_columns(int which, const Tile& to, const Stop& stop) const {
      const int dims = a.dims[which];
      if (const T* first = stop.first[which]) {
        // Eight threads copy 128 bytes, or four 64: then what a loop adds to an offset is constant.
        constexpr int kUnit = Tile::kChunks % 8 == 0 ? 8 : 4;
        const int thread = this->thread();
        const int chunk = thread % kUnit, column = thread / kUnit;
        const int slot = to.at(column, chunk), element = chunk * kChunk<T>;
        const int* offset = relative(which) + column;
        NATTEN_UNROLL
        for (int i = 0; i < kColumns; i += kThreads / kUnit) {
          const T* from = first + std::int64_t{offset[i]} * kChunk<T> + element;
          NATTEN_UNROLL
          for (int j = 0; j < Tile::kChunks; j += kUnit)
            if (element + j * kChunk<T> < dims)
              gpu.copy_async(slot + i * Tile::kPitch + 16 * j, from + j * kChunk<T>);
        }
        return;
      }
      const ColumnTile& at = stop.tile;
      const Tokens<const T>& x = at.is_additional ? a.additional[which] : a.columns[which];
      NATTEN_DO_NOT_UNROLL
      for (int item = thread(); item < kColumns * Tile::kChunks; item += kThreads) {
        const int column = item / Tile::kChunks, chunk = item % Tile::kChunks;
        const T* from = nullptr;
        Coordinate token;
        if (at.is_additional) {
          const int n = at.origin[2] + column;
          if (n < a.additional_columns) from = x.tensor.at(state.batch, column_head(at), {0, 0, n});
        } else if (token_of_column(at, column, token)) {
          from = x.tensor.at(state.batch, column_head(at), token);
        }
        load_chunk(to.at(column, chunk), from, chunk, dims, x.is_aligned);
      }
    }
    /// B1 and what else is known about its columns.
    NATTEN_DEVICE void load_first_columns(int stage, const Stop& stop) const {
      load_columns(0, first_columns(stage), stop);
      if constexpr (!kRowsAreQueries) {
        if (thread() < kColumns) {
          const ColumnTile& at = stop.tile;
          Coordinate token;
          const bool exists = token_of_column(at, thread(), token);
          const auto copy = [&](const Operand<const float>& x, int which) {
            gpu.copy_word_async(statistics(which, stage) + thread() * int(sizeof(float)),
                                exists ? x.at(state.batch, query_head(at), token) : x.data, exists);
          };
          copy(a.logsumexp, 0);
          if constexpr (kNeedsGradWeights) copy(a.row_term, 1);
        }
      }
    }

    /// What is subtracted from scores to base 2. A row whose scores are all -inf has that logsumexp
    /// too, and its weights are exp2(-inf - 0) = 0.
    NATTEN_DEVICE static float subtrahend(float logsumexp) {
      return logsumexp == kNone ? 0.0f : logsumexp * kLog2E;
    }
    /// Turns the columns' logsumexp into subtrahends: each thread the one that it has copied.
    NATTEN_DEVICE void scale_statistics(int stage) const {
      if (thread() >= kColumns) return;
      float& x = gpu.template shared<float>(statistics(0, stage))[thread()];
      x = subtrahend(x);
    }

    /// Chunks past `dims`, which whole tiles' copies leave alone, are zero.
    NATTEN_DEVICE void clear_padding(const Tile& tile, int count, int dims) const {
      if (dims > kDims - kChunk<T>) return;
      for (int item = thread(); item < count * Tile::kChunks; item += kThreads)
        load_chunk(tile.at(item / Tile::kChunks, item % Tile::kChunks), nullptr, 0, 0, false);
    }

    /// Fills `state` and the tables. Returns false where the block has no rows.
    NATTEN_DEVICE bool prepare() const {
      if (thread() == 0) {
        std::int64_t index = gpu.block() / a.blocks_per_head;
        state.rows = row_tile(a.grid, gpu.block() % a.blocks_per_head);
        state.split = static_cast<int>(index % a.splits);
        index /= a.splits;
        state.batch = index / a.heads;
        state.head = static_cast<int>(index % a.heads);
        state.first_column_head =
            kRowsAreQueries ? state.head / a.queries_per_kv : state.head * a.queries_per_kv;
        state.tiles.additional = (a.additional_columns + kColumns - 1) / kColumns;
        state.tiles.heads = kRowsAreQueries ? 1 : a.queries_per_kv;
      }
      gpu.sync();
      const RowTile& rows = state.rows;
      if (rows.valid[0] == 0 || rows.valid[1] == 0 || rows.valid[2] == 0) return false;
      spans().compute(a.grid, rows, thread(), kThreads);
      if (thread() < kColumns) {
        std::int64_t offsets[2] = {0, 0};
        int bias = 0;
        NATTEN_EACH (i, kMaxRank) {
          const int offset = a.grid.column_tile.offset(thread(), i);
          NATTEN_EACH (which, 2)
            offsets[which] += a.columns[which].tensor.grid[i] * a.grid.axes[i].dilation * offset;
          bias += (kRowsAreQueries ? 1 : -1) * offset * static_cast<int>(a.rpb.grid[i]);
        }
        NATTEN_EACH (which, 2)
          relative(which)[thread()] = static_cast<int>(offsets[which] / kChunk<T>);
        relative_bias()[thread()] = bias;
      }
      if constexpr (kPass == Pass::forward) {
        for (int row = thread(); row < kRows; row += kThreads) {
          references()[row] = kNone;
        }
      }
      clear_padding({Layout::kColumns1}, kStages * kColumns, a.dims[0]);
      clear_padding({Layout::kColumns2}, kColumns, a.dims[1]);
      gpu.sync();
      if (warp() == 0) {
        NATTEN_EACH (i, kMaxRank) {
          if (lane() % 4 != i) continue;
          const TileShape& shape = a.grid.row_tile;
          const int of_warp = lane() / 4, first = 16 * kM * of_warp;
          if (of_warp < kWarps)
            state.bounds[of_warp][i] =
                bounds_of(spans(), shape, rows, i, first, first + 16 * kM - 1);
          if (of_warp == kWarps)
            state.tiles.set_axis(i, bounds_of(spans(), shape, rows, i, 0, kRows - 1),
                                 a.grid.column_tile);
        }
        gpu.sync_warp();
        if (lane() == 0) {
          const std::int64_t count = state.tiles.count();
          state.first = static_cast<int>(count * state.split / a.splits);
          state.count = static_cast<int>(count * (state.split + 1) / a.splits) - state.first;
        }
        gpu.sync_warp();
        locate(0);
      }
      gpu.sync();
      return true;
    }

    NATTEN_DEVICE Overlap overlap(const ColumnTile& at, int of_warp) const {
      if (at.is_additional)
        return at.origin[2] + kColumns <= a.additional_columns ? Overlap::all : Overlap::some;
      return overlap_of(state.bounds[of_warp], a.grid.column_tile, at.origin);
    }

    /// The columns that a row sees, a bit for each.
    NATTEN_DEVICE std::uint64_t seen_by(int row, const ColumnTile& at) const {
      if (at.is_additional) return low_bits(a.additional_columns - at.origin[2]);
      const TileShape& shape = a.grid.row_tile;
      const Span seen[kMaxRank] = {spans().at(0, shape.offset(row, 0)),
                                   spans().at(1, shape.offset(row, 1)),
                                   spans().at(2, shape.offset(row, 2))};
      return a.mask.word(a.grid.column_tile, seen, at.origin);
    }
    /// The same for this thread's columns: bit 8 n + j is element j of block n.
    static_assert(kN % 4 == 0);
    using Mask = std::uint32_t[kN / 4];
    NATTEN_DEVICE static bool bit(const Mask& mask, int n, int j) {
      return mask[n / 4] >> (8 * (n % 4) + j) & 1;
    }

    /// Scales where that comes first, adds biases, and gives unseen columns the score -inf.
    NATTEN_DEVICE void finish_scores(FragmentC (&scores)[kM][kN], const ColumnTile& at,
                                     Overlap overlap) const {
      const bool scales_first = kScalesFirst && a.scales_first;
      if (overlap == Overlap::all && !scales_first) return;
      // Four threads share their rows, and what rows see: each finds it out for one of them.
      const int first_row = row_of(0, 0), own = lane() % (2 * kM);
      std::uint64_t word = ~std::uint64_t{0};
      if (overlap == Overlap::some) word = seen_by(first_row + 8 * own, at);
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) {
          Mask mask;
          NATTEN_EACH (i, kN / 4)
            mask[i] = gpu.shuffle(static_cast<std::uint32_t>(word >> (32 * i)),
                                  (lane() & ~3) + 2 * m + half) >>
                      (2 * (lane() % 4));
          if (scales_first) scale_row(scores[m], half, first_row + 16 * m + 8 * half, at, mask);
          NATTEN_EACH (n, kN)
            NATTEN_EACH (j, 2) {
              float& score = scores[m][n][2 * half + j];
              score = bit(mask, n, j) ? score : kNone;
            }
        }
    }
    NATTEN_DEVICE void scale_row(FragmentC (&scores)[kN], int half, int row, const ColumnTile& at,
                                 const Mask& mask) const {
      const bool is_biased = a.rpb && !at.is_additional && a.grid.rows != Rows::additional &&
                             state.rows.holds(a.grid.row_tile, row);
      constexpr int kSign = kRowsAreQueries ? 1 : -1;  // offsets are key - query
      int offset = 0;
      NATTEN_EACH (i, kMaxRank) {
        const int position = state.rows.origin[i] + a.grid.row_tile.offset(row, i);
        offset +=
            (kSign * (at.origin[i] - position) + static_cast<int>(a.grid.axes[i].kernel_size) - 1) *
            static_cast<int>(a.rpb.grid[i]);
      }
      const T* bias = a.rpb.data + query_head(at) * a.rpb.head;
      NATTEN_EACH (n, kN)
        NATTEN_EACH (j, 2) {
          float& score = scores[n][2 * half + j];
          score *= a.scale * kLog2E;
          if (is_biased && bit(mask, n, j))
            score += static_cast<float>(bias[offset + relative_bias()[column_of(n) + j]]) * kLog2E;
        }
    }

    /// The sum, or the largest, of a row's four threads.
    NATTEN_DEVICE float row_sum(float x) const {
      x += gpu.shuffle_xor(x, 1);
      return x + gpu.shuffle_xor(x, 2);
    }
    NATTEN_DEVICE float row_max(float x) const {
      x = std::fmax(x, gpu.shuffle_xor(x, 1));
      return std::fmax(x, gpu.shuffle_xor(x, 2));
    }

    /// Turns scores into weights 2^(factor score - reference), and adds them to this thread's share
    /// of the rows' totals. A row's reference is a largest score of the past: it follows, and what
    /// was summed is rescaled, only once weights would exceed 2^8, which float16 holds and which is
    /// rare after the first tiles.
    NATTEN_DEVICE void softmax(FragmentC (&scores)[kM][kN], FragmentC (&sums)[kM][kDims / 8],
                               float (&totals)[kM][2]) const {
      constexpr float kSlack = 8;
      float most[kM][2], reference[kM][2];
      const int first_row = row_of(0, 0);
      bool is_near = true;
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) {
          float x = kNone;
          NATTEN_EACH (n, kN)
            NATTEN_EACH (j, 2) x = std::fmax(x, scores[m][n][2 * half + j]);
          most[m][half] = x * a.factor;
          reference[m][half] = references()[first_row + 16 * m + 8 * half];
          is_near = is_near && most[m][half] <= reference[m][half] + kSlack;
        }
      if (!gpu.all(is_near)) {
        gpu.sync_warp();  // four lanes read a row's reference, and each may write it
        NATTEN_EACH (m, kM)
          NATTEN_EACH (half, 2) {
            float& past = reference[m][half];
            const float now = std::fmax(past, row_max(most[m][half]));
            // Before a row has seen anything its sums are 0, and 0 * 2^-inf too.
            const float correction = now == kNone ? 1.0f : gpu.exp2(past - now);
            past = now;
            references()[first_row + 16 * m + 8 * half] = now;
            totals[m][half] *= correction;
            NATTEN_EACH (n, kDims / 8)
              NATTEN_EACH (j, 2) sums[m][n][2 * half + j] *= correction;
          }
      }
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) {
          const float subtracted = reference[m][half] == kNone ? 0.0f : reference[m][half];
          NATTEN_EACH (n, kN)
            NATTEN_EACH (j, 2) {
              float& x = scores[m][n][2 * half + j];
              x = gpu.exp2(x * a.factor - subtracted);
              totals[m][half] += x;
            }
        }
    }

    /// Statistics of queries: of this thread's rows, or of the columns in shared memory.
    struct QueryStatistics {
      float subtrahend[kM][2], row_term[kM][2];
    };
    NATTEN_DEVICE QueryStatistics row_statistics() const {
      QueryStatistics s;
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) {
          Coordinate token;
          const bool exists = token_of_row(row_of(m, half), token);
          s.subtrahend[m][half] =
              exists ? subtrahend(*a.logsumexp.at(state.batch, state.head, token)) : 0.0f;
          s.row_term[m][half] =
              exists && kSumsFirst ? *a.row_term.at(state.batch, state.head, token) : 0.0f;
        }
      return s;
    }

    /// Turns scores into the weights P of the forward pass.
    NATTEN_DEVICE void weigh(FragmentC (&scores)[kM][kN], const QueryStatistics& of_rows,
                             int stage) const {
      NATTEN_EACH (n, kN)
        NATTEN_EACH (j, 2) {
          float of_column = 0;
          if constexpr (!kRowsAreQueries)
            of_column = gpu.template shared<float>(statistics(0, stage))[column_of(n) + j];
          NATTEN_EACH (m, kM)
            NATTEN_EACH (half, 2) {
              float& x = scores[m][n][2 * half + j];
              x = gpu.exp2(x * a.factor -
                           (kRowsAreQueries ? of_rows.subtrahend[m][half] : of_column));
            }
        }
    }
    /// Turns dP into dS.
    NATTEN_DEVICE void differentiate(FragmentC (&grads)[kM][kN], const FragmentC (&weights)[kM][kN],
                                     const QueryStatistics& of_rows, int stage) const {
      NATTEN_EACH (n, kN)
        NATTEN_EACH (j, 2) {
          float of_column = 0;
          if constexpr (!kRowsAreQueries)
            of_column = gpu.template shared<float>(statistics(1, stage))[column_of(n) + j];
          NATTEN_EACH (m, kM)
            NATTEN_EACH (half, 2) {
              const int i = 2 * half + j;
              const float term = kRowsAreQueries ? of_rows.row_term[m][half] : of_column;
              grads[m][n][i] = weights[m][n][i] * (grads[m][n][i] - term);
            }
        }
    }

    template <class E, int kRowBlocks, int kColumnBlocks>
    NATTEN_DEVICE static void clear(E (&x)[kRowBlocks][kColumnBlocks][4]) {
      NATTEN_EACH (m, kRowBlocks)
        NATTEN_EACH (n, kColumnBlocks)
          NATTEN_EACH (i, 4) x[m][n][i] = 0;
    }

    NATTEN_DEVICE void run() const {
      if (!prepare()) return;
      constexpr Tile rows1{Layout::kRows1}, rows2{Layout::kRows2}, columns2{Layout::kColumns2};

      load_rows(0, rows1);
      if constexpr (kNeedsGradWeights) load_rows(1, rows2);
      if (state.count > 0) load_first_columns(0, stop_of(0));
      gpu.commit();

      FragmentC sums1[kSumsFirst ? kM : 1][kDims / 8], sums2[kSumsSecond ? kM : 1][kDims / 8];
      clear(sums1);
      clear(sums2);
      // This thread's shares of the sums of weights, and of P dP.
      float totals[kM][2], products[kM][2];
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) totals[m][half] = products[m][half] = 0;
      QueryStatistics of_rows{};
      if constexpr (kRowsAreQueries && kPass != Pass::forward) of_rows = row_statistics();

      NATTEN_DO_NOT_UNROLL
      for (int i = 0; i < state.count; ++i) {
        const int stage = kStages == 2 ? i & 1 : 0;
        const bool has_next = i + 1 < state.count;
        const Stop &stop = stop_of(i), &next = stop_of(i + 1);
        gpu.template wait<0>();
        if constexpr (!kRowsAreQueries) scale_statistics(stage);
        gpu.sync();  // B1 is there, and all warps are done with B2
        load_columns(1, columns2, stop);
        gpu.commit();
        if constexpr (kStages == 2) {
          if (has_next) load_first_columns(1 - stage, next);
          gpu.commit();
        }
        if (i % State::kBatch == 0 && warp() == i / State::kBatch % kWarps)
          locate(i + State::kBatch);
        gpu.sync_warp();  // products need whole warps

        const Overlap seen = stop.seen[warp()];
        FragmentC scores[kM][kN];
        Weights<T, kM, kN> weights;
        if (seen != Overlap::none) {
          clear(scores);
          multiply_rows<T>(gpu, scores, rows1, 16 * kM * warp(), first_columns(stage));
          finish_scores(scores, stop.tile, seen);
          if constexpr (kPass == Pass::forward)
            softmax(scores, sums2, totals);
          else
            weigh(scores, of_rows, stage);
          if constexpr (kSumsSecond) pack_weights<T>(gpu, weights, scores);
        }

        gpu.template wait<kStages - 1>();
        gpu.sync();  // B2 is there, and all warps are done with the scores
        if constexpr (kStages == 1 && !kSumsFirst) {
          if (has_next) load_first_columns(0, next);
          gpu.commit();
          gpu.sync_warp();  // copies may have parted lanes
        }
        if (seen != Overlap::none) {
          if constexpr (kSumsSecond) accumulate_rows<T>(gpu, sums2, weights, columns2);
          if constexpr (kNeedsGradWeights) {
            FragmentC grads[kM][kN];
            clear(grads);
            multiply_rows<T>(gpu, grads, rows2, 16 * kM * warp(), columns2);
            if constexpr (kPass == Pass::row_term) {
              add_products(totals, products, scores, grads);
            } else {
              differentiate(grads, scores, of_rows, stage);
              pack_weights<T>(gpu, weights, grads);
              accumulate_rows<T>(gpu, sums1, weights, first_columns(stage));
            }
          }
        }
        if constexpr (kAddsQueries) {
          if (seen == Overlap::none) clear(weights);
          store_grad_scores(weights);
          gpu.sync();
          add_to_queries(stop.tile);
        }
        if constexpr (kStages == 1 && kSumsFirst) {
          gpu.sync();  // all warps are done with B1
          if (has_next) load_first_columns(0, next);
          gpu.commit();
        }
      }
      gpu.template wait<0>();
      gpu.sync();  // rows are there even where there was no column; their memory is free

      if constexpr (kPass == Pass::forward || kPass == Pass::row_term) {
        NATTEN_EACH (m, kM)
          NATTEN_EACH (half, 2) {
            const int row = row_of(m, half);
            const float total = row_sum(totals[m][half]);
            if constexpr (kPass == Pass::forward) {
              write_statistic(row, references()[row] * kLn2 + gpu.log(total));
              NATTEN_EACH (n, kDims / 8)
                NATTEN_EACH (j, 2) divide(sums2[m][n][2 * half + j], total);
            } else {
              float term = row_sum(products[m][half]);
              divide(term, total);
              write_statistic(row, term);
            }
          }
      }
      if constexpr (kSumsFirst) write(0, sums1, a.scale);
      if constexpr (kSumsSecond) write(1, sums2, 1.0f);
    }

    /// Puts the warp's dS where all warps find them: keys by queries, in the element type.
    NATTEN_DEVICE void store_grad_scores(const Weights<T, kM, kN>& x) const {
      constexpr SharedTile<T, kColumns> to{Layout::kGradScores};
      NATTEN_EACH (m, kM)
        NATTEN_EACH (n, kN)
          NATTEN_EACH (half, 2)
            *gpu.template shared<std::uint32_t>(to.at(row_of(m, half), n) + 4 * (lane() % 4)) =
                x[m][n / 2][n % 2 * 2 + half];
    }
    /// Adds to each query of the tile what the block's keys give it. A warp has 16 queries.
    NATTEN_DEVICE void add_to_queries(const ColumnTile& at) const {
      static_assert(kColumns == 16 * kWarps);
      constexpr SharedTile<T, kColumns> grads{Layout::kGradScores};
      constexpr Tile keys{Layout::kRows1};
      const int a_at = grads.at(lane() / 16 * 8 + lane() % 8, 2 * warp() + lane() / 8 % 2);
      const int b_at = keys.at(lane() % 16, lane() / 16);
      float* to[2];
      NATTEN_EACH (half, 2) {
        Coordinate token;
        const bool exists = token_of_column(at, 16 * warp() + 8 * half + lane() / 4, token);
        const int* lengths = a.grid.column_lengths;
        const std::int64_t index = ravel(token, lengths);
        const std::int64_t queries = std::int64_t{lengths[0]} * lengths[1] * lengths[2];
        const std::int64_t heads = std::int64_t{a.heads} * a.queries_per_kv;
        to[half] = exists
                       ? a.query_sums +
                             ((state.batch * heads + query_head(at)) * queries + index) * a.dims[0]
                       : nullptr;
      }
      constexpr int kPart = 4;  // blocks of 8 dims at a time, for lack of registers
      NATTEN_UNROLL
      for (int part = 0; part < kDims / 8; part += kPart) {
        FragmentC sums[1][kPart];
        clear(sums);
        NATTEN_EACH (k, kRows / 16) {
          FragmentA x;
          gpu.load_matrices_transposed(x, a_at + 16 * k * grads.kPitch);
          NATTEN_UNROLL
          for (int n = 0; n < kPart; n += 2) {
            std::uint32_t y[4];
            gpu.load_matrices_transposed(y, keys.step(b_at, part + n) + 16 * k * keys.kPitch);
            const FragmentB low = {y[0], y[1]}, high = {y[2], y[3]};
            gpu.template multiply_add<T>(sums[0][n], x, low);
            gpu.template multiply_add<T>(sums[0][n + 1], x, high);
          }
        }
        NATTEN_EACH (n, kPart)
          NATTEN_EACH (i, 4) {
            const int d = column_of(part + n) + i % 2;
            if (to[i / 2] && d < a.dims[0]) gpu.atomic_add(to[i / 2] + d, sums[0][n][i]);
          }
        gpu.sync_warp();  // additions have parted lanes
      }
    }

    /// Adds weights to `totals`, and their products with `grads` to `products`.
    NATTEN_DEVICE void add_products(float (&totals)[kM][2], float (&products)[kM][2],
                                    const FragmentC (&weights)[kM][kN],
                                    const FragmentC (&grads)[kM][kN]) const {
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) {
          float total = 0, product = 0;
          NATTEN_EACH (n, kN)
            NATTEN_EACH (j, 2) {
              const float weight = weights[m][n][2 * half + j];
              total += weight;
              product += weight * grads[m][n][2 * half + j];
            }
          totals[m][half] += total;
          products[m][half] += product;
        }
    }
    /// Divides by a sum of weights. All are 0 where all scores are -inf, and so is what they weigh.
    NATTEN_DEVICE static void divide(float& x, float total) { x /= total == 0 ? 1.0f : total; }

    /// Writes a row's logsumexp or, less the gradient of logsumexp, its row term.
    NATTEN_DEVICE void write_statistic(int row, float x) const {
      Coordinate token;
      if (!a.statistic || lane() % 4 != 0 || !token_of_row(row, token)) return;
      if (kPass != Pass::forward && a.grad_logsumexp)
        x -= *a.grad_logsumexp.at(state.batch, state.head, token);
      *a.statistic.at(state.batch, state.head, token) = x;
    }

    /// Writes the sums of this thread's rows over a part of the columns.
    NATTEN_DEVICE void write_partial(int which, const FragmentC (&sums)[kM][kDims / 8],
                                     float factor) const {
      const int dims = a.dims[which];
      const int* lengths = a.grid.row_lengths;
      const std::int64_t rows = std::int64_t{lengths[0]} * lengths[1] * lengths[2];
      const std::int64_t before = (state.batch * a.heads + state.head) * rows;
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) {
          Coordinate token;
          if (!token_of_row(row_of(m, half), token)) continue;
          float* to = a.partial[which].data + state.split * a.partial[which].part +
                      (before + ravel(token, lengths)) * dims;
          NATTEN_EACH (n, kDims / 8)
            NATTEN_EACH (j, 2) {
              const int d = dim_of<T>(lane(), n, j);
              if (d < dims) to[d] = sums[m][n][2 * half + j] * factor;
            }
        }
    }

    /// Writes the sums of the warp's rows, in whole rows by way of the memory that A1 had.
    NATTEN_DEVICE void write(int which, const FragmentC (&sums)[kM][kDims / 8],
                             float factor) const {
      const Tokens<T>& to = a.sums[which];
      if (!to.tensor) return;
      if (!kRowsAreQueries && a.splits > 1) return write_partial(which, sums, factor);
      const int dims = a.dims[which];
      constexpr Tile staging{Layout::kRows1};
      gpu.sync_warp();
      NATTEN_EACH (m, kM)
        NATTEN_EACH (half, 2) store_sums(gpu, sums[m], half, factor, staging, row_of(m, half));
      gpu.sync_warp();
      NATTEN_DO_NOT_UNROLL
      for (int item = lane(); item < 16 * kM * Tile::kChunks; item += kLanes) {
        const int row = 16 * kM * warp() + item / Tile::kChunks, chunk = item % Tile::kChunks;
        Coordinate token;
        if (chunk * kChunk<T> >= dims || !token_of_row(row, token)) continue;
        T* slot = to.tensor.at(state.batch, state.head, token) + chunk * kChunk<T>;
        const T* from = gpu.template shared<T>(staging.at(row, chunk));
        if (to.is_aligned && (chunk + 1) * kChunk<T> <= dims) {
          gpu.copy_chunk(slot, from);
          continue;
        }
        for (int j = 0; j < kChunk<T> && chunk * kChunk<T> + j < dims; ++j) slot[j] = from[j];
      }
    }
  };
};

/// What grad_all has added up, times the scale, in the element type.
template <class T>
struct ScaleQueries {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  Operand<T> to;
  const float* from;  ///< contiguous [B, H, queries, D]
  Coordinate lengths;
  std::int64_t count, heads, dims;
  float scale;

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    const std::int64_t i = gpu.block() * kThreads + gpu.thread();
    if (i >= count) return;
    const std::int64_t row = i / dims, queries = volume(lengths);
    to.at(row / queries / heads, row / queries % heads, unravel(row % queries, lengths))[i % dims] =
        static_cast<T>(from[i] * scale);
  }
};

}  // namespace natten::detail::cuda
