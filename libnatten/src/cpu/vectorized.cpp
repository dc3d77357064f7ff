#include "vectorized.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../dispatch.h"
#include "../operand.h"
#include "isa.h"
#include "most_columns.h"
#include "naive.h"
#include "parallel.h"

// One engine runs all passes. Each has rows and columns: rows gather from the columns that they
// see. Rows are queries and columns keys, but for the gradients of keys and values and for
// av_transpose, where rows are keys and columns the queries that see them.
//
// Along the innermost axis what a row sees is contiguous (within its dilation group), so the
// columns of one line serve all rows of a strip, and most of the lines that one line of rows sees
// serve its neighbors too. Lines are packed once, converted to the type of sums and transposed,
// into a ring that slides along the middle axis with the rows. The kernels (simd/) work on blocks
// of a few vectors of rows: at the same place of neighboring lines, or one after the other on a
// line.

namespace natten::detail::cpu {
namespace {

using simd::kMostVectors;

// Packed columns and rows of a thread: strips are as long as fits. Heads take turns, and what one
// of them needs at a time fits the L2 cache; packing less often is worth more than packing less.
constexpr std::size_t kMostBytes = 3 << 20;
constexpr std::int64_t kPieceColumns = 256;
constexpr std::int64_t kItemsPerThread = 2;  // at least, to even out threads that start late
// Partial sums are cut for so many threads, whatever there are: how they are cut shows in the
// result.
constexpr int kThreadsOfPartialSums = 16;
/// Bytes of partial sums, if there is more than one of each gradient.
constexpr std::size_t kMostPartialBytes = 16 << 20;
constexpr std::int64_t kAdditionalPiece = 4096;  // additional tokens that are packed at a time
// Multiply-adds, below which waking other threads takes longer than they save: some 30 us of work.
constexpr double kLeastSharedWork = 1 << 19;
constexpr std::int64_t kMostWeights = 4096;  // per row, of the unfused operations
constexpr std::int64_t kSpareBias = 64;  // elements around a table of biases that vectors may touch

enum class Pass { forward, backward_query, backward_key, qk, av, av_transpose };

Pass first_pass(Op op) {
  return op == Op::qk             ? Pass::qk
         : op == Op::av           ? Pass::av
         : op == Op::av_transpose ? Pass::av_transpose
                                  : Pass::forward;
}

bool rows_are_keys(Pass pass) { return pass == Pass::backward_key || pass == Pass::av_transpose; }
bool is_fused(Pass pass) { return pass < Pass::qk; }

std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Cuts memory of a thread into arrays, aligned to cache lines.
class Arena {
 public:
  explicit Arena(std::vector<char>& memory) : memory_(memory) {}
  /// Call with all sizes first (measuring), then `begin`, then again for the arrays.
  template <class T>
  T* take(std::int64_t count) {
    const std::size_t offset = used_;
    used_ += round_up(count * static_cast<std::int64_t>(sizeof(T)), 64);
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }
  template <class T>
  std::int64_t used() const {
    return static_cast<std::int64_t>(used_ / sizeof(T));
  }
  void begin() {
    if (memory_.size() < used_ + 64) memory_.resize(used_ + 64);
#if defined(__SANITIZE_ADDRESS__)
    // What is read before it is written shows as NaN.
    std::fill(memory_.begin(), memory_.end(), static_cast<char>(0xFF));
#endif
    base_ = memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64) % 64;
    used_ = 0;
  }

 private:
  std::vector<char>& memory_;
  char* base_ = nullptr;
  std::size_t used_ = 0;
};

/// What the rows of one pass are and what they see.
struct Grid {
  Problem p;
  Pass pass;

  std::int64_t heads() const { return rows_are_keys(pass) ? p.kv_heads : p.heads; }
  std::int64_t row_length(int axis) const {
    const Axis& a = p.axes[axis];
    return rows_are_keys(pass) ? a.key_length : a.query_length;
  }
  Interval columns(int axis, std::int64_t group, std::int64_t position) const {
    return columns_of(p.axes[axis], rows_are_keys(pass), group, position);
  }
  std::int64_t rows(int axis, std::int64_t group) const {
    return rows_of(p.axes[axis], rows_are_keys(pass), group);
  }
  std::int64_t most_columns(int axis, std::int64_t run) const {
    return cpu::most_columns(p.axes[axis], rows_are_keys(pass), run);
  }
};

/// How a pass is cut into work. Strips, whose rows share vectors, are decided from the problem
/// alone; the rest changes no sum and may depend on threads.
struct Plan {
  Grid grid;
  std::int64_t padded, value_padded;        // head dims as multiples of the vector width
  std::int64_t width;                       // of vectors
  std::int64_t row_heads, column_heads;     // that are handled together
  std::int64_t stack;                       // lines of rows along axis 1 that are handled together
  std::int64_t ring0, ring1;                // lines of axes 0 and 1 that these see at most
  std::int64_t ring2;                       // columns of a line that a row sees at most
  std::int64_t strip;                       // rows of the innermost axis that share packed columns
  std::int64_t sweep;                       // lines of axis 1 that one item handles in turn
  bool in_pieces;                           // columns do not fit a ring
  std::int64_t piece_lines, piece_columns;  // what is packed at a time
  std::int64_t strips, sweeps, items;       // items per batch entry and head

  Plan(const Problem& p, Pass pass, int vector_width, std::size_t element, int threads)
      : grid{p, pass},
        padded(round_up(p.head_dim, vector_width)),
        value_padded(round_up(p.value_dim, vector_width)),
        width(vector_width) {
    // Where neighboring lines of rows see no lines in common, stacking them gives nothing.
    stack = grid.rows(1, 0) > 1 && grid.most_columns(1, 1) > 1 ? kMostVectors : 1;
    ring0 = std::max<std::int64_t>(1, grid.most_columns(0, 1));
    ring1 = std::max<std::int64_t>(1, grid.most_columns(1, stack));
    ring2 = std::max<std::int64_t>(1, grid.most_columns(2, 1));
    const std::int64_t least_strip = stack > 1 ? std::max<std::int64_t>(16, width)
                                               : std::max<std::int64_t>(16, kMostVectors * width);
    const std::int64_t longest = grid.rows(2, 0);
    const std::int64_t operands = !is_fused(pass)                ? padded
                                  : pass == Pass::forward        ? padded + value_padded
                                  : pass == Pass::backward_query ? 2 * padded + value_padded
                                                                 : 2 * (padded + value_padded);
    // Of the packed columns and rows, with strips of some rows.
    const auto bytes = [&](std::int64_t rows) {
      return static_cast<std::size_t>(operands *
                                      (column_heads * ring0 * ring1 * grid.most_columns(2, rows) +
                                       row_heads * stack * rows)) *
             element;
    };
    // Heads of a token are neighbors in memory: it is read in order where they are packed together.
    row_heads = std::clamp<std::int64_t>(grid.heads(), 1, simd::kMostHeads);
    // Unfused tensors are heads-first.
    if (!is_fused(pass)) row_heads = 1;
    column_heads = row_heads;
    const auto take_heads = [&](std::int64_t count) {
      row_heads = column_heads = count;
      if (p.heads == p.kv_heads) return;
      // Heads of one key head; the gradients of that are added up head by head.
      if (pass == Pass::backward_key) row_heads = 1;
      while (p.heads / p.kv_heads % row_heads != 0) --row_heads;
      column_heads = 1;
    };
    take_heads(row_heads);
    while (column_heads > 1 && bytes(least_strip) > kMostBytes) take_heads((row_heads + 1) / 2);
    strip = round_up(std::min<std::int64_t>(longest, 256), width);
    while (strip > least_strip && bytes(strip) > kMostBytes)
      strip = std::max(least_strip, round_up(strip / 2, width));
    in_pieces = bytes(strip) > kMostBytes;
    if (in_pieces) row_heads = column_heads = 1;
    piece_lines = ring0 * ring1;
    // Packing is paid by the rows of a strip, so strips are long where columns are cut.
    if (in_pieces) strip = round_up(std::min<std::int64_t>(longest, 128), width);
    piece_columns = grid.most_columns(2, strip);
    if (in_pieces) {
      piece_columns = std::min(piece_columns, kPieceColumns);
      piece_lines = std::max<std::int64_t>(
          1, static_cast<std::int64_t>(kMostBytes / 4 / element) / (operands * piece_columns));
    }
    strips = (longest + strip - 1) / strip;
    // Items for all threads: by shorter sweeps as long as few lines are packed twice, then by fewer
    // heads, which reads memory in pieces, then by even shorter sweeps.
    const std::int64_t lines = grid.rows(1, 0);
    const auto set_sweep = [&](std::int64_t length) {
      sweep = std::min(lines, round_up(length, stack));
      sweeps = (lines + sweep - 1) / sweep;
      items = groups() * grid.rows(0, 0) * sweeps * strips;
    };
    set_sweep(lines);
    const auto too_few = [&] {
      return items * p.batch * head_groups() < kItemsPerThread * threads;
    };
    while (too_few() && sweep > 2 * ring1) set_sweep(sweep / 2);
    while (too_few() && row_heads > 1) take_heads((row_heads + 1) / 2);
    while (too_few() && sweep > stack) set_sweep(sweep / 2);
  }

