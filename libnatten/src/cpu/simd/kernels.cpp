// Compiled once per instruction set, with NATTEN_ISA naming it and NATTEN_VECTOR_BYTES. Everything
// is in an unnamed namespace and nothing from the standard library or the other headers is used, so
// that the object file shares no inline function with code for other processors.

#include "kernels.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace natten::detail::cpu::simd {
namespace {

// Vectors may be shorter than the processor's, which halves the work on 512 bits where it pays, or
// longer: the compiler then makes each of several.
constexpr int kVectorBytes = NATTEN_VECTOR_BYTES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
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
  return x - Vector<T>{};  // not +, which would make 0 of -0
}
template <class T>
NATTEN_INLINE Ints<T> lanes() {
  Ints<T> v;
  for (int i = 0; i < kWidth<T>; ++i) v[i] = i;
  return v;
}
/// Lanes a[first], b[first], a[first + 1], b[first + 1], ...
template <class T>
NATTEN_INLINE Vector<T> interleave(Vector<T> a, Vector<T> b, int first) {
#if defined(__clang__)
  Vector<T> interleaved;  // makes one instruction of it, as gcc does of the function below
#pragma GCC unroll 8
  for (int i = 0; i < kWidth<T> / 2; ++i) {
    interleaved[2 * i] = a[first + i];
    interleaved[2 * i + 1] = b[first + i];
  }
  return interleaved;
#else
  Ints<T> index;
  for (int i = 0; i < kWidth<T>; ++i) index[i] = (i % 2) * kWidth<T> + i / 2 + first;
  return __builtin_shuffle(a, b, index);
#endif
}
/// Lane l is v[index[l]].
template <class T>
NATTEN_INLINE Vector<T> permute(Vector<T> v, Ints<T> index) {
#if defined(__clang__)
  // It has no such function, and makes an instruction of the loop only if that is in no other loop.
#if defined(__AVX512VL__)
  if constexpr (kVectorBytes == 32) {
    if constexpr (sizeof(T) == 4)
      return _mm256_permutexvar_ps(reinterpret_cast<__m256i>(index), v);
    else
      return _mm256_permutexvar_pd(reinterpret_cast<__m256i>(index), v);
  } else if constexpr (kVectorBytes == 64) {
    if constexpr (sizeof(T) == 4)
      return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), v);
    else
      return _mm512_permutexvar_pd(reinterpret_cast<__m512i>(index), v);
  }
#elif defined(__AVX2__)
  if constexpr (kVectorBytes == 32) {
    if constexpr (sizeof(T) == 8) index = index << 1 | index << 33 | std::int64_t{1} << 32;
    return reinterpret_cast<Vector<T>>(
        _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256i>(index)));
  }
#elif defined(__aarch64__)
  // By bytes.
  if constexpr (sizeof(T) == 4)
    index = index * 0x04040404 + 0x03020100;
  else
    index = index * 0x0808080808080808 + 0x0706050403020100;
  return reinterpret_cast<Vector<T>>(
      vqtbl1q_u8(reinterpret_cast<uint8x16_t>(v), reinterpret_cast<uint8x16_t>(index)));
#endif
  Vector<T> permuted;
#pragma GCC unroll 16
  for (int l = 0; l < kWidth<T>; ++l) permuted[l] = v[index[l]];
  return permuted;
#else
  return __builtin_shuffle(v, index);
#endif
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

constexpr std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t max(std::int64_t a, std::int64_t b) { return a < b ? b : a; }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// ---- exp ----

/// n + magic has a whole number n, of either sign, in its low bits.
template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float log2e = 1.44269504088896341f, magic = 12582912.0f, lowest = -87.0f;
  static constexpr int mantissa = 23;
  static constexpr std::int32_t bias = 127;
  // Of (2^r - 1) / r on |r| <= 1/2, from the highest power down, by interpolation in Chebyshev's
  // points. That leaves an error of 5e-9.
  static constexpr float terms[] = {1.54531629e-4f, 1.33908634e-3f, 9.61808256e-3f,
                                    5.55035711e-2f, 2.40226508e-1f, 6.93147188e-1f};
};
template <>
struct Exp<double> {
  static constexpr double log2e = 1.44269504088896340736, magic = 6755399441055744.0;
  static constexpr double lowest = -708.0;
  static constexpr int mantissa = 52;
  static constexpr std::int64_t bias = 1023;
  // Likewise; an error of 2e-17.
  static constexpr double terms[] = {
      2.5729324177362304e-11, 4.4558179083360645e-10, 7.0548973041554993e-9, 1.0178057087733941e-7,
      1.3215486808705563e-6,  1.5252733841556773e-5,  1.5403530393370733e-4, 1.3333558146406471e-3,
      9.6181291076284795e-3,  5.5504108664821627e-2,  2.4022650695910071e-1, 6.9314718055994531e-1};
};

/// exp(x) for x <= 0 and a little above, to within |x| * 2^-mantissa of itself; 0 below the normal
/// range, NaN for NaN.
template <class T>
NATTEN_INLINE Vector<T> exp(Vector<T> x) {
  using E = Exp<T>;
  // x * log2(e) = n + r
  const Vector<T> shifted = x * E::log2e + E::magic;
  const Vector<T> r = x * E::log2e - (shifted - E::magic);
  Vector<T> sum = broadcast<T>(E::terms[0]);
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof(E::terms) / sizeof(T); ++i) sum = sum * r + E::terms[i];
  sum = sum * r + T(1);
  const Ints<T> exponent = (reinterpret_cast<Ints<T>>(shifted) + E::bias) << E::mantissa;
  return x < E::lowest ? Vector<T>{} : sum * reinterpret_cast<Vector<T>>(exponent);
}

