#pragma once

#include <cstddef>
#include <cstdint>

/// What the code that is compiled once per instruction set offers to `fused.cpp`: plain structs and
/// a table of functions. Nothing here is inline, so that no code compiled for one instruction set
/// can be merged with that of another.
namespace natten::detail::cpu::simd {

/// Most rows (queries, or keys where keys gather from queries) that a block holds.
inline constexpr int kBlock = 8;
/// Columns that packed lines have to spare at their end: vectors may read past the last column.
inline constexpr int kSpareColumns = 16;

/// The packed tokens of one line of the innermost axis, converted to the type that sums are kept
/// in. Transposed operands are [dim][ld], plain ones [column][padded dim].
template <class T>
struct Line {
  const T* transposed = nullptr;       // of the product that gives scores
  const T* transposed_grad = nullptr;  // of the product that gives gradients of weights
  const T* plain = nullptr;            // what weights multiply
  const T* plain_grad = nullptr;       // what gradients of scores multiply
  const T* bias = nullptr;       // bias of a row at `position` and column c: bias[c - position]
  T* grad_bias = nullptr;        // accumulated, likewise
  const T* logsumexp = nullptr;  // by column, where columns are queries
  const T* row_term = nullptr;   // by column, where columns are queries
};

/// Rows that share their lines of columns but for the interval within a line.
template <class T>
struct Block {
  int rows;  // 1 to kBlock; operands by row have kBlock rows, of which the last may be garbage
  const Line<T>* lines;
  std::int64_t line_count;
  std::int64_t ld;             // of transposed operands
  std::int64_t begin[kBlock];  // the columns that a row sees, the same in each line
  std::int64_t end[kBlock];
  std::int64_t position[kBlock];  // of the row, for the bias
  std::int64_t dim, value_dim;    // summed over in scores and in gradients of weights
  std::int64_t padded, value_padded;
  T* scratch;  // scratch_elements
};

/// Adds a block of columns to the softmax of a block of queries. Start with largest = -inf and
/// total = sums = 0; the result is sums / total, and logsumexp = largest + log(total).
template <class T>
struct Forward {
  Block<T> block;
  const T* query;  // [rows][padded], scaled
  T* sums;         // [rows][value_padded]
  T* largest;      // [rows]
  T* total;        // [rows]
};

/// Gradients from a block of queries. Two steps over the same columns: the first adds up row_term,
/// the sum of P * dP; the second uses it.
template <class T>
struct BackwardQuery {
  Block<T> block;
  const T* query;           // [rows][padded], scaled
  const T* grad_output;     // [rows][value_padded]
  const T* logsumexp;       // [rows]
  T* row_term;              // [rows]
  bool sum_row_term;        // first step
  bool sum_gradients;       // second step; both at once where all columns of the rows are here
  const T* grad_logsumexp;  // [rows], taken off row_term once that is complete; may be null
  T* grad_query;            // [rows][padded], accumulated, lacks the scale
  T* grad_key;              // [columns of the only line][padded], accumulated; null for windows
  T* grad_value;            // likewise [value_padded]
};

/// Gradients of a block of keys, the rows, from the queries that see them, the columns.
template <class T>
struct BackwardKey {
  Block<T> block;
  const T* key;    // [rows][padded]
  const T* value;  // [rows][value_padded]
  T* grad_key;     // [rows][padded], accumulated
  T* grad_value;   // [rows][value_padded], accumulated
};

/// How to pack a line: `count` tokens of `dim` elements, `stride` elements apart.
template <class T>
struct Packing {
  const void* from;
  std::int64_t stride, count, dim;
  T scale;
  T* transposed;  // [dim][ld], or null
  std::int64_t ld;
  T* plain;  // [count][padded], or null; padding is set to 0
  std::int64_t padded;
};

template <class T>
struct Kernels {
  void (*forward)(const Forward<T>&);
  void (*backward_query)(const BackwardQuery<T>&);
  void (*backward_key)(const BackwardKey<T>&);
  std::size_t scratch_elements;  // of Block::scratch
  int width;                     // elements per vector; padded dims are a multiple
};

/// Conversion between tensor elements and sums, per element type in the order of DType.
struct Conversions {
  void (*pack_f64)(const Packing<double>&);
  void (*pack[4])(const Packing<float>&);  // [0] unused
  /// Writes `count` sums, times `scale`.
  void (*store_f64)(const double* from, double scale, void* to, std::int64_t count);
  void (*store[4])(const float* from, float scale, void* to, std::int64_t count);
};

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Conversions convert;
};

}  // namespace natten::detail::cpu::simd