  std::int64_t head_groups() const { return (grid.heads() + row_heads - 1) / row_heads; }
  std::int64_t groups() const {
    return grid.p.axes[0].dilation * grid.p.axes[1].dilation * grid.p.axes[2].dilation;
  }
};

std::int64_t bias_count(const Problem& p) { return volume(relative_positions(p)); }
/// Of a head's table of biases, with those to spare.
std::int64_t bias_elements(const Problem& p) { return bias_count(p) + 2 * kSpareBias; }

/// Sums over queries that several items contribute to go through one partial sum per unit: a run of
/// items of one head. How many units there are does not depend on threads, and is bounded by the
/// memory that they take. Gradients of so many additional tokens that they would leave few units
/// have none: those tokens gather from the queries, as keys do. Biases may leave few.
struct Partials {
  std::int64_t units = 0;       // per batch entry and head
  std::int64_t bias = 0;        // elements of a table of biases, with its spare ends
  std::int64_t additional = 0;  // elements of the additional tokens' gradients
  std::int64_t stride() const { return bias + additional; }

  /// Those of a plan for gradients of queries, with elements of some size.
  Partials(const Plan& plan, std::size_t element) : units(plan.items) {
    const Problem& p = plan.grid.p;
    if (plan.grid.pass != Pass::backward_query) return;
    const std::int64_t others = std::max<std::int64_t>(1, p.batch * plan.head_groups());
    const std::int64_t wanted = std::min(plan.items, std::max<std::int64_t>(1, 32 / others));
    const std::int64_t most_elements = static_cast<std::int64_t>(kMostPartialBytes / element) /
                                       std::max<std::int64_t>(1, p.batch * p.heads);
    if (p.wants_grad_rpb) bias = bias_elements(p);
    if (p.wants_grad_additional) additional = p.additional * (plan.padded + plan.value_padded);
    if (wanted * additional + bias > most_elements) additional = 0;
    if (stride() > 0) units = std::max<std::int64_t>(1, std::min(wanted, most_elements / stride()));
  }
};

/// One pass over one job. Copies share nothing that is written.
template <class E>
class Engine {
  using T = StatisticOf<E>;
  using In = Operand<const E>;

 public:
  Engine(const Job& job, Pass pass)
      : isa_(instruction_set()),
        kernels_(kernels_for<T>(isa_)),
        p_(job.problem),
        pass_(pass),
        tensors_(job.tensors),
        row_terms_(static_cast<T*>(job.workspace)) {
    query_ = operand<const E>(p_, tensors_, &Tensors::query);
    key_ = operand<const E>(p_, tensors_, &Tensors::key);
    value_ = operand<const E>(p_, tensors_, &Tensors::value);
    rpb_ = operand<const E>(p_, tensors_, &Tensors::rpb);
    additional_keys_ = operand<const E>(p_, tensors_, &Tensors::additional_keys);
    additional_values_ = operand<const E>(p_, tensors_, &Tensors::additional_values);
    output_ =
        operand<E>(p_, tensors_, pass == Pass::av_transpose ? &Tensors::key : &Tensors::output);
    attn_ = operand<E>(p_, tensors_, &Tensors::attn);
    if (!is_fused(pass)) return;
    if (pass == Pass::forward) {
      logsumexp_out_ = operand<T>(p_, tensors_, &Tensors::logsumexp);
    } else {
      logsumexp_ = operand<const T>(p_, tensors_, &Tensors::logsumexp);
      grad_output_ = operand<const E>(p_, tensors_, &Tensors::grad_output);
      grad_logsumexp_ = operand<const T>(p_, tensors_, &Tensors::grad_logsumexp);
      grad_query_ = operand<E>(p_, tensors_, &Tensors::grad_query);
      grad_key_ = operand<E>(p_, tensors_, &Tensors::grad_key);
      grad_value_ = operand<E>(p_, tensors_, &Tensors::grad_value);
    }
  }

  Plan plan(int threads) const {
    const bool sums_up =
        pass_ == Pass::backward_query && (p_.wants_grad_rpb || p_.wants_grad_additional);
    return Plan(p_, pass_, kernels_.width, sizeof(T), sums_up ? kThreadsOfPartialSums : threads);
  }

  /// Runs units first to last of the pass.
  void run(const Plan& plan, const Partials& partials, std::int64_t first, std::int64_t last) {
    const Lent lent(memory_);
    allocate(plan, partials.additional > 0);
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t of_head = unit % partials.units;
      const std::int64_t row_heads = plan.grid.heads();
      batch_ = unit / partials.units / plan.head_groups();
      first_head_ = unit / partials.units % plan.head_groups() * plan.row_heads;
      head_count_ = std::min(plan.row_heads, row_heads - first_head_);
      for (std::int64_t h = 0; h < head_count_ && partials.stride(); ++h) {
        T* partial =
            partial_sums() +
            ((batch_ * row_heads + first_head_ + h) * partials.units + of_head) * partials.stride();
        std::fill(partial, partial + partials.stride(), T(0));
        grad_bias_[h] = partials.bias ? partial + kSpareBias : nullptr;
        grad_additional_[h] = partials.additional ? partial + partials.bias : nullptr;
      }
      for (std::int64_t item = plan.items * of_head / partials.units;
           item < plan.items * (of_head + 1) / partials.units; ++item)
        run_item(plan, item);
    }
  }

  T* partial_sums() const { return row_terms_ + p_.batch * p_.heads * p_.queries(); }

 private:
  /// Memory that a thread keeps, in the hands of one engine: at a checkpoint of this call the
  /// thread's owner may make another.
  class Lent {
   public:
    explicit Lent(std::vector<char>& to) : to_(to) { to_.swap(of_thread()); }
    ~Lent() { to_.swap(of_thread()); }
    Lent(const Lent&) = delete;
    Lent& operator=(const Lent&) = delete;

   private:
    static std::vector<char>& of_thread() {
      thread_local std::vector<char> memory;
      return memory;
    }
    std::vector<char>& to_;
  };

