#pragma once

// Tiles in shared memory and products of them on tensor cores. All but what a fragment holds is the
// same for 16-bit elements and for float, which is multiplied in TF32: a row of an operand is two
// chunks of 16 bytes in either case.

#include <natten/half.h>

#include <type_traits>

#include "../machine.h"

namespace natten::detail::cuda {

inline constexpr int kLanes = 32;
inline constexpr int kChunkBytes = 16;  ///< the unit of copies
template <class T>
inline constexpr int kChunk = kChunkBytes / int(sizeof(T));  ///< elements
/// Columns of A, and rows of B, in one product.
template <class T>
inline constexpr int kDepth = 2 * kChunk<T>;

/// Rows of `kDims` elements in shared memory, `kDims` a multiple of 32. The chunks of a row change
/// places with the row, so that eight rows' chunks of one column lie in different banks.
template <class T, int kDims>
struct SharedTile {
  static constexpr int kPitch = int(sizeof(T)) * kDims;
  static constexpr int kChunks = kDims / kChunk<T>;
  static constexpr int kSwaps = kPitch % 128 == 0 ? 7 : 3;
  /// Eight threads copy 128 bytes, or four 64: then what a loop adds to an offset is constant.
  static constexpr int kUnit = kChunks % 8 == 0 ? 8 : 4;

  int offset;  ///< in bytes

  static constexpr int bytes(int rows) { return rows * kPitch; }
  NATTEN_DEVICE int at(int row, int chunk) const {
    const int swap = kSwaps == 7 ? row & 7 : (row >> 1) & 3;
    return offset + row * kPitch + ((chunk ^ swap) << 4);
  }
  /// The offset of the same chunk `rows` after a row, whose number has no bit in common with
  /// `rows`.
  NATTEN_DEVICE static int rows_on(int at, int rows) {
    const int swap = kSwaps == 7 ? rows & 7 : (rows >> 1) & 3;
    return (at ^ (swap << 4)) + rows * kPitch;
  }
  /// The offset `chunks` after that of a chunk of the same row, whose number has no bit in common
  /// with `chunks`. Cheaper than `at`: where it is constant, so are both numbers.
  NATTEN_DEVICE static int step(int at, int chunks) {
    return (at ^ ((chunks & kSwaps) << 4)) + ((chunks & ~kSwaps) << 4);
  }
};

/// Rounds elements that products take as they lie in memory.
template <class T, int kCount>
NATTEN_DEVICE void round_operand(std::uint32_t (&x)[kCount]) {
  if constexpr (std::is_same_v<T, float>) {
    NATTEN_EACH (i, kCount) x[i] = tf32_bits(natten::detail::float_of(x[i]));
  }
}

/// Rows of a tile, from `first_row` on, as operands A of products: a call reads the `k`-th.
template <class T, int kDims, class Machine>
struct SharedRows {
  Machine& gpu;
  SharedTile<T, kDims> tile;
  int at;

  NATTEN_DEVICE SharedRows(Machine& machine, int lane, const SharedTile<T, kDims>& a, int first_row)
      : gpu(machine), tile(a), at(a.at(first_row + lane % 16, lane / 16)) {}
  template <int kM>
  NATTEN_DEVICE void operator()(int k, FragmentA (&x)[kM]) const {
    NATTEN_EACH (m, kM) {
      gpu.load_matrices(x[m], tile.step(at, 2 * k) + 16 * m * tile.kPitch);
      round_operand<T>(x[m]);
    }
  }
};

/// The same in registers.
template <int kM, int kK>
struct HeldRows {
  FragmentA operands[kK][kM];

