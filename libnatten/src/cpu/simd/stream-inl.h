#pragma once

// The forward pass of few rows: columns are read where they lie, once, tile by tile, each while the
// next one is fetched.

#include "conversions-inl.h"
#include "exp-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// Runs of columns that are handled together, most columns of each, and most that a row sees of
/// all.
constexpr int kMostRuns = 4, kRunColumns = 32;
/// Most columns that a row is run over at a time.
constexpr int kTurnColumns = 16;

/// Some columns of some runs, and the rows that see them.
struct StreamTile {
  struct Row {
    int row;
    int count;                         // of columns
    std::int64_t scores;               // before those of the columns among the row's
    std::int64_t column[kRunColumns];  // elements from those of the first run's first column
  };
  int runs = 0;
  const StreamLine* line;  // of the first run
  std::int64_t first[kMostRuns], last[kMostRuns];
  bool is_weighted;  // of values, else of keys
  int columns;       // of all runs
  std::int64_t column[kMostRuns * kRunColumns];
  int rows;
  Row row[kMostStreamRows];
};

/// Goes through all columns twice, tile by tile: the keys, then the values.
template <class Type>
class StreamTiles {
 public:
  using T = typename Type::Sum;
  using Element = typename Type::Element;

  explicit StreamTiles(const Stream<T>& s) : s_(s) {
    std::int64_t most = 1;
    for (int r = 0; r < s.rows; ++r) most = max(most, s.end[r] - s.begin[r]);
    runs_ = static_cast<int>(min(max(kRunColumns / most, 1), kMostRuns));
    columns_ = runs_ == 1 ? kWidth<T> : kRunColumns;
  }

  /// Makes the next tile; tells whether there is one.
  bool next(StreamTile& tile) {
    while (true) {
      if (line_ >= s_.line_count) {
        if (is_weighted_) return false;
        is_weighted_ = true;
        line_ = done_ = 0;
        for (std::int64_t& count : seen_) count = 0;
      }
      fill(tile);
      if (tile.runs > 0) return true;
      line_ += runs_;
      done_ = 0;
    }
  }
  /// Elements of one head from the first run's first column on.
  const Element* base(bool is_weighted, int head) const {
    const StreamLine& line = *s_.lines;
    return static_cast<const Element*>(is_weighted ? line.value : line.key) +
           head * (is_weighted ? s_.value_head : s_.key_head);
  }
  /// Columns that a row has seen of the pass at hand.
  std::int64_t seen(int row) const { return seen_[row]; }

 private:
  void fill(StreamTile& tile) {
    tile.line = s_.lines + line_;
    tile.is_weighted = is_weighted_;
    tile.runs = tile.columns = tile.rows = 0;
    const auto count = static_cast<int>(min(runs_, s_.line_count - line_));
    bool any = false;
    for (int l = 0; l < count; ++l) {
      const StreamLine& line = tile.line[l];
      tile.first[l] = min(line.first + done_, line.last);
      tile.last[l] = min(tile.first[l] + columns_, line.last);
      any = any || tile.first[l] < tile.last[l];
      for (std::int64_t c = tile.first[l]; c < tile.last[l]; ++c)
        tile.column[tile.columns++] = offset(line, c);
    }
    if (!any) return;
    tile.runs = count;
    done_ += columns_;
    for (int r = 0; r < s_.rows; ++r) {
      StreamTile::Row& row = tile.row[tile.rows];
      row.row = r;
      row.count = 0;
      row.scores = seen_[r];
      for (int l = 0; l < count; ++l) {
        const std::int64_t last = min(s_.end[r], tile.last[l]);
        for (std::int64_t c = max(s_.begin[r], tile.first[l]); c < last; ++c)
          row.column[row.count++] = offset(tile.line[l], c);
      }
      if (row.count == 0) continue;
      seen_[r] += row.count;
      ++tile.rows;
    }
  }
  std::int64_t offset(const StreamLine& line, std::int64_t column) const {
    const auto* from = static_cast<const Element*>(is_weighted_ ? line.value : line.key);
    return from - base(is_weighted_, 0) +
           (column - line.first) * (is_weighted_ ? s_.value_stride : s_.key_stride);
  }

  const Stream<T>& s_;
  int runs_, columns_;  // of a tile, and of each run
  bool is_weighted_ = false;
  std::int64_t line_ = 0;  // first run of the tile
  std::int64_t done_ = 0;  // columns of each of its runs
  std::int64_t seen_[kMostStreamRows] = {};
};

/// Fetches a column of one head to the L2 cache: in the L1 cache tokens would displace each other.
template <class Element>
NATTEN_INLINE void fetch_column(const Element* column, std::int64_t dim) {
  constexpr std::int64_t per_line = 64 / static_cast<std::int64_t>(sizeof(Element));
  for (std::int64_t d = 0; d < dim; d += per_line) __builtin_prefetch(column + d, 0, 1);
}

