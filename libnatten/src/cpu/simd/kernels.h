#pragma once

#include <cstddef>
#include <cstdint>

/// What the code that is compiled once per instruction set offers to the engine: plain
/// structs and a table of functions. Nothing here is inline, so that no code compiled for one
/// instruction set can be merged with that of another.
namespace natten::detail::cpu::simd {

/// Most vectors of rows (queries, or keys where keys gather from queries) that a block holds.
inline constexpr int kMostVectors = 3;
/// Most elements of a vector.
inline constexpr int kMostWidth = 16;
/// Most heads whose tokens are packed together.
inline constexpr int kMostHeads = 8;
/// Columns of padding at each end of transposed lines, in vectors: vectors may read past the first
/// and last column.
inline constexpr int kPaddingVectors = kMostVectors;
/// Most steps of a row over columns that are handled at once. It bounds the scratch, and the number
/// of terms that are summed in one go.
inline constexpr int kBatchSteps = 512;
/// Likewise of gradients from queries: with all steps at once these need no second round.
inline constexpr int kMostStepsAtOnce = 1024;
/// Steps of weight 0 before and after those of a line, where vectors are adjacent.
inline constexpr int kPaddingSteps = 3;
/// Most rows of a line, and most columns that each of them sees, of `Stream`.
inline constexpr int kMostStreamRows = 16, kMostStreamColumns = 256;

/// The packed tokens of one line of the innermost axis, converted to the type that sums are kept
/// in. Transposed operands are [dim][ld], plain ones [column][padded dim]. Kernels for pairs read
/// two bfloat16 instead, the first in the low half of an element: dims 2 i and 2 i + 1 in
/// transposed operands, [dim / 2][ld], and a column and the next one in plain ones, [column][padded
/// dim].
template <class T>
struct Line {
  const T* transposed = nullptr;       // of the product that gives scores
  const T* transposed_grad = nullptr;  // of the product that gives gradients of weights
  const T* plain = nullptr;            // what weights multiply
  const T* plain_grad = nullptr;       // what gradients of scores multiply
  const T* bias = nullptr;  // of vector 0, for a row at `position` and column c: bias[c - position]
  T* grad_bias = nullptr;   // accumulated, likewise
  T* grad_key = nullptr;    // accumulated by column: [column][padded]; null: not wanted
  T* grad_value = nullptr;  // likewise [column][value_padded]
  const T* logsumexp = nullptr;  // by column, where columns are queries
  const T* row_term = nullptr;   // by column, where columns are queries
  const T* hidden = nullptr;     // by column, not 0 where a mask hides the key; null: none is
  // Those of the block's vectors that see this line.
  int first_vector = 0, last_vector = kMostVectors;
  // By vector, where this line's weights begin among those of a row; for Weights.
  std::int64_t weights[kMostVectors] = {};
};

/// Some vectors of rows, with the lines of columns that they see. Stacked vectors belong to
/// neighboring lines, at the same place of each, and so see the same columns of a line. Adjacent
/// ones follow each other on one line and all see all lines.
template <class T>
struct Block {
  int vectors;      // 1 to kMostVectors
  bool adjacent;    // else stacked
  bool everywhere;  // rows see all columns of the only line, which is not transposed but plain
  int rows;         // of a stacked vector, or of all adjacent ones
  std::int64_t vector_stride;  // rows from a vector to the next in operands by row
  const Line<T>* lines;
  std::int64_t line_count;
  std::int64_t ld;  // of transposed operands
  // The columns that each of `rows` sees, the same in each line.
  std::int64_t begin[kMostVectors * kMostWidth];
  std::int64_t end[kMostVectors * kMostWidth];
  std::int64_t first_slot[kMostVectors * kMostWidth];  // of the first column, for Weights
  std::int64_t position;        // of row 0, for the bias; rows after it follow
  std::int64_t bias_stride;     // elements from the biases of one stacked vector to the next
  std::int64_t dim, value_dim;  // elements summed over in scores and in gradients of weights
  std::int64_t padded, value_padded;
  T scale;     // of scores of pairs; else it is in an operand
  T* scratch;  // scratch_elements
};

// Rows are given in two layouts: plain [row][padded dim], and transposed per vector,
// [row / width][dim][width].

/// Adds a block of columns to the softmax of a block of queries. Start with largest = -inf and
/// total = sums = 0; the result is sums / total, and logsumexp = largest + log(total).
template <class T>
struct Forward {
  const Block<T>& block;
  const T* query = nullptr;  // transposed, scaled
  T* sums = nullptr;         // [rows][value_padded]
  T* largest = nullptr;      // [rows]
  T* total = nullptr;        // [rows]
};

/// A run of columns that follow each other on a line, read where they lie.
struct StreamLine {
  const void *key, *value;   // of the first column and head, elements of the tensors
  std::int64_t first, last;  // their positions; the last is past them
  const void* bias;          // of the first head, of a column at the row's own position; or null
};

/// As Forward, for few rows of one line and the columns of some heads of all the runs that they
/// see, of which nothing is packed.
template <class T>
struct Stream {
  const StreamLine* lines = nullptr;
  std::int64_t line_count = 0;
  std::int64_t key_stride = 0, value_stride = 0;             // elements from a column to the next
  std::int64_t key_head = 0, value_head = 0, bias_head = 0;  // and from a head to the next
  int heads = 1;                                             // of columns
  int group = 1;                                        // heads of rows that share one of these
  int rows = 0;                                         // of each head
  std::int64_t position = 0;                            // of row 0; the others follow
  const std::int64_t *begin = nullptr, *end = nullptr;  // columns that each of `rows` sees
  std::int64_t dim = 0, value_dim = 0, padded = 0, value_padded = 0;
  std::int64_t head_rows = 0;  // from a head to the next in what follows, all [head][row]
  const T* query = nullptr;    // [padded], scaled
  T* sums = nullptr;           // [value_padded]
  T* largest = nullptr;
  T* total = nullptr;
  T* added = nullptr;   // scratch, [value_padded]
  T* scores = nullptr;  // scratch, [kMostStreamColumns + kMostWidth]
};

/// Gradients from a block of queries. Two rounds over the same columns: the first adds up row_term,
/// the sum of P * dP, and total, the sum of P; the second uses their quotient, from which
/// grad_logsumexp is taken off, as row_term. Start with 0 and with the least normal number, which
/// counts only where a row has no weights. Where the caller asks for the rounds one by one, it
/// makes the quotient between them.
template <class T>
struct BackwardQuery {
  const Block<T>& block;
  const T* query = nullptr;              // transposed, scaled
  const T* grad_output = nullptr;        // transposed
  const T* plain_query = nullptr;        // [rows][padded]; for gradients of columns
  const T* plain_grad_output = nullptr;  // [rows][value_padded]; likewise
  const T* logsumexp = nullptr;          // [rows]
  const T* grad_logsumexp = nullptr;     // [rows]
  T* row_term = nullptr;                 // [rows]
  T* total = nullptr;                    // [rows]
  bool sum_row_term = false;             // first round
  bool sum_gradients = false;  // second round; both at once where all columns of the rows are here
  T* grad_query = nullptr;     // [rows][padded], accumulated, lacks the scale and 1 / total
  // Scratch, [kept_batches][batch_elements]: what the second round needs not compute again.
  T* kept = nullptr;
  std::int64_t kept_batches = 0;
};

/// Gradients of a block of keys, the rows, from the queries that see them, the columns.
template <class T>
struct BackwardKey {
  const Block<T>& block;
  const T* key = nullptr;    // transposed
  const T* value = nullptr;  // transposed
  T* grad_key = nullptr;     // [rows][padded], accumulated
  T* grad_value = nullptr;   // [rows][value_padded], accumulated
};

/// The weights, or scores, of a block, by row: weights[vector * width + row][..], a line's from
/// Line::weights on, for the columns that the row sees. Rows end with a vector of padding.
template <class T>
struct Weights {
  const Block<T>& block;
  T* weights = nullptr;
  std::int64_t stride = 0;         // from a row to the next
  std::int64_t vector_stride = 0;  // and from a vector of rows
  const T* rows = nullptr;         // `score` reads them, transposed
  T hidden_score = 0;              // `score` writes it for hidden keys
  T* sums = nullptr;               // `weigh` adds to them: [rows][padded]
};

/// What the kernels of fused passes do with blocks.
struct StepCount {
  bool at_once = false;          // if they can be, as in BackwardQuery
  std::int64_t batches = 0;      // in which the steps are handled
  std::int64_t visits = 0;       // of vectors at lines
  std::int64_t steps = 0;        // of vectors; each makes a vector of scores
  std::int64_t masked = 0;       // of these, in which some row sees nothing
  std::int64_t sums = 0;         // columns that rows add to their sums
  std::int64_t column_sums = 0;  // rows that columns add to theirs
};

/// How to pack a line: `count` tokens of `dim` elements, `stride` elements apart, of some heads.
/// Operands of a head follow those of the head before it.
template <class T>
struct Packing {
  const void* from = nullptr;  // null: zeros
  std::int64_t stride = 0, count = 0, dim = 0;
  int heads = 1;
  bool continues = false;        // these complete the last pair of tokens that are packed already
  std::int64_t head_stride = 0;  // elements from a head to the next
  const std::uint8_t* seen = nullptr;  // of each token, 0 where it is packed as zeros; null: none
  std::int64_t seen_stride = 0;
  T scale = 1;
  T* transposed = nullptr;  // [dim][ld], or where ld is 0 [count / width][dim][width]; may be null
  std::int64_t ld = 0;
  std::int64_t transposed_stride = 0;  // from a head to the next
  T* plain = nullptr;                  // [count][padded], or null; padding is set to 0
  std::int64_t padded = 0;
  std::int64_t plain_stride = 0;  // from a head to the next
  const Packing* next = nullptr;  // is packed after this and can be fetched meanwhile; may be null
};

/// How to write sums, times a scale, to a line of tokens of some heads.
template <class T>
struct Unpacking {
  const T* from = nullptr;  // [count][padded]
  std::int64_t padded = 0;
  std::int64_t from_stride = 0;  // from a head to the next
  const T* scales = nullptr;     // [count], null for 1
  std::int64_t scales_stride = 0;
  T scale = 1;  // of all
  void* to = nullptr;
  std::int64_t stride = 0, count = 0, dim = 0;  // of tokens
  int heads = 1;
  std::int64_t head_stride = 0;
  bool streams = false;  // past the caches, which cannot hold all that is written
};

template <class T>
struct Kernels {
  void (*forward)(const Forward<T>&);
  void (*stream[4])(const Stream<T>&);  // by DType of the tensors; null where sums are of another
  /// Makes largest logsumexp, and total the factor of sums, for `count` rows; the last vector is
  /// written whole.
  void (*finish)(T* largest, T* total, std::int64_t count);
  void (*backward_query)(const BackwardQuery<T>&);
  void (*backward_key)(const BackwardKey<T>&);
  void (*score)(const Weights<T>&);            // writes weights, as products of rows and columns
  void (*weigh)(const Weights<T>&);            // reads weights, sums up columns (Line::plain)
  void (*count)(const Block<T>&, StepCount&);  // reads no data; adds up
  std::size_t scratch_elements;                // of Block::scratch
  std::size_t batch_elements;                  // of BackwardQuery::kept, for each batch
  int width;                                   // elements per vector; padded dims are a multiple
};

/// Conversion between tensor elements and sums, per element type in the order of DType.
struct Conversions {
  void (*pack_f64)(const Packing<double>&);
  void (*pack[4])(const Packing<float>&);     // [0] unused
  void (*pack_pairs)(const Packing<float>&);  // of bfloat16; null where there are no units for it
  void (*unpack_f64)(const Unpacking<double>&);
  void (*unpack[4])(const Unpacking<float>&);
};

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Conversions convert;
  Kernels<float> pairs;  // of fused passes alone; weights are rounded to bfloat16
};

/// What an instruction set for pairs of bfloat16 has beside that of another.
struct PairKernels {
  Kernels<float> kernels;
  void (*pack)(const Packing<float>&);
};

}  // namespace natten::detail::cpu::simd
