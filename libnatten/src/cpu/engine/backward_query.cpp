#include <limits>

#include "engine.h"
#include "workspace.h"

namespace natten::detail::cpu::engine {
namespace {

/// Gradients of queries, and those of biases and additional tokens, which many queries add to. Also
/// makes the row terms, which the gradients of keys need. See simd::BackwardQuery for its rounds.
template <class E>
class BackwardQuery final : public Pass<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::isa;
  using Pass<E>::mask;
  using Pass<E>::plan;

  BackwardQuery(const Job& job, int threads)
      : Pass<E>(job, PassKind::backward_query, threads),
        query_(operand<const E>(job.problem, job.tensors, &Tensors::query)),
        key_(operand<const E>(job.problem, job.tensors, &Tensors::key)),
        value_(operand<const E>(job.problem, job.tensors, &Tensors::value)),
        grad_output_(operand<const E>(job.problem, job.tensors, &Tensors::grad_output)),
        logsumexp_(operand<const T>(job.problem, job.tensors, &Tensors::logsumexp)),
        grad_logsumexp_(operand<const T>(job.problem, job.tensors, &Tensors::grad_logsumexp)),
        grad_query_(operand<E>(job.problem, job.tensors, &Tensors::grad_query)),
        workspace_(job, plan) {}

  void take_memory(Arena& arena) override {
    const Problem& p = plan.problem();
    query_rows_ = take_rows<T>(arena, plan, plan.elements(p.head_dim));
    grad_output_rows_ = take_rows<T>(arena, plan, plan.elements(p.value_dim));
    if (plan.partial.additional > 0) {
      plain_query_ = take_rows<T>(arena, plan, plan.padded);
      plain_grad_output_ = take_rows<T>(arena, plan, plan.value_padded);
    }
    sums_ = take_rows<T>(arena, plan, plan.padded);
    for (RowBuffer<T>* numbers : {&total_, &logsumexp_rows_, &row_term_, &grad_logsumexp_rows_})
      *numbers = take_rows<T>(arena, plan, 1);
  }

  void begin_unit(const Work& work) override {
    if (plan.partial.elements() > 0) workspace_.clear_partial_sums(work);
  }

  void load_rows(const Work& work, Loader<T>& loader) override {
    const Problem& p = plan.problem();
    // Together, if they are alike.
    const bool apart = plan.in_pairs && plain_query_;
    const RowBuffer<T> none;
    pack_rows(loader, plan, work, Source<E>{query_, p.head_dim, plan.query_scale()}, query_rows_,
              apart ? none : plain_query_);
    pack_rows(loader, plan, work, Source<E>{grad_output_, p.value_dim}, grad_output_rows_,
              apart ? none : plain_grad_output_);
    if (apart) {
      Loader<T> numbers(isa, p.dtype);
      pack_rows(numbers, plan, work, Source<E>{query_, p.head_dim, p.scale}, none, plain_query_);
      pack_rows(numbers, plan, work, Source<E>{grad_output_, p.value_dim}, none,
                plain_grad_output_);
      numbers.run();
    }
    sums_.fill(plan, work, T(0));
    row_term_.fill(plan, work, T(0));
    // Lost in a sum of weights, and can be divided by where there are none.
    total_.fill(plan, work, std::numeric_limits<T>::min());
    for_each_row(plan, work, [&](std::int64_t r, std::int64_t head, const Coordinate& token) {
      logsumexp_rows_[r] = weights_reference(*logsumexp_.at(work.batch, head, token));
      grad_logsumexp_rows_[r] =
          grad_logsumexp_ ? *grad_logsumexp_.at(work.batch, head, token) : T(0);
    });
  }

  int rounds() const override { return plan.in_pieces || plan.problem().additional > 0 ? 2 : 1; }

  void pack_line(const Work& work, const LineToPack<T>& line, Loader<T>& loader) override {
    const Problem& p = plan.problem();
    pack_columns(loader, plan, work, line, Source<E>{key_, p.head_dim, 1.0, mask},
                 Source<E>{value_, p.value_dim, 1.0, mask});
    if (mask) pack_mask(plan, work, line, mask);
  }

  T* grad_bias(const Work& work) const override { return workspace_.grad_bias(work); }

  void run_block(const Work& work, const Columns<T>& columns,
                 const simd::Block<T>& block) override {
    const std::int64_t row = work.row_index(plan);
    simd::BackwardQuery<T> f{block};
    f.query = query_rows_.at(row);
    f.grad_output = grad_output_rows_.at(row);
    if (columns.are_additional() && plan.partial.additional > 0) {
      f.plain_query = plain_query_.at(row);
      f.plain_grad_output = plain_grad_output_.at(row);
      const std::int64_t first = columns.part.begin;
      f.grad_key = workspace_.grad_additional_keys(work) + first * plan.padded;
      f.grad_value = workspace_.grad_additional_values(work) + first * plan.value_padded;
    }
    f.logsumexp = logsumexp_rows_.at(row);
    f.grad_logsumexp = grad_logsumexp_rows_.at(row);
    f.row_term = row_term_.at(row);
    f.total = total_.at(row);
    f.sum_row_term = work.round == 0;
    f.sum_gradients = work.round == rounds() - 1;
    f.grad_query = sums_.at(row);
    this->kernels().backward_query(f);
  }

  void end_round(const Work& work) override {
    if (work.round == rounds() - 1) return;
    for (std::int64_t r = 0; r < work.head_count * plan.head_rows; ++r)
      row_term_[r] = row_term_[r] / total_[r] - grad_logsumexp_rows_[r];
  }

  void store_rows(const Work& work) override {
    const Problem& p = plan.problem();
    for (std::int64_t r = 0; r < work.head_count * plan.head_rows; ++r) total_[r] = 1 / total_[r];
    unpack_rows(isa, plan, work, sums_, Target<E, T>{grad_query_, p.head_dim, p.scale, total_});
    for_each_row(plan, work, [&](std::int64_t r, std::int64_t head, const Coordinate& token) {
      *workspace_.row_term(work.batch, head, token) = row_term_[r];
    });
  }

 private:
  Operand<const E> query_, key_, value_, grad_output_;
  Operand<const T> logsumexp_, grad_logsumexp_;
  Operand<E> grad_query_;
  Workspace<T> workspace_;
  RowBuffer<T> query_rows_, grad_output_rows_, plain_query_, plain_grad_output_;
  RowBuffer<T> sums_, total_, logsumexp_rows_, row_term_, grad_logsumexp_rows_;
};

}  // namespace

template <class E>
Phase backward_query(const Job& job, int threads) {
  return phase_of<E>(job, BackwardQuery<E>(job, threads));
}
template Phase backward_query<double>(const Job&, int);
template Phase backward_query<float>(const Job&, int);
template Phase backward_query<bfloat16>(const Job&, int);
template Phase backward_query<float16>(const Job&, int);

}  // namespace natten::detail::cpu::engine
