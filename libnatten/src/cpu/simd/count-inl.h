#pragma once

// What the kernels of fused passes do with a block, without doing it.

#include "walk-inl.h"

namespace natten::detail::cpu::simd {
namespace {

template <class T>
void count(const Block<T>& block, StepCount& counts) {
  const Walk<T> walk(block);
  const std::int64_t most_steps =
      counts.at_once && fits_at_once(walk) ? kMostStepsAtOnce : kBatchSteps;
  for_each_batch(walk, most_steps, [&](const Batch& batch) {
    ++counts.batches;
    std::int64_t lines_of[kMostVectors] = {}, visits = 0;
    for (std::int64_t l = batch.line0; l < batch.line1; ++l)
      for (int v = block.lines[l].first_vector;
           v < static_cast<int>(min(block.lines[l].last_vector, block.vectors)); ++v) {
        ++lines_of[v];
        ++visits;
      }
    counts.visits += visits;
    counts.steps += visits * (batch.step1 - batch.step0);
    for (int v = 0; v < block.vectors; ++v) {
      const std::int64_t low = max(walk.all_low[walk.of(v)], batch.step0);
      const std::int64_t high = min(walk.all_high[walk.of(v)], batch.step1);
      counts.masked += lines_of[v] * (batch.step1 - batch.step0 - max(high - low, 0));
    }
    if (!block.adjacent) {
      for (int row = 0; row < block.rows; ++row)
        counts.sums +=
            visits *
            max(min(walk.high[0][row], batch.step1) - max(walk.low[0][row], batch.step0), 0);
      for_each_column(walk, batch, [&](std::int64_t, int begin, int end) {
        counts.column_sums += visits * (end - begin);
      });
      return;
    }
    for_each_column_group(
        walk, batch,
        [&](std::int64_t, int columns, int, int begin, int end) {
          counts.column_sums += (batch.line1 - batch.line0) * columns * (end - begin);
        },
        [](std::int64_t, int) {});
    for (int v = 0; v < block.vectors; ++v)
      for (int row = 0; row < walk.rows_of(v); row += kRowGroup) {
        const auto entries = static_cast<int>(min(kRowGroup, walk.rows_of(v) - row));
        const Steps steps = steps_of_group(walk, batch, v, row, entries);
        counts.sums += lines_of[v] * entries * (steps.high - steps.low);
      }
  });
}

}  // namespace
}  // namespace natten::detail::cpu::simd