  NATTEN_DEVICE void operator()(int k, FragmentA (&x)[kM]) const {
    NATTEN_EACH (m, kM)
      NATTEN_EACH (i, 4) x[m][i] = operands[k][m][i];
  }
};

/// c[i][j] = row i of A times row j of `b`, or where `kAdds`, that plus c[i][j]; `rows(k, x)` gives
/// A's `k`-th operand.
template <class T, bool kAdds = false, int kDims, int kM, int kN, class Machine, class RowsOfA>
NATTEN_DEVICE void multiply_rows(Machine& gpu, int lane, FragmentC (&c)[kM][kN],
                                 const RowsOfA& rows, const SharedTile<T, kDims>& b) {
  const int b_at = b.at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  NATTEN_EACH (k, kDims / kDepth<T>) {
    FragmentA x[kM];
    rows(k, x);
    NATTEN_UNROLL
    for (int n = 0; n < kN; n += 2) {
      std::uint32_t y[4];
      gpu.load_matrices(y, b.step(b_at, 2 * k) + 8 * n * b.kPitch);
      round_operand<T>(y);
      const FragmentB low = {y[0], y[1]}, high = {y[2], y[3]};
      NATTEN_EACH (m, kM) {
        if (k == 0 && !kAdds) {
          gpu.template multiply<T>(c[m][n], x[m], low);
          gpu.template multiply<T>(c[m][n + 1], x[m], high);
        } else {
          gpu.template multiply_add<T>(c[m][n], x[m], low);
          gpu.template multiply_add<T>(c[m][n + 1], x[m], high);
        }
      }
    }
  }
}

/// The same with row i of `a`, from `first_row` on.
template <class T, bool kAdds = false, int kDims, int kM, int kN, class Machine>
NATTEN_DEVICE void multiply_rows(Machine& gpu, int lane, FragmentC (&c)[kM][kN],
                                 const SharedTile<T, kDims>& a, int first_row,
                                 const SharedTile<T, kDims>& b) {
  multiply_rows<T, kAdds>(gpu, lane, c, SharedRows<T, kDims, Machine>(gpu, lane, a, first_row), b);
}

/// Weights as operands A of products.
template <class T, int kM, int kN>
using Weights = FragmentA[kM][8 * kN / kDepth<T>];

/// Of 16-bit elements, two blocks of 8 columns of C are an operand A as they lie. Of float one is,
/// with its columns in the order 0, 2, 4, 6, 1, 3, 5, 7. `x` has them from `first` on.
template <class T, int kAll, int kK, int kM, int kN, class Machine>
NATTEN_DEVICE void pack_weights(Machine& gpu, FragmentA (&x)[kAll][kK],
                                const FragmentC (&c)[kM][kN], int first = 0) {
  NATTEN_EACH (m, kM)
    NATTEN_EACH (n, kN)
      NATTEN_EACH (half, 2) {
        const float low = c[m][n][2 * half], high = c[m][n][2 * half + 1];
        if constexpr (std::is_same_v<T, float>) {
          x[first + m][n][half] = tf32_bits(low);
          x[first + m][n][2 + half] = tf32_bits(high);
        } else {
          x[first + m][n / 2][n % 2 * 2 + half] = gpu.template pack<T>(low, high);
        }
      }
}

/// The dim of element `j` of block `n` of a row's sums. Blocks are 8 dims in a row; but of float,
/// block n's dims are 32 (n / 4) + n % 4 + (0, 4, ..., 28).
template <class T>
NATTEN_DEVICE int dim_of(int lane, int n, int j) {
  const int in_block = lane % 4 * 2 + j;
  return std::is_same_v<T, float> ? n / 4 * 32 + n % 4 + 4 * in_block : 8 * n + in_block;
}

/// sums[i] += sum over j of weights[i][j] times row j of `b`.
template <class T, int kDims, int kM, int kK, class Machine>
NATTEN_DEVICE void accumulate_rows(Machine& gpu, int lane, FragmentC (&sums)[kM][kDims / 8],
                                   const FragmentA (&weights)[kM][kK],
                                   const SharedTile<T, kDims>& b) {
  if constexpr (std::is_same_v<T, float>) {
    // ldmatrix transposes 16-bit elements only. A thread reads a chunk of each of its two rows:
    // four dims, for as many blocks.
    const int b_at[2] = {b.at(lane % 4 * 2, lane / 4), b.at(lane % 4 * 2 + 1, lane / 4)};
    NATTEN_EACH (k, kK) {
      NATTEN_UNROLL
      for (int n = 0; n < kDims / 8; n += 4) {
        std::uint32_t y[2][4];
        NATTEN_EACH (row, 2) {
          gpu.read_chunk(y[row], b.step(b_at[row], 2 * n) + 8 * k * b.kPitch);
          round_operand<T>(y[row]);
        }
        NATTEN_EACH (i, 4) {
          const FragmentB column = {y[0][i], y[1][i]};
          NATTEN_EACH (m, kM) gpu.template multiply_add<T>(sums[m][n + i], weights[m][k], column);
        }
      }
    }
  } else {
    const int b_at = b.at(lane % 16, lane / 16);
    NATTEN_EACH (k, kK) {
      NATTEN_UNROLL
      for (int n = 0; n < kDims / 8; n += 2) {
        std::uint32_t y[4];
        gpu.load_matrices_transposed(y, b.step(b_at, n) + 16 * k * b.kPitch);
        const FragmentB low = {y[0], y[1]}, high = {y[2], y[3]};
        NATTEN_EACH (m, kM) {
          gpu.template multiply_add<T>(sums[m][n], weights[m][k], low);
          gpu.template multiply_add<T>(sums[m][n + 1], weights[m][k], high);
        }
      }
    }
  }
}

/// Puts sums of `accumulate_rows`, times a factor, into a row of shared memory.
template <class T, int kBlocks, int kDims, class Machine>
NATTEN_DEVICE void store_sums(Machine& gpu, int lane, const FragmentC (&sums)[kBlocks], int half,
                              float factor, const SharedTile<T, kDims>& to, int row) {
  static_assert(kBlocks * 8 == kDims);
  if constexpr (std::is_same_v<T, float>) {
    NATTEN_UNROLL
    for (int n = 0; n < kBlocks; n += 4)
      NATTEN_EACH (j, 2) {
        std::uint32_t x[4];
        NATTEN_EACH (i, 4) x[i] = natten::detail::bits_of(sums[n + i][2 * half + j] * factor);
        gpu.write_chunk(to.at(row, 2 * n + lane % 4 * 2 + j), x);
      }
  } else {
    const int first = to.at(row, 0) + lane % 4 * 4;
    NATTEN_EACH (n, kBlocks)
      *gpu.template shared<std::uint32_t>(to.step(first, n)) =
          gpu.template pack<T>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
  }
}

}  // namespace natten::detail::cuda
