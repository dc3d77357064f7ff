// Compiled once per instruction set, with NATTEN_ISA naming it. Everything is in an unnamed
// namespace and nothing from the standard library or the other headers is used, so that the object
// file shares no inline function with code for other processors.

#include "kernels.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace natten::detail::cpu::simd {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

#define NATTEN_INLINE inline __attribute__((always_inline))

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t ints __attribute__((vector_size(kVectorBytes)));
  using Int = std::int32_t;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t ints __attribute__((vector_size(kVectorBytes)));
  using Int = std::int64_t;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Ints = typename VectorOf<T>::ints;
template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
NATTEN_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
NATTEN_INLINE void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}
template <class T>
NATTEN_INLINE Vector<T> broadcast(T x) {
  return Vector<T>{} + x;
}
template <class T>
NATTEN_INLINE Ints<T> lanes() {
  Ints<T> v;
  for (int i = 0; i < kWidth<T>; ++i) v[i] = i;
  return v;
}
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

constexpr std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t max(std::int64_t a, std::int64_t b) { return a < b ? b : a; }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// ---- exp ----

/// 2^n for whole n in the normal range: n + 1.5 * 2^(mantissa bits) holds n in its low bits.
template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float log2e = 1.44269504088896341f, magic = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.0f;
  static constexpr int mantissa = 23;
  static constexpr std::int32_t bias = 127;
  // 1/k! from k = 7 down to 2: the next term is below 2^-24 of the sum on |r| <= ln(2) / 2.
  static constexpr float terms[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2};
};
template <>
struct Exp<double> {
  static constexpr double log2e = 1.44269504088896340736, magic = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -708.0;
  static constexpr int mantissa = 52;
  static constexpr std::int64_t bias = 1023;
  static constexpr double terms[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800,
                                     1. / 362880,     1. / 40320,     1. / 5040,     1. / 720,
                                     1. / 120,        1. / 24,        1. / 6,        1. / 2};
};

/// exp(x) for x <= 0 and a little above; 0 below the normal range, NaN for NaN.
template <class T>
NATTEN_INLINE Vector<T> exp(Vector<T> x) {
  using E = Exp<T>;
  const Vector<T> shifted = x * E::log2e + E::magic;
  const Vector<T> n = shifted - E::magic;
  const Vector<T> r = (x - n * E::ln2_high) - n * E::ln2_low;
  Vector<T> sum = broadcast<T>(E::terms[0]);
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof(E::terms) / sizeof(T); ++i) sum = sum * r + E::terms[i];
  sum = (sum * r) * r + r + T(1);
  const Ints<T> exponent = (reinterpret_cast<Ints<T>>(shifted) + E::bias) << E::mantissa;
  return x < E::lowest ? Vector<T>{} : sum * reinterpret_cast<Vector<T>>(exponent);
}
template <class T>
NATTEN_INLINE T exp1(T x) {
  return exp<T>(broadcast<T>(x))[0];
}

template <class T>
NATTEN_INLINE T sum_of(Vector<T> v) {
  T sum = v[0];
  for (int i = 1; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}
template <class T>
NATTEN_INLINE T max_of(Vector<T> v) {
  T largest = v[0];
  for (int i = 1; i < kWidth<T>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// ---- products ----

/// Most vectors of columns that are handled at once. It bounds the scratch, and the number of terms
/// that are summed in one go.
constexpr int kBatch = 64;
template <class T>
constexpr std::int64_t kRow = std::int64_t{kBatch} * kWidth<T>;  // a row of scores in scratch

/// Rows of a tile of column products. Groups of Q rows read the same vectors of columns, and
/// several groups share a tile: their columns overlap, so they find them in the L1 cache.
constexpr int kTileRows = kRegisters / 4;
/// Vectors of columns of such a tile. Few, as each is a walk over all of dim in the L1 cache.
constexpr int kTileColumns = 3;

/// out[row][n] = sum over i of a[row][i] * b[n][first of the row's group + i * ld].
template <class T, int Q, int N>
void column_tile(const T* a, std::int64_t a_row, const T* const* b, const std::int64_t* first,
                 std::int64_t ld, std::int64_t dim, T* out) {
  constexpr int kGroups = kTileRows / Q;
  const T* columns[N][kGroups];
  for (int n = 0; n < N; ++n)
    for (int g = 0; g < kGroups; ++g) columns[n][g] = b[n] + first[g];
  Vector<T> c[kGroups][Q][N] = {};
  for (std::int64_t i = 0, at = 0; i < dim; ++i, at += ld) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      Vector<T> row[Q];
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) row[q] = broadcast<T>(a[(g * Q + q) * a_row + i]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vector<T> column = load(columns[n][g] + at);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) c[g][q][n] += row[q] * column;
      }
    }
  }
  for (int g = 0; g < kGroups; ++g)
    for (int q = 0; q < Q; ++q)
      for (int n = 0; n < N; ++n) store(out + (g * Q + q) * kRow<T> + n * kWidth<T>, c[g][q][n]);
}