/// log(x) for normal x >= 1, to within some 2^-mantissa, and for 0: Halley's iteration on
/// exp(y) = x.
template <class T>
NATTEN_INLINE Vector<T> log(Vector<T> x) {
  using E = Exp<T>;
  // Taking a mantissa for its own logarithm is off by less than 0.06.
  constexpr T unit = static_cast<T>(std::int64_t{1} << E::mantissa), ln2 = T(1) / E::log2e;
  Vector<T> y =
      (__builtin_convertvector(reinterpret_cast<Ints<T>>(x), Vector<T>) / unit - E::bias) * ln2;
  // Each round cubes the error and divides it by 12.
  for (int round = 0; round < (E::mantissa > 30 ? 3 : 2); ++round) {
    const Vector<T> power = exp<T>(y);
    y += 2 * (x - power) / (x + power);
  }
  return x == 0 ? broadcast<T>(-kInfinity<T>) : y;
}

template <class T>
NATTEN_INLINE T sum_of(Vector<T> v) {
  T sum = v[0];
  for (int i = 1; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}

/// Transposes a square of vectors in place: each round interleaves the halves.
template <class T>
NATTEN_INLINE void transpose(Vector<T> (&rows)[kWidth<T>]) {
  constexpr int kW = kWidth<T>;
#pragma GCC unroll 8
  for (int round = 1; round < kW; round *= 2) {
    Vector<T> next[kW];
#pragma GCC unroll 16
    for (int i = 0; i < kW / 2; ++i) {
      next[2 * i] = interleave<T>(rows[i], rows[i + kW / 2], 0);
      next[2 * i + 1] = interleave<T>(rows[i], rows[i + kW / 2], kW / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = next[i];
  }
}

// ---- products ----

/// Most slots of a row that are handled at once. It bounds the scratch, and the number of terms
/// that are summed in one go.
constexpr int kBatch = 512;
/// Rows of one vector whose products with weights share columns, where vectors are adjacent.
constexpr int kRowGroup = 4;
/// Slots of weight 0 before and after those of a line.
constexpr int kSpareSlots = kRowGroup - 1;
/// Elements of one vector's scores: [slot][row].
template <class T>
constexpr std::int64_t kScores = std::int64_t{kBatch} * kWidth<T>;

/// How a vector of rows reads columns.
enum class Columns {
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
  Ints<T> index;  // of columns that are permuted
  std::int64_t dim;
  std::int64_t out_stride;  // from the products of one vector of rows to those of the next
};

/// out[n][m][row] = <rows of vector n, their columns m>, for vectors from `first` on.
template <class T, Columns kColumns, int N, int M>
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
      if constexpr (kColumns == Columns::following) column = load(columns + m);
      if constexpr (kColumns == Columns::permuted) column = permute<T>(load(columns + m), p.index);
      if constexpr (kColumns == Columns::same) column = broadcast<T>(columns[m * p.next_column]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[n][m] += row[n] * column;
    }
  }
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) store(out + n * p.out_stride + m * kWidth<T>, c[n][m]);
}

/// Calls column_tile with the sizes as template arguments.
template <class T, Columns kColumns, int N, int M = kTileColumns<N>>
NATTEN_INLINE void column_tile_of(int m, const ColumnProducts<T>& p, int first, const T* columns,
                                  T* out) {
  if constexpr (M > 1)
    if (m < M) return column_tile_of<T, kColumns, N, M - 1>(m, p, first, columns, out);
  column_tile<T, kColumns, N, M>(p, first, columns, out);
}

/// The products of vectors first to first + N with `count` columns, in tiles.
template <class T, Columns kColumns, int N = kMostVectors>
void column_tiles(int n, const ColumnProducts<T>& p, int first, const T* columns,
                  std::int64_t count, T* out) {
  if constexpr (N > 1)
    if (n < N) return column_tiles<T, kColumns, N - 1>(n, p, first, columns, count, out);
  while (count > 0) {
    // As even a split as possible: a tile of one column would wait for its own sums.
    const auto m = static_cast<int>(ceil_div(count, ceil_div(count, kTileColumns<N>)));
    column_tile_of<T, kColumns, N>(m, p, first, columns, out);
    columns += m * p.next_column;
    out += m * kWidth<T>;
    count -= m;
  }
}

/// The weights of some entries (sums) for adjacent columns of a line.
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

/// Adds a run's products to the sums of entries kFirst to kLast, or tries other entries.
template <class T, int G, int N, int kFirst = 0, int kLast = G>
NATTEN_INLINE void add_run(const RowProducts<T>& p, const Run<T>& run, const T* weights,
                           const T* plain, Vector<T> (&c)[G][N]) {
  if (run.first == kFirst && run.last == kLast) {
    for (std::int64_t i = 0; i < p.count; ++i, weights += p.next_column, plain += p.padded) {
      Vector<T> weight[G];
#pragma GCC unroll 8
      for (int g = kFirst; g < kLast; ++g) weight[g] = broadcast<T>(weights[g * p.next_entry]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vector<T> column = load(plain + n * kWidth<T>);
#pragma GCC unroll 8
        for (int g = kFirst; g < kLast; ++g) c[g][n] += weight[g] * column;
      }
    }
  } else if constexpr (kLast - kFirst > 1) {
    add_run<T, G, N, kFirst, kLast - 1>(p, run, weights, plain, c);
  } else if constexpr (kFirst + 1 < G) {
    add_run<T, G, N, kFirst + 1, G>(p, run, weights, plain, c);
  }
}

