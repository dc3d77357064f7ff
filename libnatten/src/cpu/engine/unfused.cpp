#include <limits>
#include <type_traits>

#include "engine.h"

namespace natten::detail::cpu::engine {
namespace {

/// What qk, av and av_transpose have in common: they write or read weights by themselves. A buffer
/// between the kernels and attn has those of a block's rows.
template <class E>
class Unfused : public Pass<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::isa;
  using Pass<E>::mask;
  using Pass<E>::plan;

  void pack_line(const Work& work, const LineToPack<T>& line, Loader<T>& loader) override {
    const KeyMask hidden = rows_are_keys(plan.kind()) ? KeyMask{} : mask;
    pack_columns(loader, plan, work, line,
                 Source<E>{columns_, plan.problem().head_dim, 1.0, hidden}, line.memory.transposed,
                 line.memory.plain, plan.padded);
    if (hidden) pack_mask(plan, work, line, hidden);
  }

  /// Where rows are queries, as in attn.
  void locate_weights(simd::Line<T>& line, std::int64_t, const Coordinate& position,
                      const LinesSeen& seen) const override {
    const Axis* axes = plan.problem().axes;
    for (int n = 0; n < simd::kMostVectors; ++n)
      line.weights[n] = ((position[0] - seen.first_slot0) * axes[1].kernel_size + position[1] -
                         seen.first_slot1[n]) *
                        axes[2].kernel_size;
  }

 protected:
  /// `columns`: the tensor that has them.
  Unfused(const Job& job, PassKind kind, int threads, TensorView Tensors::*columns)
      : Pass<E>(job, kind, threads),
        columns_(operand<const E>(job.problem, job.tensors, columns)),
        attn_(operand<E>(job.problem, job.tensors, &Tensors::attn)) {}
  Unfused(const Unfused&) = default;
  ~Unfused() = default;

  /// For `per_row` weights, or a piece of the additional tokens, and a vector of padding.
  void take_weights(Arena& arena, std::int64_t per_row) {
    const std::int64_t additional = std::min(plan.problem().additional, kAdditionalPiece);
    stride_ = round_up(std::max(per_row, additional), plan.width) + plan.width;
    weights_ = arena.take<T>(weights_count());
  }
  std::int64_t weights_count() const { return simd::kMostVectors * plan.width * stride_; }
  /// The weights of a row of one of a block's vectors.
  T* weights_of(std::int64_t vector, std::int64_t row) const {
    return weights_ + (vector * plan.width + row) * stride_;
  }
  simd::Weights<T> kernel_arguments(const simd::Block<T>& block) const {
    simd::Weights<T> w{block};
    w.weights = weights_;
    w.stride = stride_;
    w.vector_stride = plan.width * stride_;
    return w;
  }

  /// Visits the rows of a block, which are queries, in runs of tokens that are `token_stride` apart
  /// in attn: `f(weights of the first, its place in attn, rows)`.
  template <class F>
  void for_each_weights(const Work& work, const Columns<T>& columns, const simd::Block<T>& block,
                        F&& f) const {
    const Problem& p = plan.problem();
    const std::int64_t slot = columns.are_additional() ? p.window_size() + columns.part.begin : 0;
    for (std::int64_t v = 0; v < (block.adjacent ? 1 : block.vectors); ++v) {
      const Coordinate query =
          work.row_at(plan, {work.first[0], work.first[1] + v, work.first[2] + work.row});
      f(weights_of(v, 0), attn_.at(work.batch, work.first_head + work.head, query) + slot,
        block.rows);
    }
  }
  std::int64_t token_stride() const { return attn_.grid[2] * plan.problem().axes[2].dilation; }
  std::int64_t line_stride() const { return attn_.grid[1] * plan.problem().axes[1].dilation; }
  std::int64_t weights_stride() const { return stride_; }
  /// Slots of a row that belong to the columns.
  std::int64_t slots_of(const Columns<T>& columns) const {
    return columns.are_additional() ? columns.part.size() : plan.problem().window_size();
  }

  Operand<const E> columns_;
  Operand<E> attn_;

 private:
  T* weights_ = nullptr;
  std::int64_t stride_ = 0;  // from a row to the next
};

/// Scores, which are written by slot.
template <class E>
class Qk final : public Unfused<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::isa;
  using Pass<E>::plan;

  Qk(const Job& job, int threads)
      : Unfused<E>(job, PassKind::qk, threads, &Tensors::key),
        query_(operand<const E>(job.problem, job.tensors, &Tensors::query)) {
    for (const Axis& axis : job.problem.axes)
      has_empty_slots_ = has_empty_slots_ || axis.is_causal || axis.boundary == Boundary::cut;
  }

