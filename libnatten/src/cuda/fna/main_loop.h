#pragma once

// Over the tiles of columns that a block visits: products, weights and sums, while the next tiles
// are copied.

#include "grad_all.h"
#include "loads.h"
#include "masks.h"
#include "prepare.h"
#include "softmax.h"

namespace natten::detail::cuda {

/// Takes the warp's rows of A1 from the memory that B2 gets.
template <class K, class Machine>
NATTEN_DEVICE void hold_rows(const Worker<K, Machine>& w, typename K::HeldRows& held) {
  using T = typename K::Element;
  w.gpu.template wait<0>();
  w.gpu.sync();
  const SharedRows<T, K::kDims, Machine> rows(w.gpu, w.lane(), {K::Layout::kRows1},
                                              16 * K::kM * w.warp());
  NATTEN_EACH (k, K::kDims / kDepth<T>) rows(k, held.operands[k]);
}

template <class K, class Machine>
NATTEN_DEVICE void main_loop(const Worker<K, Machine>& w, Accumulators<K>& sums) {
  using T = typename K::Element;
  constexpr typename K::Tile rows1{K::Layout::kRows1}, rows2{K::Layout::kRows2},
      columns2{K::Layout::kColumns2};
  typename K::HeldRows held;
  if constexpr (K::kHoldsRows) hold_rows(w, held);
  QueryStatistics<K> of_rows{};
  if constexpr (K::kRowsAreQueries && K::kPass != TilePass::forward) of_rows = row_statistics(w);

  constexpr bool kLoadsEarly = K::kStages == 1 && !K::kSumsFirst;  // B1 is done with before B2
  constexpr bool kPacksEarly = !K::kNeedsGradWeights;              // nothing needs them as they are
  bool is_over = w.state.count == 0;
  if (!is_over) {
    find_axis_words(w);
    find_axis_words(w, 0);
  }
  NATTEN_DO_NOT_UNROLL
  for (int i = 0; !is_over; ++i) {
    const int stage = K::kStages == 2 ? i & 1 : 0;
    const typename K::Stop& next = w.stop_of(i + 1);
    w.gpu.template wait<0>();
    if constexpr (!K::kRowsAreQueries) scale_statistics(w, stage);
    w.gpu.sync();  // B1 is there, and all warps are done with B2
    load_columns(w, 1, columns2, w.stop_of(i));
    w.gpu.commit();
    if constexpr (K::kStages == 2) {
      if (!w.stop_of(i).is_last) load_first_columns(w, 1 - stage, next);
      w.gpu.commit();
    }
    if (i % K::State::kBatch == 0 && w.warp() == i / K::State::kBatch % K::kWarps)
      locate(w, i + K::State::kBatch);
    if (!w.stop_of(i).is_last) find_axis_words(w, i + 1);
    w.gpu.sync_warp();  // products need whole warps

    // Opaque, as in Worker::thread: products need the registers.
    const typename K::Stop& stop = w.stop_of(w.opaque(i));
    const Overlap seen = stop.seen[w.warp()];
    typename K::Scores scores;
    typename K::Weights weights;
    if (seen != Overlap::none) {
      const bool starts_at_masks = K::kStartsAtMasks && seen == Overlap::some && !w.a.scales_first;
      if (starts_at_masks) {
        if constexpr (K::kStartsAtMasks) {
          start_scores(w, scores, stop, w.opaque(i));
          if constexpr (K::kHoldsRows)
            multiply_rows<T, true>(w.gpu, w.lane(), scores, held, w.first_columns(stage));
          else
            multiply_rows<T, true>(w.gpu, w.lane(), scores, rows1, 16 * K::kM * w.warp(),
                                   w.first_columns(stage));
        }
      } else {
        if constexpr (K::kHoldsRows)
          multiply_rows<T>(w.gpu, w.lane(), scores, held, w.first_columns(stage));
        else
          multiply_rows<T>(w.gpu, w.lane(), scores, rows1, 16 * K::kM * w.warp(),
                           w.first_columns(stage));
        finish_scores(w, scores, stop, w.opaque(i), seen);
      }
      if constexpr (K::kPass == TilePass::forward)
        softmax(w, scores, sums.second, sums.totals);
      else
        weigh(w, scores, of_rows, stage);
      if constexpr (K::kSumsSecond && kPacksEarly) pack_weights<T>(w.gpu, weights, scores);
    }

    w.gpu.template wait<K::kStages - 1>();
    w.gpu.sync();  // B2 is there, and all warps are done with the scores
    if constexpr (kLoadsEarly) {
      is_over = stop.is_last;
      if (!is_over) load_first_columns(w, 0, next);
      w.gpu.commit();
      w.gpu.sync_warp();  // copies may have parted lanes
    }
    if (seen != Overlap::none) {
      if constexpr (K::kSumsSecond) {
        if constexpr (!kPacksEarly) pack_weights<T>(w.gpu, weights, scores);
        accumulate_rows<T>(w.gpu, w.lane(), sums.second, weights, columns2);
      }
      if constexpr (K::kNeedsGradWeights) {
        typename K::Scores grads;
        multiply_rows<T>(w.gpu, w.lane(), grads, rows2, 16 * K::kM * w.warp(), columns2);
        if constexpr (K::kPass == TilePass::row_term) {
          add_products<K>(sums.totals, sums.products, scores, grads);
        } else if constexpr (K::kFindsTerm) {
          move_row_term(w, sums, scores, grads, of_rows);
          differentiate(w, grads, scores, of_rows, stage);
          Weights<T, 2 * K::kM, K::kN> both;
          pack_weights<T>(w.gpu, both, grads, 0);
          pack_weights<T>(w.gpu, both, scores, K::kM);
          accumulate_rows<T>(w.gpu, w.lane(), sums.first, both, w.first_columns(stage));
        } else {
          differentiate(w, grads, scores, of_rows, stage);
          pack_weights<T>(w.gpu, weights, grads);
          accumulate_rows<T>(w.gpu, w.lane(), sums.first, weights, w.first_columns(stage));
        }
      }
    }
    if constexpr (K::kAddsQueries) {
      store_grad_scores(w, weights, stop.seen[w.warp()]);
      w.gpu.sync();
      add_to_queries(w, stop.tile);
    }
    if constexpr (K::kStages == 1 && K::kSumsFirst) {
      w.gpu.sync();  // all warps are done with B1
      if (!stop.is_last) load_first_columns(w, 0, next);
      w.gpu.commit();
    }
    if constexpr (!kLoadsEarly) is_over = stop.is_last;
  }
  w.gpu.template wait<0>();
  w.gpu.sync();  // rows are there even where there was no column; their memory is free
}

}  // namespace natten::detail::cuda