  std::int64_t heads_per_kv_head() const { return p_.heads / p_.kv_heads; }
  bool rows_are_keys() const { return cpu::rows_are_keys(pass_); }
  /// Heads of columns that are packed together.
  std::int64_t column_heads(const Plan& plan) const {
    return plan.column_heads == 1 ? 1 : head_count_;
  }

  /// `plain_rows`: the gradients of additional tokens need them.
  void allocate(const Plan& plan, bool plain_rows) {
    Arena arena(memory_);
    for (int round = 0; round < 2; ++round) {
      const std::int64_t columns = plan.piece_columns;
      const std::int64_t per_line = 64 / sizeof(T);
      ld_ = round_up(columns, per_line);
      // An odd number of cache lines: rows of a transposed operand then spread over the cache.
      if (ld_ / per_line % 2 == 0 && ld_ > 2 * per_line) ld_ += per_line;
      // What vectors read past either end of a row is never used, so only the first and the last
      // row need memory there.
      const std::int64_t spare = round_up(simd::kPaddingVectors * plan.width, per_line);
      const auto take_transposed = [&](std::int64_t dim) {
        T* taken = arena.take<T>(dim * ld_ + 2 * spare);
        return taken ? taken + spare : nullptr;
      };
      const std::int64_t d = plan.padded, v = plan.value_padded;
      const bool backward = is_fused(pass_) && pass_ != Pass::forward;
      const bool keyed = pass_ == Pass::backward_key;
      const bool scores = is_fused(pass_) || pass_ == Pass::qk;
      const std::int64_t lines = plan.piece_lines;
      slots_.resize(lines);
      // The operands of the first head; those of the others follow at slot_stride_.
      std::int64_t before = arena.used<T>();
      for (std::int64_t head = 0; head < plan.column_heads; ++head) {
        for (Slot& slot : slots_) {
          Slot taken;
          taken.transposed = scores ? take_transposed(p_.head_dim) : nullptr;
          taken.plain = pass_ == Pass::backward_query || pass_ == Pass::qk
                            ? nullptr
                            : arena.take<T>(columns * (is_fused(pass_) ? v : d));
          taken.transposed_grad = backward ? take_transposed(p_.value_dim) : nullptr;
          taken.plain_grad = backward ? arena.take<T>(columns * d) : nullptr;
          taken.logsumexp = keyed ? take_transposed(1) : nullptr;
          taken.row_term = keyed ? take_transposed(1) : nullptr;
          if (head == 0) slot = taken;
        }
        if (head == 0) slot_stride_ = arena.used<T>() - before;
      }
      lines_.resize(lines);
      const std::int64_t additional = std::min(p_.additional, kAdditionalPiece);
      additional_keys_plain_ = arena.take<T>(plan.column_heads * additional * d);
      additional_values_plain_ = arena.take<T>(plan.column_heads * additional * std::max(d, v));
      bias_memory_ = arena.take<T>(rpb_ ? plan.row_heads * bias_elements(p_) : 0);
      line_rows_ = round_up(plan.strip, plan.width);
      head_rows_ = plan.stack * line_rows_;
      const std::int64_t rows = plan.row_heads * head_rows_;
      row_a_ = arena.take<T>(rows * p_.head_dim);
      row_b_ = arena.take<T>(backward ? rows * p_.value_dim : 0);
      plain_row_a_ = plain_rows ? arena.take<T>(rows * d) : nullptr;
      plain_row_b_ = plain_rows ? arena.take<T>(rows * v) : nullptr;
      sums_a_ = arena.take<T>(rows * std::max(d, v));
      sums_b_ = arena.take<T>(keyed ? rows * v : 0);
      // With a vector to spare.
      weights_stride_ =
          round_up(std::max(weights_per_row(plan), additional), plan.width) + plan.width;
      weights_ =
          is_fused(pass_) ? nullptr : arena.take<T>(kMostVectors * plan.width * weights_stride_);
      for (T** statistic : {&largest_, &total_, &row_logsumexp_, &row_term_, &row_grad_logsumexp_})
        *statistic = arena.take<T>(rows);
      scratch_ = arena.take<T>(static_cast<std::int64_t>(kernels_.scratch_elements));
      if (round == 0) arena.begin();
    }
    bias_head_ = -1;
    additional_of_ = -1;
  }

  void run_item(const Plan& plan, std::int64_t item) {
    const Grid& grid = plan.grid;
    const std::int64_t strip = item % plan.strips;
    item /= plan.strips;
    const std::int64_t sweep = item % plan.sweeps;
    item /= plan.sweeps;
    const std::int64_t line0 = item % grid.rows(0, 0);
    item /= grid.rows(0, 0);
    const Axis* axes = p_.axes;
    group_ = unravel(item, {axes[0].dilation, axes[1].dilation, axes[2].dilation});
    for (int axis = 0; axis < kMaxRank; ++axis)
      if (group_[axis] >= grid.row_length(axis)) return;
    if (line0 >= grid.rows(0, group_[0])) return;
    first_row_ = strip * plan.strip;
    row_count_ = std::min(plan.strip, grid.rows(2, group_[2]) - first_row_);
    if (row_count_ <= 0) return;
    const std::int64_t last_line = std::min((sweep + 1) * plan.sweep, grid.rows(1, group_[1]));
    tags_.assign(slots_.size(), -1);
    intervals_.resize(row_count_);
    for (std::int64_t r = 0; r < row_count_; ++r)
      intervals_[r] = grid.columns(2, group_[2], first_row_ + r);
    for (std::int64_t line1 = sweep * plan.sweep; line1 < last_line; line1 += plan.stack) {
      line_count_ = std::min(plan.stack, last_line - line1);
      run_lines(plan, line0, line1);
    }
  }

  /// The rows of one strip of some neighboring lines.
  void run_lines(const Plan& plan, std::int64_t line0, std::int64_t line1) {
    const Coordinate first{line0, line1, first_row_};
    first_line_ = first;
    load_rows(plan, first);
    // Where rows are keys, all heads that share one give it gradients.
    const std::int64_t rounds = rows_are_keys() ? heads_per_kv_head() : 1;
    for (std::int64_t i = 0; i < rounds; ++i) {
      column_head_ = rows_are_keys() ? first_head_ * rounds + i : first_head_ / heads_per_kv_head();
      query_head_ = rows_are_keys() ? column_head_ : first_head_;
      if (rounds > 1) tags_.assign(slots_.size(), -1);  // the ring holds one head's lines
      const bool two_steps = pass_ == Pass::backward_query && (plan.in_pieces || p_.additional > 0);
      for (int step = 0; step < (two_steps ? 2 : 1); ++step) {
        sum_row_term_ = step == 0;
        sum_gradients_ = !two_steps || step == 1;
        visit_windows(plan, line0, line1);
        if (!rows_are_keys())
          for (std::int64_t first = 0; first < p_.additional; first += kAdditionalPiece)
            visit_additional(plan, first);
        if (step == 0 && two_steps)
          for (std::int64_t r = 0; r < head_count_ * head_rows_; ++r)
            row_term_[r] = row_term_[r] / total_[r] - row_grad_logsumexp_[r];
      }
    }
    store_rows(plan, first);
  }

  Coordinate token(const Coordinate& position) const {
    Coordinate c;
    for (int i = 0; i < kMaxRank; ++i) c[i] = token_at(p_.axes[i], group_[i], position[i]);
    return c;
  }

