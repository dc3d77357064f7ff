#pragma once

// What the kernel of a pass is given, by the host.

#include <natten/types.h>

#include <cstdint>

#include "../../operand.h"
#include "../examples.h"
#include "tiles.h"

namespace natten::detail::cuda {

enum class TilePass : std::uint8_t {
  forward,
  row_term,
  grad_query,
  grad_key_value,
  grad_key,
  grad_value,
  grad_all,
};

constexpr bool rows_are_queries(TilePass pass) {
  return pass == TilePass::forward || pass == TilePass::row_term || pass == TilePass::grad_query;
}

/// The most dims of kernels with two sums of as many, which registers limit.
inline constexpr int kMostDimsOfTwo = 128;

inline constexpr float kNone = -__builtin_huge_valf();  ///< the score of what is not seen
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

/// A tensor on the rows or columns of a pass. One of additional tokens counts them along the last
/// axis.
template <class T>
struct Tokens {
  Operand<T> tensor;
  /// Tokens lie at multiples of so many elements: of 16, 8 or 4 bytes, or of one.
  int unit_log2 = 0;

  NATTEN_HOST_DEVICE int unit() const { return 1 << unit_log2; }
};

/// Sums over parts of the columns, contiguous: [splits, B, heads, rows, dims].
struct Partial {
  float* data = nullptr;
  std::int64_t part = 0;  ///< elements of one
};

/// What all passes take.
template <class T>
struct Arguments {
  PassGrid grid;  ///< of examples: tiles are those of the longest, numbers of tokens those of all
  Examples examples{};
  MaskWords mask;
  std::int64_t blocks_per_head;
  int heads;               ///< of the rows
  int queries_per_kv;      ///< heads of queries that share one of keys
  int dims[2];             ///< of A1, B1 and of A2, B2
  int additional_columns;  ///< tokens
  Tokens<const T> rows[2], columns[2], additional[2];
  bool has_offsets[2];    ///< of columns from a tile's first, in units, which fit into 32 bits
  bool copies_chunks[2];  ///< these units are whole chunks, and so are tokens
  int turn_units[2][kMaxRank];  ///< those of a turn of a circular axis
  KeyMask row_mask{}, column_mask{};
  bool hides_rows = false;     ///< there may be keys that nobody sees
  bool hides_columns = false;  ///< rows' intervals may hold columns that are hidden or not given
  Operand<const T> rpb;        ///< offsets within a head fit into 32 bits
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

  explicit Arguments(const PassGrid& g) : grid(g), mask(g.column_tile) {}
  NATTEN_HOST_DEVICE Coordinate row_lengths() const {
    return {grid.places[0].row_length, grid.places[1].row_length, grid.places[2].row_length};
  }
  NATTEN_HOST_DEVICE Coordinate column_lengths() const {
    return {grid.places[0].column_length, grid.places[1].column_length,
            grid.places[2].column_length};
  }
};

}  // namespace natten::detail::cuda
