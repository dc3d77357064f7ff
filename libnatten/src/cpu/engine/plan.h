#pragma once

#include <natten/problem.h>
#include <natten/tuner.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../../dispatch.h"
#include "../../operand.h"
#include "../isa.h"
#include "../most_columns.h"

/// What is cut into what: a pass into units of items, an item into lines of rows, and the columns
/// that these see into lines and pieces.
namespace natten::detail::cpu::engine {

/// The engine's runs over rows and columns, each for one kind of result. In each, rows gather from
/// the columns that they see. Rows are queries and columns keys, but for the gradients of keys and
/// values and for av_transpose, where rows are keys and columns the queries that see them.
enum class PassKind { forward, backward_query, backward_key, qk, av, av_transpose };

inline bool rows_are_keys(PassKind kind) {
  return kind == PassKind::backward_key || kind == PassKind::av_transpose;
}
inline bool is_fused(PassKind kind) { return kind < PassKind::qk; }
/// Whether rows write or read weights by slot.
inline bool rows_have_slots(PassKind kind) { return kind == PassKind::qk || kind == PassKind::av; }

/// The pass that an operation begins with.
PassKind first_pass(Op);

/// Additional tokens that are packed at a time.
inline constexpr std::int64_t kAdditionalPiece = 4096;
/// Most weights of a row, of the unfused operations.
inline constexpr std::int64_t kMostWeights = 4096;
/// Elements around a table of biases that vectors may touch.
inline constexpr std::int64_t kBiasPadding = 64;

/// Multiply-adds, below which waking other threads takes longer than they save: some 30 us of work.
inline constexpr double kLeastSharedWork = 1 << 19;
/// Of a call, roughly.
double multiply_adds(const Problem&);
/// In which a byte takes as long to pack.
inline constexpr double kPackedByte = 6;

inline std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline std::int64_t bias_count(const Problem& p) { return volume(relative_positions(p)); }
/// Of a head's table of biases, with its padding.
inline std::int64_t bias_elements(const Problem& p) { return bias_count(p) + 2 * kBiasPadding; }

/// The rows of a pass, and what they see along each axis.
struct RowGrid {
  Problem problem;
  PassKind kind;