  /// Where to pack tokens: transposed [dim][ld] or, where ld is 0, by vector; plain
  /// [count][padded]. Strides are from a head to the next.
  struct Packed {
    T* transposed;
    std::int64_t ld, transposed_stride;
    T* plain;
    std::int64_t padded, plain_stride;
  };
  /// Has `pack_all` pack `count` tokens of some heads from a position on, along the innermost axis.
  void pack_tokens(const In& from, std::int64_t head, std::int64_t heads, const Coordinate& first,
                   std::int64_t count, std::int64_t dim, double scale, const Packed& to) {
    packings_.push_back({from.at(batch_, head, token(first)), from.grid[2] * p_.axes[2].dilation,
                         count, dim, static_cast<int>(heads), from.head, static_cast<T>(scale),
                         to.transposed, to.ld, to.transposed_stride, to.plain, to.padded,
                         to.plain_stride, nullptr});
  }
  void pack_all() {
    for (std::size_t i = 0; i + 1 < packings_.size(); ++i) packings_[i].next = &packings_[i + 1];
    for (const auto& packing : packings_) pack(isa_, p_.dtype, packing);
    packings_.clear();
  }

  /// Visits the strip's rows in all of its lines and heads: `f(row, its head, its token)`.
  template <class F>
  void for_each_row(const Coordinate& first, F&& f) const {
    for (std::int64_t line = 0; line < line_count_; ++line)
      for (std::int64_t r = 0; r < row_count_; ++r) {
        const Coordinate at = token({first[0], first[1] + line, first[2] + r});
        for (std::int64_t h = 0; h < head_count_; ++h)
          f(h * head_rows_ + line * line_rows_ + r, first_head_ + h, at);
      }
  }

  void load_rows(const Plan& plan, const Coordinate& first) {
    const std::int64_t d = plan.padded, v = plan.value_padded, rows = head_count_ * head_rows_;
    const auto pack_rows = [&](const In& from, std::int64_t dim, double scale, T* transposed,
                               T* plain, std::int64_t padded) {
      for (std::int64_t line = 0; line < line_count_; ++line) {
        const std::int64_t row = line * line_rows_;
        pack_tokens(from, first_head_, head_count_, {first[0], first[1] + line, first[2]},
                    row_count_, dim, scale,
                    {transposed + row * dim, 0, head_rows_ * dim,
                     plain ? plain + row * padded : nullptr, padded, head_rows_ * padded});
      }
    };
    if (!is_fused(pass_)) {
      if (pass_ == Pass::qk) pack_rows(query_, p_.head_dim, 1.0, row_a_, nullptr, d);
      std::fill(sums_a_, sums_a_ + rows * d, T(0));
      return;
    }
    if (rows_are_keys()) {
      pack_rows(key_, p_.head_dim, 1.0, row_a_, nullptr, d);
      pack_rows(value_, p_.value_dim, 1.0, row_b_, nullptr, v);
      std::fill(sums_a_, sums_a_ + rows * d, T(0));
      std::fill(sums_b_, sums_b_ + rows * v, T(0));
      return;
    }
    pack_rows(query_, p_.head_dim, p_.scale, row_a_, plain_row_a_, d);
    std::fill(sums_a_, sums_a_ + rows * (pass_ == Pass::forward ? v : d), T(0));
    if (pass_ == Pass::forward) {
      std::fill(largest_, largest_ + rows, -std::numeric_limits<T>::infinity());
      std::fill(total_, total_ + rows, T(0));
      return;
    }
    pack_rows(grad_output_, p_.value_dim, 1.0, row_b_, plain_row_b_, v);
    std::fill(row_term_, row_term_ + rows, T(0));
    // Lost in a sum of weights, and can be divided by where there are none.
    std::fill(total_, total_ + rows, std::numeric_limits<T>::min());
    for_each_row(first, [&](std::int64_t r, std::int64_t head, const Coordinate& at) {
      row_logsumexp_[r] = logsumexp_at(head, at);
      row_grad_logsumexp_[r] = grad_logsumexp_ ? *grad_logsumexp_.at(batch_, head, at) : T(0);
    });
  }

  void store_rows(const Plan& plan, const Coordinate& first) {
    const std::int64_t d = plan.padded, v = plan.value_padded;
    const auto unpack_rows = [&](const Operand<E>& to, std::int64_t dim, const T* sums,
                                 std::int64_t padded, double scale, const T* scales) {
      if (!to) return;
      for (std::int64_t line = 0; line < line_count_; ++line) {
        const std::int64_t row = line * line_rows_;
        unpack(isa_, p_.dtype,
               simd::Unpacking<T>{
                   sums + row * padded, padded, head_rows_ * padded,
                   scales ? scales + row : nullptr, head_rows_, static_cast<T>(scale),
                   to.at(batch_, first_head_, token({first[0], first[1] + line, first[2]})),
                   to.grid[2] * p_.axes[2].dilation, row_count_, dim, static_cast<int>(head_count_),
                   to.head});
      }
    };
    if (pass_ == Pass::qk) return;
    if (!is_fused(pass_)) {
      unpack_rows(output_, p_.head_dim, sums_a_, d, 1.0, nullptr);
    } else if (pass_ == Pass::forward) {
      kernels_.finish(largest_, total_, head_count_ * head_rows_);
      unpack_rows(output_, p_.value_dim, sums_a_, v, 1.0, total_);
      if (logsumexp_out_)
        for_each_row(first, [&](std::int64_t r, std::int64_t head, const Coordinate& at) {
          *logsumexp_out_.at(batch_, head, at) = largest_[r];
        });
    } else if (pass_ == Pass::backward_query) {
      for (std::int64_t r = 0; r < head_count_ * head_rows_; ++r) total_[r] = 1 / total_[r];
      unpack_rows(grad_query_, p_.head_dim, sums_a_, d, p_.scale, total_);
      for_each_row(first, [&](std::int64_t r, std::int64_t head, const Coordinate& at) {
        *row_term_at(head, at) = row_term_[r];
      });
    } else {
      unpack_rows(grad_key_, p_.head_dim, sums_a_, d, 1.0, nullptr);
      unpack_rows(grad_value_, p_.value_dim, sums_b_, v, 1.0, nullptr);
    }
  }

