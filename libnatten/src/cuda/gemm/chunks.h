#pragma once

// The slots of a query are cut into chunks, which lie one after another in memory. A block has
// those of its queries in shared memory while it computes, so that it reads and writes them by
// whole lines.

#include <natten/problem.h>

#include <algorithm>

#include "../machine.h"

namespace natten::detail::cuda {

/// Slots `first`, ... of a query: a box of its window, or additional tokens.
struct SlotChunk {
  int first, count;
  int begin[kMaxRank];   ///< of the box; of additional tokens the last one counts
  int extent[kMaxRank];  ///< likewise
  bool is_additional;
};

struct SlotChunks {
  int kernel_size[kMaxRank];
  /// Of a chunk: 1 along axes before the one that is cut, and all of those after it.
  int extent[kMaxRank];
  int counts[kMaxRank];
  int additional, additional_extent;

  NATTEN_HOST_DEVICE int of_window() const { return counts[0] * counts[1] * counts[2]; }
  NATTEN_HOST_DEVICE int count() const {
    return of_window() + (additional + additional_extent - 1) / additional_extent;
  }
  /// Slots from one to the next along an axis.
  NATTEN_HOST_DEVICE int step(int axis) const {
    return axis == 2 ? 1 : axis == 1 ? kernel_size[2] : kernel_size[1] * kernel_size[2];
  }
  NATTEN_HOST_DEVICE int window_size() const { return kernel_size[0] * step(0); }
  /// Chunk `index`, less than `count()`.
  NATTEN_HOST_DEVICE SlotChunk at(int index) const {
    SlotChunk chunk{0, 1, {0, 0, 0}, {0, 0, 0}, index >= of_window()};
    if (chunk.is_additional) {
      const int begin = (index - of_window()) * additional_extent, left = additional - begin;
      chunk.begin[2] = begin;
      chunk.extent[2] = chunk.count = left < additional_extent ? left : additional_extent;
      chunk.first = window_size() + begin;
      return chunk;
    }
    NATTEN_UNROLL
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const int begin = index % counts[a] * extent[a], left = kernel_size[a] - begin;
      index /= counts[a];
      chunk.begin[a] = begin;
      chunk.extent[a] = left < extent[a] ? left : extent[a];
      chunk.first += begin * step(a);
      chunk.count *= chunk.extent[a];
    }
    return chunk;
  }
};

/// Chunks of at most `most` slots, about equal; of additional tokens, of multiples of `unit`.
inline SlotChunks cut_slots(const Problem& p, int most, int unit) {
  SlotChunks chunks{};
  int left = most;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int size = static_cast<int>(p.axes[a].kernel_size);
    const int fitting = std::min(std::max(left, 1), size);
    chunks.kernel_size[a] = size;
    chunks.counts[a] = (size + fitting - 1) / fitting;
    chunks.extent[a] = (size + chunks.counts[a] - 1) / chunks.counts[a];
    left = chunks.counts[a] > 1 ? 1 : left / size;
  }
  chunks.additional = static_cast<int>(p.additional);
  chunks.additional_extent = most / unit * unit;
  return chunks;
}

}  // namespace natten::detail::cuda