/// Calls column_tile with `n` as a template argument.
template <class T, int Q, int N = kTileColumns>
NATTEN_INLINE void column_tile_of(int n, const T* a, std::int64_t a_row, const T* const* b,
                                  const std::int64_t* first, std::int64_t ld, std::int64_t dim,
                                  T* out) {
  if constexpr (N > 1)
    if (n < N) return column_tile_of<T, Q, N - 1>(n, a, a_row, b, first, ld, dim, out);
  column_tile<T, Q, N>(a, a_row, b, first, ld, dim, out);
}

/// Most vectors of sums per tile of Q rows, such that the tile and its operands fit registers.
template <int Q>
constexpr int kTileVectors = min(8, (kRegisters - 1 - Q) / Q);

/// Adjacent columns: `offset` of the first in rows of weights, and their plain operands.
template <class T>
struct Run {
  std::int64_t offset;
  const T* plain;
  std::int64_t count;
};

/// sums[q][n] += sum over the columns of all runs of weights[q][column] * plain[column][n], for N
/// vectors from element `first` on.
template <class T, int Q, int N>
void row_tile(const T* weights, const Run<T>* runs, int run_count, std::int64_t first,
              std::int64_t padded, T* sums) {
  Vector<T> c[Q][N] = {};
  for (int r = 0; r < run_count; ++r) {
    const T* a = weights + runs[r].offset;
    const T* b = runs[r].plain + first;
    for (std::int64_t i = 0; i < runs[r].count; ++i, ++a, b += padded) {
      Vector<T> row[Q];
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) row[q] = broadcast<T>(a[q * kRow<T>]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const Vector<T> column = load(b + n * kWidth<T>);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) c[q][n] += row[q] * column;
      }
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) {
      T* to = sums + q * padded + first + n * kWidth<T>;
      store(to, load(to) + c[q][n]);
    }
}
template <class T, int Q, int N = kTileVectors<Q>>
NATTEN_INLINE void row_tile_of(int n, const T* weights, const Run<T>* runs, int run_count,
                               std::int64_t first, std::int64_t padded, T* sums) {
  if constexpr (N > 1)
    if (n < N) return row_tile_of<T, Q, N - 1>(n, weights, runs, run_count, first, padded, sums);
  row_tile<T, Q, N>(weights, runs, run_count, first, padded, sums);
}

// ---- blocks ----

/// How the columns of a block are cut into vectors, `per_line` for each line. Groups of Q rows
/// share a first column, so that one vector of columns serves them all.
template <class T, int Q>
struct Cut {
  const Block<T>& block;
  int groups;
  std::int64_t first[kBlock / Q];    // column that a group starts with
  std::int64_t columns[kBlock / Q];  // how many columns a group needs
  std::int64_t per_line = 1;