  std::int64_t heads() const { return rows_are_keys(kind) ? problem.kv_heads : problem.heads; }
  /// Rows that are given, and the first of them.
  std::int64_t row_length(int axis) const {
    const Axis& a = problem.axes[axis];
    return rows_are_keys(kind) ? a.key_length : a.query_length;
  }
  std::int64_t row_offset(int axis) const {
    const Axis& a = problem.axes[axis];
    return rows_are_keys(kind) ? a.key_offset : a.query_offset;
  }
  /// Columns that are given.
  std::int64_t column_length(int axis) const {
    const Axis& a = problem.axes[axis];
    return rows_are_keys(kind) ? a.query_length : a.key_length;
  }
  /// The number of a column among them; -1 where it is not.
  std::int64_t column_index(int axis, std::int64_t token) const {
    const Axis& a = problem.axes[axis];
    return rows_are_keys(kind) ? query_index(a, token) : key_index(a, token);
  }
  bool is_circular(int axis) const { return problem.axes[axis].boundary == Boundary::circular; }
  /// Positions after which a circular axis begins again; of other axes more than there are.
  std::int64_t turn(int axis) const {
    const Axis& a = problem.axes[axis];
    return is_circular(axis) ? a.grid_length / a.dilation
                             : std::numeric_limits<std::int64_t>::max();
  }
  /// Dilation groups that have rows, and the one that is number `i` of them.
  std::int64_t groups(int axis) const {
    return std::min(problem.axes[axis].dilation, row_length(axis));
  }
  std::int64_t group(int axis, std::int64_t i) const {
    return group_of(problem.axes[axis], row_offset(axis) + i);
  }
  Interval columns(int axis, std::int64_t group, std::int64_t position) const {
    return columns_of(problem.axes[axis], rows_are_keys(kind), group, position);
  }
  /// Positions of the rows of a dilation group, and how many the longest has.
  Interval rows(int axis, std::int64_t group) const {
    return rows_of(problem.axes[axis], rows_are_keys(kind), group);
  }
  std::int64_t most_rows(int axis) const {
    const std::int64_t dilation = problem.axes[axis].dilation;
    return (row_length(axis) + dilation - 1) / dilation;
  }
  std::int64_t most_columns(int axis, std::int64_t run) const {
    return cpu::most_columns(problem.axes[axis], rows_are_keys(kind), run);
  }
};

/// What is packed of a column, in elements; 0 where a pass has no such operand. See simd::Line.
struct ColumnShape {
  std::int64_t transposed = 0;       // not padded
  std::int64_t transposed_grad = 0;  // likewise
  std::int64_t plain = 0;            // padded
  std::int64_t plain_grad = 0;       // likewise
  bool statistics = false;           // logsumexp and row term
  bool hidden = false;               // whether a mask hides it
  std::int64_t grad_key = 0;         // sums of its gradients if these are wanted, padded
  std::int64_t grad_value = 0;       // likewise
};

/// Sums over queries that several items contribute to, those of biases and additional tokens, go
/// through one partial sum per unit. How many units there are does not depend on threads, and is
/// bounded by the memory that they take. Gradients of so many additional tokens that they would
/// leave few units have none: those tokens gather from the queries, as keys do. Biases may leave
/// few.
struct PartialSums {
  std::int64_t bias = 0;        // elements of a table of biases, with its padding
  std::int64_t additional = 0;  // elements of the additional tokens' gradients
  std::int64_t elements() const { return bias + additional; }
};

/// Where weights of blocks of queries and their gradients stay between two visits of the columns,
/// in batches of simd::BackwardQuery::kept. As many as memory is spent on; the rest is computed
/// again.
struct KeptBatches {
  std::int64_t count = 0;
  std::int64_t of_block = 0, of_piece = 0;
  std::int64_t pieces = 1;       // that are in one batch
  std::int64_t piece_steps = 0;  // from one of these to the next
};

/// How a pass is cut into work. Strips, whose rows share vectors, are decided from the problem
/// alone, and so are units where there are partial sums; the rest changes no sum and may depend on
/// threads.
struct Plan {
  RowGrid grid;
  std::int64_t width = 0;         // of vectors
  std::size_t element_bytes = 0;  // of sums
  bool in_pairs = false;          // what is packed are pairs of bfloat16: see simd::Line
  std::int64_t padded = 0, value_padded = 0;  // head dims as multiples of the vector width
  ColumnShape column;                         // what is packed of each
  std::int64_t row_heads = 0;                 // heads of rows that are handled together
  std::int64_t column_heads = 0;              // and the heads of columns that these see
  std::int64_t stack = 0;                     // lines of rows that are handled together
  std::int64_t lines = 0;                     // of columns, that these see at most
  std::int64_t ring0 = 0, ring1 = 0;          // lines of axes 0 and 1 that are packed together
  std::int64_t ring2 = 0;                     // columns of a line that a row sees at most
  std::int64_t strip = 0;                     // rows of a line that share packed columns
  std::int64_t stacks = 0;                    // of lines, along axis 1
  bool sums_columns = false;                  // rows give gradients to the columns that they see
  bool in_pieces = false;                     // columns do not fit a ring
  std::int64_t piece_lines = 0;               // lines that blocks of rows visit at a time
  std::int64_t piece_columns = 0;             // and columns of each
  std::int64_t strips = 0;                    // along axis 2
  std::int64_t sweeps = 0;                    // along axis 1: of stacks that one item goes through
  std::int64_t slabs = 0;                     // along axis 0: of planes of such stacks
  std::int64_t units = 0;                     // per batch entry and group of heads: runs of items
  PartialSums partial;                        // of each unit and head
  KeptBatches kept;                           // of the rows at hand
  std::int64_t line_rows = 0;  // rows from a line of rows to the next in operands by row
  std::int64_t head_rows = 0;  // and from a head to the next

