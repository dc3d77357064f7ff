#include <limits>

#include "engine.h"

namespace natten::detail::cpu::engine {
namespace {

/// Softmax attention, carried from piece to piece of the columns.
template <class E>
class Forward final : public Pass<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::isa;
  using Pass<E>::mask;
  using Pass<E>::plan;

  Forward(const Job& job, int threads)
      : Pass<E>(job, PassKind::forward, threads),
        query_(operand<const E>(job.problem, job.tensors, &Tensors::query)),
        key_(operand<const E>(job.problem, job.tensors, &Tensors::key)),
        value_(operand<const E>(job.problem, job.tensors, &Tensors::value)),
        output_(operand<E>(job.problem, job.tensors, &Tensors::output)),
        logsumexp_(operand<T>(job.problem, job.tensors, &Tensors::logsumexp)) {}

  void take_memory(Arena& arena) override {
    query_rows_ = take_rows<T>(arena, plan, plan.elements(plan.problem().head_dim));
    sums_ = take_rows<T>(arena, plan, plan.value_padded);
    largest_ = take_rows<T>(arena, plan, 1);
    total_ = take_rows<T>(arena, plan, 1);
  }

  void load_rows(const Work& work, Loader<T>& loader) override {
    const Problem& p = plan.problem();
    pack_rows(loader, plan, work, Source<E>{query_, p.head_dim, plan.query_scale()}, query_rows_);
    sums_.fill(plan, work, T(0));
    largest_.fill(plan, work, -std::numeric_limits<T>::infinity());
    total_.fill(plan, work, T(0));
  }

  void pack_line(const Work& work, const LineToPack<T>& line, Loader<T>& loader) override {
    const Problem& p = plan.problem();
    pack_columns(loader, plan, work, line, Source<E>{key_, p.head_dim, 1.0, mask},
                 Source<E>{value_, p.value_dim, 1.0, mask});
    if (mask) pack_mask(plan, work, line, mask);
  }

  void run_block(const Work& work, const Columns<T>&, const simd::Block<T>& block) override {
    const std::int64_t row = work.row_index(plan);
    simd::Forward<T> f{block};
    f.query = query_rows_.at(row);
    f.sums = sums_.at(row);
    f.largest = largest_.at(row);
    f.total = total_.at(row);
    this->kernels().forward(f);
  }

  void store_rows(const Work& work) override {
    // `largest` becomes logsumexp, and `total` the factor of sums.
    this->kernels().finish(largest_.data, total_.data, work.head_count * plan.head_rows);
    unpack_rows(isa, plan, work, sums_,
                Target<E, T>{output_, plan.problem().value_dim, 1.0, total_});
    if (logsumexp_)
      for_each_row(plan, work, [&](std::int64_t r, std::int64_t head, const Coordinate& token) {
        *logsumexp_.at(work.batch, head, token) = largest_[r];
      });
  }

 private:
  Operand<const E> query_, key_, value_;
  Operand<E> output_;
  Operand<T> logsumexp_;
  RowBuffer<T> query_rows_, sums_, largest_, total_;
};

}  // namespace

template <class E>
Phase forward(const Job& job, int threads) {
  return phase_of<E>(job, Forward<E>(job, threads));
}
template Phase forward<double>(const Job&, int);
template Phase forward<float>(const Job&, int);
template Phase forward<bfloat16>(const Job&, int);
template Phase forward<float16>(const Job&, int);

}  // namespace natten::detail::cpu::engine