/// The products for N vectors of sums from element `first` on.
template <class T, int G, int N>
void row_tile(const RowProducts<T>& p, std::int64_t first) {
  Vector<T> c[G][N] = {};
  for (int r = 0; r < p.run_count; ++r)
    add_run<T, G, N>(p, p.runs[r], p.weights + p.runs[r].weights,
                     p.runs[r].plain + p.column * p.padded + first, c);
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) {
      T* to = p.sums + g * p.sums_stride + first + n * kWidth<T>;
      store(to, load(to) + c[g][n]);
    }
}
template <class T, int G, int N = kTileVectors<G>>
NATTEN_INLINE void row_tile_of(int n, const RowProducts<T>& p, std::int64_t first) {
  if constexpr (N > 1)
    if (n < N) return row_tile_of<T, G, N - 1>(n, p, first);
  row_tile<T, G, N>(p, first);
}
/// The products for all of the sums' vectors, in tiles.
template <class T, int G = kRowGroup>
void row_tiles(int entries, const RowProducts<T>& p) {
  if constexpr (G > 1)
    if (entries < G) return row_tiles<T, G - 1>(entries, p);
  const std::int64_t vectors = p.padded / kWidth<T>;
  for (std::int64_t d = 0; d < vectors;) {
    const auto n = static_cast<int>(ceil_div(vectors - d, ceil_div(vectors - d, kTileVectors<G>)));
    row_tile_of<T, G>(n, p, d * kWidth<T>);
    d += n;
  }
}

// ---- blocks ----

/// The slots of a block's rows: slot j of row r of vector v is column base(v, r) + j of each line
/// that the vector sees.
template <class T>
struct Slots {
  using Int = typename VectorOf<T>::Int;
  const Block<T>& block;
  Columns columns = Columns::following;
  std::int64_t first;       // column of slot 0 of row 0
  std::int64_t count;       // of slots
  std::int64_t shift = 0;   // columns from one vector to the next
  Ints<T> index{};          // base(v, r) = first + index[r] + v * shift
  std::int64_t bias_first;  // base - position of the row, less bias_index
  Ints<T> bias_index{};
  // Each row sees slots low to high. All rows of a vector see all_low to all_high.
  Int low[kMostVectors][kWidth<T>], high[kMostVectors][kWidth<T>];
  std::int64_t all_low[kMostVectors], all_high[kMostVectors];

  explicit Slots(const Block<T>& b) : block(b) {
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
      columns = b.everywhere ? Columns::same : Columns::permuted;
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
        low[v][l] = 0;  // rows to spare see everything, so that they need no mask
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
  /// Stacked vectors have the same slots.
  NATTEN_INLINE int of(int v) const { return block.adjacent ? v : 0; }
  NATTEN_INLINE bool sees_all(int v, std::int64_t slot) const {
    return slot >= all_low[of(v)] && slot < all_high[of(v)];
  }
  NATTEN_INLINE Ints<T> mask(int v, std::int64_t slot) const {
    Ints<T> lower, upper;
    __builtin_memcpy(&lower, low[of(v)], sizeof lower);
    __builtin_memcpy(&upper, high[of(v)], sizeof upper);
    const auto at = static_cast<Int>(slot);
    return (lower <= at) & (upper > at);
  }
  /// One number per column, read as the rows of a vector read columns.
  NATTEN_INLINE Vector<T> read(const T* from, int v, std::int64_t slot) const {
    const Vector<T> x = load(from + first + v * shift + slot);
    return columns == Columns::permuted ? permute<T>(x, index) : x;
  }
  NATTEN_INLINE std::int64_t bias_at(int v, std::int64_t slot) const {
    return bias_first + slot + v * (block.adjacent ? shift - kWidth<T> : block.bias_stride);
  }
  /// Rows of a vector that are not to spare.
  NATTEN_INLINE int rows_of(int v) const {
    return static_cast<int>(
        min(block.adjacent ? block.rows - v * kWidth<T> : block.rows, kWidth<T>));
  }
};

/// Slots slot0 to slot1 of some lines, stored [line][slot] with spare slots around those of a line
/// where vectors are adjacent.
struct Batch {
  std::int64_t line0, line1, slot0, slot1, spare;
  NATTEN_INLINE std::int64_t per_line() const { return slot1 - slot0 + 2 * spare; }
  /// Where the products with slot 0 of a line would be.
  NATTEN_INLINE std::int64_t at(std::int64_t line) const {
    return (line - line0) * per_line() + spare - slot0;
  }
};

/// Visits all slots of a block in batches that fit the scratch.
template <class T, class F>
NATTEN_INLINE void for_each_batch(const Slots<T>& slots, F&& f) {
  const std::int64_t spare = slots.block.adjacent ? kSpareSlots : 0;
  const std::int64_t slot_step = min(slots.count, kBatch - 2 * spare);
  const std::int64_t line_step = kBatch / (slot_step + 2 * spare);
  for (std::int64_t line = 0; line < slots.block.line_count; line += line_step)
    for (std::int64_t slot = 0; slot < slots.count; slot += slot_step)
      f(Batch{line, min(line + line_step, slots.block.line_count), slot,
              min(slot + slot_step, slots.count), spare});
}

/// out[v][slot][r] = <row r of vector v, its column of the slot>.
template <class T, Columns kColumns>
void column_products(const Slots<T>& slots, const Batch& batch, const T* rows,
                     const T* Line<T>::*operand, std::int64_t dim, std::int64_t padded, T* out) {
  const Block<T>& block = slots.block;
  constexpr bool kTransposed = kColumns != Columns::same;
  ColumnProducts<T> p;
  p.rows = rows;
  p.row_stride = block.vector_stride * dim;
  p.next_column = kTransposed ? 1 : padded;
  p.next_dim = kTransposed ? block.ld : 1;
  p.index = slots.index;
  p.dim = dim;
  p.out_stride = kScores<T> - slots.shift * kWidth<T>;
  const std::int64_t count = batch.slot1 - batch.slot0, shift = slots.shift;
  const std::int64_t span = count + (block.vectors - 1) * shift;
  for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
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
      const std::int64_t slot = batch.slot0 + at;
      column_tiles<T, kColumns>(v1 - v0, p, v0,
                                line.*operand + (slots.first + slot) * p.next_column, end - at,
                                out + v0 * p.out_stride + (batch.at(l) + slot) * kWidth<T>);
      at = end;
    }
  }
}
template <class T>
NATTEN_INLINE void column_products(const Slots<T>& slots, const Batch& batch, const T* rows,
                                   const T* Line<T>::*operand, std::int64_t dim,
                                   std::int64_t padded, T* out) {
  const auto products = slots.columns == Columns::following ? column_products<T, Columns::following>
                        : slots.columns == Columns::permuted ? column_products<T, Columns::permuted>
                                                             : column_products<T, Columns::same>;
  products(slots, batch, rows, operand, dim, padded, out);
}

