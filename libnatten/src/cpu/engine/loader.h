#pragma once

#include <vector>

#include "arena.h"
#include "work.h"

namespace natten::detail::cpu::engine {

/// Packs tokens for the kernels. What is added is put on a list, so that while some tokens are
/// packed the next ones can be fetched.
template <class T>
class Loader {
 public:
  /// `in_pairs`: see Plan.
  Loader(const simd::InstructionSet& isa, DType dtype, bool in_pairs = false)
      : isa_(isa), dtype_(dtype), in_pairs_(in_pairs) {}

  void add(const simd::Packing<T>& packing) { list_.push_back(packing); }
  /// Packs all that has been added.
  void run() {
    for (std::size_t i = 0; i + 1 < list_.size(); ++i) list_[i].next = &list_[i + 1];
    for (const simd::Packing<T>& packing : list_) pack(isa_, dtype_, packing, in_pairs_);
    forget();
  }
  /// Empties the list without packing.
  void forget() { list_.clear(); }

 private:
  const simd::InstructionSet& isa_;
  const DType dtype_;
  const bool in_pairs_;
  std::vector<simd::Packing<T>> list_;
};

/// What is packed of a tensor. What the mask hides is 0, as it may be no number.
template <class E>
struct Source {
  const Operand<const E>& tensor;
  std::int64_t dim;
  double scale = 1.0;
  KeyMask mask = {};
};

/// Packs `count` tokens of some heads from the one with number `first` on, along the innermost
/// axis, or zeros where there are none. The caller adds the destination.
template <class T, class E>
simd::Packing<T> packing_of(const Source<E>& source, const Plan& plan, const Work& work,
                            std::int64_t first_head, std::int64_t heads, const Coordinate* first,
                            std::int64_t count) {
  const std::int64_t dilation = plan.problem().axes[2].dilation;
  const Operand<const E>& from = source.tensor;
  simd::Packing<T> packing;
  packing.from = first ? from.at(work.batch, first_head, *first) : nullptr;
  packing.stride = from.grid[2] * dilation;
  if (source.mask && first) {
    packing.seen = source.mask.seen.at(work.batch, 0, *first);
    packing.seen_stride = source.mask.seen.grid[2] * dilation;
  }
  packing.count = count;
  packing.dim = source.dim;
  packing.heads = static_cast<int>(heads);
  packing.head_stride = from.head;
  packing.scale = static_cast<T>(source.scale);
  return packing;
}

/// An operand by row, or numbers by row, of the rows at hand: `dim` elements each.
template <class T>
struct RowBuffer {
  T* data = nullptr;
  std::int64_t dim = 1;