  void take_memory(Arena& arena) override {
    query_rows_ = take_rows<T>(arena, plan, plan.problem().head_dim);
    this->take_weights(arena, plan.problem().window_size());
  }

  void load_rows(const Work& work, Loader<T>& loader) override {
    pack_rows(loader, plan, work, Source<E>{query_, plan.problem().head_dim}, query_rows_);
  }

  void run_block(const Work& work, const Columns<T>& columns,
                 const simd::Block<T>& block) override {
    const Problem& p = plan.problem();
    const T empty = p.empty_slots == EmptySlots::zero ? T(0) : -std::numeric_limits<T>::infinity();
    if (has_empty_slots_ && !columns.are_additional())
      std::fill_n(this->weights_of(0, 0), this->weights_count(), empty);
    simd::Weights<T> w = this->kernel_arguments(block);
    w.hidden_score = empty;
    w.rows = query_rows_.at(work.row_index(plan));
    this->kernels().score(w);
    this->for_each_weights(work, columns, block, [&](const T* weights, E* attn, int rows) {
      simd::Unpacking<T> unpacking;
      unpacking.from = weights;
      unpacking.padded = this->weights_stride();
      unpacking.to = attn;
      unpacking.stride = this->token_stride();
      unpacking.count = rows;
      unpacking.dim = this->slots_of(columns);
      unpack(isa, p.dtype, unpacking);
    });
  }

  void store_rows(const Work&) override {}  // run_block has

 private:
  Operand<const E> query_;
  bool has_empty_slots_ = false;  // of windows that are smaller than others
  RowBuffer<T> query_rows_;
};

/// Columns summed up with given weights.
template <class E>
class WeightedSums : public Unfused<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::isa;
  using Pass<E>::mask;
  using Pass<E>::plan;

  void load_rows(const Work& work, Loader<T>&) override { sums_.fill(plan, work, T(0)); }

  void run_block(const Work& work, const Columns<T>& columns,
                 const simd::Block<T>& block) override {
    simd::Weights<T> w = this->kernel_arguments(block);
    load_weights(work, columns, w);
    w.sums = sums_.at(work.row_index(plan));
    this->kernels().weigh(w);
  }

  void store_rows(const Work& work) override {
    if (rows_are_keys(plan.kind())) clear_hidden(plan, work, mask, sums_);
    unpack_rows(isa, plan, work, sums_, Target<E, T>{output_, plan.problem().head_dim});
  }

 protected:
  WeightedSums(const Job& job, PassKind kind, int threads, TensorView Tensors::*columns,
               TensorView Tensors::*output)
      : Unfused<E>(job, kind, threads, columns),
        output_(operand<E>(job.problem, job.tensors, output)) {}
  WeightedSums(const WeightedSums&) = default;
  ~WeightedSums() = default;

  void take_rows_and_weights(Arena& arena, std::int64_t weights_per_row) {
    sums_ = take_rows<T>(arena, plan, plan.padded);
    this->take_weights(arena, weights_per_row);
  }

 private:
  /// Fills the buffer from attn, or has the kernel read attn itself.
  virtual void load_weights(const Work&, const Columns<T>&, simd::Weights<T>&) = 0;

  Operand<E> output_;
  RowBuffer<T> sums_;
};

/// Values with the weights of queries, the rows.
template <class E>
class Av final : public WeightedSums<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::isa;
  using Pass<E>::plan;

  Av(const Job& job, int threads)
      : WeightedSums<E>(job, PassKind::av, threads, &Tensors::value, &Tensors::output) {}

  void take_memory(Arena& arena) override {
    this->take_rows_and_weights(arena, plan.problem().window_size());
  }

 private:
  void load_weights(const Work& work, const Columns<T>& columns, simd::Weights<T>& w) override {
    if constexpr (std::is_same_v<E, T>) {
      w.stride = this->token_stride();
      bool is_first = true;
      this->for_each_weights(work, columns, w.block, [&](T*, E* attn, int rows) {
        if (is_first) w.weights = attn;
        is_first = false;
        // The next block's, of which the last of a line may not be there.
        constexpr auto per_line = static_cast<std::int64_t>(64 / sizeof(T));
        for (std::int64_t r = 0; r < std::min<std::int64_t>(rows, work.row_count - work.row - rows);
             ++r)
          for (std::int64_t slot = 0; slot < this->slots_of(columns); slot += per_line)
            __builtin_prefetch(attn + (rows + r) * w.stride + slot);
      });
      w.vector_stride = w.block.adjacent ? plan.width * w.stride : this->line_stride();
      return;
    }
    this->for_each_weights(work, columns, w.block, [&](T* weights, const E* attn, int rows) {
      simd::Packing<T> packing;
      packing.from = attn;
      packing.stride = this->token_stride();
      packing.count = rows;
      packing.dim = this->slots_of(columns);
      packing.plain = weights;
      packing.padded = this->weights_stride();
      pack(isa, plan.problem().dtype, packing);
    });
  }
};

