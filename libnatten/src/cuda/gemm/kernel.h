#pragma once

// The unfused operations on tensor cores:
//
//   operation     rows     columns  computes
//   qk            queries  keys     slots of attn = Q K^T (+ biases)
//   av            queries  keys     sum over a query's slots of attn V
//   av_transpose  keys     queries  sum over the queries that see a key of attn Q
//
// over tiles of columns, by the functions of the fused kernel (fna/kernel.h). Where rows are
// queries, a block goes through its columns once for each chunk of slots (chunks.h), and qk in a
// block of its own for each: by the slots of a chunk, queries see a narrower window. In shared
// memory a row of them begins as far from a multiple of 16 bytes as it does in attn, so that whole
// pieces are copied.

#include "../fna/epilogue.h"
#include "../fna/loads.h"
#include "slots.h"
#include "transposed.h"

namespace natten::detail::cuda {

/// Calls `use(i, stage)` for the block's tiles of columns, which are in shared memory then. Before
/// that, `ahead(i + 1, stage of that)` may begin with the next one; `behind` comes after.
/// Everything stands here once, which keeps kernels small: two rounds before the first tile locate
/// and load it.
template <class K, class Machine, class Ahead, class Use, class Behind>
NATTEN_DEVICE void for_each_tile(const Worker<K, Machine>& w, Ahead&& ahead, Use&& use,
                                 Behind&& behind) {
  constexpr int kBatch = K::State::kBatch;
  int i = -2;
  NATTEN_DO_NOT_UNROLL
  do {
    w.gpu.template wait<0>();
    w.gpu.sync();  // the tile is there, and all warps are done with the one before
    const bool has_next = i >= -1 && i + 1 < w.state.count;
    const int stage = i & 1, next_stage = 1 - stage;
    if (has_next) {
      load_columns(w, 0, w.first_columns(next_stage), w.stop_of(i + 1));
      ahead(i + 1, next_stage);
    }
    w.gpu.commit();
    const int batch = i == -2 ? 0 : i + kBatch;
    if (batch % kBatch == 0 && w.warp() == batch / kBatch % K::kWarps) locate(w, batch);
    w.gpu.sync_warp();  // products need whole warps
    if (i >= 0) use(w.gpu.opaque(i), stage);
    if (has_next) behind(i + 1, next_stage);
  } while (++i < w.state.count);
}
template <class K, class Machine, class Use>
NATTEN_DEVICE void for_each_tile(const Worker<K, Machine>& w, Use&& use) {
  const auto nothing = [](int, int) {};
  for_each_tile(w, nothing, use, nothing);
}

/// Writes the scores of the block's chunk of slots.
template <class K, class Machine>
NATTEN_DEVICE void write_scores(const Worker<K, Machine>& w) {
  using T = typename K::Element;
  constexpr typename K::Tile rows{K::Layout::kRows1};
  load_rows(w, 0, rows);
  find_chunk(w, w.state.split);
  if (w.a.fills_empty) clear_slots(w);
  for_each_tile(w, [&](int i, int stage) {
    const typename K::Stop& stop = w.stop_of(i);
    if (stop.seen[w.warp()] == Overlap::none) return;
    typename K::Scores scores;
    multiply_rows<T>(w.gpu, w.lane(), scores, rows, 16 * K::kM * w.warp(), w.first_columns(stage));
    scatter(w, scores, stop);
  });
  store_slots(w);
}

/// Adds up columns by the weights in the slots of their queries.
template <class K, class Machine>
NATTEN_DEVICE void add_slots(const Worker<K, Machine>& w, Accumulators<K>& sums) {
  using T = typename K::Element;
  NATTEN_DO_NOT_UNROLL
  for (int chunk = 0; chunk < w.a.slots.count(); ++chunk) {
    find_chunk(w, chunk);
    load_slots(w);
    for_each_tile(w, [&](int i, int stage) {
      const typename K::Stop& stop = w.stop_of(i);
      if (stop.seen[w.warp()] == Overlap::none) return;
      typename K::Weights weights;
      gather(w, weights, stop);
      w.gpu.sync_warp();  // to gather may have parted lanes
      accumulate_rows<T>(w.gpu, w.lane(), sums.first, weights, w.first_columns(stage));
    });
  }
}

/// Adds up the queries that see the block's rows.
template <class K, class Machine>
NATTEN_DEVICE void add_queries(const Worker<K, Machine>& w, Accumulators<K>& sums) {
  using T = typename K::Element;
  see(w);
  w.gpu.sync();
  if (w.warp() == 0) find_columns(w);
  const Share<K, Machine> share(w);
  Fetched<K> fetched;
  for_each_tile(
      w, [&](int i, int) { fetch(w, share, fetched, w.stop_of(i)); },
      [&](int i, int stage) {
        if (w.stop_of(i).seen[w.warp()] == Overlap::none) return;
        typename K::Weights weights;
        read(w, weights, stage);
        accumulate_rows<T>(w.gpu, w.lane(), sums.first, weights, w.first_columns(stage));
      },
      [&](int, int stage) { store(w, share, fetched, stage); });
}

template <class T, int kDims, Op kOp>
struct GemmKernel {
  using Traits = GemmTraits<T, kDims, kOp>;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr int kBlocks = 2;
  static constexpr int kSharedBytes = Traits::Layout::kBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);

  GemmArguments<T> a;

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    using Layout = typename Traits::Layout;
    const Worker<Traits, Machine> w{gpu, a,
                                    *gpu.template shared<typename Traits::State>(Layout::kState)};
    if (!find_rows(w)) return;
    set_relative<Traits, 1>(w);
    clear_padding(w, {Layout::kColumns1}, Traits::kStages * Traits::kColumns, a.dims[0]);
    if constexpr (kOp == Op::qk) {
      write_scores(w);
    } else {
      Accumulators<Traits> sums;
      sums.clear();
      if constexpr (kOp == Op::av)
        add_slots(w, sums);
      else
        add_queries(w, sums);
      w.gpu.sync();  // all warps are done with the columns, whose memory rows take
      write_results(w, sums);
    }
  }
};

}  // namespace natten::detail::cuda