  /// What weights are exp(score - ...) of: where all scores are -inf, and logsumexp with them,
  /// there are none.
  T logsumexp_at(std::int64_t head, const Coordinate& at) const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const T logsumexp = *logsumexp_.at(batch_, head, at);
    return logsumexp == -kInfinity ? kInfinity : logsumexp;
  }

  T* row_term_at(std::int64_t head, const Coordinate& at) const {
    return row_terms_ + (batch_ * p_.heads + head) * p_.queries() + ravel(at, query_lengths(p_));
  }

  // ---- columns ----

  struct Slot {
    T *transposed, *plain, *transposed_grad, *plain_grad, *logsumexp, *row_term;
  };

  /// Packs columns first[2] to first[2] + count of one line.
  void pack_line(const Plan& plan, const Slot& slot, const Coordinate& first, std::int64_t count) {
    const std::int64_t d = plan.padded, v = plan.value_padded;
    const auto pack_columns = [&](const In& from, std::int64_t dim, double scale, T* transposed,
                                  T* plain, std::int64_t padded) {
      pack_tokens(from, column_head_, column_heads(plan), first, count, dim, scale,
                  {transposed, ld_, slot_stride_, plain, padded, slot_stride_});
    };
    if (!is_fused(pass_)) {
      const In& from = pass_ == Pass::qk ? key_ : pass_ == Pass::av ? value_ : query_;
      pack_columns(from, p_.head_dim, 1.0, slot.transposed, slot.plain, d);
      return;
    }
    if (!rows_are_keys()) {
      pack_columns(key_, p_.head_dim, 1.0, slot.transposed, slot.plain_grad, d);
      pack_columns(value_, p_.value_dim, 1.0, slot.transposed_grad, slot.plain, v);
      return;
    }
    pack_columns(query_, p_.head_dim, p_.scale, slot.transposed, slot.plain_grad, d);
    pack_columns(grad_output_, p_.value_dim, 1.0, slot.transposed_grad, slot.plain, v);
    for (std::int64_t c = 0; c < count; ++c) {
      const Coordinate at = token({first[0], first[1], first[2] + c});
      for (std::int64_t h = 0; h < column_heads(plan); ++h) {
        slot.logsumexp[h * slot_stride_ + c] = logsumexp_at(column_head_ + h, at);
        slot.row_term[h * slot_stride_ + c] = *row_term_at(column_head_ + h, at);
      }
    }
  }

  /// The line in a slot, of one of the heads.
  simd::Line<T> line_of(const Slot& slot, std::int64_t head) const {
    const auto of_head = [&](const T* first) {
      return first ? first + head * slot_stride_ : nullptr;
    };
    simd::Line<T> line;
    line.transposed = of_head(slot.transposed);
    line.transposed_grad = of_head(slot.transposed_grad);
    line.plain = of_head(slot.plain);
    line.plain_grad = of_head(slot.plain_grad);
    line.logsumexp = of_head(slot.logsumexp);
    line.row_term = of_head(slot.row_term);
    return line;
  }

  /// Runs the rows over the lines that they see.
  void visit_windows(const Plan& plan, std::int64_t line0, std::int64_t line1) {
    const Interval i0 = plan.grid.columns(0, group_[0], line0);
    Interval seen[kMostVectors];  // by each line of rows
    for (std::int64_t n = 0; n < line_count_; ++n)
      seen[n] = plan.grid.columns(1, group_[1], line1 + n);
    // Of neighboring lines each begins and ends no earlier than the one before.
    const Interval i1{seen[0].begin, seen[line_count_ - 1].end};
    if (rpb_) load_bias();
    const std::int64_t begin = intervals_.front().begin, end = intervals_.back().end;
    const std::int64_t lines = i0.size() * i1.size();
    const std::int64_t tag_stride = p_.axes[1].query_length + p_.axes[1].key_length;
    for (std::int64_t c = begin; c < end; c += plan.piece_columns) {
      const std::int64_t stop = std::min(end, c + plan.piece_columns);
      for (std::int64_t l = 0; l < lines; l += plan.piece_lines) {
        const std::int64_t count = std::min(lines - l, plan.piece_lines);
        for (std::int64_t h = 0; h < head_count_; ++h) {
          for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t at0 = i0.begin + (l + i) / i1.size();
            const std::int64_t at1 = i1.begin + (l + i) % i1.size();
            // In a ring, lines that are seen together have different slots.
            const std::int64_t slot =
                plan.in_pieces ? i : at0 % plan.ring0 * plan.ring1 + at1 % plan.ring1;
            const std::int64_t tag = at0 * tag_stride + at1;
            if (h == 0 && (plan.in_pieces || tags_[slot] != tag)) {
              pack_line(plan, slots_[slot], {at0, at1, c}, stop - c);
              tags_[slot] = tag;
            }
            simd::Line<T>& line = lines_[i];
            line = line_of(slots_[slot], plan.column_heads == 1 ? 0 : h);
            if (plan.stack > 1) {
              while (line.first_vector < line_count_ && seen[line.first_vector].end <= at1)
                ++line.first_vector;
              line.last_vector = line.first_vector;
              while (line.last_vector < line_count_ && seen[line.last_vector].begin <= at1)
                ++line.last_vector;
            }
            if (rpb_) set_bias(line, h, at0 - line0, at1 - line1);
            for (std::int64_t n = 0; n < kMostVectors; ++n)
              line.weights[n] = pass_ == Pass::av_transpose
                                    ? i * plan.ring2
                                    : ((at0 - i0.begin) * p_.axes[1].kernel_size + at1 -
                                       seen[std::min(n, line_count_ - 1)].begin) *
                                          p_.axes[2].kernel_size;
          }
          columns_of_lines_ = {i0.begin, i1.begin, 0};
          lines_per_plane_ = i1.size();
          visit_blocks(plan, h, lines_.data(), count, c, stop, false);
        }
      }
    }
  }

  /// Runs the rows over the additional tokens from `first` on, as many as are packed at a time.
  void visit_additional(const Plan& plan, std::int64_t first) {
    const std::int64_t n = std::min(p_.additional - first, kAdditionalPiece);
    const std::int64_t d = plan.padded, v = plan.value_padded;
    const std::int64_t of = (batch_ * p_.kv_heads + column_head_) * p_.additional + first;
    if (additional_of_ != of) {
      const auto pack_additional = [&](const In& from, std::int64_t dim, T* to,
                                       std::int64_t padded) {
        pack(isa_, p_.dtype,
             simd::Packing<T>{from.at(batch_, column_head_, first), from.token, n, dim,
                              static_cast<int>(column_heads(plan)), from.head, T(1), nullptr, 0, 0,
                              to, padded, n * padded, nullptr});
      };
      if (additional_keys_)
        pack_additional(additional_keys_, p_.head_dim, additional_keys_plain_, d);
      if (additional_values_)
        pack_additional(additional_values_, is_fused(pass_) ? p_.value_dim : p_.head_dim,
                        additional_values_plain_, is_fused(pass_) ? v : d);
      additional_of_ = of;
    }
    for (std::int64_t h = 0; h < head_count_; ++h) {
      const std::int64_t column_head = plan.column_heads == 1 ? 0 : h;
      simd::Line<T> line;
      line.transposed = line.plain_grad = additional_keys_plain_ + column_head * n * d;
      line.transposed_grad = line.plain = additional_values_plain_ + column_head * n * v;
      visit_blocks(plan, h, &line, 1, first, first + n, true);
    }
  }

  /// Calls the kernel for each block of rows. `everywhere`: the columns are additional tokens,
  /// which every row sees.
  void visit_blocks(const Plan& plan, std::int64_t head, const simd::Line<T>* lines,
                    std::int64_t line_count, std::int64_t start, std::int64_t stop,
                    bool everywhere) {
    pack_all();
    simd::Block<T> block;
    block.adjacent = plan.stack == 1;
    block.everywhere = everywhere;
    first_column_ = start;
    block.vector_stride = block.adjacent ? plan.width : line_rows_;
    block.lines = lines;
    block.line_count = line_count;
    block.ld = ld_;
    block.bias_stride = bias_stride();
    block.dim = p_.head_dim;
    block.value_dim = p_.value_dim;
    block.padded = plan.padded;
    block.value_padded = plan.value_padded;
    block.scratch = scratch_;
    const std::int64_t most_rows = (block.adjacent ? kMostVectors : 1) * plan.width;
    for (std::int64_t r = 0; r < row_count_; r += most_rows) {
      block.rows = static_cast<int>(std::min(most_rows, row_count_ - r));
      block.vectors = static_cast<int>(block.adjacent ? (block.rows + plan.width - 1) / plan.width
                                                      : line_count_);
      block.position = first_row_ + r - start;
      bool sees_any = block.everywhere;
      for (int i = 0; i < block.rows; ++i) {
        const Interval seen = everywhere ? Interval{start, stop} : intervals_[r + i];
        block.begin[i] = std::clamp(seen.begin, start, stop) - start;
        block.end[i] = std::clamp(seen.end, start, stop) - start;
        sees_any = sees_any || block.begin[i] < block.end[i];
      }
      if (!sees_any) continue;
      checkpoint(line_count * (block.end[block.rows - 1] - block.begin[0]) * block.vectors *
                 plan.width * (p_.head_dim + p_.value_dim));
      run_block(plan, block, head, head * head_rows_ + r);
    }
  }

  void run_block(const Plan& plan, const simd::Block<T>& block, std::int64_t head,
                 std::int64_t row) {
    const std::int64_t d = plan.padded, v = plan.value_padded;
    const T* a = row_a_ + row * p_.head_dim;
    const T* b = row_b_ + row * p_.value_dim;
    if (!is_fused(pass_)) {
      run_unfused(plan, block, head, row);
    } else if (pass_ == Pass::forward) {
      kernels_.forward({block, a, sums_a_ + row * v, largest_ + row, total_ + row});
    } else if (pass_ == Pass::backward_key) {
      kernels_.backward_key({block, a, b, sums_a_ + row * d, sums_b_ + row * v});
    } else {
      simd::BackwardQuery<T> f{block};
      f.query = a;
      f.grad_output = b;
      if (block.everywhere && grad_additional_[head]) {
        f.plain_query = plain_row_a_ + row * d;
        f.plain_grad_output = plain_row_b_ + row * v;
        f.grad_key = grad_additional_[head] + first_column_ * d;
        f.grad_value = grad_additional_[head] + p_.additional * d + first_column_ * v;
      }
      f.logsumexp = row_logsumexp_ + row;
      f.grad_logsumexp = row_grad_logsumexp_ + row;
      f.row_term = row_term_ + row;
      f.total = total_ + row;
      f.sum_row_term = sum_row_term_;
      f.sum_gradients = sum_gradients_;
      f.grad_query = sums_a_ + row * d;
      kernels_.backward_query(f);
    }
  }

  // ---- weights of the unfused operations ----

  std::int64_t weights_per_row(const Plan& plan) const {
    return pass_ == Pass::av_transpose ? plan.ring0 * plan.ring1 * plan.ring2 : p_.window_size();
  }

  /// Visits a block's rows: `f(their weights, their place in attn)`.
  template <class F>
  void for_each_weights(const Plan& plan, const simd::Block<T>& block, std::int64_t head,
                        std::int64_t row, F&& f) const {
    const std::int64_t first = block.everywhere ? p_.window_size() + first_column_ : 0;
    for (std::int64_t v = 0; v < block.vectors; ++v)
      for (std::int64_t r = 0; r < plan.width; ++r) {
        if ((block.adjacent ? v * plan.width : 0) + r >= block.rows) break;
        const std::int64_t at = row - head * head_rows_ + v * block.vector_stride + r;
        f(weights_ + (v * plan.width + r) * weights_stride_,
          attn_.at(batch_, first_head_ + head,
                   token({first_line_[0], first_line_[1] + at / line_rows_,
                          first_row_ + at % line_rows_})) +
              first);
      }
  }

  void run_unfused(const Plan& plan, const simd::Block<T>& block, std::int64_t head,
                   std::int64_t row) {
    const std::int64_t count = block.everywhere ? block.end[0] : p_.window_size();
    simd::Weights<T> w{block, weights_, weights_stride_, row_a_ + row * p_.head_dim,
                       sums_a_ + row * plan.padded};
    if (pass_ == Pass::qk) {
      const bool is_causal = p_.axes[0].is_causal || p_.axes[1].is_causal || p_.axes[2].is_causal;
      if (is_causal && !block.everywhere)
        std::fill(weights_, weights_ + kMostVectors * plan.width * weights_stride_,
                  p_.empty_slots == EmptySlots::zero ? T(0) : -std::numeric_limits<T>::infinity());
      kernels_.score(w);
      for_each_weights(plan, block, head, row, [&](const T* weights, E* attn) {
        unpack(isa_, p_.dtype,
               simd::Unpacking<T>{weights, 0, 0, nullptr, 0, T(1), attn, 0, 1, count, 1, 0});
      });
      return;
    }
    if (pass_ == Pass::av)
      for_each_weights(plan, block, head, row, [&](T* weights, const E* attn) {
        pack(isa_, p_.dtype,
             simd::Packing<T>{attn, 0, 1, count, 1, 0, T(1), nullptr, 0, 0, weights,
                              weights_stride_, 0, nullptr});
      });
    else
      gather_weights(plan, block);
    kernels_.weigh(w);
  }

  /// The weights that queries, the columns, give to a block's keys.
  void gather_weights(const Plan& plan, const simd::Block<T>& block) {
    const Axis* axes = p_.axes;
    const std::int64_t low = block.begin[0], high = block.end[block.rows - 1];
    for (std::int64_t l = 0; l < block.line_count; ++l) {
      const Coordinate line{columns_of_lines_[0] + l / lines_per_plane_,
                            columns_of_lines_[1] + l % lines_per_plane_, 0};
      const Interval seen0 = window(axes[0], group_[0], line[0]);
      const Interval seen1 = window(axes[1], group_[1], line[1]);
      for (std::int64_t c = low; c < high; ++c) {
        const Coordinate at{line[0], line[1], intervals_.front().begin + c};
        const Interval seen2 = window(axes[2], group_[2], at[2]);
        const E* attn = attn_.at(batch_, first_head_, token(at));
        for (std::int64_t v = 0; v < block.vectors; ++v) {
          if (v < block.lines[l].first_vector || v >= block.lines[l].last_vector) continue;
          const std::int64_t line1 = first_line_[1] + (block.adjacent ? 0 : v);
          const E* of_line =
              attn + ((first_line_[0] - seen0.begin) * axes[1].kernel_size + line1 - seen1.begin) *
                         axes[2].kernel_size;
          const std::int64_t first = block.adjacent ? v * plan.width : 0;
          const std::int64_t last = std::min<std::int64_t>(first + plan.width, block.rows);
          const std::int64_t position = block.position + intervals_.front().begin;
          for (std::int64_t r = std::max(first, seen2.begin - position);
               r < std::min(last, seen2.end - position); ++r)
            weights_[(v * plan.width + r - first) * weights_stride_ + block.lines[l].weights[v] +
                     c - block.begin[r]] = static_cast<T>(of_line[position + r - seen2.begin]);
        }
      }
    }
  }

  // ---- bias ----

  /// Converts the heads' biases. Where rows are keys, columns run against the offset: the innermost
  /// dimension is reversed.
  void load_bias() {
    if (bias_head_ == query_head_) return;
    bias_head_ = query_head_;
    const Coordinate shape = relative_positions(p_);
    for (std::int64_t h = 0; h < head_count_; ++h)
      for (std::int64_t i = 0; i < bias_count(p_); ++i) {
        Coordinate at = unravel(i, shape);
        if (rows_are_keys()) at[2] = shape[2] - 1 - at[2];
        bias_memory_[h * bias_elements(p_) + kSpareBias + i] =
            static_cast<T>(*rpb_.at(0, query_head_ + h, at));
      }
  }
  /// Elements from the biases for one line of rows to those for the next: it is one line further,
  /// or nearer.
  std::int64_t bias_stride() const {
    return (rows_are_keys() ? 1 : -1) * relative_positions(p_)[2];
  }
  /// Biases of a line of columns, at a distance from the first line of rows.
  void set_bias(simd::Line<T>& line, std::int64_t head, std::int64_t distance0,
                std::int64_t distance1) const {
    if (rows_are_keys()) {
      distance0 = -distance0;
      distance1 = -distance1;
    }
    const Coordinate shape = relative_positions(p_);
    const std::int64_t row = (distance0 + p_.axes[0].kernel_size - 1) * shape[1] + distance1 +
                             p_.axes[1].kernel_size - 1;
    const std::int64_t offset = row * shape[2] + p_.axes[2].kernel_size - 1;
    line.bias = bias_memory_ + head * bias_elements(p_) + kSpareBias + offset;
    line.grad_bias = grad_bias_[head] ? grad_bias_[head] + offset : nullptr;
  }

  const simd::InstructionSet& isa_;
  const simd::Kernels<T>& kernels_;
  const Problem p_;
  const Pass pass_;
  const Tensors tensors_;
  In query_, key_, value_, rpb_, additional_keys_, additional_values_, grad_output_;
  Operand<const T> logsumexp_, grad_logsumexp_;
  Operand<E> output_, attn_, grad_query_, grad_key_, grad_value_;
  Operand<T> logsumexp_out_;
  T* row_terms_;
  std::vector<char> memory_;

  // What the current unit, item and line work on.
  std::int64_t batch_ = 0;
  std::int64_t first_head_ = 0, head_count_ = 0;   // of rows
  std::int64_t column_head_ = 0, query_head_ = 0;  // first of the columns', of the queries'
  Coordinate group_{};
  std::int64_t first_row_ = 0, row_count_ = 0;
  Coordinate first_line_{};        // of rows
  Coordinate columns_of_lines_{};  // the first line of columns
  std::int64_t first_column_ = 0;  // of what is packed of a line, or of the additional tokens
  std::int64_t lines_per_plane_ = 0;
  std::vector<Interval> intervals_;  // columns that each row of the strip sees
  std::vector<std::int64_t> tags_;   // which line a slot of the ring holds
  std::vector<Slot> slots_;
  std::vector<simd::Line<T>> lines_;
  std::vector<simd::Packing<T>> packings_;
  std::int64_t ld_ = 0, bias_head_ = -1, additional_of_ = -1;
  std::int64_t line_count_ = 0;   // lines of rows at hand
  std::int64_t line_rows_ = 0;    // rows from one of them to the next in operands by row
  std::int64_t head_rows_ = 0;    // and from one head to the next
  std::int64_t slot_stride_ = 0;  // elements from the operands of one head to the next
  bool sum_row_term_ = false, sum_gradients_ = false;
  T *grad_bias_[simd::kMostHeads] = {}, *grad_additional_[simd::kMostHeads] = {};  // by head
  T* bias_memory_ = nullptr;
  T *additional_keys_plain_ = nullptr, *additional_values_plain_ = nullptr;
  T *row_a_ = nullptr, *row_b_ = nullptr, *plain_row_a_ = nullptr, *plain_row_b_ = nullptr;
  T *sums_a_ = nullptr, *sums_b_ = nullptr, *weights_ = nullptr;
  std::int64_t weights_stride_ = 0;
  T *largest_ = nullptr, *total_ = nullptr, *row_logsumexp_ = nullptr, *row_term_ = nullptr;
  T *row_grad_logsumexp_ = nullptr, *scratch_ = nullptr;
};

