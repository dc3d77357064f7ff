#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <vector>

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
    kept_ =
        arena.take<T>(plan.kept.count * static_cast<std::int64_t>(this->kernels().batch_elements));
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

  int rounds() const override { return plan.has_pieces() || plan.problem().additional > 0 ? 2 : 1; }

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
    if (const KeptPart part(plan, work); part.count > 0) {
      f.kept_batches = part.count;
      f.kept = kept_ + part.first * static_cast<std::int64_t>(this->kernels().batch_elements) +
               part.first_step * plan.width;
    }
    this->kernels().backward_query(f);
  }

  void end_round(const Work& work) override {
    if (work.round == rounds() - 1) return;
    for (std::int64_t r = 0; r < work.head_count * plan.head_rows; ++r)
      row_term_[r] = row_term_[r] / total_[r] - grad_logsumexp_rows_[r];
  }

  void store_columns(const Work& work, const LineSums<T>& sums) override {
    clear_hidden_columns(work, sums);
    Interval rest{sums.first[2], sums.first[2] + sums.count};
    const std::int64_t turn = plan.grid.turn(2);
    if (rest.size() > turn) {  // it ends with tokens that it begins with
      rest.end = rest.begin + turn;
      for_each_head(
          work, sums,
          [&](const Operand<E>&, std::int64_t, T* own, std::int64_t, std::int64_t padded) {
            const T* again = own + turn * padded;
            for (std::int64_t i = 0; i < (sums.count - turn) * padded; ++i) own[i] += again[i];
          });
    }
    std::vector<Interval> parts;
    plan.for_each_shared(2, work.group[2], work.strip, [&](const Interval& part) {
      if (part.begin >= rest.end) return;
      parts.push_back({part.begin, std::min(part.end, rest.end)});
    });
    std::sort(parts.begin(), parts.end(),
              [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
    const bool shared0 = is_shared(0, work, sums.first[0]),
               shared1 = is_shared(1, work, sums.first[1]);
    const auto give_part = [&](const Interval& part, bool shared2) {
      if (part.size() > 0) give(work, sums, part, {shared0, shared1, shared2});
    };
    for (const Interval& part : parts) {
      give_part({rest.begin, part.begin}, false);
      give_part(part, true);
      rest.begin = part.end;
    }
    give_part(rest, false);
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
    const Interval all{sums.first[2], sums.first[2] + sums.count};
    for_each_column(work, sums, all, [&](std::int64_t column, const Coordinate& key) {
      if (!mask.hides(work.batch, key)) return;
      for_each_head(work, sums,
                    [&](const Operand<E>&, std::int64_t, T* of, std::int64_t, std::int64_t padded) {
                      std::fill_n(of + column * padded, padded, T(0));
                    });
    });
  }
  /// A part of a line, in runs: `f(column, number of its key, columns)`.
  template <class F>
  void for_each_run_of(const Work& work, const LineSums<T>& sums, const Interval& part,
                       F&& f) const {
    for_each_run(plan, work, {sums.first[0], sums.first[1], part.begin}, part.size(),
                 [&](const Coordinate* key, std::int64_t at, std::int64_t count) {
                   f(part.begin - sums.first[2] + at, *key, count);
                 });
  }
  /// Likewise column by column: `f(column, number of its key)`.
  template <class F>
  void for_each_column(const Work& work, const LineSums<T>& sums, const Interval& part,
                       F&& f) const {
    for_each_run_of(work, sums, part, [&](std::int64_t column, Coordinate key, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) {
        f(column + i, key);
        key[2] += plan.problem().axes[2].dilation;
      }
    });
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
  /// Writes the sums of a part of a line; `stays`: in the caches, as they are read soon.
  void write(const Work& work, const LineSums<T>& sums, const Interval& part, bool stays) const {
    for_each_gradient(sums, [&](const Operand<E>& to, const T* from, std::int64_t dim,
                                std::int64_t padded) {
      for_each_run_of(work, sums, part,
                      [&](std::int64_t column, const Coordinate& key, std::int64_t count) {
                        simd::Unpacking<T> unpacking;
                        unpacking.from = from + column * padded;
                        unpacking.padded = padded;
                        unpacking.from_stride = sums.head_stride;
                        set_target(unpacking, plan, work, heads_of_sums(work), to, key, count, dim);
                        if (stays) unpacking.streams = false;
                        unpack(isa, plan.problem().dtype, unpacking);
                      });
    });
  }
  /// Along which axes tokens are visited once more.
  using Shared = std::array<bool, kMaxRank>;
  /// Along axis 0 or 1, those of a line.
  bool is_shared(int axis, const Work& work, std::int64_t position) const {
    bool found = false;
    plan.for_each_shared(axis, work.group[axis], axis == 0 ? work.slab : work.sweep,
                         [&](const Interval& part) { found = found || part.contains(position); });
    return found;
  }
  /// Writes the sums of a part of a line, once those of all visits of its tokens are in them: two
  /// meet along each axis in turn, so that what is added to what does not depend on who is first.
  void give(const Work& work, const LineSums<T>& sums, const Interval& part,
            const Shared& shared) const {
    const Coordinate line = plan.line_in_ring({sums.first[0], sums.first[1], part.begin});
    // Known by this item's positions and cuts, along axes where visits have met by the token.
    typename Exchange<T>::Key key{
        work.batch, heads_of_sums(work).first, 0, 0, 0, 0, work.slab, work.sweep, work.strip};
    for (int axis = 0; axis < kMaxRank; ++axis) key[3 + axis] = work.token(plan, axis, line[axis]);
    // A tensor of sums can hold one that waits, instead of memory.
    const bool holds = std::is_same_v<E, T> && std::count(shared.begin(), shared.end(), true) == 1;
    for (int axis = 0; axis < kMaxRank; ++axis) {
      const Axis& a = plan.problem().axes[axis];
      if (plan.grid.is_circular(axis)) key[3 + axis] = floor_mod(key[3 + axis], a.grid_length);
      key[6 + axis] = -1;
      if (!shared[axis]) continue;
      key[2] = axis;
      if (!meet(work, sums, part, key, holds)) return;
    }
    write(work, sums, part, false);
  }
  /// Leaves sums for the other visit, or adds what that has left to them. Tells which.
  bool meet(const Work& work, const LineSums<T>& sums, const Interval& part,
            const typename Exchange<T>::Key& key, bool holds) const {
    const std::int64_t first = part.begin - sums.first[2];
    const std::int64_t elements =
        holds ? 0 : part.size() * heads_of_sums(work).count * (plan.padded + plan.value_padded);
    return exchange_->meet(
        key, elements,
        [&](T* memory) {
          if (holds) return write(work, sums, part, true);
          for_each_head(work, sums,
                        [&](const Operand<E>&, std::int64_t, const T* own, std::int64_t,
                            std::int64_t padded) {
                          memory = std::copy_n(own + first * padded, part.size() * padded, memory);
                        });
        },
        [&](const T* memory) {
          for_each_head(work, sums,
                        [&](const Operand<E>& to, std::int64_t head, T* own, std::int64_t dim,
                            std::int64_t padded) {
                          if constexpr (std::is_same_v<E, T>)
                            if (holds)
                              return for_each_column(
                                  work, sums, part, [&](std::int64_t column, const Coordinate& at) {
                                    const T* left = to.at(work.batch, head, at);
                                    T* sum = own + column * padded;
                                    for (std::int64_t d = 0; d < dim; ++d) sum[d] += left[d];
                                  });
                          T* sum = own + first * padded;
                          for (std::int64_t i = 0; i < part.size() * padded; ++i)
                            sum[i] += *memory++;
                        });
        });
  }

  Operand<const E> query_, key_, value_, grad_output_;
  Operand<const T> logsumexp_, grad_logsumexp_;
  Operand<E> grad_query_, grad_key_, grad_value_;
  Workspace<T> workspace_;
  std::shared_ptr<Exchange<T>> exchange_;  // of all threads
  RowBuffer<T> query_rows_, grad_output_rows_, plain_query_, plain_grad_output_;
  RowBuffer<T> sums_, total_, logsumexp_rows_, row_term_, grad_logsumexp_rows_;
  T* kept_ = nullptr;  // see simd::BackwardQuery
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