  explicit NATTEN_INLINE Cut(const Block<T>& b) : block(b), groups((b.rows + Q - 1) / Q) {
    for (int g = 0; g < groups; ++g) {
      std::int64_t begin = b.begin[g * Q], end = b.end[g * Q];
      for (int q = g * Q + 1; q < g * Q + Q && q < b.rows; ++q) {
        begin = min(begin, b.begin[q]);
        end = max(end, b.end[q]);
      }
      first[g] = begin;
      columns[g] = end - begin;
      per_line = max(per_line, ceil_div(end - begin, kWidth<T>));
    }
    for (int g = groups; g < kBlock / Q; ++g) first[g] = first[0];  // tiles may have rows to spare
  }
};

/// Some lines' vectors at0 to at1: whole lines, or a part of one. Vector v of the batch is number
/// at0 + v % per_line() of line line0 + v / per_line().
struct Batch {
  std::int64_t line0, line1, at0, at1;
  NATTEN_INLINE std::int64_t per_line() const { return at1 - at0; }
  NATTEN_INLINE std::int64_t vectors() const { return (line1 - line0) * per_line(); }
};

/// Visits all columns of a block in batches of at most kBatch vectors.
template <class T, int Q, class F>
NATTEN_INLINE void for_each_batch(const Cut<T, Q>& cut, F&& f) {
  const std::int64_t at_step = min(cut.per_line, kBatch), line_step = kBatch / at_step;
  for (std::int64_t line = 0; line < cut.block.line_count; line += line_step)
    for (std::int64_t at = 0; at < cut.per_line; at += at_step)
      f(Batch{line, min(line + line_step, cut.block.line_count), at,
              min(at + at_step, cut.per_line)});
}

/// out[row][v] = <a[row], columns of vector v of the batch>.
template <class T, int Q>
NATTEN_INLINE void column_products(const Cut<T, Q>& cut, const Batch& batch, const T* a,
                                   std::int64_t a_row, const T* Line<T>::*operand, std::int64_t dim,
                                   T* out) {
  const T* columns[kBatch];  // of the vectors, for a group that starts at column 0
  for (std::int64_t line = batch.line0, v = 0; line < batch.line1; ++line)
    for (std::int64_t at = batch.at0; at < batch.at1; ++at)
      columns[v++] = cut.block.lines[line].*operand + at * kWidth<T>;
  const std::int64_t vectors = batch.vectors();
  for (std::int64_t v = 0; v < vectors;) {
    // As even a split as possible: a tile of one vector would wait for its own sums.
    const int n = static_cast<int>(ceil_div(vectors - v, ceil_div(vectors - v, kTileColumns)));
    for (int row = 0; row < cut.block.rows; row += kTileRows)
      column_tile_of<T, Q>(n, a + row * a_row, a_row, columns + v, cut.first + row / Q,
                           cut.block.ld, dim, out + row * kRow<T> + v * kWidth<T>);
    v += n;
  }
}

/// sums[row] += sum over the batch's columns of weights[row][column] * operand[column].
template <class T, int Q>
NATTEN_INLINE void row_products(const Cut<T, Q>& cut, const Batch& batch, const T* weights,
                                const T* Line<T>::*operand, std::int64_t padded, T* sums) {
  constexpr int kMost = kTileVectors<Q>, kW = kWidth<T>;
  for (int g = 0; g < cut.groups; ++g) {
    const std::int64_t column = batch.at0 * kW;
    const std::int64_t count = min(cut.columns[g], batch.at1 * kW) - column;
    if (count <= 0) continue;
    Run<T> runs[kBatch];
    int run_count = 0;
    for (std::int64_t line = batch.line0; line < batch.line1; ++line, ++run_count)
      runs[run_count] = {run_count * batch.per_line() * kW,
                         cut.block.lines[line].*operand + (cut.first[g] + column) * padded, count};
    const std::int64_t vectors = padded / kW;
    for (std::int64_t d = 0; d < vectors;) {
      const int n = static_cast<int>(ceil_div(vectors - d, ceil_div(vectors - d, kMost)));
      row_tile_of<T, Q>(n, weights + g * Q * kRow<T>, runs, run_count, d * kW, padded,
                        sums + g * Q * padded);
      d += n;
    }
  }
}