template <class E>
Phase pass_phase(const Job& job, Pass pass, int threads) {
  const Engine<E> engine(job, pass);
  const Problem& p = job.problem;
  const Plan plan = engine.plan(threads);
  const Partials partials(plan, sizeof(StatisticOf<E>));
  return {p.batch * plan.head_groups() * partials.units,
          [=](std::int64_t first, std::int64_t last) {
            Engine<E> own(engine);
            own.run(plan, partials, first, last);
          }};
}

/// The additional tokens of a backward pass as keys of a grid of their own, all of which every
/// query sees.
Job as_keys(const Job& job) {
  Job own{job.problem, {}, job.workspace};
  Problem& p = own.problem;
  const std::int64_t count = p.additional;
  for (Axis& axis : p.axes) axis = {axis.query_length, 1, 1, 1, 1, false};
  p.axes[kMaxRank - 1].key_length = p.axes[kMaxRank - 1].kernel_size = count;
  p.additional = 0;
  p.has_rpb = p.wants_grad_rpb = p.wants_grad_additional = false;
  const Tensors& t = job.tensors;
  // [B, N, ..] to [B, 1, 1, N, ..], of the problem's rank.
  const auto on_grid = [&](TensorView v) {
    const auto spread = [&](auto& values, std::int64_t trivial) {
      std::copy_backward(values.begin() + 1, values.begin() + v.ndim,
                         values.begin() + v.ndim + p.rank - 1);
      std::fill_n(values.begin() + 1, p.rank - 1, trivial);
    };
    if (!v) return v;
    spread(v.shape, 1);
    spread(v.strides, 0);
    v.ndim += p.rank - 1;
    return v;
  };
  own.tensors.query = t.query;
  own.tensors.logsumexp = t.logsumexp;
  own.tensors.grad_output = t.grad_output;
  own.tensors.key = on_grid(t.additional_keys);
  own.tensors.value = on_grid(t.additional_values);
  own.tensors.grad_key = on_grid(t.grad_additional_keys);
  own.tensors.grad_value = on_grid(t.grad_additional_values);
  return own;
}