  const Problem& problem() const { return grid.problem; }
  PassKind kind() const { return grid.kind; }
  /// Of a transposed operand, by row or column.
  std::int64_t elements(std::int64_t dim) const { return in_pairs ? (dim + 1) / 2 : dim; }
  /// The problem's scale is in packed queries, or where pairs are packed as they are, in what the
  /// kernels make of them: scores, and once sums are written gradients of keys.
  double query_scale() const { return in_pairs ? 1.0 : problem().scale; }
  double score_scale() const { return in_pairs ? problem().scale : 1.0; }
  std::int64_t head_groups() const { return (grid.heads() + row_heads - 1) / row_heads; }
  std::int64_t groups() const { return grid.groups(0) * grid.groups(1) * grid.groups(2); }
  /// How many parts the rows of an axis are cut into.
  std::int64_t cuts(int axis) const { return axis == 0 ? slabs : axis == 1 ? sweeps : strips; }
  /// The row of an axis, of those of a dilation group, that a cut begins with.
  std::int64_t first_row(int axis, std::int64_t number) const {
    if (axis == 2) return number * strip;
    // Whole stacks, but where columns are summed: threads wait there for the largest cut.
    if (axis == 1 && !sums_columns) return stacks * number / sweeps * stack;
    return grid.most_rows(axis) * number / cuts(axis);
  }
  /// The rows of a cut, of those of a dilation group; an item has a cut of each axis.
  Interval rows_of_cut(int axis, const Interval& rows, std::int64_t number) const {
    return {rows.begin + first_row(axis, number),
            std::min(rows.begin + first_row(axis, number + 1), rows.end)};
  }
  /// Per batch entry and group of heads, counted for the longest dilation group.
  std::int64_t items() const { return groups() * slabs * sweeps * strips; }
  std::int64_t all_items() const { return problem().batch * head_groups() * items(); }
  /// The columns that a cut sees; none beyond the last.
  Interval columns_of_cut(int axis, std::int64_t group, std::int64_t number) const;
  /// Whether the ring holds a circular axis whole, so that all turns have one entry.
  bool holds_turn(int axis) const {
    return axis < 2 && (axis == 0 ? ring0 : ring1) == grid.turn(axis);
  }
  /// Whether a cut may come back to a token of a circular axis after a turn, with another entry of
  /// the ring. Along axis 2 both visits are in one line.
  bool returns(int axis) const { return axis < 2 && grid.is_circular(axis) && !holds_turn(axis); }
  /// Calls `f(part)` with the parts of `columns_of_cut` whose tokens are visited once more along
  /// this axis: by another cut, or on a circular axis by the same one, a turn later or earlier.
  template <class F>
  void for_each_shared(int axis, std::int64_t group, std::int64_t number, F&& f) const {
    const bool is_circular = grid.is_circular(axis);
    if (!is_circular && cuts(axis) == 1) return;
    const Interval own = columns_of_cut(axis, group, number);
    const std::int64_t first = is_circular ? 0 : std::max<std::int64_t>(number - 1, 0);
    const std::int64_t last = is_circular ? cuts(axis) : std::min(number + 2, cuts(axis));
    const std::int64_t turn = is_circular ? grid.turn(axis) : 0;
    for (std::int64_t n = first; n < last; ++n) {
      if (n == number && !returns(axis)) continue;
      const Interval other = columns_of_cut(axis, group, n);
      for (std::int64_t shift = -turn; shift <= turn; shift += std::max<std::int64_t>(turn, 1)) {
        if (n == number && shift == 0) continue;
        const Interval part{std::max(own.begin, other.begin + shift),
                            std::min(own.end, other.end + shift)};
        if (part.size() > 0) f(part);
      }
    }
  }
  /// Whether blocks of rows see their columns in several pieces: then they see them twice, in
  /// backward_query, as row terms come first.
  bool has_pieces() const { return in_pieces || piece_lines < lines; }
  /// Rows of a block, at most.
  std::int64_t block_rows() const { return (stack == 1 ? simd::kMostVectors : 1) * width; }
  /// Rows that a thread has at hand.
  std::int64_t rows() const { return row_heads * head_rows; }
  /// Which of the lines at one position of axis 2 a line is: where the ring holds a circular axis
  /// whole, each turn has the same.
  Coordinate line_in_ring(Coordinate line) const {
    for (int axis = 0; axis < 2; ++axis)
      if (holds_turn(axis)) line[axis] = floor_mod(line[axis], grid.turn(axis));
    return line;
  }
  std::int64_t total_units() const { return grid.problem.batch * head_groups() * units; }
};

/// Whether a pass writes gradients of keys or values with those of queries.
inline bool gives_to_columns(const Plan& plan) {
  return plan.sums_columns && (plan.problem().wants_grad_key || plan.problem().wants_grad_value);
}

/// `element_bytes`: of sums. `in_pairs`: see Plan. `threads`: that take part.
Plan make_plan(const Problem& problem, PassKind kind, int vector_width, std::size_t element_bytes,
               bool in_pairs, int threads, const Configuration& configuration = {});

/// Whether two plans of a pass sum up the same numbers in the same order. May be false where they
/// do.
bool sums_alike(const Plan& a, const Plan& b);

/// For tensors of element type E.
template <class E>
Plan plan_for(const Problem& problem, PassKind kind, int threads,
              const Configuration& configuration = {}) {
  using T = StatisticOf<E>;
  const simd::InstructionSet& isa = instruction_set();
  const bool in_pairs = std::is_same_v<E, bfloat16> && isa.convert.pack_pairs && is_fused(kind);
  return make_plan(problem, kind, kernels_for<T>(isa, in_pairs).width, sizeof(T), in_pairs, threads,
                   configuration);
}

}  // namespace natten::detail::cpu::engine