/// Visits a batch's vectors for one row: `f(offset in the row, line, column, mask)`, mask set where
/// the row sees the column.
template <class T, int Q, class F>
NATTEN_INLINE void for_each_vector(const Cut<T, Q>& cut, const Batch& batch, int row, F&& f) {
  constexpr int kW = kWidth<T>;
  using Int = typename VectorOf<T>::Int;
  for (std::int64_t at = batch.at0; at < batch.at1; ++at) {
    const std::int64_t column = cut.first[row / Q] + at * kW;
    const auto low = static_cast<Int>(max(min(cut.block.begin[row] - column, kW), 0));
    const auto high = static_cast<Int>(max(min(cut.block.end[row] - column, kW), 0));
    const Ints<T> lane = lanes<T>(), mask = (lane >= low) & (lane < high);
    std::int64_t offset = (at - batch.at0) * kW;
    for (std::int64_t line = batch.line0; line < batch.line1; ++line) {
      f(offset, cut.block.lines[line], column, mask);
      offset += batch.per_line() * kW;
    }
  }
}

/// Adds the bias and sets what a row does not see to -inf. Returns the largest score.
template <class T, int Q>
NATTEN_INLINE T finish_scores(const Cut<T, Q>& cut, const Batch& batch, int row, T* scores) {
  Vector<T> largest = broadcast<T>(-kInfinity<T>);
  const std::int64_t position = cut.block.position[row];
  for_each_vector(cut, batch, row,
                  [&](std::int64_t offset, const Line<T>& line, std::int64_t column, Ints<T> mask) {
                    Vector<T> s = load(scores + offset);
                    if (line.bias) s += load(line.bias + (column - position));
                    s = mask ? s : broadcast<T>(-kInfinity<T>);
                    store(scores + offset, s);
                    largest = s > largest ? s : largest;
                  });
  return max_of<T>(largest);
}

template <class T, int Q>
void forward_block(const Forward<T>& f) {
  constexpr int kW = kWidth<T>;
  const Block<T>& block = f.block;
  const Cut<T, Q> cut(block);
  T* scores = block.scratch;
  for_each_batch(cut, [&](const Batch& batch) {
    column_products(cut, batch, f.query, block.padded, &Line<T>::transposed, block.dim, scores);
    for (int row = 0; row < block.rows; ++row) {
      T* s = scores + row * kRow<T>;
      const T batch_largest = finish_scores(cut, batch, row, s);
      const T largest = batch_largest > f.largest[row] ? batch_largest : f.largest[row];
      // Where the row sees nothing yet all weights are 0, not exp(-inf + inf).
      const T reference = largest == -kInfinity<T> ? T(0) : largest;
      Vector<T> total{};
      for (std::int64_t at = 0; at < batch.vectors() * kW; at += kW) {
        const Vector<T> weight = exp<T>(load(s + at) - reference);
        store(s + at, weight);
        total += weight;
      }
      if (f.largest[row] != -kInfinity<T> && f.largest[row] != largest) {
        const T shrink = exp1<T>(f.largest[row] - reference);
        f.total[row] *= shrink;
        T* sums = f.sums + row * block.value_padded;
        for (std::int64_t d = 0; d < block.value_padded; d += kW)
          store(sums + d, load(sums + d) * shrink);
      }
      f.largest[row] = largest;
      f.total[row] += sum_of<T>(total);
    }
    row_products(cut, batch, scores, &Line<T>::plain, block.value_padded, f.sums);
  });
}

/// Adds the gradients that one query gives to columns, which are the additional tokens.
template <class T>
NATTEN_INLINE void add_to_columns(const BackwardQuery<T>& f, int row, std::int64_t column, T weight,
                                  T grad) {
  const Block<T>& block = f.block;
  const auto add = [](T* to, const T* from, T factor, std::int64_t count) {
    for (std::int64_t d = 0; d < count; d += kWidth<T>)
      store(to + d, load(to + d) + load(from + d) * factor);
  };
  add(f.grad_key + column * block.padded, f.query + row * block.padded, grad, block.padded);
  add(f.grad_value + column * block.value_padded, f.grad_output + row * block.value_padded, weight,
      block.value_padded);
}