/// Adds up the partial sums of the bias and of additional tokens, or has the latter gather from the
/// queries.
template <class E>
void reduce_partials(const Job& job, int threads, std::vector<Phase>& phases) {
  using T = StatisticOf<E>;
  const Engine<E> engine(job, Pass::backward_query);
  const Problem p = job.problem;
  const Plan plan = engine.plan(threads);
  const Partials partials(plan, sizeof(T));
  const T* sums = engine.partial_sums();
  // The sum over units first to last of one element.
  const auto sum_of = [=](std::int64_t first, std::int64_t last, std::int64_t element) {
    double sum = 0;
    for (std::int64_t unit = first; unit < last; ++unit)
      sum += static_cast<double>(sums[unit * partials.stride() + element]);
    return sum;
  };
  if (p.wants_grad_rpb) {
    const auto grad = operand<E>(p, job.tensors, &Tensors::grad_rpb);
    const Coordinate shape = relative_positions(p);
    phases.push_back({p.heads * bias_count(p), [=](std::int64_t first, std::int64_t last) {
                        for (std::int64_t i = first; i < last; ++i) {
                          const std::int64_t head = i / bias_count(p), at = i % bias_count(p);
                          double sum = 0;
                          for (std::int64_t b = 0; b < p.batch; ++b) {
                            const std::int64_t unit = (b * p.heads + head) * partials.units;
                            sum += sum_of(unit, unit + partials.units, kSpareBias + at);
                          }
                          *grad.at(0, head, unravel(at, shape)) = static_cast<E>(sum);
                        }
                      }});
  }
  if (p.wants_grad_additional && p.additional > 0 && partials.additional == 0)
    phases.push_back(pass_phase<E>(as_keys(job), Pass::backward_key, threads));
  if (partials.additional > 0) {
    const auto grad_keys = operand<E>(p, job.tensors, &Tensors::grad_additional_keys);
    const auto grad_values = operand<E>(p, job.tensors, &Tensors::grad_additional_values);
    const std::int64_t group = p.heads / p.kv_heads;
    phases.push_back(
        {p.batch * p.kv_heads * p.additional, [=](std::int64_t first, std::int64_t last) {
           for (std::int64_t i = first; i < last; ++i) {
             const std::int64_t n = i % p.additional, kv = i / p.additional;
             const std::int64_t unit = kv * group * partials.units;
             const auto write = [&](const Operand<E>& to, std::int64_t dim, std::int64_t element) {
               if (!to) return;
               E* out = to.at(kv / p.kv_heads, kv % p.kv_heads, n);
               for (std::int64_t d = 0; d < dim; ++d)
                 out[d] = static_cast<E>(sum_of(unit, unit + group * partials.units, element + d));
             };
             write(grad_keys, p.head_dim, partials.bias + n * plan.padded);
             write(grad_values, p.value_dim,
                   partials.bias + p.additional * plan.padded + n * plan.value_padded);
           }
         }});
  }
}

