#include <limits>

#include "engine.h"
#include "workspace.h"

namespace natten::detail::cpu::engine {
namespace {

/// Gradients of keys and values, which gather from the queries that see them.
template <class E>
class BackwardKey final : public Pass<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::isa;
  using Pass<E>::mask;
  using Pass<E>::plan;

  BackwardKey(const Job& job, int threads)
      : Pass<E>(job, PassKind::backward_key, threads),
        query_(operand<const E>(job.problem, job.tensors, &Tensors::query)),
        key_(operand<const E>(job.problem, job.tensors, &Tensors::key)),
        value_(operand<const E>(job.problem, job.tensors, &Tensors::value)),
        grad_output_(operand<const E>(job.problem, job.tensors, &Tensors::grad_output)),
        logsumexp_(operand<const T>(job.problem, job.tensors, &Tensors::logsumexp)),
        grad_key_(operand<E>(job.problem, job.tensors, &Tensors::grad_key)),
        grad_value_(operand<E>(job.problem, job.tensors, &Tensors::grad_value)),
        workspace_(job, plan) {}

  void take_memory(Arena& arena) override {
    const Problem& p = plan.problem();
    key_rows_ = take_rows<T>(arena, plan, plan.elements(p.head_dim));
    value_rows_ = take_rows<T>(arena, plan, plan.elements(p.value_dim));
    key_sums_ = take_rows<T>(arena, plan, plan.padded);
    value_sums_ = take_rows<T>(arena, plan, plan.value_padded);
  }

  void load_rows(const Work& work, Loader<T>& loader) override {
    const Problem& p = plan.problem();
    pack_rows(loader, plan, work, Source<E>{key_, p.head_dim, 1.0, mask}, key_rows_);
    pack_rows(loader, plan, work, Source<E>{value_, p.value_dim, 1.0, mask}, value_rows_);
    key_sums_.fill(plan, work, T(0));
    value_sums_.fill(plan, work, T(0));
  }

  void pack_line(const Work& work, const LineToPack<T>& line, Loader<T>& loader) override {
    const Problem& p = plan.problem();
    const LineMemory<T>& to = line.memory;
    pack_columns(loader, plan, work, line, Source<E>{query_, p.head_dim, plan.query_scale()},
                 Source<E>{grad_output_, p.value_dim});
    for_each_run(
        plan, work, line.first, line.count,
        [&](const Coordinate* first, std::int64_t start, std::int64_t count) {
          Coordinate query = first ? *first : Coordinate{};
          for (std::int64_t c = start; c < start + count; ++c) {
            for (std::int64_t h = 0; h < work.column_head_count; ++h) {
              const std::int64_t head = work.column_head + h;
              const std::int64_t at = h * line.head_stride + c;
              // A query that is not given has no weights.
              to.logsumexp[at] = first ? weights_reference(*logsumexp_.at(work.batch, head, query))
                                       : std::numeric_limits<T>::infinity();
              to.row_term[at] = first ? *workspace_.row_term(work.batch, head, query) : T(0);
            }
            query[2] += p.axes[2].dilation;
          }
        });
  }

  void run_block(const Work& work, const Columns<T>&, const simd::Block<T>& block) override {
    const std::int64_t row = work.row_index(plan);
    simd::BackwardKey<T> f{block};
    f.key = key_rows_.at(row);
    f.value = value_rows_.at(row);
    f.grad_key = key_sums_.at(row);
    f.grad_value = value_sums_.at(row);
    this->kernels().backward_key(f);
  }

  void store_rows(const Work& work) override {
    const Problem& p = plan.problem();
    clear_hidden(plan, work, mask, key_sums_);
    clear_hidden(plan, work, mask, value_sums_);
    unpack_rows(isa, plan, work, key_sums_,
                Target<E, T>{grad_key_, p.head_dim, plan.score_scale()});
    unpack_rows(isa, plan, work, value_sums_, Target<E, T>{grad_value_, p.value_dim});
  }

 private:
  Operand<const E> query_, key_, value_, grad_output_;
  Operand<const T> logsumexp_;
  Operand<E> grad_key_, grad_value_;
  Workspace<T> workspace_;
  RowBuffer<T> key_rows_, value_rows_, key_sums_, value_sums_;
};

}  // namespace

template <class E>
Phase backward_key(const Job& job, int threads) {
  return phase_of<E>(job, BackwardKey<E>(job, threads));
}
template Phase backward_key<double>(const Job&, int);
template Phase backward_key<float>(const Job&, int);
template Phase backward_key<bfloat16>(const Job&, int);
template Phase backward_key<float16>(const Job&, int);

}  // namespace natten::detail::cpu::engine