template <class T, int Q>
void backward_query_block(const BackwardQuery<T>& f) {
  constexpr int kW = kWidth<T>;
  const Block<T>& block = f.block;
  const Cut<T, Q> cut(block);
  T* weights = block.scratch;
  T* grads = weights + kBlock * kRow<T>;
  // Both steps at once need all columns in one batch.
  const bool at_once =
      f.sum_row_term && f.sum_gradients && block.line_count * cut.per_line <= kBatch;
  for (int step = 0; step < 2; ++step) {
    const bool sums_row_term = step == 0 && f.sum_row_term;
    const bool sums_gradients = step == 0 ? at_once : f.sum_gradients && !at_once;
    if (!sums_row_term && !sums_gradients) continue;
    for_each_batch(cut, [&](const Batch& batch) {
      column_products(cut, batch, f.query, block.padded, &Line<T>::transposed, block.dim, weights);
      column_products(cut, batch, f.grad_output, block.value_padded, &Line<T>::transposed_grad,
                      block.value_dim, grads);
      for (int row = 0; row < block.rows; ++row) {
        T* w = weights + row * kRow<T>;
        T* g = grads + row * kRow<T>;
        finish_scores(cut, batch, row, w);
        Vector<T> sum{};
        for (std::int64_t at = 0; at < batch.vectors() * kW; at += kW) {
          const Vector<T> weight = exp<T>(load(w + at) - f.logsumexp[row]);
          store(w + at, weight);
          // Beyond the last column grads hold anything.
          const Vector<T> grad = weight != T(0) ? load(g + at) : Vector<T>{};
          store(g + at, grad);
          sum += weight * grad;
        }
        if (sums_row_term) f.row_term[row] += sum_of<T>(sum);
        if (at_once && f.grad_logsumexp) f.row_term[row] -= f.grad_logsumexp[row];
        if (!sums_gradients) continue;
        for (std::int64_t at = 0; at < batch.vectors() * kW; at += kW)
          store(g + at, load(w + at) * (load(g + at) - f.row_term[row]));
        const std::int64_t position = block.position[row];
        for_each_vector(
            cut, batch, row,
            [&](std::int64_t offset, const Line<T>& line, std::int64_t column, Ints<T>) {
              if (line.grad_bias) {
                T* to = line.grad_bias + (column - position);
                store(to, load(to) + load(g + offset));
              }
              if (f.grad_key)
                for (int lane = 0; lane < kW && column + lane < block.end[row]; ++lane)
                  add_to_columns(f, row, column + lane, w[offset + lane], g[offset + lane]);
            });
      }
      if (sums_gradients)
        row_products(cut, batch, grads, &Line<T>::plain_grad, block.padded, f.grad_query);
    });
    if (step == 0 && !at_once && f.grad_logsumexp)
      for (int row = 0; row < block.rows; ++row) f.row_term[row] -= f.grad_logsumexp[row];
  }
}

template <class T, int Q>
void backward_key_block(const BackwardKey<T>& f) {
  const Block<T>& block = f.block;
  const Cut<T, Q> cut(block);
  T* weights = block.scratch;
  T* grads = weights + kBlock * kRow<T>;
  for_each_batch(cut, [&](const Batch& batch) {
    column_products(cut, batch, f.key, block.padded, &Line<T>::transposed, block.dim, weights);
    column_products(cut, batch, f.value, block.value_padded, &Line<T>::transposed_grad,
                    block.value_dim, grads);
    for (int row = 0; row < block.rows; ++row) {
      T* w = weights + row * kRow<T>;
      T* g = grads + row * kRow<T>;
      finish_scores(cut, batch, row, w);
      for_each_vector(
          cut, batch, row,
          [&](std::int64_t offset, const Line<T>& line, std::int64_t column, Ints<T> mask) {
            Vector<T> weight = exp<T>(load(w + offset) - load(line.logsumexp + column));
            weight = mask ? weight : Vector<T>{};
            const Vector<T> grad = weight * (load(g + offset) - load(line.row_term + column));
            store(w + offset, weight);
            store(g + offset, mask ? grad : Vector<T>{});
          });
    }
    row_products(cut, batch, weights, &Line<T>::plain, block.value_padded, f.grad_value);
    row_products(cut, batch, grads, &Line<T>::plain_grad, block.padded, f.grad_key);
  });
}