/// Products of a row with M columns, at most a vector of them.
template <class Type, int M>
Vector<typename Type::Sum> stream_dots(const typename Type::Sum* row,
                                       const typename Type::Element* base,
                                       const std::int64_t* columns, std::int64_t dim) {
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  const typename Type::Element* column[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) column[m] = base + columns[m];
  Vector<T> sums[kW];
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) sums[i] = Vector<T>{};
  std::int64_t d = 0;
  for (; d + kW <= dim; d += kW) {
    const Vector<T> x = load(row + d);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[m] += x * Type::read(column[m] + d);
  }
  if (d < dim) {
    const Vector<T> x = load(row + d);
    for (int m = 0; m < M; ++m) sums[m] += x * read_rest<Type>(column[m], d, dim);
  }
  transpose<T>(sums);
#pragma GCC unroll 16
  for (int i = 1; i < kW; ++i) sums[0] += sums[i];
  return sums[0];
}
template <class Type, int M = kWidth<typename Type::Sum>>
NATTEN_INLINE Vector<typename Type::Sum> stream_dots_of(int m, const typename Type::Sum* row,
                                                        const typename Type::Element* base,
                                                        const std::int64_t* columns,
                                                        std::int64_t dim) {
  if constexpr (M > 1)
    if (m < M) return stream_dots_of<Type, M - 1>(m, row, base, columns, dim);
  return stream_dots<Type, M>(row, base, columns, dim);
}

/// Adds columns, times their weights, to N vectors of sums.
template <class Type, int N>
void add_weighted(const typename Type::Sum* weights, int count, const typename Type::Element* base,
                  const std::int64_t* columns, typename Type::Sum* sums) {
  using T = typename Type::Sum;
  Vector<T> c[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) c[n] = load(sums + n * kWidth<T>);
  for (int i = 0; i < count; ++i) {
    const Vector<T> weight = broadcast<T>(weights[i]);
    const typename Type::Element* column = base + columns[i];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) c[n] += weight * Type::read(column + n * kWidth<T>);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store(sums + n * kWidth<T>, c[n]);
}
/// The same for all of the sums, N vectors at a time as long as there are so many.
template <class Type, int N = 8>
NATTEN_INLINE void add_all_weighted(const typename Type::Sum* weights, int count,
                                    const typename Type::Element* base, const std::int64_t* columns,
                                    typename Type::Sum* sums, std::int64_t dim) {
  using T = typename Type::Sum;
  constexpr int kTile = N * kWidth<T>;
  for (; dim >= kTile; dim -= kTile, base += kTile, sums += kTile)
    add_weighted<Type, N>(weights, count, base, columns, sums);
  if constexpr (N > 1) {
    add_all_weighted<Type, N / 2>(weights, count, base, columns, sums, dim);
  } else if (dim > 0) {
    Vector<T> sum = load(sums);
    for (int i = 0; i < count; ++i) sum += weights[i] * read_part<Type>(base + columns[i], dim);
    store(sums, sum);
  }
}

/// Adds the biases of one head to a row's scores of a tile.
template <class Type>
void add_biases(const Stream<typename Type::Sum>& s, const StreamTile& tile,
                const StreamTile::Row& row, int head, typename Type::Sum* scores) {
  constexpr int kW = kWidth<typename Type::Sum>;
  for (int l = 0; l < tile.runs; ++l) {
    const std::int64_t first = max(s.begin[row.row], tile.first[l]);
    const std::int64_t count = min(s.end[row.row], tile.last[l]) - first;
    const auto* bias = static_cast<const typename Type::Element*>(tile.line[l].bias) +
                       head * s.bias_head + (first - s.position - row.row);
    for (std::int64_t i = 0; i < count; i += kW)
      store(scores + i,
            load(scores + i) +
                (count - i >= kW ? Type::read(bias + i) : read_part<Type>(bias + i, count - i)));
    scores += max(count, 0);
  }
}