/// sums[row] += sum over the batch's columns of weights * operand[column].
template <class T>
void row_products(const Slots<T>& slots, const Batch& batch, const T* weights,
                  const T* Line<T>::*operand, std::int64_t padded, T* sums) {
  constexpr int kW = kWidth<T>;
  const Block<T>& block = slots.block;
  Run<T> runs[kBatch];
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
    // Slots low to high of the row.
    if (low >= high) return;
    p.column = slots.base(v, row) + low;
    p.count = high - low;
    p.weights = weights + v * kScores<T> + low * kW + row;
    p.sums = sums + (v * block.vector_stride + row) * padded;
    row_tiles<T>(entries, p);
  };
  if (!block.adjacent) {
    p.next_entry = kScores<T>;
    p.sums_stride = block.vector_stride * padded;
    for (int row = 0; row < block.rows; ++row)
      add(block.vectors, 0, row, max(slots.low[0][row], batch.slot0),
          min(slots.high[0][row], batch.slot1));
    return;
  }
  // The slot of the same column is one less for the next row, or the same.
  const std::int64_t step = slots.shift ? 1 : 0;
  p.next_entry = 1 - step * kW;
  p.sums_stride = padded;
  for (int v = 0; v < block.vectors; ++v)
    for (int row = 0; row < slots.rows_of(v); row += kRowGroup) {
      const auto entries = static_cast<int>(min(kRowGroup, slots.rows_of(v) - row));
      std::int64_t low = batch.slot1, high = batch.slot0;
      for (int g = 0; g < entries; ++g) {
        const std::int64_t from = max(slots.low[v][row + g], batch.slot0);
        const std::int64_t to = min(slots.high[v][row + g], batch.slot1);
        if (from >= to) continue;  // its columns may not even be packed
        low = min(low, from + g * step);
        high = max(high, to + g * step);
      }
      for (int r = 0; r < run_count; ++r) {
        runs[r].first = 0;
        runs[r].last = entries;
      }
      add(entries, v, row, low, high);
    }
}

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

/// Visits a batch's slots of one vector: `f(offset, line, slot)`.
template <class T, class F>
NATTEN_INLINE void for_each_slot(const Slots<T>& slots, const Batch& batch, int v, F&& f) {
  for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
    const Line<T>& line = slots.block.lines[l];
    if (v < line.first_vector || v >= line.last_vector) continue;
    std::int64_t offset = (batch.at(l) + batch.slot0) * kWidth<T>;
    for (std::int64_t slot = batch.slot0; slot < batch.slot1; ++slot, offset += kWidth<T>)
      f(offset, line, slot);
  }
}

/// Sets the weights of spare slots to 0.
template <class T>
NATTEN_INLINE void clear_spare_slots(const Batch& batch, T* weights) {
  for (std::int64_t l = batch.line0; l < batch.line1; ++l)
    for (std::int64_t i = 1; i <= batch.spare; ++i) {
      store(weights + (batch.at(l) + batch.slot0 - i) * kWidth<T>, Vector<T>{});
      store(weights + (batch.at(l) + batch.slot1 - 1 + i) * kWidth<T>, Vector<T>{});
    }
}

/// Calls f<true> where the products of a vector's batch are its scores as they are: without biases,
/// and with nothing that a row does not see.
template <class T, class F>
NATTEN_INLINE void with_kind_of_scores(const Slots<T>& slots, const Batch& batch, int v, F&& f) {
  if (!slots.block.lines->bias && slots.sees_all(v, batch.slot0) &&
      slots.sees_all(v, batch.slot1 - 1))
    f(True{});
  else
    f(False{});
}

