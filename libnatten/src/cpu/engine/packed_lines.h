#pragma once

#include "loader.h"

namespace natten::detail::cpu::engine {

/// Where a line of columns is packed to, of the first head; that of the next one is `head_stride`
/// further. See simd::Line; null what a pass does not need.
template <class T>
struct LineMemory {
  T *transposed = nullptr, *transposed_grad = nullptr;
  T *plain = nullptr, *plain_grad = nullptr;
  T *logsumexp = nullptr, *row_term = nullptr;
  T *grad_key = nullptr, *grad_value = nullptr;
  T* hidden = nullptr;  // of all heads
};

/// The sums that rows have given to a line of columns.
template <class T>
struct LineSums {
  const LineMemory<T>& memory;  // grad_key, grad_value
  std::int64_t head_stride;
  Coordinate first;  // position of the first column
  std::int64_t count;
};

/// A part of a line of columns that is to be packed.
template <class T>
struct LineToPack {
  const LineMemory<T>& memory;
  std::int64_t ld;           // of transposed operands
  std::int64_t head_stride;  // of all
  Coordinate first;          // position of the first column
  std::int64_t count;
};

/// The lines of columns that a thread has packed: a ring that slides along axes 0 and 1 with the
/// rows, in which all lines that are seen together have different entries. Where columns do not
/// fit, pieces of some lines.
template <class T>
class PackedLines {
 public:
  void take(Arena& arena, const Plan& plan) {
    constexpr std::int64_t per_cache_line = 64 / sizeof(T);
    // Runs of columns are packed in whole vectors, and on circular axes may begin anywhere.
    const bool is_circular = plan.problem().axes[2].boundary == Boundary::circular;
    ld_ = round_up(plan.piece_columns + (is_circular ? plan.width : 0), per_cache_line);
    // An odd number of cache lines: rows of a transposed operand then spread over the cache.
    if (ld_ / per_cache_line % 2 == 0 && ld_ > 2 * per_cache_line) ld_ += per_cache_line;
    // What vectors read past either end of a row is never used, so only the first and the last
    // row need memory there.
    const std::int64_t padding = round_up(simd::kPaddingVectors * plan.width, per_cache_line);
    const auto take_transposed = [&](std::int64_t dim) -> T* {
      if (dim == 0) return nullptr;
      T* taken = arena.take<T>(dim * ld_ + 2 * padding);
      return taken ? taken + padding : nullptr;
    };
    const auto take_plain = [&](std::int64_t padded) {
      return padded == 0 ? nullptr : arena.take<T>(plan.piece_columns * padded);
    };
    entries_.resize(plan.in_pieces ? plan.piece_lines : plan.ring0 * plan.ring1);
    const ColumnShape& column = plan.column;
    const std::int64_t before = arena.used<T>();
    for (std::int64_t head = 0; head < plan.column_heads; ++head) {
      for (Entry& entry : entries_) {
        LineMemory<T> memory;
        memory.transposed = take_transposed(column.transposed);
        memory.plain = take_plain(column.plain);
        memory.transposed_grad = take_transposed(column.transposed_grad);
        memory.plain_grad = take_plain(column.plain_grad);
        memory.grad_key = take_plain(plan.problem().wants_grad_key ? column.grad_key : 0);
        memory.grad_value = take_plain(plan.problem().wants_grad_value ? column.grad_value : 0);
        memory.logsumexp = take_transposed(column.statistics ? 1 : 0);
        memory.row_term = take_transposed(column.statistics ? 1 : 0);
        if (head == 0) entry.memory = memory;
      }
      if (head == 0) head_stride_ = arena.used<T>() - before;
    }
    for (Entry& entry : entries_) entry.memory.hidden = take_transposed(column.hidden ? 1 : 0);
  }

