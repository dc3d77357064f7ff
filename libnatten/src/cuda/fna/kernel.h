#pragma once

// Fused neighborhood attention on tensor cores, forward and backward, in one kernel: all passes are
//
//   S = A1 B1^T, weights of S, dP = A2 B2^T, sums += weights B
//
// over tiles of columns (tiles.h), with
//
//   pass            rows       A1  A2  columns  B1  B2  computes
//   forward         queries    Q       keys     K   V   output = sum P V, logsumexp
//   row_term        queries    Q   dO  keys     K   V   sum P dP / sum P - gradient of logsumexp
//   grad_query      queries    Q   dO  keys     K   V   dQ = scale sum dS K, and the row term
//   grad_key_value  keys       K   V   queries  Q   dO  dK = scale sum dS Q, dV = sum P dO
//   grad_key                                            the first of them
//   grad_value                                          the second
//   grad_all                                            both, and dQ / scale by atomic additions
//
// where P = exp(S - logsumexp) and dS = P (dP - row term). The sum of P is 1 but for logsumexp's
// own rounding, which is large where scores are; the row term is divided by it, for dP and the row
// term nearly cancel where one key takes nearly all weight. Four warps share the columns in shared
// memory and own 16 or 32 rows each, so a row's sums stay in the registers of four threads. Every
// row is summed by one warp, in an order that depends on the problem alone; but in grad_all, which
// saves one of eight products, many blocks add to a query's gradient in any order.
//
// grad_query finds the row term on its way where registers hold two sums, that of dS K and that of
// P K: dS is by the row term of what has been seen, and where that moves, so does the first sum, by
// the second times the step (`move_row_term`). So a backward pass takes eight products. With a pass
// of its own for the row term, as grad_all and more than 128 dims have it, it takes two more, and
// one less in grad_query.
//
// What a pass is given is in arguments.h, the sizes of tiles and what a thread holds in worker.h;
// the steps are in a file each: prepare.h, loads.h, main_loop.h with masks.h, softmax.h and
// grad_all.h, and epilogue.h. Products are in matrices.h.

#include "arguments.h"
#include "epilogue.h"
#include "loads.h"
#include "main_loop.h"
#include "prepare.h"
#include "worker.h"

namespace natten::detail::cuda {

template <class T, int kDims, int kM, TilePass kPass>
struct TileKernel {
  using Traits = TileTraits<T, kDims, kM, kPass>;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr int kBlocks = Traits::kBlocks;
  static constexpr int kSharedBytes = Traits::Layout::kBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);

  Arguments<T> a;

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    using Layout = typename Traits::Layout;
    const Worker<Traits, Machine> w{gpu, a,
                                    *gpu.template shared<typename Traits::State>(Layout::kState)};
    if (!prepare(w)) return;
    load_rows(w, 0, {Layout::kRows1});
    if constexpr (Traits::kNeedsGradWeights) load_rows(w, 1, {Layout::kRows2});
    if (w.state.count > 0) load_first_columns(w, 0, w.stop_of(0));
    gpu.commit();

    Accumulators<Traits> sums;
    sums.clear();
    main_loop(w, sums);
    write_results(w, sums);
  }
};

}  // namespace natten::detail::cuda