/// The score of a slot: adds the bias, and sets what a row does not see to -inf.
template <bool kPlain, class T>
NATTEN_INLINE Vector<T> finish_score(const Slots<T>& slots, const Line<T>& line, int v,
                                     std::int64_t slot, Vector<T> score) {
  if constexpr (kPlain) return score;
  if (line.bias) {
    const T* bias = line.bias + slots.bias_at(v, slot);
    score += slots.columns == Columns::permuted ? permute<T>(load(bias), slots.bias_index)
                                                : broadcast<T>(*bias);
  }
  if (!slots.sees_all(v, slot)) score = slots.mask(v, slot) ? score : broadcast<T>(-kInfinity<T>);
  return score;
}

template <class T>
void forward(const Forward<T>& f) {
  constexpr int kW = kWidth<T>;
  const Block<T>& block = f.block;
  const Slots<T> slots(block);
  for_each_batch(slots, [&](const Batch& batch) {
    column_products(slots, batch, f.query, &Line<T>::transposed, block.dim, block.padded,
                    block.scratch);
    for (int v = 0; v < block.vectors; ++v) {
      T* scores = block.scratch + v * kScores<T>;
      const std::int64_t first_row = v * block.vector_stride;
      const Vector<T> before = load(f.largest + first_row);
      Vector<T> largest = before;
      with_kind_of_scores(slots, batch, v, [&](auto plain) {
        for_each_slot(slots, batch, v,
                      [&](std::int64_t offset, const Line<T>& line, std::int64_t slot) {
                        const Vector<T> score =
                            finish_score<plain.value>(slots, line, v, slot, load(scores + offset));
                        if (!plain.value) store(scores + offset, score);
                        largest = score > largest ? score : largest;
                      });
      });
      // Where a row sees nothing yet all weights are 0, not exp(-inf + inf).
      const Vector<T> reference = largest == -kInfinity<T> ? Vector<T>{} : largest;
      Vector<T> total{};
      for_each_slot(slots, batch, v, [&](std::int64_t offset, const Line<T>&, std::int64_t) {
        const Vector<T> weight = exp<T>(load(scores + offset) - reference);
        store(scores + offset, weight);
        total += weight;
      });
      clear_spare_slots(batch, scores);
      const Vector<T> shrink = exp<T>(before - reference);
      store(f.total + first_row, load(f.total + first_row) * shrink + total);
      store(f.largest + first_row, largest);
      for (int row = 0; row < slots.rows_of(v); ++row) {
        if (before[row] == -kInfinity<T> || before[row] == largest[row]) continue;
        T* sums = f.sums + (first_row + row) * block.value_padded;
        for (std::int64_t d = 0; d < block.value_padded; d += kW)
          store(sums + d, load(sums + d) * shrink[row]);
      }
    }
    row_products(slots, batch, block.scratch, &Line<T>::plain, block.value_padded, f.sums);
  });
}

template <class T>
void finish(T* largest, T* total, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kWidth<T>) {
    const Vector<T> sum = load(total + i);
    store(largest + i, load(largest + i) + log<T>(sum));
    // A row whose scores all are -inf has no weights to divide.
    store(total + i, sum == 0 ? Vector<T>{} : 1 / sum);
  }
}

/// Adds the gradients that rows give to columns, which all rows see.
template <class T>
NATTEN_INLINE void add_to_columns(const Slots<T>& slots, const Batch& batch, int v,
                                  const T* weights, const T* plain, std::int64_t padded, T* sums) {
  const Run<T> run = {plain + v * slots.block.vector_stride * padded, 0, 0, 0};
  for (std::int64_t slot = batch.slot0; slot < batch.slot1; slot += kRowGroup) {
    const auto entries = static_cast<int>(min(kRowGroup, batch.slot1 - slot));
    Run<T> all = run;
    all.last = entries;
    row_tiles<T>(entries, {&all, 1, 0, slots.rows_of(v),
                           weights + v * kScores<T> + (batch.at(0) + slot) * kWidth<T>, kWidth<T>,
                           1, padded, sums + slot * padded, padded});
  }
}

/// Adds gradients of scores to those of the biases.
template <class T>
NATTEN_INLINE void add_to_bias(const Slots<T>& slots, const Batch& batch, int v, const T* grads) {
  for_each_slot(slots, batch, v, [&](std::int64_t offset, const Line<T>& line, std::int64_t slot) {
    T* to = line.grad_bias + slots.bias_at(v, slot);
    const T* from = grads + offset;
    const int rows = slots.rows_of(v);
    if (slots.columns == Columns::permuted)
      for (int row = 0; row < rows; ++row) to[slots.bias_index[row]] += from[row];
    else if (rows == kWidth<T>)
      *to += sum_of<T>(load(from));
    else
      for (int row = 0; row < rows; ++row) *to += from[row];
  });
}

