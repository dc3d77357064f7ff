#pragma once

// How the rows of a block walk over the columns that they see, and the products along the way.

#include "products-inl.h"

namespace natten::detail::cpu::simd {
namespace {

static_assert(kPaddingSteps == kRowGroup - 1);
/// Elements of one vector's scores: [step][row].
template <class T>
constexpr std::int64_t kScores = std::int64_t{kMostStepsAtOnce} * kWidth<T>;

/// How a block's rows walk over columns, all at the same pace: at step j row r of vector v is at
/// column base(v, r) + j of each line that the vector sees.
template <class T>
struct Walk {
  using Int = typename VectorOf<T>::Int;
  const Block<T>& block;
  Access access = Access::following;
  std::int64_t first;       // column of step 0 of row 0
  std::int64_t count;       // of steps
  std::int64_t shift = 0;   // columns from one vector to the next
  Ints<T> index{};          // base(v, r) = first + index[r] + v * shift
  std::int64_t bias_first;  // base - position of the row, less bias_index
  Ints<T> bias_index{};
  // Each row sees the columns of steps low to high, all rows of a vector those of all_low to
  // all_high.
  Int low[kMostVectors][kWidth<T>], high[kMostVectors][kWidth<T>];
  std::int64_t all_low[kMostVectors], all_high[kMostVectors];

