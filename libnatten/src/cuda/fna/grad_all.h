#pragma once

// The gradients of queries in grad_all, which many blocks add to.

#include "worker.h"

namespace natten::detail::cuda {

/// Puts the warp's dS where all warps find them: keys by queries, in the element type. Rows
/// that do not exist or are hidden have anything, infinity included, and so has all of a tile that
/// the warp does not see.
template <class K, class Machine>
NATTEN_DEVICE void store_grad_scores(const Worker<K, Machine>& w, const typename K::Weights& x,
                                     Overlap seen) {
  using T = typename K::Element;
  constexpr SharedTile<T, K::kColumns> to{K::Layout::kGradScores};
  NATTEN_EACH (m, K::kM)
    NATTEN_EACH (half, 2) {
      const bool is_live = seen != Overlap::none && w.live()[w.row_of(m, half)];
      NATTEN_EACH (n, K::kN)
        *w.gpu.template shared<std::uint32_t>(to.at(w.row_of(m, half), n) + 4 * (w.lane() % 4)) =
            is_live ? x[m][n / 2][n % 2 * 2 + half] : 0;
    }
}
/// Adds to each query of the tile what the block's keys give it. A warp has 16 queries.
template <class K, class Machine>
NATTEN_DEVICE void add_to_queries(const Worker<K, Machine>& w, const ColumnTile& at) {
  using T = typename K::Element;
  using Tile = typename K::Tile;
  static_assert(K::kColumns == 16 * K::kWarps);
  constexpr SharedTile<T, K::kColumns> grads{K::Layout::kGradScores};
  constexpr Tile keys{K::Layout::kRows1};
  const int a_at = grads.at(w.lane() / 16 * 8 + w.lane() % 8, 2 * w.warp() + w.lane() / 8 % 2);
  const int b_at = keys.at(w.lane() % 16, w.lane() / 16);
  float* to[2];
  NATTEN_EACH (half, 2) {
    Coordinate token;
    const bool exists = w.token_of_column(at, 16 * w.warp() + 8 * half + w.lane() / 4, token);
    const Coordinate lengths = w.a.column_lengths();
    const std::int64_t index = ravel(token, lengths), queries = volume(lengths);
    const std::int64_t heads = std::int64_t{w.a.heads} * w.a.queries_per_kv;
    to[half] =
        exists ? w.a.query_sums +
                     ((w.state.batch * heads + w.query_head(at)) * queries + index) * w.a.dims[0]
               : nullptr;
  }
  constexpr int kPart = 4;  // blocks of 8 dims at a time, for lack of registers
  NATTEN_UNROLL
  for (int part = 0; part < K::kDims / 8; part += kPart) {
    FragmentC sums[1][kPart];
    clear(sums);
    NATTEN_EACH (k, K::kRows / 16) {
      FragmentA x;
      w.gpu.load_matrices_transposed(x, a_at + 16 * k * grads.kPitch);
      NATTEN_UNROLL
      for (int n = 0; n < kPart; n += 2) {
        std::uint32_t y[4];
        w.gpu.load_matrices_transposed(y, keys.step(b_at, part + n) + 16 * k * keys.kPitch);
        const FragmentB low = {y[0], y[1]}, high = {y[2], y[3]};
        w.gpu.template multiply_add<T>(sums[0][n], x, low);
        w.gpu.template multiply_add<T>(sums[0][n + 1], x, high);
      }
    }
    NATTEN_EACH (n, kPart)
      NATTEN_EACH (i, 4) {
        const int d = w.column_of(part + n) + i % 2;
        if (to[i / 2] && d < w.a.dims[0]) w.gpu.atomic_add(to[i / 2] + d, sums[0][n][i]);
      }
    w.gpu.sync_warp();  // additions have parted lanes
  }
}

/// What grad_all has added up, times the scale, in the element type.
template <class T>
struct ScaleQueries {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  Operand<T> to;
  const float* from;  ///< contiguous [B, H, queries, D]
  Coordinate lengths;
  std::int64_t count, heads, dims;
  float scale;

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    const std::int64_t i = gpu.block() * kThreads + gpu.thread();
    if (i >= count) return;
    const std::int64_t row = i / dims, queries = volume(lengths);
    to.at(row / queries / heads, row / queries % heads, unravel(row % queries, lengths))[i % dims] =
        static_cast<T>(from[i] * scale);
  }
};

}  // namespace natten::detail::cuda
