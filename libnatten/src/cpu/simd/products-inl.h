#pragma once

// Products in tiles that fit the registers: of rows with columns, which gives scores, and of
// weights with columns, which gives sums. F says what elements of operands are: see factors-inl.h.

#include "factors-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// How a vector of rows reads columns.
enum class Access {
  following,  // each row one column after the row before it
  permuted,   // rows from the same few columns
  same,       // all rows the same column, which is not transposed
};

/// Most columns of a tile with N vectors of rows, such that it and its operands fit registers.
template <int N>
constexpr int kTileColumns = static_cast<int>(min(8, (kRegisters - 1 - N) / N));

template <class T>
struct ColumnProducts {
  const T* rows;            // transposed
  std::int64_t row_stride;  // from a vector of rows to the next
  std::int64_t next_column, next_dim;
  Ints<T> index;            // of columns that are permuted
  std::int64_t dim;         // elements of a row
  bool adds;                // to what is there, of other elements
  T scale;                  // of products of pairs
  std::int64_t out_stride;  // from the products of one vector of rows to those of the next
};

/// out[n][m][row] = <rows of vector n, their columns m>, for vectors from `first` on.
template <class F, Access kAccess, int N, int M, class T = typename F::Sum>
void column_tile(const ColumnProducts<T>& p, int first, const T* columns, T* out) {
  const T* rows = p.rows + first * p.row_stride;
  Vector<T> c[N][M] = {};
  for (std::int64_t i = 0; i < p.dim; ++i, rows += kWidth<T>, columns += p.next_dim) {
    Vector<T> row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load(rows + n * p.row_stride);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vector<T> column;
      if constexpr (kAccess == Access::following) column = load(columns + m);
      if constexpr (kAccess == Access::permuted) column = permute<T>(load(columns + m), p.index);
      if constexpr (kAccess == Access::same)
        column = F::broadcast_from(columns + m * p.next_column);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[n][m] = F::multiply_add(row[n], column, c[n][m]);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) {
      if constexpr (F::kCount > 1) c[n][m] *= p.scale;
      T* to = out + n * p.out_stride + m * kWidth<T>;
      store(to, p.adds ? load(to) + c[n][m] : c[n][m]);
    }
}

/// Calls column_tile with the sizes as template arguments.
template <class F, Access kAccess, int N, int M = kTileColumns<N>, class T = typename F::Sum>
NATTEN_INLINE void column_tile_of(int m, const ColumnProducts<T>& p, int first, const T* columns,
                                  T* out) {
  if constexpr (M > 1)
    if (m < M) return column_tile_of<F, kAccess, N, M - 1>(m, p, first, columns, out);
  column_tile<F, kAccess, N, M>(p, first, columns, out);
}

/// The products of vectors first to first + N with `count` columns, in tiles.
template <class F, Access kAccess, int N = kMostVectors, class T = typename F::Sum>
void column_tiles(int n, const ColumnProducts<T>& p, int first, const T* columns,
                  std::int64_t count, T* out) {
  if constexpr (N > 1)
    if (n < N) return column_tiles<F, kAccess, N - 1>(n, p, first, columns, count, out);
  while (count > 0) {
    // As even a split as possible: a tile of one column would wait for its own sums.
    const auto m = static_cast<int>(ceil_div(count, ceil_div(count, kTileColumns<N>)));
    column_tile_of<F, kAccess, N>(m, p, first, columns, out);
    columns += m * p.next_column;
    out += m * kWidth<T>;
    count -= m;
  }
}

/// Rows of one vector whose products with weights share columns, where vectors are adjacent.
constexpr int kRowGroup = 4;

/// The weights of some entries (sums) for adjacent columns of a line. An element of a pair has the
/// next column, or weight, too: of those that follow each other every second is read.
template <class T>
struct Run {
  const T* plain;        // of the line
  std::int64_t weights;  // offset of the line's weights
  int first, last;       // the entries that see the line
};

/// sums[entry][d] += sum over columns of all runs of weight(entry, column) * plain[column][d].
template <class T>
struct RowProducts {
  const Run<T>* runs;
  int run_count;
  std::int64_t column, count;            // the columns of each run
  const T* weights;                      // Run::weights counts from here
  std::int64_t next_entry, next_column;  // in weights
  std::int64_t padded;
  T* sums;
  std::int64_t sums_stride;
};

/// Most vectors of sums per tile of G entries, such that it and its operands fit registers.
template <int G>
constexpr int kTileVectors = static_cast<int>(min(8, (kRegisters - 1 - G) / G));