  explicit Walk(const Block<T>& b) : block(b) {
    constexpr int kW = kWidth<T>;
    std::int64_t begin_low = 0, begin_high = 0, longest = 0, offset_low = 0, offset_high = 0;
    bool any = false;
    for (int r = 0; r < b.rows; ++r) {
      if (b.begin[r] >= b.end[r]) continue;
      begin_low = any ? min(begin_low, b.begin[r]) : b.begin[r];
      begin_high = any ? max(begin_high, b.begin[r]) : b.begin[r];
      offset_low = any ? min(offset_low, b.begin[r] - r) : b.begin[r] - r;
      offset_high = any ? max(offset_high, b.end[r] - r) : b.end[r] - r;
      any = true;
    }
    for (int r = 0; r < b.rows; ++r)
      if (b.begin[r] < b.end[r]) longest = max(longest, b.end[r] - b.begin[r]);
    first = offset_low;
    count = offset_high - offset_low;
    for (int l = 0; l < kW; ++l) index[l] = static_cast<Int>(l);
    if (b.everywhere || (begin_high - begin_low < (b.adjacent ? 1 : kW) && longest < count)) {
      access = b.everywhere ? Access::same : Access::permuted;
      first = begin_low;
      count = longest;
      for (int l = 0; l < kW; ++l)
        index[l] = static_cast<Int>(l < b.rows ? begin_of(l, begin_low) - begin_low : 0);
    } else if (b.adjacent) {
      shift = kW;
    }
    Int least = 0;
    for (int l = 0; l < kW && l < b.rows; ++l) {
      bias_index[l] = static_cast<Int>(index[l] - l);
      least = bias_index[l] < least ? bias_index[l] : least;
    }
    bias_first = first - b.position + least;
    for (int l = 0; l < kW; ++l) bias_index[l] = l < b.rows ? bias_index[l] - least : 0;
    for (int v = 0; v < (b.adjacent ? b.vectors : 1); ++v) {
      all_low[v] = 0;
      all_high[v] = count;
      for (int l = 0; l < kW; ++l) {
        const int r = v * kW + l;
        low[v][l] = 0;  // rows of padding see everything, so that they need no mask
        high[v][l] = static_cast<Int>(count);
        if (r >= b.rows) continue;
        low[v][l] = static_cast<Int>(min(max(b.begin[r] - base(v, l), 0), count));
        high[v][l] = static_cast<Int>(min(max(b.end[r] - base(v, l), low[v][l]), count));
        all_low[v] = max(all_low[v], low[v][l]);
        all_high[v] = min(all_high[v], high[v][l]);
      }
    }
  }
  /// Where a row's columns begin, if it sees any.
  NATTEN_INLINE std::int64_t begin_of(int r, std::int64_t otherwise) const {
    return block.begin[r] < block.end[r] ? block.begin[r] : otherwise;
  }
  NATTEN_INLINE std::int64_t base(int v, int row) const { return first + index[row] + v * shift; }
  /// Stacked vectors walk alike.
  NATTEN_INLINE int of(int v) const { return block.adjacent ? v : 0; }
  /// How many steps earlier the next row of adjacent vectors comes to the same column.
  NATTEN_INLINE std::int64_t earlier() const { return shift ? 1 : 0; }
  NATTEN_INLINE bool sees_all(int v, std::int64_t step) const {
    return step >= all_low[of(v)] && step < all_high[of(v)];
  }
  NATTEN_INLINE Ints<T> mask(int v, std::int64_t step) const {
    Ints<T> lower, upper;
    __builtin_memcpy(&lower, low[of(v)], sizeof lower);
    __builtin_memcpy(&upper, high[of(v)], sizeof upper);
    const auto at = static_cast<Int>(step);
    return (lower <= at) & (upper > at);
  }
  /// One number per column, read as the rows of a vector read columns.
  NATTEN_INLINE Vector<T> read(const T* from, int v, std::int64_t step) const {
    const Vector<T> x = load(from + first + v * shift + step);
    return access == Access::permuted ? permute<T>(x, index) : x;
  }
  NATTEN_INLINE std::int64_t bias_at(int v, std::int64_t step) const {
    return bias_first + step + v * (block.adjacent ? shift - kWidth<T> : block.bias_stride);
  }
  /// Rows of a vector that are not padding.
  NATTEN_INLINE int rows_of(int v) const {
    return static_cast<int>(
        min(block.adjacent ? block.rows - v * kWidth<T> : block.rows, kWidth<T>));
  }
};

/// Steps step0 to step1 over some lines, stored [line][step] with steps of padding around those of
/// a line where vectors are adjacent.
struct Batch {
  std::int64_t line0, line1, step0, step1, padding;
  NATTEN_INLINE std::int64_t per_line() const { return step1 - step0 + 2 * padding; }
  /// Where the products with step 0 of a line would be.
  NATTEN_INLINE std::int64_t at(std::int64_t line) const {
    return (line - line0) * per_line() + padding - step0;
  }
};

/// Visits all steps of a block in batches of at most `most_steps`.
template <class T, class F>
NATTEN_INLINE void for_each_batch(const Walk<T>& walk, std::int64_t most_steps, F&& f) {
  const std::int64_t padding = walk.block.adjacent ? kPaddingSteps : 0;
  const std::int64_t steps = min(walk.count, most_steps - 2 * padding);
  const std::int64_t lines = most_steps / (steps + 2 * padding);
  for (std::int64_t line = 0; line < walk.block.line_count; line += lines)
    for (std::int64_t step = 0; step < walk.count; step += steps)
      f(Batch{line, min(line + lines, walk.block.line_count), step, min(step + steps, walk.count),
              padding});
}
template <class T, class F>
NATTEN_INLINE void for_each_batch(const Walk<T>& walk, F&& f) {
  for_each_batch(walk, std::int64_t{kBatchSteps}, f);
}
/// Whether all steps fit into one batch, if that may be longer.
template <class T>
NATTEN_INLINE bool fits_at_once(const Walk<T>& walk) {
  const std::int64_t padding = walk.block.adjacent ? kPaddingSteps : 0;
  return walk.block.line_count * (walk.count + 2 * padding) <= kMostStepsAtOnce;
}

/// Most elements that are summed in one go. The more there are, the more is rounded.
constexpr std::int64_t kMostDims = 512;

/// out[v][step][r] = <row r of vector v, its column of the step>; of pairs, times `scale`.
template <class F, Access kAccess, class T = typename F::Sum>
void column_products(const Walk<T>& walk, const Batch& batch, const T* rows,
                     const T* Line<T>::*operand, std::int64_t dim, std::int64_t padded, T* out,
                     T scale) {
  const Block<T>& block = walk.block;
  constexpr bool kTransposed = kAccess != Access::same;
  ColumnProducts<T> p;
  p.row_stride = block.vector_stride * dim;
  p.next_column = kTransposed ? 1 : padded;
  p.next_dim = kTransposed ? block.ld : 1;
  p.index = walk.index;
  p.scale = scale;
  p.out_stride = kScores<T> - walk.shift * kWidth<T>;
  const std::int64_t count = batch.step1 - batch.step0, shift = walk.shift;
  const std::int64_t span = count + (block.vectors - 1) * shift;
  for (std::int64_t d = 0; d < dim; d += kMostDims) {
    p.rows = rows + d * kWidth<T>;
    p.dim = min(dim - d, kMostDims);
    p.adds = d > 0;
    for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
      const T* columns = block.lines[l].*operand + d * p.next_dim;
      const Line<T>& line = block.lines[l];
      for (std::int64_t at = 0; at < span;) {
        // Adjacent vectors have columns at to end in common.
        int v0 = line.first_vector, v1 = static_cast<int>(min(line.last_vector, block.vectors));
        std::int64_t end = span;
        if (shift) {
          v0 = at < count ? 0 : static_cast<int>((at - count) / shift + 1);
          v1 = static_cast<int>(min(block.vectors, at / shift + 1));
          end = min(v1 < block.vectors ? v1 * shift : span, v0 * shift + count);
        }
        const std::int64_t step = batch.step0 + at;
        // Between the columns of two adjacent vectors there may be some that none sees.
        if (v0 < v1)
          column_tiles<F, kAccess>(v1 - v0, p, v0, columns + (walk.first + step) * p.next_column,
                                   end - at,
                                   out + v0 * p.out_stride + (batch.at(l) + step) * kWidth<T>);
        at = end;
      }
    }
  }
}
template <class F, class T = typename F::Sum>
NATTEN_INLINE void column_products(const Walk<T>& walk, const Batch& batch, const T* rows,
                                   const T* Line<T>::*operand, std::int64_t dim,
                                   std::int64_t padded, T* out, T scale = 1) {
  const auto products = walk.access == Access::following  ? column_products<F, Access::following>
                        : walk.access == Access::permuted ? column_products<F, Access::permuted>
                                                          : column_products<F, Access::same>;
  products(walk, batch, rows, operand, dim, padded, out, scale);
}

struct Steps {
  std::int64_t low, high;
};
/// The steps of a batch that some rows of an adjacent vector sum together, as the first of them
/// counts: those in which any sees a column.
template <class T>
NATTEN_INLINE Steps steps_of_group(const Walk<T>& walk, const Batch& batch, int v, int row,
                                   int entries) {
  const std::int64_t earlier = walk.earlier();
  std::int64_t low = 0, high = 0;
  for (int g = 0; g < entries; ++g) {
    const std::int64_t from = max(walk.low[v][row + g], batch.step0);
    const std::int64_t to = min(walk.high[v][row + g], batch.step1);
    if (from >= to) continue;  // its columns may not even be packed
    const bool is_first = low == high;
    low = is_first ? from + g * earlier : min(low, from + g * earlier);
    high = is_first ? to + g * earlier : max(high, to + g * earlier);
  }
  return {low, high};
}

/// sums[row] += sum over the batch's columns of weights * operand[column].
template <class F, class T = typename F::Sum>
void row_products(const Walk<T>& walk, const Batch& batch, const T* weights,
                  const T* Line<T>::*operand, std::int64_t padded, T* sums) {
  constexpr int kW = kWidth<T>;
  const Block<T>& block = walk.block;
  Run<T> runs[kMostStepsAtOnce];
  int run_count = 0;
  for (std::int64_t l = batch.line0; l < batch.line1; ++l)
    runs[run_count++] = {block.lines[l].*operand, batch.at(l) * kW, block.lines[l].first_vector,
                         static_cast<int>(min(block.lines[l].last_vector, block.vectors))};
  RowProducts<T> p;
  p.runs = runs;
  p.run_count = run_count;
  p.next_column = kW;
  p.padded = padded;
  const auto add = [&](int entries, int v, int row, std::int64_t low, std::int64_t high) {
    // Steps low to high of the row.
    if (low >= high) return;
    p.column = walk.base(v, row) + low;
    p.count = high - low;
    p.weights = weights + v * kScores<T> + low * kW + row;
    p.sums = sums + (v * block.vector_stride + row) * padded;
    row_tiles<F>(entries, p);
  };
  if (!block.adjacent) {
    p.next_entry = kScores<T>;
    p.sums_stride = block.vector_stride * padded;
    for (int row = 0; row < block.rows; ++row)
      add(block.vectors, 0, row, max(walk.low[0][row], batch.step0),
          min(walk.high[0][row], batch.step1));
    return;
  }
  p.next_entry = 1 - walk.earlier() * kW;
  p.sums_stride = padded;
  for (int v = 0; v < block.vectors; ++v)
    for (int row = 0; row < walk.rows_of(v); row += kRowGroup) {
      const auto entries = static_cast<int>(min(kRowGroup, walk.rows_of(v) - row));
      const auto [low, high] = steps_of_group(walk, batch, v, row, entries);
      for (int r = 0; r < run_count; ++r) {
        runs[r].first = 0;
        runs[r].last = entries;
      }
      add(entries, v, row, low, high);
    }
}

/// Columns of a batch that a row sees.
struct ColumnsSeen {
  std::int64_t begin, end;
};
template <class T>
NATTEN_INLINE ColumnsSeen columns_seen(const Walk<T>& walk, const Batch& batch, int v, int row) {
  const std::int64_t base = walk.base(v, row);
  return {base + max(walk.low[walk.of(v)][row], batch.step0),
          base + min(walk.high[walk.of(v)][row], batch.step1)};
}

/// Visits stacked rows by column: `f(column, first row that sees it, past the last)`.
template <class T, class F>
NATTEN_INLINE void for_each_column(const Walk<T>& walk, const Batch& batch, F&& f) {
  ColumnsSeen seen[kWidth<T>];
  std::int64_t first = 0, last = 0;
  for (int row = 0; row < walk.block.rows; ++row) {
    seen[row] = columns_seen(walk, batch, 0, row);
    if (seen[row].begin >= seen[row].end) continue;
    first = first == last ? seen[row].begin : min(first, seen[row].begin);
    last = max(last, seen[row].end);
  }
  const auto sees = [&](int row, std::int64_t column) {
    return seen[row].begin <= column && column < seen[row].end;
  };
  for (std::int64_t column = first; column < last; ++column)
    for (int row = 0; row < walk.block.rows; ++row) {
      const int begin = row;
      while (row < walk.block.rows && sees(row, column)) ++row;
      if (row > begin) f(column, begin, row);
    }
}

/// Visits rows that are adjacent, or see everything, by groups of columns: `f(first column,
/// columns, v, first row of vector v that sees any of them, past the last)`, and after the last
/// vector `done(first column, columns)`.
template <class T, class F, class Done>
NATTEN_INLINE void for_each_column_group(const Walk<T>& walk, const Batch& batch, F&& f,
                                         Done&& done) {
  std::int64_t first = 0, last = 0;
  for (int v = 0; v < walk.block.vectors; ++v)
    for (int row = 0; row < walk.rows_of(v); ++row) {
      const ColumnsSeen seen = columns_seen(walk, batch, v, row);
      if (seen.begin >= seen.end) continue;
      first = first == last ? seen.begin : min(first, seen.begin);
      last = max(last, seen.end);
    }
  for (std::int64_t column = first; column < last; column += kRowGroup) {
    const auto columns = static_cast<int>(min(kRowGroup, last - column));
    const auto sees_any = [&](int v, int row) {
      const ColumnsSeen seen = columns_seen(walk, batch, v, row);
      return seen.begin < seen.end && seen.begin < column + columns && column < seen.end;
    };
    for (int v = 0; v < walk.block.vectors; ++v) {
      int begin = 0, end = walk.rows_of(v);
      while (begin < end && !sees_any(v, begin)) ++begin;
      while (begin < end && !sees_any(v, end - 1)) --end;
      if (begin < end) f(column, columns, v, begin, end);
    }
    done(column, columns);
  }
}

/// The sums of the columns of some lines that follow each other, at most kMostVectors, of which
/// each is seen from no earlier to no earlier a vector than the line before. Rows are stacked.
template <class F, class T = typename F::Sum>
void sum_columns_of_lines(const Walk<T>& walk, const Batch& batch, const T* weights, const T* plain,
                          std::int64_t line, int lines, T* Line<T>::*sums, ColumnSums<T>& p) {
  const Block<T>& block = walk.block;
  const Line<T>* seen = block.lines + line;
  p.next_column = batch.per_line() * kWidth<T>;
  const T* first_weights[kMostVectors];  // by vector, of step 0 of row 0
  p.vectors = 0;
  for (int v = 0; v < block.vectors; ++v) {
    RowsOfColumns<T>& rows = p.rows[p.vectors];
    rows.first = 0;
    while (rows.first < lines && seen[rows.first].last_vector <= v) ++rows.first;
    rows.last = rows.first;
    while (rows.last < lines && seen[rows.last].first_vector <= v) ++rows.last;
    if (rows.first == rows.last) continue;
    first_weights[p.vectors] = weights + v * kScores<T> + batch.at(line) * kWidth<T>;
    rows.plain = plain + v * block.vector_stride * p.padded;
    ++p.vectors;
  }
  for_each_column(walk, batch, [&](std::int64_t column, int begin, int end) {
    for (int g = 0; g < lines; ++g) p.sums[g] = seen[g].*sums + column * p.padded;
    for (int i = 0; i < p.vectors; ++i) {
      p.rows[i].weights = first_weights[i] + (column - walk.first) * kWidth<T>;
      p.rows[i].begin = begin;
      p.rows[i].end = end;
    }
    column_sum_tiles<F, kMostVectors>(lines, p);
  });
}

/// The sums of the columns of a line, of some at a time. Rows are adjacent, or see everything.
template <class F, class T = typename F::Sum>
void sum_columns_of_line(const Walk<T>& walk, const Batch& batch, const T* weights, const T* plain,
                         std::int64_t line, T* Line<T>::*sums, ColumnSums<T>& p) {
  p.next_column = kWidth<T>;
  p.vectors = 0;
  for_each_column_group(
      walk, batch,
      [&](std::int64_t column, int columns, int v, int begin, int end) {
        const std::int64_t step = column - walk.first - v * walk.shift;
        p.rows[p.vectors++] = {weights + v * kScores<T> + (batch.at(line) + step) * kWidth<T>,
                               plain + v * walk.block.vector_stride * p.padded,
                               0,
                               columns,
                               begin,
                               end};
      },
      [&](std::int64_t column, int columns) {
        for (int g = 0; g < columns; ++g)
          p.sums[g] = walk.block.lines[line].*sums + (column + g) * p.padded;
        column_sum_tiles<F>(columns, p);
        p.vectors = 0;
      });
}

/// sums[column] += sum over the rows that see it of weights * plain[row], if lines have such sums.
template <class F, class T = typename F::Sum>
void column_sums(const Walk<T>& walk, const Batch& batch, const T* weights, const T* plain,
                 std::int64_t padded, T* Line<T>::*sums) {
  const Block<T>& block = walk.block;
  if (!(block.lines->*sums)) return;
  // The column of step 0 of row 0 is that of an earlier step of the rows after it.
  std::int64_t offsets[kWidth<T>];
  for (int row = 0; row < kWidth<T>; ++row)
    offsets[row] = row - std::int64_t{walk.index[row]} * kWidth<T>;
  ColumnSums<T> p;
  p.offsets = offsets;
  p.padded = padded;
  for (std::int64_t line = batch.line0; line < batch.line1;) {
    if (block.adjacent || block.everywhere) {
      sum_columns_of_line<F>(walk, batch, weights, plain, line++, sums, p);
      continue;
    }
    const auto continues = [&](const Line<T>& next) {
      return next.first_vector >= (&next - 1)->first_vector &&
             next.last_vector >= (&next - 1)->last_vector;
    };
    int lines = 1;
    while (lines < kMostVectors && line + lines < batch.line1 &&
           continues(block.lines[line + lines]))
      ++lines;
    sum_columns_of_lines<F>(walk, batch, weights, plain, line, lines, sums, p);
    line += lines;
  }
}

/// Visits a batch's lines that one vector sees: `f(line, where the products with its step 0 are)`.
template <class T, class F>
NATTEN_INLINE void for_each_line(const Walk<T>& walk, const Batch& batch, int v, F&& f) {
  for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
    const Line<T>& line = walk.block.lines[l];
    if (v >= line.first_vector && v < line.last_vector) f(line, batch.at(l));
  }
}
/// Visits their steps: `f(offset, line, step)`.
template <class T, class F>
NATTEN_INLINE void for_each_step(const Walk<T>& walk, const Batch& batch, int v, F&& f) {
  for_each_line(walk, batch, v, [&](const Line<T>& line, std::int64_t at) {
    std::int64_t offset = (at + batch.step0) * kWidth<T>;
    for (std::int64_t step = batch.step0; step < batch.step1; ++step, offset += kWidth<T>)
      f(offset, line, step);
  });
}