/// Makes weights of a row's scores, and scales what it has summed up before.
template <class T>
NATTEN_INLINE void weigh_scores(const Stream<T>& s, std::int64_t row, std::int64_t count,
                                T* scores) {
  constexpr int kW = kWidth<T>;
  store(scores + count, broadcast<T>(-kInfinity<T>));
  Vector<T> most = broadcast<T>(-kInfinity<T>);
  for (std::int64_t i = 0; i < count; i += kW) {
    const Vector<T> score = load(scores + i);
    most = score > most ? score : most;
  }
  const T before = s.largest[row];
  T largest = before;
  for (int l = 0; l < kW; ++l) largest = most[l] > largest ? most[l] : largest;
  // Where a row sees nothing yet all weights are 0, not exp(-inf + inf).
  const Vector<T> reference = broadcast<T>(largest == -kInfinity<T> ? T(0) : largest);
  Vector<T> total{};
  for (std::int64_t i = 0; i < count; i += kW) {
    const Vector<T> weight = exp<T>(load(scores + i) - reference);
    store(scores + i, weight);
    total += weight;
  }
  const Vector<T> shrink = exp<T>(before - reference);
  s.total[row] = s.total[row] * shrink[0] + sum_of<T>(total);
  s.largest[row] = largest;
  if (before == -kInfinity<T> || before == largest) return;
  T* sums = s.sums + row * s.value_padded;
  for (std::int64_t d = 0; d < s.value_padded; d += kW) store(sums + d, load(sums + d) * shrink);
}

template <class Type>
void stream(const Stream<typename Type::Sum>& s) {
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  constexpr std::int64_t kRowScores = kMostStreamColumns + kMostWidth;
  StreamTiles<Type> tiles(s);
  StreamTile tile_memory[2];
  const auto for_each_row = [&](auto&& f) {
    for (int h = 0; h < s.heads * s.group; ++h)
      for (int r = 0; r < s.rows; ++r) f(h * s.head_rows + r, r);
  };
  std::int64_t seen[kMostStreamRows];  // of keys
  bool is_weighted = false;
  bool has_tile = tiles.next(tile_memory[0]);
  for (int at_hand = 0; has_tile; at_hand = 1 - at_hand) {
    const StreamTile& tile = tile_memory[at_hand];
    StreamTile& next = tile_memory[1 - at_hand];
    if (!tile.is_weighted)
      for (int r = 0; r < s.rows; ++r) seen[r] = tiles.seen(r);
    if (tile.is_weighted && !is_weighted) {
      is_weighted = true;
      for_each_row([&](std::int64_t at, int r) {
        if (seen[r] > 0) weigh_scores(s, at, seen[r], s.scores + at * kRowScores);
        for (std::int64_t d = 0; d < s.value_padded; d += kW)
          store(s.added + at * s.value_padded + d, Vector<T>{});
      });
    }
    has_tile = tiles.next(next);
    int turns = 0, turn = 0;
    for (int i = 0; i < tile.rows; ++i)
      turns += s.heads * s.group * ceil_div(tile.row[i].count, kTurnColumns);
    // A part of the next tile in each turn, as what can be waited for at once is limited. Of
    // several runs token by token, in the order of memory; of one, which is short, head by head.
    const bool by_token = next.runs > 1;
    int fetched = 0, fetched_column = 0, fetched_head = 0;
    const auto fetch = [&] {
      if (!has_tile) return;
      const std::int64_t until = std::int64_t{next.columns} * s.heads * ++turn / turns;
      for (; fetched < until; ++fetched) {
        fetch_column(tiles.base(next.is_weighted, fetched_head) + next.column[fetched_column],
                     next.is_weighted ? s.value_dim : s.dim);
        if (by_token && ++fetched_head == s.heads) {
          fetched_head = 0;
          ++fetched_column;
        } else if (!by_token && ++fetched_column == next.columns) {
          fetched_column = 0;
          ++fetched_head;
        }
      }
    };
    for (int head = 0; head < s.heads; ++head) {
      const auto* base = tiles.base(tile.is_weighted, head);
      for (int h = head * s.group; h < (head + 1) * s.group; ++h)
        for (int i = 0; i < tile.rows; ++i) {
          const StreamTile::Row& row = tile.row[i];
          const std::int64_t at = h * s.head_rows + row.row;
          T* scores = s.scores + at * kRowScores + row.scores;
          for (int first = 0; first < row.count; first += kTurnColumns) {
            fetch();
            const int last = static_cast<int>(min(first + kTurnColumns, row.count));
            if (tile.is_weighted)
              add_all_weighted<Type>(scores + first, last - first, base, row.column + first,
                                     s.added + at * s.value_padded, s.value_dim);
            for (int c = first; c < last && !tile.is_weighted; c += kW)
              store(scores + c,
                    stream_dots_of<Type>(static_cast<int>(min(kW, last - c)),
                                         s.query + at * s.padded, base, row.column + c, s.dim));
          }
          if (tile.is_weighted) continue;
          if (tile.line->bias) add_biases<Type>(s, tile, row, h, scores);
        }
    }
  }
  for_each_row([&](std::int64_t at, int) {
    for (std::int64_t d = at * s.value_padded; d < (at + 1) * s.value_padded; d += kW)
      store(s.sums + d, load(s.sums + d) + load(s.added + d));
  });
}

}  // namespace
}  // namespace natten::detail::cpu::simd