  explicit operator bool() const { return data != nullptr; }
  T* at(std::int64_t row) const { return data + row * dim; }
  T& operator[](std::int64_t row) const { return data[row]; }  // of numbers
  /// Sets the rows of the heads at hand.
  void fill(const Plan& plan, const Work& work, T value) const {
    std::fill_n(data, work.head_count * plan.head_rows * dim, value);
  }
};
template <class T>
RowBuffer<T> take_rows(Arena& arena, const Plan& plan, std::int64_t dim) {
  return {arena.take<T>(plan.rows() * dim), dim};
}

/// Packs the rows at hand: transposed by vector, plain, or both.
template <class T, class E>
void pack_rows(Loader<T>& loader, const Plan& plan, const Work& work, const Source<E>& source,
               const RowBuffer<T>& transposed, const RowBuffer<T>& plain = {}) {
  for (std::int64_t line = 0; line < work.line_count; ++line) {
    const Coordinate first =
        work.row_at(plan, {work.first[0], work.first[1] + line, work.first[2]});
    for (std::int64_t head = 0; head < work.head_count; head += simd::kMostHeads) {
      const std::int64_t heads = std::min<std::int64_t>(simd::kMostHeads, work.head_count - head);
      simd::Packing<T> packing =
          packing_of<T>(source, plan, work, work.first_head + head, heads, &first, work.row_count);
      if (transposed) {
        packing.transposed_stride = plan.head_rows * transposed.dim;
        packing.transposed =
            transposed.at(line * plan.line_rows) + head * packing.transposed_stride;
      }
      if (plain) {
        packing.padded = plain.dim;
        packing.plain_stride = plan.head_rows * plain.dim;
        packing.plain = plain.at(line * plan.line_rows) + head * packing.plain_stride;
      }
      loader.add(packing);
    }
  }
}

/// Sets the sums of rows that are hidden keys to 0.
template <class T>
void clear_hidden(const Plan& plan, const Work& work, const KeyMask& mask,
                  const RowBuffer<T>& sums) {
  if (!mask) return;
  for_each_row(plan, work, [&](std::int64_t row, std::int64_t, const Coordinate& key) {
    if (mask.hides(work.batch, key)) std::fill_n(sums.at(row), sums.dim, T(0));
  });
}

/// Heads that follow each other.
struct Heads {
  std::int64_t first, count;
};

// Tensors of this size and more are written past the caches: else what is written last would
// displace what was written first, and each cache line would be read before it is written.
constexpr std::int64_t kStreamedBytes = 8 << 20;
/// Whether a tensor of the rows' size is written so, with heads of `dim` elements: only whole
/// cache lines can be.
template <class E>
bool is_streamed(const Problem& p, std::int64_t dim) {
  const auto bytes = static_cast<std::int64_t>(sizeof(E)) * dim;
  return bytes % 64 == 0 && p.batch * p.heads * p.queries() * bytes >= kStreamedBytes;
}

/// Says to which tokens of a tensor sums are written: of some heads, `count` from the one with
/// number `first` on, along the innermost axis.
template <class T, class E>
void set_target(simd::Unpacking<T>& unpacking, const Plan& plan, const Work& work, Heads heads,
                const Operand<E>& to, const Coordinate& first, std::int64_t count,
                std::int64_t dim) {
  const Problem& p = plan.problem();
  unpacking.to = to.at(work.batch, heads.first, first);
  unpacking.stride = to.grid[2] * p.axes[2].dilation;
  unpacking.count = count;
  unpacking.dim = dim;
  unpacking.heads = static_cast<int>(heads.count);
  unpacking.head_stride = to.head;
  unpacking.streams = is_streamed<E>(p, dim);
}

/// Where sums of rows are written, and with what factors: one, and one of each row.
template <class E, class T>
struct Target {
  const Operand<E>& tensor;
  std::int64_t dim;
  double scale = 1.0;
  RowBuffer<T> scales = {};
};

/// Writes sums of the rows at hand, if there is a tensor for them.
template <class T, class E>
void unpack_rows(const simd::InstructionSet& isa, const Plan& plan, const Work& work,
                 const RowBuffer<T>& sums, const Target<E, T>& target) {
  const Problem& p = plan.problem();
  const Operand<E>& to = target.tensor;
  if (!to) return;
  for (std::int64_t line = 0; line < work.line_count; ++line) {
    const std::int64_t row = line * plan.line_rows;
    const Coordinate first =
        work.row_at(plan, {work.first[0], work.first[1] + line, work.first[2]});
    simd::Unpacking<T> unpacking;
    unpacking.from = sums.at(row);
    unpacking.padded = sums.dim;
    unpacking.from_stride = plan.head_rows * sums.dim;
    unpacking.scales = target.scales ? target.scales.at(row) : nullptr;
    unpacking.scales_stride = plan.head_rows;
    unpacking.scale = static_cast<T>(target.scale);
    set_target(unpacking, plan, work, {work.first_head, work.head_count}, to, first, work.row_count,
               target.dim);
    unpack(isa, p.dtype, unpacking);
  }
}

}  // namespace natten::detail::cpu::engine
