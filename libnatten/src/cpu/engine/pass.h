#pragma once

#include "../../backend.h"
#include "../parallel.h"
#include "packed_lines.h"

namespace natten::detail::cpu::engine {

/// What differs between passes: which tensors are rows and columns, which kernel runs on them and
/// where its sums go. The engine calls these functions in this order. Each thread works with a
/// copy.
template <class E>
class Pass {
 public:
  using T = StatisticOf<E>;

  const Plan plan;
  const KeyMask mask;
  const simd::InstructionSet& isa;

  /// Takes the buffers of the rows at hand.
  virtual void take_memory(Arena&) = 0;
  virtual void begin_unit(const Work&) {}
  /// Packs the rows at hand, and sets their sums to what they start with.
  virtual void load_rows(const Work&, Loader<T>&) = 0;
  /// How often the rows are run over all their columns.
  virtual int rounds() const { return 1; }
  /// Packs a part of a line of columns.
  virtual void pack_line(const Work&, const LineToPack<T>&, Loader<T>&) = 0;
  /// Where the gradients of the table of biases of a head are added up; null for nowhere.
  virtual T* grad_bias(const Work&) const { return nullptr; }
  /// Says where the weights of line `number` of those at hand are among a row's, if they are read
  /// or written by themselves. `position`: the line's.
  virtual void locate_weights(simd::Line<T>&, std::int64_t /*number*/,
                              const Coordinate& /*position*/, const LinesSeen&) const {}
  /// Says where gradients of the additional tokens from `first` on are added up, if they are.
  virtual void locate_sums(simd::Line<T>&, const Work&, std::int64_t /*first*/) const {}
  /// Runs a block of rows over columns.
  virtual void run_block(const Work&, const Columns<T>&, const simd::Block<T>&) = 0;
  virtual void end_round(const Work&) {}
  /// Writes the sums of a line of columns, to which no further rows of this thread will add.
  virtual void store_columns(const Work&, const LineSums<T>&) {}
  /// Writes the results of the rows at hand.
  virtual void store_rows(const Work&) = 0;

 protected:
  Pass(const Job& job, PassKind kind, int threads)
      : Pass(job, plan_for<E>(job.problem, kind, threads, job.configuration)) {}
  Pass(const Job& job, const Plan& given)
      : plan(given), mask(key_mask(job.problem, job.tensors)), isa(instruction_set()) {}
  Pass(const Pass&) = default;
  ~Pass() = default;

  const simd::Kernels<T>& kernels() const { return kernels_for<T>(isa, plan.in_pairs); }
};

// The passes, as phases of independent units.

template <class E>
Phase forward(const Job& job, int threads);
/// Gradients of queries, row terms and the partial sums of biases and additional tokens; where its
/// plan sums columns, gradients of keys and values too.
template <class E>
Phase backward_query(const Job& job, const Plan& plan);
/// Gradients of keys and values. Needs the row terms.
template <class E>
Phase backward_key(const Job& job, int threads);
template <class E>
Phase qk(const Job& job, int threads);
template <class E>
Phase av(const Job& job, int threads);
template <class E>
Phase av_transpose(const Job& job, int threads);

}  // namespace natten::detail::cpu::engine