  std::int64_t ld() const { return ld_; }
  /// Forgets all lines, before others of the same position are packed.
  void forget() {
    for (Entry& entry : entries_) entry.is_packed = false;
  }
  /// Calls `f` with the sums of a line, if it has any, and sets them to 0; or of all lines.
  template <class F>
  void take_sums(std::int64_t number, F&& f) {
    Entry& entry = entries_[number];
    if (!entry.has_sums) return;
    f(LineSums<T>{entry.memory, head_stride_, entry.first, entry.count});
    entry.has_sums = false;
  }
  template <class F>
  void take_all_sums(F&& f) {
    for (std::size_t i = 0; i < entries_.size(); ++i) take_sums(static_cast<std::int64_t>(i), f);
  }
  /// Starts sums of `count` columns of a line, for all heads.
  void begin_sums(const Plan& plan, std::int64_t number, const Coordinate& first,
                  std::int64_t count) {
    Entry& entry = entries_[number];
    if (entry.has_sums) return;
    entry.has_sums = true;
    entry.first = first;
    entry.count = count;
    for (std::int64_t head = 0; head < plan.column_heads; ++head) {
      const auto clear = [&](T* sums, std::int64_t padded) {
        if (sums) std::fill_n(sums + head * head_stride_, count * padded, T(0));
      };
      clear(entry.memory.grad_key, plan.padded);
      clear(entry.memory.grad_value, plan.value_padded);
    }
  }
  /// The entry of line `number` of those that are at hand together.
  std::int64_t entry_of(const Plan& plan, std::int64_t number, const Coordinate& line) const {
    if (plan.in_pieces) return number;
    return floor_mod(line[0], plan.ring0) * plan.ring1 + floor_mod(line[1], plan.ring1);
  }
  /// Whether a line has to be packed into its entry; if so, takes it to be there from now on.
  bool admit(const Plan& plan, std::int64_t number, const Coordinate& line) {
    Entry& entry = entries_[entry_of(plan, number, line)];
    const Coordinate held = plan.line_in_ring(line);
    if (!plan.in_pieces && entry.is_packed && entry.line0 == held[0] && entry.line1 == held[1])
      return false;
    entry.is_packed = true;
    entry.line0 = held[0];
    entry.line1 = held[1];
    return true;
  }
  /// Columns first[2] to first[2] + count of a line, for packing.
  LineToPack<T> to_pack(std::int64_t entry, const Coordinate& first, std::int64_t count) const {
    return {entries_[entry].memory, ld_, head_stride_, first, count};
  }
  /// The line in an entry, of the first head.
  simd::Line<T> line(std::int64_t entry) const {
    const LineMemory<T>& memory = entries_[entry].memory;
    simd::Line<T> line;
    line.transposed = memory.transposed;
    line.transposed_grad = memory.transposed_grad;
    line.plain = memory.plain;
    line.plain_grad = memory.plain_grad;
    line.logsumexp = memory.logsumexp;
    line.row_term = memory.row_term;
    line.grad_key = memory.grad_key;
    line.grad_value = memory.grad_value;
    line.hidden = memory.hidden;
    return line;
  }
  /// Makes a line of a head that of the next one.
  void to_next_head(simd::Line<T>& line) const {
    for (const T** operand : {&line.transposed, &line.transposed_grad, &line.plain,
                              &line.plain_grad, &line.logsumexp, &line.row_term})
      if (*operand) *operand += head_stride_;
    for (T** sums : {&line.grad_key, &line.grad_value})
      if (*sums) *sums += head_stride_;
  }

 private:
  struct Entry {
    LineMemory<T> memory;
    bool is_packed = false;
    std::int64_t line0 = 0, line1 = 0;  // which line it holds
    bool has_sums = false;
    Coordinate first{};      // of their columns
    std::int64_t count = 0;  // likewise
  };
  std::vector<Entry> entries_;
  std::int64_t ld_ = 0;
  std::int64_t head_stride_ = 0;
};

/// Packs the columns of a line: transposed, plain [column][padded], or both.
template <class T, class E>
void pack_columns(Loader<T>& loader, const Plan& plan, const Work& work, const LineToPack<T>& line,
                  const Source<E>& source, T* transposed, T* plain, std::int64_t padded) {
  for_each_run(plan, work, line.first, line.count,
               [&](const Coordinate* first, std::int64_t at, std::int64_t count) {
                 simd::Packing<T> packing = packing_of<T>(source, plan, work, work.column_head,
                                                          work.column_head_count, first, count);
                 packing.transposed = transposed ? transposed + at : nullptr;
                 packing.ld = line.ld;
                 packing.transposed_stride = line.head_stride;
                 packing.plain = plain ? plain + at * padded : nullptr;
                 packing.padded = padded;
                 packing.plain_stride = line.head_stride;
                 packing.continues = at > 0;
                 loader.add(packing);
               });
}

/// Says which columns of a line are hidden keys.
template <class T>
void pack_mask(const Plan& plan, const Work& work, const LineToPack<T>& line, const KeyMask& mask) {
  for_each_run(plan, work, line.first, line.count,
               [&](const Coordinate* first, std::int64_t at, std::int64_t count) {
                 Coordinate key = first ? *first : Coordinate{};
                 for (std::int64_t c = at; c < at + count; ++c) {
                   line.memory.hidden[c] = first && mask.hides(work.batch, key) ? T(1) : T(0);
                   key[2] += plan.problem().axes[2].dilation;
                 }
               });
}

/// Packs the columns of a fused pass: those that rows are multiplied with to give scores, and those
/// that weights multiply. In gradients they change their parts.
template <class T, class E>
void pack_columns(Loader<T>& loader, const Plan& plan, const Work& work, const LineToPack<T>& line,
                  const Source<E>& scored, const Source<E>& weighted) {
  const LineMemory<T>& to = line.memory;
  pack_columns(loader, plan, work, line, scored, to.transposed, to.plain_grad, plan.padded);
  pack_columns(loader, plan, work, line, weighted, to.transposed_grad, to.plain, plan.value_padded);
}

}  // namespace natten::detail::cpu::engine