/// Visits their products: `f(offset)`. Those of lines without padding follow each other, and are
/// one loop.
template <class T, class F>
NATTEN_INLINE void for_each_product(const Walk<T>& walk, const Batch& batch, int v, F&& f) {
  const auto sees = [&](std::int64_t l) {
    const Line<T>& line = walk.block.lines[l];
    return v >= line.first_vector && v < line.last_vector;
  };
  for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
    if (!sees(l)) continue;
    std::int64_t offset = (batch.at(l) + batch.step0) * kWidth<T>;
    if (batch.padding == 0)
      while (l + 1 < batch.line1 && sees(l + 1)) ++l;
    const std::int64_t end = (batch.at(l) + batch.step1) * kWidth<T>;
    for (; offset < end; offset += kWidth<T>) f(offset);
  }
}

/// Sets the weights of steps of padding to 0.
template <class T>
NATTEN_INLINE void clear_padding(const Batch& batch, T* weights) {
  for (std::int64_t l = batch.line0; l < batch.line1; ++l)
    for (std::int64_t i = 1; i <= batch.padding; ++i) {
      store(weights + (batch.at(l) + batch.step0 - i) * kWidth<T>, Vector<T>{});
      store(weights + (batch.at(l) + batch.step1 - 1 + i) * kWidth<T>, Vector<T>{});
    }
}

