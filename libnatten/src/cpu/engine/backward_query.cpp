#include <limits>
#include <memory>

#include "engine.h"
#include "exchange.h"
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

  BackwardQuery(const Job& job, const Plan& given)
      : Pass<E>(job, given),
        query_(operand<const E>(job.problem, job.tensors, &Tensors::query)),
        key_(operand<const E>(job.problem, job.tensors, &Tensors::key)),
        value_(operand<const E>(job.problem, job.tensors, &Tensors::value)),
        grad_output_(operand<const E>(job.problem, job.tensors, &Tensors::grad_output)),
        logsumexp_(operand<const T>(job.problem, job.tensors, &Tensors::logsumexp)),
        grad_logsumexp_(operand<const T>(job.problem, job.tensors, &Tensors::grad_logsumexp)),
        grad_query_(operand<E>(job.problem, job.tensors, &Tensors::grad_query)),
        grad_key_(operand<E>(job.problem, job.tensors, &Tensors::grad_key)),
        grad_value_(operand<E>(job.problem, job.tensors, &Tensors::grad_value)),
        workspace_(job, plan),
        exchange_(plan.sums_columns ? std::make_shared<Exchange<T>>() : nullptr) {}

  void take_memory(Arena& arena) override {
    const Problem& p = plan.problem();
    query_rows_ = take_rows<T>(arena, plan, plan.elements(p.head_dim));
    grad_output_rows_ = take_rows<T>(arena, plan, plan.elements(p.value_dim));
    if (plan.partial.additional > 0 || gives_to_columns(plan)) {
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
    pack_rows(loader, plan, work, Source<E>{query_, p.head_dim, plan.query_scale()}, query_rows_,
              plain_query_);
    pack_rows(loader, plan, work, Source<E>{grad_output_, p.value_dim}, grad_output_rows_,
              plain_grad_output_);
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

  void locate_sums(simd::Line<T>& line, const Work& work, std::int64_t first) const override {
    if (plan.partial.additional == 0) return;
    line.grad_key = workspace_.grad_additional_keys(work) + first * plan.padded;
    line.grad_value = workspace_.grad_additional_values(work) + first * plan.value_padded;
  }

  void run_block(const Work& work, const Columns<T>&, const simd::Block<T>& block) override {
    const std::int64_t row = work.row_index(plan);
    simd::BackwardQuery<T> f{block};
    f.query = query_rows_.at(row);
    f.grad_output = grad_output_rows_.at(row);
    if (plain_query_) {
      f.plain_query = plain_query_.at(row);
      f.plain_grad_output = plain_grad_output_.at(row);
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

  void store_columns(const Work& work, const LineSums<T>& sums) override {
    clear_hidden_columns(work, sums);
    if (plan.shared_axis() == 1) {
      const std::int64_t line = sums.first[1];
      for (const std::int64_t lower : {work.sweep - 1, work.sweep})
        if (plan.columns_of_cut(1, work.group[1], lower).contains(line) &&
            plan.columns_of_cut(1, work.group[1], lower + 1).contains(line))
          return meet(work, sums, 0, sums.count, lower);
      return write(work, sums, 0, sums.count);
    }
    // The first columns are the strip's before too, the last ones the next one's.
    const std::int64_t begin = sums.first[2], end = begin + sums.count;
    const Interval before = plan.columns_of_cut(2, work.group[2], work.strip - 1);
    const Interval next = plan.columns_of_cut(2, work.group[2], work.strip + 1);
    const std::int64_t own = before.size() > 0 ? std::max(begin, before.end) : begin;
    const std::int64_t shared = next.size() > 0 ? std::min(end, next.begin) : end;
    if (begin < own) meet(work, sums, 0, own - begin, work.strip - 1);
    if (own < shared) write(work, sums, own - begin, shared - begin);
    if (shared < end) meet(work, sums, shared - begin, end - begin, work.strip);
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
  /// Those of keys to which the rows at hand give sums.
  Heads heads_of_sums(const Work& work) const {
    const Problem& p = plan.problem();
    const std::int64_t group = p.heads / p.kv_heads;
    return {work.first_head / group, work.head_count / group};
  }
  /// Sets the sums of columns that are hidden keys to 0, as queries that are no numbers may have
  /// spoiled them.
  void clear_hidden_columns(const Work& work, const LineSums<T>& sums) const {
    if (!mask) return;
    for_each_column(work, sums, 0, sums.count, [&](std::int64_t column, const Coordinate& key) {
      if (!mask.hides(work.batch, key)) return;
      for_each_head(work, sums,
                    [&](const Operand<E>&, std::int64_t, T* of, std::int64_t, std::int64_t padded) {
                      std::fill_n(of + column * padded, padded, T(0));
                    });
    });
  }
  /// Columns first to last of a line: `f(column, its number among the keys)`.
  template <class F>
  void for_each_column(const Work& work, const LineSums<T>& sums, std::int64_t first,
                       std::int64_t last, F&& f) const {
    Coordinate key = work.column_at(plan, {sums.first[0], sums.first[1], sums.first[2] + first});
    for (std::int64_t column = first; column < last; ++column) {
      f(column, key);
      key[2] += plan.problem().axes[2].dilation;
    }
  }
  /// Both gradients, if they are wanted: `f(tensor, sums, dim, padded)`.
  template <class F>
  void for_each_gradient(const LineSums<T>& sums, F&& f) const {
    const Problem& p = plan.problem();
    if (sums.memory.grad_key) f(grad_key_, sums.memory.grad_key, p.head_dim, plan.padded);
    if (sums.memory.grad_value)
      f(grad_value_, sums.memory.grad_value, p.value_dim, plan.value_padded);
  }
  /// Likewise head by head: `f(tensor, head, its sums, dim, padded)`.
  template <class F>
  void for_each_head(const Work& work, const LineSums<T>& sums, F&& f) const {
    const Heads heads = heads_of_sums(work);
    for_each_gradient(sums,
                      [&](const Operand<E>& to, T* of, std::int64_t dim, std::int64_t padded) {
                        for (std::int64_t h = 0; h < heads.count; ++h)
                          f(to, heads.first + h, of + h * sums.head_stride, dim, padded);
                      });
  }
  /// Writes sums of columns first to last of a line; `stays`: in the caches, as they are read soon.
  void write(const Work& work, const LineSums<T>& sums, std::int64_t first, std::int64_t last,
             bool stays = false) const {
    const Coordinate key =
        work.column_at(plan, {sums.first[0], sums.first[1], sums.first[2] + first});
    for_each_gradient(
        sums, [&](const Operand<E>& to, const T* from, std::int64_t dim, std::int64_t padded) {
          simd::Unpacking<T> unpacking;
          unpacking.from = from + first * padded;
          unpacking.padded = padded;
          unpacking.from_stride = sums.head_stride;
          set_target(unpacking, plan, work, heads_of_sums(work), to, key, last - first, dim);
          if (stays) unpacking.streams = false;
          unpack(isa, plan.problem().dtype, unpacking);
        });
  }
  /// As `write`, of columns that another item gives sums to. Tensors of sums can hold those of the
  /// item that comes first.
  void meet(const Work& work, const LineSums<T>& sums, std::int64_t first, std::int64_t last,
            std::int64_t lower) const {
    constexpr bool kHolds = std::is_same_v<E, T>;
    const Heads heads = heads_of_sums(work);
    const std::int64_t elements =
        kHolds ? 0 : (last - first) * heads.count * (plan.padded + plan.value_padded);
    exchange_->meet(
        {work.batch, heads.first, work.token(plan, 0, sums.first[0]),
         work.token(plan, 1, sums.first[1]), work.group[2], lower},
        elements,
        [&](T* memory) {
          if (kHolds) return write(work, sums, first, last, true);
          for_each_head(work, sums,
                        [&](const Operand<E>&, std::int64_t, const T* own, std::int64_t,
                            std::int64_t padded) {
                          memory = std::copy(own + first * padded, own + last * padded, memory);
                        });
        },
        [&](const T* memory) {
          for_each_head(work, sums,
                        [&](const Operand<E>& to, std::int64_t head, T* own, std::int64_t dim,
                            std::int64_t padded) {
                          for_each_column(work, sums, first, last,
                                          [&](std::int64_t column, const Coordinate& key) {
                                            T* sum = own + column * padded;
                                            if constexpr (kHolds) {
                                              const T* left = to.at(work.batch, head, key);
                                              for (std::int64_t d = 0; d < dim; ++d)
                                                sum[d] += left[d];
                                            } else {
                                              for (std::int64_t d = 0; d < padded; ++d)
                                                sum[d] += *memory++;
                                            }
                                          });
                        });
          write(work, sums, first, last);
        });
  }

  Operand<const E> query_, key_, value_, grad_output_;
  Operand<const T> logsumexp_, grad_logsumexp_;
  Operand<E> grad_query_, grad_key_, grad_value_;
  Workspace<T> workspace_;
  std::shared_ptr<Exchange<T>> exchange_;  // of all threads
  RowBuffer<T> query_rows_, grad_output_rows_, plain_query_, plain_grad_output_;
  RowBuffer<T> sums_, total_, logsumexp_rows_, row_term_, grad_logsumexp_rows_;
};

}  // namespace

template <class E>
Phase backward_query(const Job& job, const Plan& plan) {
  return phase_of<E>(job, BackwardQuery<E>(job, plan));
}
template Phase backward_query<double>(const Job&, const Plan&);
template Phase backward_query<float>(const Job&, const Plan&);
template Phase backward_query<bfloat16>(const Job&, const Plan&);
template Phase backward_query<float16>(const Job&, const Plan&);

}  // namespace natten::detail::cpu::engine