/// Four rows share vectors of columns where that costs no more vectors than two rows, else two.
template <class T>
NATTEN_INLINE bool prefers_four(const Block<T>& block) {
  if (block.rows <= 2) return false;
  return Cut<T, 4>(block).per_line * 15 <= Cut<T, 2>(block).per_line * 16;
}
template <class T>
void forward(const Forward<T>& f) {
  prefers_four(f.block) ? forward_block<T, 4>(f) : forward_block<T, 2>(f);
}
template <class T>
void backward_query(const BackwardQuery<T>& f) {
  prefers_four(f.block) ? backward_query_block<T, 4>(f) : backward_query_block<T, 2>(f);
}
template <class T>
void backward_key(const BackwardKey<T>& f) {
  prefers_four(f.block) ? backward_key_block<T, 4>(f) : backward_key_block<T, 2>(f);
}

// ---- conversion ----

struct Float64 {
  using Element = double;
  using Sum = double;
  static NATTEN_INLINE double read(Element x) { return x; }
  static NATTEN_INLINE Element write(double x) { return x; }
};
struct Float32 {
  using Element = float;
  using Sum = float;
  static NATTEN_INLINE float read(Element x) { return x; }
  static NATTEN_INLINE Element write(float x) { return x; }
};

NATTEN_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t b;
  __builtin_memcpy(&b, &x, sizeof b);
  return b;
}
NATTEN_INLINE float float_of(std::uint32_t b) {
  float x;
  __builtin_memcpy(&x, &b, sizeof x);
  return x;
}