template <class T>
void backward_query(const BackwardQuery<T>& f) {
  const Block<T>& block = f.block;
  const Slots<T> slots(block);
  T* weights = block.scratch;
  T* grads = weights + kMostVectors * kScores<T>;
  // Both steps at once need all slots in one batch.
  int batches = 0;
  for_each_batch(slots, [&](const Batch&) { ++batches; });
  const bool at_once = f.sum_row_term && f.sum_gradients && batches == 1;
  // The weights of a row sum up to 1 only as well as its logsumexp is rounded, which is the worse
  // the larger scores are. With the quotient the gradients of a row's scores still sum up to 0.
  const auto finish_row_term = [&](int v) {
    const std::int64_t row = v * block.vector_stride;
    store(f.row_term + row,
          load(f.row_term + row) / load(f.total + row) - load(f.grad_logsumexp + row));
  };
  for (int step = 0; step < 2; ++step) {
    const bool sums_row_term = step == 0 && f.sum_row_term;
    const bool sums_gradients = step == 0 ? at_once : f.sum_gradients && !at_once;
    if (!sums_row_term && !sums_gradients) continue;
    for_each_batch(slots, [&](const Batch& batch) {
      column_products(slots, batch, f.query, &Line<T>::transposed, block.dim, block.padded,
                      weights);
      column_products(slots, batch, f.grad_output, &Line<T>::transposed_grad, block.value_dim,
                      block.value_padded, grads);
      for (int v = 0; v < block.vectors; ++v) {
        T* w = weights + v * kScores<T>;
        T* g = grads + v * kScores<T>;
        const std::int64_t first_row = v * block.vector_stride;
        const Vector<T> logsumexp = load(f.logsumexp + first_row);
        Vector<T> sum{}, total{};
        with_kind_of_scores(slots, batch, v, [&](auto plain) {
          for_each_slot(
              slots, batch, v, [&](std::int64_t offset, const Line<T>& line, std::int64_t slot) {
                const Vector<T> weight = exp<T>(
                    finish_score<plain.value>(slots, line, v, slot, load(w + offset)) - logsumexp);
                store(w + offset, weight);
                Vector<T> grad = load(g + offset);
                if (!plain.value && !slots.sees_all(v, slot)) {
                  grad = slots.mask(v, slot) ? grad : Vector<T>{};
                  store(g + offset, grad);
                }
                sum += weight * grad;
                total += weight;
              });
        });
        if (sums_row_term) {
          store(f.row_term + first_row, load(f.row_term + first_row) + sum);
          store(f.total + first_row, load(f.total + first_row) + total);
        }
        if (at_once) finish_row_term(v);
        if (!sums_gradients) continue;
        const Vector<T> row_term = load(f.row_term + first_row);
        for_each_slot(slots, batch, v, [&](std::int64_t offset, const Line<T>&, std::int64_t) {
          store(g + offset, load(w + offset) * (load(g + offset) - row_term));
        });
        clear_spare_slots(batch, g);
        if (block.lines->grad_bias) add_to_bias(slots, batch, v, g);
        if (!f.grad_key) continue;
        add_to_columns(slots, batch, v, grads, f.plain_query, block.padded, f.grad_key);
        add_to_columns(slots, batch, v, weights, f.plain_grad_output, block.value_padded,
                       f.grad_value);
      }
      if (sums_gradients)
        row_products(slots, batch, grads, &Line<T>::plain_grad, block.padded, f.grad_query);
    });
    if (step == 0 && f.sum_gradients && !at_once)
      for (int v = 0; v < block.vectors; ++v) finish_row_term(v);
  }
}

template <class T>
void backward_key(const BackwardKey<T>& f) {
  const Block<T>& block = f.block;
  const Slots<T> slots(block);
  T* weights = block.scratch;
  T* grads = weights + kMostVectors * kScores<T>;
  for_each_batch(slots, [&](const Batch& batch) {
    column_products(slots, batch, f.key, &Line<T>::transposed, block.dim, block.padded, weights);
    column_products(slots, batch, f.value, &Line<T>::transposed_grad, block.value_dim,
                    block.value_padded, grads);
    for (int v = 0; v < block.vectors; ++v) {
      T* w = weights + v * kScores<T>;
      T* g = grads + v * kScores<T>;
      with_kind_of_scores(slots, batch, v, [&](auto plain) {
        for_each_slot(
            slots, batch, v, [&](std::int64_t offset, const Line<T>& line, std::int64_t slot) {
              const Vector<T> score =
                  finish_score<plain.value>(slots, line, v, slot, load(w + offset));
              Vector<T> weight = exp<T>(score - slots.read(line.logsumexp, v, slot));
              Vector<T> grad = weight * (load(g + offset) - slots.read(line.row_term, v, slot));
              if (!plain.value && !slots.sees_all(v, slot)) {
                const Ints<T> mask = slots.mask(v, slot);
                weight = mask ? weight : Vector<T>{};
                grad = mask ? grad : Vector<T>{};
              }
              store(w + offset, weight);
              store(g + offset, grad);
            });
      });
      clear_spare_slots(batch, w);
      clear_spare_slots(batch, g);
    }
    row_products(slots, batch, weights, &Line<T>::plain, block.value_padded, f.grad_value);
    row_products(slots, batch, grads, &Line<T>::plain_grad, block.padded, f.grad_key);
  });
}

// ---- the unfused operations ----

