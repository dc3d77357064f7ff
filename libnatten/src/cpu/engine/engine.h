#pragma once

#include "additional.h"
#include "bias.h"
#include "pass.h"

namespace natten::detail::cpu::engine {

/// Runs a pass, for one thread: goes through units, items, lines of rows and the columns that these
/// see, down to blocks of rows.
template <class E>
class Engine {
 public:
  /// `pass` is the thread's own, and outlives the engine.
  Engine(Pass<E>& pass, const AdditionalTokens<E>& additional, const BiasTables<E>& biases);

  /// Runs units first to last.
  void run(std::int64_t first, std::int64_t last);

 private:
  using T = StatisticOf<E>;

  void take_memory(std::vector<char>& memory);
  void run_item(Work work, std::int64_t item);
  /// The rows of one strip of some neighboring lines.
  void run_rows(Work work);
  /// Runs the rows at hand over the lines that they see.
  void visit_windows(Work work);
  /// A line of columns of the first head at `position`, of those that begin at position[2], for the
  /// kernels, without biases; packs it of all heads if it is not there. `number`: of the lines at
  /// hand.
  simd::Line<T> line_of(const Work& work, const LinesSeen& seen, std::int64_t number,
                        const Coordinate& position, std::int64_t count);
  /// Runs the rows at hand over the additional tokens from `first` on that are packed together.
  void visit_additional(Work work, std::int64_t first);
  /// Runs the rows at hand of one head over columns, block by block.
  void visit_blocks(Work work, const Columns<T>& columns);

  Pass<E>& pass_;
  const Plan& plan_;
  const Problem& p_;
  Loader<T> loader_;
  PackedLines<T> packed_;
  AdditionalTokens<E> additional_;
  BiasTables<E> biases_;
  std::vector<Interval> seen_by_row_;            // of the strip, along the innermost axis
  std::vector<std::int64_t> first_slot_by_row_;  // likewise, the slot of the first column seen
  std::vector<simd::Line<T>> lines_;             // at hand
  T* scratch_ = nullptr;                         // of the kernels
};

extern template class Engine<double>;
extern template class Engine<float>;
extern template class Engine<bfloat16>;
extern template class Engine<float16>;

/// The phase of a pass: each thread runs units with copies of its own.
template <class E, class P>
Phase phase_of(const Job& job, const P& pass) {
  const AdditionalTokens<E> additional(job);
  const BiasTables<E> biases(job, pass.plan);
  return {pass.plan.total_units(), [=](std::int64_t first, std::int64_t last) {
            P own(pass);
            Engine<E>(own, additional, biases).run(first, last);
          }};
}

}  // namespace natten::detail::cpu::engine