/// As natten::bfloat16, which is not used here because its functions are inline.
struct BFloat16 {
  using Element = std::uint16_t;
  using Sum = float;
  static NATTEN_INLINE float read(Element x) {
    return float_of(static_cast<std::uint32_t>(x) << 16);
  }
  static NATTEN_INLINE Element write(float x) {
    const std::uint32_t b = bits_of(x);
    const std::uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return static_cast<Element>((b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded);
  }
};

/// As natten::float16.
struct Float16 {
  using Element = std::uint16_t;
  using Sum = float;
  static NATTEN_INLINE float read(Element x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000u) << 16;
    const std::uint32_t magnitude = x & 0x7fffu;
    const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
    const std::uint32_t normal =
        (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
    return float_of((magnitude < 0x400u ? bits_of(subnormal) : normal) | sign);
#endif
  }
  static NATTEN_INLINE Element write(float x) {
#if defined(__F16C__)
    return static_cast<Element>(_cvtss_sh(x, 0));
#else
    const std::uint32_t b = bits_of(x);
    const std::uint32_t magnitude = b & 0x7fffffffu;
    const std::uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t normal =
        (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    const std::uint32_t half = magnitude > 0x7f800000u    ? nan
                               : magnitude >= 0x477ff000u ? 0x7c00u
                               : magnitude < 0x38800000u  ? tiny
                                                          : normal;
    return static_cast<Element>(half | ((b >> 16) & 0x8000u));
#endif
  }
};

/// Transposes a square of vectors in place: each round interleaves the halves.
template <class T>
NATTEN_INLINE void transpose(Vector<T> (&rows)[kWidth<T>]) {
  constexpr int kW = kWidth<T>;
  Ints<T> low, high;
  for (int i = 0; i < kW; ++i) {
    low[i] = (i % 2) * kW + i / 2;
    high[i] = (i % 2) * kW + i / 2 + kW / 2;
  }
#pragma GCC unroll 8
  for (int round = 1; round < kW; round *= 2) {
    Vector<T> next[kW];
#pragma GCC unroll 16
    for (int i = 0; i < kW / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kW / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kW / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = next[i];
  }
}

/// Elements of a token that are converted at a time.
template <class T>
constexpr int kPiece = 4 * kWidth<T>;

/// Converts `length` elements, and sets the rest of the piece to 0. Inlined twice: for whole pieces
/// the length is a constant.
template <class Type, class T>
NATTEN_INLINE void convert(const typename Type::Element* from, std::int64_t length, T scale,
                           T* piece) {
  for (std::int64_t i = 0; i < length; ++i) piece[i] = Type::read(from[i]) * scale;
  for (std::int64_t i = length; i < kPiece<T>; ++i) piece[i] = T(0);
}

template <class Type>
void pack(const Packing<typename Type::Sum>& p) {
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  const auto* from = static_cast<const typename Type::Element*>(p.from);
  for (std::int64_t first = 0; first < p.count; first += kW) {
    const int tokens = static_cast<int>(min(kW, p.count - first));
    for (std::int64_t d = 0; d < p.dim; d += kPiece<T>) {
      const std::int64_t length = min(kPiece<T>, p.dim - d);
      T piece[kW][kPiece<T>];
      for (int i = 0; i < kW; ++i) {
        const auto* token = from + (first + (i < tokens ? i : 0)) * p.stride + d;
        // Tokens lie far apart where there are many heads, which hardware does not foresee.
        __builtin_prefetch(token + kW * p.stride);
        __builtin_prefetch(token + kW * p.stride + kPiece<T> / 2);
        if (length == kPiece<T>)
          convert<Type, T>(token, kPiece<T>, p.scale, piece[i]);
        else
          convert<Type, T>(token, length, p.scale, piece[i]);
      }
      if (p.plain)
        for (int i = 0; i < tokens; ++i)
          for (std::int64_t e = 0; e < kPiece<T> && d + e < p.padded; e += kW)
            store(p.plain + (first + i) * p.padded + d + e, load(piece[i] + e));
      if (!p.transposed) continue;
      for (std::int64_t e = 0; e < length; e += kW) {
        Vector<T> square[kW];
        for (int i = 0; i < kW; ++i) square[i] = load(piece[i] + e);
        transpose<T>(square);
        T* to = p.transposed + (d + e) * p.ld + first;
        if (length - e >= kW) {
#pragma GCC unroll 16
          for (int i = 0; i < kW; ++i) store(to + i * p.ld, square[i]);
        } else {
          for (std::int64_t i = 0; i < length - e; ++i) store(to + i * p.ld, square[i]);
        }
      }
    }
  }
}

template <class Type>
void unpack(const typename Type::Sum* from, typename Type::Sum scale, void* to,
            std::int64_t count) {
  auto* out = static_cast<typename Type::Element*>(to);
  for (std::int64_t i = 0; i < count; ++i) out[i] = Type::write(from[i] * scale);
}

template <class T>
constexpr Kernels<T> kernels() {
  return {forward<T>, backward_query<T>, backward_key<T>,
          static_cast<std::size_t>(2 * kBlock * kRow<T>), kWidth<T>};
}

}  // namespace

#define NATTEN_CONCAT(a, b) a##b
#define NATTEN_NAMED(a, b) NATTEN_CONCAT(a, b)
#define NATTEN_TEXT_OF(a) #a
#define NATTEN_TEXT(a) NATTEN_TEXT_OF(a)

extern const InstructionSet NATTEN_NAMED(isa_, NATTEN_ISA);
const InstructionSet NATTEN_NAMED(isa_, NATTEN_ISA) = {
    NATTEN_TEXT(NATTEN_ISA),
    kernels<float>(),
    kernels<double>(),
    {pack<Float64>,
     {nullptr, pack<Float32>, pack<BFloat16>, pack<Float16>},
     unpack<Float64>,
     {nullptr, unpack<Float32>, unpack<BFloat16>, unpack<Float16>}}};

}  // namespace natten::detail::cpu::simd
