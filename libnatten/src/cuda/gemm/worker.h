#pragma once

// A thread that computes an unfused operation: what fna's functions want to know (fna/worker.h),
// and the slots that its block has in shared memory.

#include "../fna/worker.h"
#include "../simt_rows.h"
#include "chunks.h"

namespace natten::detail::cuda {

template <class T>
struct GemmArguments : Arguments<T> {
  SlotChunks slots{};
  Operand<T> scores{};         ///< attn, written
  Operand<const T> weights{};  ///< attn, read
  bool fills_empty = false;    ///< writes to slots without a key...
  float empty = 0;             ///< ...this
  simt::Sights sights{};       ///< of queries, where they are columns

  using Arguments<T>::Arguments;
};

template <class T, int kWarps>
struct GemmState : BlockState<T, kWarps> {
  SlotChunk chunk;
};

/// The constants of the kernel of an operation, of which `Op` names three: of elements of type `T`,
/// up to `kDims` of them per token.
template <class T, int kPaddedDims, Op kTheOp>
struct GemmTraits {
  using Element = T;
  using Given = GemmArguments<T>;
  static constexpr Op kOp = kTheOp;
  static constexpr int kDims = kPaddedDims;
  static constexpr int kM = 1;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr bool kRowsAreQueries = kOp != Op::av_transpose;
  /// Like these passes it sums weights times columns, if it sums at all.
  static constexpr TilePass kPass = kRowsAreQueries ? TilePass::grad_query : TilePass::grad_key;
  static constexpr bool kAddsQueries = false, kSumsFirst = kOp != Op::qk, kSumsSecond = false;
  static constexpr bool kFindsTerm = false;
  static constexpr bool kKeepsIndices = false, kSharesWords = false, kTablesRows = false;
  static constexpr int kRows = 16 * kM * kWarps;
  using Tile = SharedTile<T, kDims>;
  static constexpr int kColumns = Tile::kPitch > 256 ? 32 : 64;
  static constexpr int kN = kColumns / 8;
  static constexpr int kStages = 2;  ///< one tile of columns is loaded beside another
  using State = GemmState<T, kWarps>;
  using Stop = ColumnStop<T, kWarps>;
  using Scores = FragmentC[kM][kN];
  using Weights = cuda::Weights<T, kM, kN>;
  using RowSums = FragmentC[kM][kDims / 8];
  using PerRow = float[kM][2];

  /// Of a row's slots, so many are in shared memory, in as many bytes and those that put them at
  /// multiples of 16 bytes where they are at such in memory.
  static constexpr int kMostSlots = 384 / int(sizeof(T));
  static constexpr int kSlotPitch = kMostSlots * int(sizeof(T)) + kChunkBytes;
  /// What columns give to rows, the other way around: columns by rows.
  using Transposed = SharedTile<T, kRows>;

  /// Shared memory, in order: offsets in bytes.
  struct Layout {
    static constexpr int kRows1 = 0;  ///< also of sums on their way out, in place of the columns
    static constexpr int kColumns1 = kOp == Op::qk ? Tile::bytes(kRows) : 0;
    static constexpr int kSlots = kColumns1 + kStages * Tile::bytes(kColumns);
    static constexpr int kState =
        kSlots + (kRowsAreQueries ? kRows * kSlotPitch : kStages * Transposed::bytes(kColumns));
    static constexpr int kLines = kState + int(sizeof(State));
    static constexpr int kRowSlots = kLines + (kRowsAreQueries ? kRows * int(sizeof(T*)) : 0);
    static constexpr int kFirstSlots = kRowSlots + (kRowsAreQueries ? kRows * int(sizeof(int)) : 0);
    static constexpr int kRelativeSlot =
        kFirstSlots + (kRowsAreQueries ? (kRows + 2) * int(sizeof(int)) : 0);
    static constexpr int kRelativeBias =
        kRelativeSlot + (kRowsAreQueries ? kColumns * int(sizeof(int)) : 0);
    static constexpr int kRelative = kRelativeBias + kColumns * int(sizeof(int));
    static constexpr int kSeenIntervals = kRelative + kColumns * int(sizeof(int));
    static constexpr int kBytes = kSeenIntervals + (kRows + 2) * int(sizeof(PlaceInterval));
    static constexpr int kReferences = 0, kStatistics = 0, kLive = 0;  // not used
  };
  static_assert(Layout::kRows1 + Tile::bytes(kRows) <= Layout::kSlots);
  static_assert(sizeof(State) % 8 == 0);

  /// Where a row's slots are in shared memory.
  NATTEN_DEVICE static int slots_of(int row) { return Layout::kSlots + row * kSlotPitch; }
  NATTEN_DEVICE static Transposed transposed(int stage) {
    return {Layout::kSlots + stage * Transposed::bytes(kColumns)};
  }
};

/// The first of a row's slots of the chunk, in memory; null where there is no such row.
template <class K, class Machine>
NATTEN_DEVICE typename K::Element** lines(const Worker<K, Machine>& w) {
  return w.gpu.template shared<typename K::Element*>(K::Layout::kLines);
}
/// Where the slot of a row and column is in `slots_of`, in elements: the sum of a number of the
/// row, one of the tile of columns and one of the column in it, modulo 2^32. The first,
template <class K, class Machine>
NATTEN_DEVICE std::uint32_t* row_slots(const Worker<K, Machine>& w) {
  return w.gpu.template shared<std::uint32_t>(K::Layout::kRowSlots);
}
/// the second,
template <class K, class Machine>
NATTEN_DEVICE std::uint32_t slot_of_tile(const Worker<K, Machine>& w, const ColumnTile& at) {
  if (at.is_additional) return static_cast<std::uint32_t>(at.origin[2]);
  std::uint32_t slot = 0;
  NATTEN_EACH (i, kMaxRank)
    slot +=
        static_cast<std::uint32_t>(at.origin[i]) * static_cast<std::uint32_t>(w.a.slots.step(i));
  return slot;
}
/// and the third.
template <class K, class Machine>
NATTEN_DEVICE std::uint32_t* relative_slots(const Worker<K, Machine>& w) {
  return w.gpu.template shared<std::uint32_t>(K::Layout::kRelativeSlot);
}

/// How many elements past a multiple of 16 bytes something is.
template <class T>
NATTEN_DEVICE int misalignment(const T* x) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(x) % kChunkBytes / sizeof(T));
}

}  // namespace natten::detail::cuda