/// Queries, the columns, with the weights that they give to keys, the rows.
template <class E>
class AvTranspose final : public WeightedSums<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::plan;

  AvTranspose(const Job& job, int threads)
      : WeightedSums<E>(job, PassKind::av_transpose, threads, &Tensors::query, &Tensors::key) {}

  void take_memory(Arena& arena) override {
    this->take_rows_and_weights(arena, plan.lines * plan.ring2);
  }

  void locate_weights(simd::Line<T>& line, std::int64_t number, const Coordinate&,
                      const LinesSeen&) const override {
    std::fill_n(line.weights, simd::kMostVectors, number * plan.ring2);
  }

 private:
  /// Collects weights from the windows of the queries.
  void load_weights(const Work& work, const Columns<T>& columns, simd::Weights<T>& w) override {
    const simd::Block<T>& block = w.block;
    const Problem& p = plan.problem();
    const Axis* axes = p.axes;
    const std::int64_t low = block.begin[0], high = block.end[block.rows - 1];
    const std::int64_t first_row = work.first[2] + work.row;  // of the block
    for (std::int64_t l = 0; l < block.line_count; ++l) {
      const simd::Line<T>& line = block.lines[l];
      Coordinate position = columns.seen->line(l);
      const std::int64_t slot0 = first_slot(axes[0], work.group[0], position[0]);
      const std::int64_t slot1 = first_slot(axes[1], work.group[1], position[1]);
      for (std::int64_t c = low; c < high; ++c) {
        position[2] = columns.part.begin + c;
        const Interval seen2 = window(axes[2], work.group[2], position[2]);
        const std::int64_t slot2 = first_slot(axes[2], work.group[2], position[2]);
        const Coordinate query = work.column_at(plan, position);
        const bool is_given = query[0] >= 0 && query[1] >= 0 && query[2] >= 0;
        const E* attn = is_given ? this->attn_.at(work.batch, work.first_head, query) : nullptr;
        for (int v = line.first_vector; v < std::min(line.last_vector, block.vectors); ++v) {
          const std::int64_t key1 = work.first[1] + (block.adjacent ? 0 : v);
          const std::int64_t slot =
              ((work.first[0] - slot0) * axes[1].kernel_size + key1 - slot1) * axes[2].kernel_size;
          const std::int64_t first = block.adjacent ? v * plan.width : 0;
          const std::int64_t last = std::min<std::int64_t>(first + plan.width, block.rows);
          for (std::int64_t r = std::max(first, seen2.begin - first_row);
               r < std::min(last, seen2.end - first_row); ++r)
            this->weights_of(v, r - first)[line.weights[v] + c - block.begin[r]] =
                is_given ? static_cast<T>(attn[slot + first_row + r - slot2]) : T(0);
        }
      }
    }
  }
};

}  // namespace

template <class E>
Phase qk(const Job& job, int threads) {
  return phase_of<E>(job, Qk<E>(job, threads));
}
template Phase qk<double>(const Job&, int);
template Phase qk<float>(const Job&, int);
template Phase qk<bfloat16>(const Job&, int);
template Phase qk<float16>(const Job&, int);

template <class E>
Phase av(const Job& job, int threads) {
  return phase_of<E>(job, Av<E>(job, threads));
}
template Phase av<double>(const Job&, int);
template Phase av<float>(const Job&, int);
template Phase av<bfloat16>(const Job&, int);
template Phase av<float16>(const Job&, int);

template <class E>
Phase av_transpose(const Job& job, int threads) {
  return phase_of<E>(job, AvTranspose<E>(job, threads));
}
template Phase av_transpose<double>(const Job&, int);
template Phase av_transpose<float>(const Job&, int);
template Phase av_transpose<bfloat16>(const Job&, int);
template Phase av_transpose<float16>(const Job&, int);

}  // namespace natten::detail::cpu::engine