/// Adds products to the sums of entries first to last, of kFirst to kLast. `at`: where the weights
/// of the i-th operand are, of entry 0.
template <class F, int G, int N, int kFirst = 0, int kLast = G, class T = typename F::Sum, class At>
NATTEN_INLINE void add_products(int first, int last, std::int64_t count, const T* weights, At&& at,
                                std::int64_t next_entry, const T* plain, std::int64_t padded,
                                Vector<T> (&c)[G][N]) {
  if (first == kFirst && last == kLast) {
    for (std::int64_t i = 0; i < count; i += F::kCount, plain += F::kCount * padded) {
      const T* w = weights + at(i);
      Vector<T> weight[G];
#pragma GCC unroll 8
      for (int g = kFirst; g < kLast; ++g) weight[g] = F::broadcast_from(w + g * next_entry);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vector<T> column = load(plain + n * kWidth<T>);
#pragma GCC unroll 8
        for (int g = kFirst; g < kLast; ++g) c[g][n] = F::multiply_add(weight[g], column, c[g][n]);
      }
    }
  } else if constexpr (kLast - kFirst > 1) {
    add_products<F, G, N, kFirst, kLast - 1>(first, last, count, weights, at, next_entry, plain,
                                             padded, c);
  } else if constexpr (kFirst + 1 < G) {
    add_products<F, G, N, kFirst + 1, G>(first, last, count, weights, at, next_entry, plain, padded,
                                         c);
  }
}

/// The products for N vectors of sums from element `first` on.
template <class F, int G, int N, class T = typename F::Sum>
void row_tile(const RowProducts<T>& p, std::int64_t first) {
  Vector<T> c[G][N] = {};
  for (int r = 0; r < p.run_count; ++r) {
    const Run<T>& run = p.runs[r];
    add_products<F, G, N>(
        run.first, run.last, p.count, p.weights + run.weights,
        [&](std::int64_t i) { return i * p.next_column; }, p.next_entry,
        run.plain + p.column * p.padded + first, p.padded, c);
  }
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) {
      T* to = p.sums + g * p.sums_stride + first + n * kWidth<T>;
      store(to, load(to) + c[g][n]);
    }
}
template <class F, int G, int N = kTileVectors<G>, class T = typename F::Sum>
NATTEN_INLINE void row_tile_of(int n, const RowProducts<T>& p, std::int64_t first) {
  if constexpr (N > 1)
    if (n < N) return row_tile_of<F, G, N - 1>(n, p, first);
  row_tile<F, G, N>(p, first);
}
/// The products for all of the sums' vectors, in tiles.
template <class F, int G = kRowGroup, class T = typename F::Sum>
void row_tiles(int entries, const RowProducts<T>& p) {
  if constexpr (G > 1)
    if (entries < G) return row_tiles<F, G - 1>(entries, p);
  const std::int64_t vectors = p.padded / kWidth<T>;
  for (std::int64_t d = 0; d < vectors;) {
    const auto n = static_cast<int>(ceil_div(vectors - d, ceil_div(vectors - d, kTileVectors<G>)));
    row_tile_of<F, G>(n, p, d * kWidth<T>);
    d += n;
  }
}

/// Rows of a vector, begin to end, and those of some columns that see them.
template <class T>
struct RowsOfColumns {
  const T* weights;  // of row 0 and the first column
  const T* plain;    // of row 0
  int first, last;   // columns
  std::int64_t begin, end;
};

/// sums[column][d] += sum over rows of weight(column, row) * plain[row][d]. Pairs are of rows.
template <class T>
struct ColumnSums {
  RowsOfColumns<T> rows[kMostVectors];
  int vectors;
  const std::int64_t* offsets;  // of a row's weights
  std::int64_t next_column;     // in weights
  std::int64_t padded;
  T* sums[kRowGroup];
};

/// The sums of G columns, N vectors of each at a time.
template <class F, int G, int N = kTileVectors<G>, class T = typename F::Sum>
NATTEN_INLINE void column_sum_tile(int n, const ColumnSums<T>& p, std::int64_t first) {
  if constexpr (N > 1)
    if (n < N) return column_sum_tile<F, G, N - 1>(n, p, first);
  Vector<T> c[G][N] = {};
  for (int v = 0; v < p.vectors; ++v) {
    const RowsOfColumns<T>& rows = p.rows[v];
    const std::int64_t* offsets = p.offsets + rows.begin;
    add_products<F, G, N>(
        rows.first, rows.last, rows.end - rows.begin, rows.weights,
        [&](std::int64_t i) { return offsets[i]; }, p.next_column,
        rows.plain + rows.begin * p.padded + first, p.padded, c);
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < N; ++i) {
      T* to = p.sums[g] + first + i * kWidth<T>;
      store(to, load(to) + c[g][i]);
    }
}
template <class F, int G = kRowGroup, class T = typename F::Sum>
void column_sum_tiles(int columns, const ColumnSums<T>& p) {
  if constexpr (G > 1)
    if (columns < G) return column_sum_tiles<F, G - 1>(columns, p);
  const std::int64_t vectors = p.padded / kWidth<T>;
  for (std::int64_t d = 0; d < vectors;) {
    const auto n = static_cast<int>(ceil_div(vectors - d, ceil_div(vectors - d, kTileVectors<G>)));
    column_sum_tile<F, G>(n, p, d * kWidth<T>);
    d += n;
  }
}

}  // namespace
}  // namespace natten::detail::cpu::simd
