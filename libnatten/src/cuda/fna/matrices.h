#pragma once

// Tiles in shared memory and products of them on tensor cores.

#include "../machine.h"

namespace natten::detail::cuda {

inline constexpr int kLanes = 32;
inline constexpr int kChunk = 8;  ///< 16-bit elements in 16 bytes, the unit of copies

/// Rows of `kDims` 16-bit elements in shared memory, `kDims` a multiple of 32. The chunks of a row
/// change places with the row, so that eight rows' chunks of one column lie in different banks.
template <int kDims>
struct SharedTile {
  static constexpr int kPitch = 2 * kDims;
  static constexpr int kChunks = kDims / kChunk;
  static constexpr int kSwaps = kPitch % 128 == 0 ? 7 : 3;

  int offset;  ///< in bytes

  static constexpr int bytes(int rows) { return rows * kPitch; }
  NATTEN_DEVICE int at(int row, int chunk) const {
    const int swap = kSwaps == 7 ? row & 7 : (row >> 1) & 3;
    return offset + row * kPitch + ((chunk ^ swap) << 4);
  }
  /// The offset `chunks` after that of chunk 0 or 1 of the same row; `chunks` is even. Cheaper than
  /// `at`: where it is constant, so are both numbers.
  NATTEN_DEVICE static int step(int at, int chunks) {
    return (at ^ ((chunks & kSwaps) << 4)) + ((chunks & ~kSwaps) << 4);
  }
};

/// c[i][j] += row i of `a` (from `first_row`) times row j of `b`.
template <class T, int kDims, int kM, int kN, class Machine>
NATTEN_DEVICE void multiply_rows(Machine& gpu, FragmentC (&c)[kM][kN], const SharedTile<kDims>& a,
                                 int first_row, const SharedTile<kDims>& b) {
  const int lane = gpu.opaque(gpu.thread()) & (kLanes - 1);
  const int a_at = a.at(first_row + lane % 16, lane / 16);
  const int b_at = b.at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  NATTEN_UNROLL
  for (int k = 0; k < kDims / 16; ++k) {
    FragmentA x[kM];
    NATTEN_UNROLL
    for (int m = 0; m < kM; ++m) gpu.load_matrices(x[m], a.step(a_at, 2 * k) + 16 * m * a.kPitch);
    NATTEN_UNROLL
    for (int n = 0; n < kN; n += 2) {
      std::uint32_t y[4];
      gpu.load_matrices(y, b.step(b_at, 2 * k) + 8 * n * b.kPitch);
      const FragmentB low = {y[0], y[1]}, high = {y[2], y[3]};
      NATTEN_UNROLL
      for (int m = 0; m < kM; ++m) {
        gpu.template multiply_add<T>(c[m][n], x[m], low);
        gpu.template multiply_add<T>(c[m][n + 1], x[m], high);
      }
    }
  }
}

/// Weights in the element type, as fragments of 16 x 16.
template <int kM, int kN>
using Weights = FragmentA[kM][kN / 2];

template <class T, int kM, int kN, class Machine>
NATTEN_DEVICE void pack_weights(Machine& gpu, Weights<kM, kN>& x, const FragmentC (&c)[kM][kN]) {
  NATTEN_UNROLL
  for (int m = 0; m < kM; ++m) NATTEN_UNROLL
  for (int n = 0; n < kN; ++n) NATTEN_UNROLL
  for (int half = 0; half < 2; ++half)
    x[m][n / 2][n % 2 * 2 + half] = gpu.template pack<T>(c[m][n][2 * half], c[m][n][2 * half + 1]);
}

/// sums[i] += sum over j of weights[i][j] times row j of `b`.
template <class T, int kDims, int kM, int kK, class Machine>
NATTEN_DEVICE void accumulate_rows(Machine& gpu, FragmentC (&sums)[kM][kDims / 8],
                                   const FragmentA (&weights)[kM][kK], const SharedTile<kDims>& b) {
  const int lane = gpu.opaque(gpu.thread()) & (kLanes - 1);
  const int b_at = b.at(lane % 16, lane / 16);
  NATTEN_UNROLL
  for (int k = 0; k < kK; ++k) {
    NATTEN_UNROLL
    for (int n = 0; n < kDims / 8; n += 2) {
      std::uint32_t y[4];
      gpu.load_matrices_transposed(y, b.step(b_at, n) + 16 * k * b.kPitch);
      const FragmentB low = {y[0], y[1]}, high = {y[2], y[3]};
      NATTEN_UNROLL
      for (int m = 0; m < kM; ++m) {
        gpu.template multiply_add<T>(sums[m][n], weights[m][k], low);
        gpu.template multiply_add<T>(sums[m][n + 1], weights[m][k], high);
      }
    }
  }
}

}  // namespace natten::detail::cuda