/// Makes weights of a vector ready for column_sums: times `scale`, in pairs of a row and the next
/// one, which comes to the same column some steps earlier. `to` is not `from`.
template <class F, class T = typename F::Sum>
NATTEN_INLINE void pair_rows(const Walk<T>& walk, const Batch& batch, int v, const T* from, T* to,
                             T scale) {
  constexpr int kW = kWidth<T>;
  const Ints<T> next = (lanes<T>() + 1) % kW;
  Ints<T> earlier{};
  std::int64_t most = 0;
  for (int l = 0; l + 1 < kW; ++l) {
    const auto steps = static_cast<std::int64_t>(walk.index[l + 1] - walk.index[l]);
    earlier[l] = l + 1 < walk.rows_of(v) ? static_cast<typename Walk<T>::Int>(steps) : -1;
    if (l + 1 < walk.rows_of(v)) most = max(most, steps);
  }
  earlier[kW - 1] = -1;  // in another vector
  for_each_line(walk, batch, v, [&](const Line<T>&, std::int64_t at) {
    // Beyond the last step of a row those after it may go on.
    for (std::int64_t step = batch.step0; step < batch.step1 + batch.padding; ++step) {
      Vector<T> second{};
      for (std::int64_t d = 0; d <= most && step - d >= batch.step0; ++d)
        if (step - d < batch.step1)
          second = earlier == static_cast<typename Walk<T>::Int>(d)
                       ? permute<T>(load(from + (at + step - d) * kW), next)
                       : second;
      const Vector<T> first = step < batch.step1 ? load(from + (at + step) * kW) : Vector<T>{};
      store(to + (at + step) * kW, F::of(first * scale, second * scale));
    }
    for (std::int64_t step = batch.step0 - batch.padding; step < batch.step0; ++step)
      store(to + (at + step) * kW, Vector<T>{});
  });
}

/// Makes the weights of a vector ready for row_products: sets those of steps of padding to 0 and,
/// where elements are pairs, puts the weight of the next step of a line beside each.
template <class F, class T = typename F::Sum>
NATTEN_INLINE void finish_weights(const Walk<T>& walk, const Batch& batch, int v, T* weights) {
  clear_padding(batch, weights);
  if constexpr (F::kCount > 1) {
    constexpr int kW = kWidth<T>;
    for_each_line(walk, batch, v, [&](const Line<T>&, std::int64_t of_line) {
      T* at = weights + (of_line + batch.step0) * kW;
      Vector<T> weight = load(at);
      if (batch.padding > 0) store(at - kW, F::of(Vector<T>{}, weight));
      for (std::int64_t step = batch.step0 + 1; step < batch.step1; ++step, at += kW) {
        const Vector<T> next = load(at + kW);
        store(at, F::of(weight, next));
        weight = next;
      }
      store(at, F::of(weight, Vector<T>{}));
    });
  }
}

}  // namespace
}  // namespace natten::detail::cpu::simd