/// Sums the slots at each offset. An item is a head and a line of its biases, to which the slots of
/// a token's lines at one offset add.
template <class E>
Phase rpb_scatter(const Job& job) {
  const Problem p = job.problem;
  const auto attn = operand<const E>(p, job.tensors, &Tensors::attn);
  const auto grad_rpb = operand<E>(p, job.tensors, &Tensors::grad_rpb);
  const Coordinate shape = relative_positions(p);
  // What a token sees of an axis.
  const auto seen = [p](int axis, std::int64_t token) {
    const Axis& a = p.axes[axis];
    return window(a, group_of(a, token), position_of(a, token));
  };
  // The slot of an axis that is at an offset from a token, or -1.
  const auto slot_at = [p, seen](int axis, std::int64_t token, std::int64_t offset) {
    const Axis& a = p.axes[axis];
    const std::int64_t key = position_of(a, token) + offset - (a.kernel_size - 1);
    const Interval keys = seen(axis, token);
    return key >= keys.begin && key < keys.end ? key - keys.begin : -1;
  };
  return {p.heads * shape[0] * shape[1], [=](std::int64_t first, std::int64_t last) {
            const Axis* axes = p.axes;
            std::vector<double> sums;
            for (std::int64_t item = first; item < last; ++item) {
              Coordinate at{item / shape[1] % shape[0], item % shape[1], 0};
              const std::int64_t head = item / shape[1] / shape[0];
              sums.assign(static_cast<std::size_t>(shape[2]), 0.0);
              Coordinate token;
              for (std::int64_t batch = 0; batch < p.batch; ++batch)
                for (token[0] = 0; token[0] < axes[0].query_length; ++token[0])
                  for (token[1] = 0; token[1] < axes[1].query_length; ++token[1]) {
                    const std::int64_t slot0 = slot_at(0, token[0], at[0]);
                    const std::int64_t slot1 = slot_at(1, token[1], at[1]);
                    if (slot0 < 0 || slot1 < 0) continue;
                    const std::int64_t slot =
                        (slot0 * axes[1].kernel_size + slot1) * axes[2].kernel_size;
                    for (token[2] = 0; token[2] < axes[2].query_length; ++token[2]) {
                      if (token[2] % 64 == 0) checkpoint(64 * axes[2].kernel_size);
                      const Interval keys = seen(2, token[2]);
                      const E* slots = attn.at(batch, head, token) + slot;
                      double* to = sums.data() + keys.begin - position_of(axes[2], token[2]) +
                                   axes[2].kernel_size - 1;
                      for (std::int64_t i = 0; i < keys.size(); ++i)
                        to[i] += static_cast<double>(slots[i]);
                    }
                  }
              for (at[2] = 0; at[2] < shape[2]; ++at[2])
                *grad_rpb.at(0, head, at) = static_cast<E>(sums[static_cast<std::size_t>(at[2])]);
            }
          }};
}

/// Copies runs of biases: the last axes of a token's slots and of the table lie alike.
template <class E>
Phase rpb_gather(const Job& job) {
  const Problem p = job.problem;
  const auto rpb = operand<const E>(p, job.tensors, &Tensors::rpb);
  const auto attn = operand<E>(p, job.tensors, &Tensors::attn);
  const E empty =
      p.empty_slots == EmptySlots::zero ? E(0.0f) : E(-std::numeric_limits<float>::infinity());
  const std::int64_t tokens = p.queries();
  return {p.batch * p.heads * tokens, [=](std::int64_t first, std::int64_t last) {
            const Axis* axes = p.axes;
            for (std::int64_t item = first; item < last; ++item) {
              if (item % 64 == 0) checkpoint(64 * p.slots());
              const std::int64_t batch = item / tokens / p.heads, head = item / tokens % p.heads;
              const Coordinate token = unravel(item % tokens, query_lengths(p));
              Interval seen[kMaxRank];
              Coordinate offset;  // of the first slot, in the table
              for (int i = 0; i < kMaxRank; ++i) {
                const std::int64_t position = position_of(axes[i], token[i]);
                seen[i] = window(axes[i], group_of(axes[i], token[i]), position);
                offset[i] = seen[i].begin - position + axes[i].kernel_size - 1;
              }
              E* slots = attn.at(batch, head, token);
              std::fill(slots, slots + p.window_size(), empty);
              std::fill(slots + p.window_size(), slots + p.slots(), E(0.0f));
              for (std::int64_t i = 0; i < seen[0].size(); ++i)
                for (std::int64_t j = 0; j < seen[1].size(); ++j) {
                  const Coordinate at{offset[0] + i, offset[1] + j, offset[2]};
                  std::copy_n(rpb.at(0, head, at), seen[2].size(),
                              slots + (i * axes[1].kernel_size + j) * axes[2].kernel_size);
                }
            }
          }};
}

template <class E>
std::vector<Phase> phases_of(const Job& job, int threads) {
  const Problem& p = job.problem;
  if (p.op == Op::rpb_scatter) return {rpb_scatter<E>(job)};
  if (p.op == Op::rpb_gather) return {rpb_gather<E>(job)};
  if (p.op == Op::av_transpose && job.tensors.additional_keys)
    return {pass_phase<E>(job, Pass::av_transpose, threads), additional_keys_phase(job)};
  if (p.op != Op::attention_backward) return {pass_phase<E>(job, first_pass(p.op), threads)};
  std::vector<Phase> phases{pass_phase<E>(job, Pass::backward_query, threads)};
  if (p.wants_grad_key || p.wants_grad_value)
    phases.push_back(pass_phase<E>(job, Pass::backward_key, threads));
  reduce_partials<E>(job, threads, phases);
  return phases;
}

std::string refuse_reason(const Problem& p) {
  if (p.queries() == 0) return "there are no queries";
  if (p.op == Op::rpb_scatter || p.op == Op::rpb_gather) return {};
  const Pass pass = first_pass(p.op);
  if (is_fused(pass)) return {};
  const bool in_pieces = dispatch_dtype(p.dtype, [&](auto type) {
    using T = StatisticOf<typename decltype(type)::type>;
    return Plan(p, pass, kernels_for<T>(instruction_set()).width, sizeof(T), 1).in_pieces;
  });
  if (in_pieces || p.window_size() > kMostWeights)
    return "the window is too large: the weights of a row must fit the cache";
  return {};
}

std::size_t workspace_bytes(const Problem& p) {
  if (p.op != Op::attention_backward) return 0;
  return dispatch_dtype(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    Job job{p, {}, nullptr};
    const Engine<E> engine(job, Pass::backward_query);
    constexpr std::size_t element = sizeof(StatisticOf<E>);
    const Partials partials(engine.plan(1), element);
    const std::int64_t heads = p.batch * p.heads;
    return static_cast<std::size_t>(heads * (p.queries() + partials.units * partials.stride())) *
           element;
  });
}

/// Multiply-adds of a call, roughly.
double work(const Problem& p) {
  const double pairs =
      static_cast<double>(p.batch * p.heads * p.queries()) * static_cast<double>(p.slots());
  const auto dims = static_cast<double>(std::max<std::int64_t>(p.head_dim + p.value_dim, 1));
  return (p.op == Op::attention_backward ? 2.5 : 1.0) * pairs * dims;
}

void run(const std::vector<Job>& jobs, const Context& context) {
  double total = 0;
  for (const Job& job : jobs) total += work(job.problem);
  Executor& executor = total < kLeastSharedWork ? calling_thread()
                       : context.executor       ? *context.executor
                                                : default_executor();
  std::vector<std::vector<Phase>> phases;
  for (const Job& job : jobs)
    phases.push_back(dispatch_dtype(job.problem.dtype, [&](auto type) {
      return phases_of<typename decltype(type)::type>(job, executor.concurrency());
    }));
  run_phases(phases, &executor, context.interrupted);
}

}  // namespace

const Backend vectorized = {"vectorized", DeviceType::cpu, refuse_reason, workspace_bytes, run};

}  // namespace natten::detail::cpu