/// Copies a batch's weights between the scratch, [slot][row], and Weights, [row][slot].
template <bool kToScratch, class T>
NATTEN_INLINE void copy_weights(const Slots<T>& slots, const Batch& batch, const Weights<T>& w) {
  constexpr int kW = kWidth<T>;
  for (int v = 0; v < slots.block.vectors; ++v) {
    const bool by_square =
        slots.all_low[slots.of(v)] == 0 && slots.all_high[slots.of(v)] == slots.count;
    for (std::int64_t l = batch.line0; l < batch.line1; ++l) {
      const Line<T>& line = slots.block.lines[l];
      if (v < line.first_vector || v >= line.last_vector) continue;
      T* in_scratch = w.block.scratch + v * kScores<T> + batch.at(l) * kW;
      T* by_row = w.weights + v * kW * w.stride + line.weights[v];
      if (by_square) {
        for (std::int64_t slot = batch.slot0; slot < batch.slot1; slot += kW) {
          const std::int64_t count = min(kW, batch.slot1 - slot);
          Vector<T> square[kW];
          if constexpr (kToScratch) {
            for (int i = 0; i < kW; ++i) square[i] = load(by_row + i * w.stride + slot);
            transpose<T>(square);
            for (int i = 0; i < count; ++i) store(in_scratch + (slot + i) * kW, square[i]);
          } else {
            for (int i = 0; i < kW; ++i)
              square[i] = load(in_scratch + (slot + min(i, count - 1)) * kW);
            transpose<T>(square);
            const Ints<T> in_range = lanes<T>() < static_cast<typename VectorOf<T>::Int>(count);
            for (int i = 0; i < kW; ++i) {
              T* to = by_row + i * w.stride + slot;
              store(to, in_range ? square[i] : load(to));
            }
          }
        }
        continue;
      }
      for (int row = 0; row < slots.rows_of(v); ++row, by_row += w.stride) {
        const std::int64_t low = slots.low[slots.of(v)][row];
        const std::int64_t end = min(slots.high[slots.of(v)][row], batch.slot1);
        for (std::int64_t slot = max(low, batch.slot0); slot < end; ++slot) {
          T& weight = in_scratch[slot * kW + row];
          if constexpr (kToScratch)
            weight = by_row[slot - low];
          else
            by_row[slot - low] = weight;
        }
      }
    }
  }
}

template <class T>
void score(const Weights<T>& w) {
  const Slots<T> slots(w.block);
  for_each_batch(slots, [&](const Batch& batch) {
    T* scores = w.block.scratch;
    column_products(slots, batch, w.rows, &Line<T>::transposed, w.block.dim, w.block.padded,
                    scores);
    if (w.block.lines->bias)
      for (int v = 0; v < w.block.vectors; ++v)
        for_each_slot(slots, batch, v,
                      [&](std::int64_t offset, const Line<T>& line, std::int64_t slot) {
                        T* at = scores + v * kScores<T> + offset;
                        store(at, finish_score<false>(slots, line, v, slot, load(at)));
                      });
    copy_weights<false>(slots, batch, w);
  });
}

template <class T>
void weigh(const Weights<T>& w) {
  const Slots<T> slots(w.block);
  for_each_batch(slots, [&](const Batch& batch) {
    // Rows of a vector share columns that not all of them see.
    if (w.block.adjacent)
      for (int v = 0; v < w.block.vectors; ++v)
        for (std::int64_t i = 0; i < (batch.line1 - batch.line0) * batch.per_line(); ++i)
          store(w.block.scratch + v * kScores<T> + i * kWidth<T>, Vector<T>{});
    copy_weights<true>(slots, batch, w);
    row_products(slots, batch, w.block.scratch, &Line<T>::plain, w.block.padded, w.sums);
  });
}

// ---- conversion ----

// Element types, by vectors of as many elements as sums fit one.

template <class T>
struct Same {
  using Element = T;
  using Sum = T;
  static NATTEN_INLINE Vector<T> read(const T* from) { return load(from); }
  static NATTEN_INLINE void write(T* to, Vector<T> v) { store(to, v); }
};

typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

NATTEN_INLINE Halves load_halves(const std::uint16_t* from) {
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
NATTEN_INLINE void store_halves(std::uint16_t* to, Halves v) { __builtin_memcpy(to, &v, sizeof v); }

/// As natten::bfloat16, which is not used here because its functions are inline.
struct BFloat16 {
  using Element = std::uint16_t;
  using Sum = float;
  static NATTEN_INLINE Vector<float> read(const Element* from) {
    return reinterpret_cast<Vector<float>>(__builtin_convertvector(load_halves(from), Bits) << 16);
  }
  static NATTEN_INLINE void write(Element* to, Vector<float> v) {
    const Bits b = reinterpret_cast<Bits>(v);
    const Bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const Bits half = (b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded;
    store_halves(to, __builtin_convertvector(half, Halves));
  }
};

/// As natten::float16.
struct Float16 {
  using Element = std::uint16_t;
  using Sum = float;
  static NATTEN_INLINE Vector<float> read(const Element* from) {
#if defined(__F16C__)
    float sums[kWidth<float>];
    for (int i = 0; i < kWidth<float>; i += 8)
      _mm256_storeu_ps(
          sums + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    return load(sums);
#else
    const Bits x = __builtin_convertvector(load_halves(from), Bits);
    const Bits sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    const Vector<float> subnormal =
        __builtin_convertvector(reinterpret_cast<Ints<float>>(magnitude), Vector<float>) * 0x1p-24f;
    const Bits normal =
        (magnitude << 13) + (magnitude >= 0x7c00u ? Bits{} + 0x70000000u : Bits{} + 0x38000000u);
    return reinterpret_cast<Vector<float>>(
        (magnitude < 0x400u ? reinterpret_cast<Bits>(subnormal) : normal) | sign);
#endif
  }
  static NATTEN_INLINE void write(Element* to, Vector<float> v) {
#if defined(__F16C__)
    float sums[kWidth<float>];
    store(sums, v);
    for (int i = 0; i < kWidth<float>; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(sums + i), 0));
#else
    const Bits b = reinterpret_cast<Bits>(v);
    const Bits magnitude = b & 0x7fffffffu;
    const Bits tiny =
        reinterpret_cast<Bits>(reinterpret_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
    const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    Bits half = magnitude < 0x38800000u ? tiny : normal;
    half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? nan : half;
    store_halves(to, __builtin_convertvector(half | ((b >> 16) & 0x8000u), Halves));
#endif
  }
};

/// Elements of a token that are converted at a time.
template <class T>
constexpr int kPiece = 256 / static_cast<int>(sizeof(T));

/// Converts `length` elements, and sets the rest of the last vector to 0. Inlined twice: for whole
/// pieces the length is a constant.
template <class Type, class T>
NATTEN_INLINE void convert(const typename Type::Element* from, std::int64_t length, T scale,
                           T* piece) {
  std::int64_t i = 0;
  for (; i + kWidth<T> <= length; i += kWidth<T>) store(piece + i, Type::read(from + i) * scale);
  if (i == length) return;
  typename Type::Element rest[kWidth<T>] = {};
  for (std::int64_t k = 0; k < length - i; ++k) rest[k] = from[i + k];
  store(piece + i, Type::read(rest) * scale);
}

/// Transposes elements d to d + length of some tokens from `first` on.
template <class T>
NATTEN_INLINE void spread(const Packing<T>& p, int head, std::int64_t first, std::int64_t d,
                          std::int64_t length, const T* const (&tokens)[kWidth<T>]) {
  constexpr int kW = kWidth<T>;
  for (std::int64_t e = 0; e < length; e += kW) {
    Vector<T> square[kW];
    for (int i = 0; i < kW; ++i) square[i] = load(tokens[i] + e);
    transpose<T>(square);
    const std::int64_t ld = p.ld ? p.ld : kW;
    T* to =
        p.transposed + head * p.transposed_stride + (p.ld ? first : first * p.dim) + (d + e) * ld;
    if (length - e >= kW) {
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) store(to + i * ld, square[i]);
    } else {
      for (std::int64_t i = 0; i < length - e; ++i) store(to + i * ld, square[i]);
    }
  }
}

/// Bytes of a cache line.
constexpr std::int64_t kLine = 64;
/// How many tokens before it is packed a token is fetched, to the L2 cache: in the L1 cache those
/// of one head displace each other.
constexpr std::int64_t kAhead = 16;

/// Fetches a token of those that follow.
template <class Element, class T>
NATTEN_INLINE void fetch(const Packing<T>& first, std::int64_t index) {
  const Packing<T>* p = &first;
  while (index >= p->count) {
    index -= p->count;
    p = p->next;
    if (!p) return;
  }
  const auto* token = static_cast<const Element*>(p->from) + index * p->stride;
  for (int head = 0; head < p->heads; ++head, token += p->head_stride)
    for (std::int64_t d = 0; d < p->dim; d += kLine / static_cast<std::int64_t>(sizeof(Element)))
      __builtin_prefetch(token + d, 0, 1);
}

template <class Type>
void pack(const Packing<typename Type::Sum>& p) {
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  const auto* from = static_cast<const typename Type::Element*>(p.from);
  for (std::int64_t first = 0; first < p.count; first += kW) {
    const int count = static_cast<int>(min(kW, p.count - first));
    for (std::int64_t d = 0; d < p.dim; d += kPiece<T>) {
      const std::int64_t length = min(kPiece<T>, p.dim - d);
      T pieces[kMostHeads][kW][kPiece<T>];
      const T* converted[kMostHeads][kW];
      // In the order of memory, where heads of a token follow each other. What a square has to
      // spare is the first token.
      for (int i = 0; i < (p.transposed ? kW : count); ++i) {
        const auto* token = from + (first + (i < count ? i : 0)) * p.stride + d;
        if (d == 0) fetch<typename Type::Element>(p, first + i + kAhead);
        for (int head = 0; head < p.heads; ++head, token += p.head_stride) {
          T* to = p.plain && i < count
                      ? p.plain + head * p.plain_stride + (first + i) * p.padded + d
                      : pieces[head][i];
          converted[head][i] = to;
          if (length == kPiece<T>)
            convert<Type, T>(token, kPiece<T>, p.scale, to);
          else
            convert<Type, T>(token, length, p.scale, to);
        }
      }
      for (int head = 0; head < p.heads && p.transposed; ++head)
        spread(p, head, first, d, length, converted[head]);
    }
  }
}

template <class Type>
void unpack(const Unpacking<typename Type::Sum>& u) {
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  auto* token = static_cast<typename Type::Element*>(u.to);
  for (std::int64_t r = 0; r < u.count; ++r, token += u.stride) {
    auto* to = token;
    for (int head = 0; head < u.heads; ++head, to += u.head_stride) {
      const T* from = u.from + head * u.from_stride + r * u.padded;
      const T scale = u.scales ? u.scale * u.scales[head * u.scales_stride + r] : u.scale;
      std::int64_t i = 0;
      for (; i + kW <= u.dim; i += kW) Type::write(to + i, load(from + i) * scale);
      if (i == u.dim) continue;
      typename Type::Element rest[kW];
      Type::write(rest, load(from + i) * scale);
      for (std::int64_t k = 0; k < u.dim - i; ++k) to[i + k] = rest[k];
    }
  }
}

template <class T>
constexpr Kernels<T> kernels() {
  return {forward<T>,
          finish<T>,
          backward_query<T>,
          backward_key<T>,
          score<T>,
          weigh<T>,
          static_cast<std::size_t>(2 * kMostVectors * kScores<T>),
          kWidth<T>};
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
    {pack<Same<double>>,
     {nullptr, pack<Same<float>>, pack<BFloat16>, pack<Float16>},
     unpack<Same<double>>,
     {nullptr, unpack<Same<float>>, unpack<BFloat16>, unpack<Float16>}}};

}  // namespace natten::detail::cpu::simd
