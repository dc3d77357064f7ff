#pragma once

#include "simt_rows.h"

namespace natten::detail::cuda::simt {

/// Sums attn over batch and queries, per head and offset: each thread one offset over a part of the
/// tiles of queries.
template <class T>
struct BiasSums {
  using Sum = StatisticOf<T>;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 4;

  Tiles tiles;
  Sights sights;
  KeyMask mask;
  int kernel_size[kMaxRank];
  int batches, heads, splits;
  Operand<const T> attn;
  Sum* partial;  // [splits, heads, offsets]

  NATTEN_HOST_DEVICE Coordinate offsets() const {
    return {2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1, 2 * kernel_size[2] - 1};
  }
  std::int64_t blocks() const {
    return (volume(offsets()) + kThreads - 1) / kThreads * splits * heads;
  }

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    const std::int64_t count = volume(offsets());
    std::uint32_t index = static_cast<std::uint32_t>(gpu.block());
    const int head = take(index, heads), split = take(index, splits);
    const std::int64_t item = static_cast<std::int64_t>(index) * kThreads + gpu.thread();
    if (item >= count) return;
    const Coordinate offset = unravel(item, offsets());

    Sum total = 0;
    const int tiles_per_head = tiles.count[0] * tiles.count[1] * tiles.count[2];
    for (int batch = 0; batch < batches; ++batch)
      for (int tile = split; tile < tiles_per_head; tile += splits)
        total += sum_of_tile(static_cast<std::uint32_t>(tile), batch, head, offset);
    partial[(static_cast<std::int64_t>(split) * heads + head) * count + item] = total;
  }

 private:
  NATTEN_DEVICE Sum sum_of_tile(std::uint32_t index, int batch, int head,
                                const Coordinate& offset) const {
    const Tile tile = tiles.tile(index, tiles.whole());
    Sum sum = 0;
    if (tile.is_empty) return sum;
    for (int i = 0; i < kRows; ++i) {
      const Row row = tiles.row(tile, i, tiles.whole());
      std::int64_t slot = 0;
      Coordinate place;  // of the key
      bool sees = row.is_active;
      for (int d = 0; d < kMaxRank; ++d) {
        const Sight sight = sights.of[d][row.token[d]];
        place[d] = sight.own + offset[d] - (kernel_size[d] - 1);
        sees = sees && sight.begin <= place[d] && place[d] < sight.end;
        slot = slot * kernel_size[d] + place[d] - sight.slot;
      }
      if (!sees || is_hidden(row, batch, place)) continue;
      sum += number(attn.at(batch, head, widened(row.token))[slot]);
    }
    return sum;
  }
  NATTEN_DEVICE bool is_hidden(const Row& row, int batch, const Coordinate& place) const {
    if (!mask) return false;
    Coordinate key;
    for (int d = 0; d < kMaxRank; ++d) {
      const Places& along = tiles.axes[d];
      key[d] = along.number(row.column[d], along.in_turn(static_cast<int>(place[d])));
    }
    return mask.hides(batch, key);
  }
};

/// Adds up parts: to[i] = sum over parts of from[part][i].
template <class T>
struct AddParts {
  using Sum = StatisticOf<T>;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 4;
  static constexpr int kDims = 4;

  const Sum* from;
  int parts;
  T* to;
  std::int64_t shape[kDims], strides[kDims];  // of `to`; the parts are contiguous

  NATTEN_HOST_DEVICE std::int64_t count() const {
    return shape[0] * shape[1] * shape[2] * shape[3];
  }
  std::int64_t blocks() const { return (count() + kThreads - 1) / kThreads; }

  template <class Machine>
  NATTEN_DEVICE void operator()(Machine& gpu) const {
    const std::int64_t item = gpu.block() * kThreads + gpu.thread();
    if (item >= count()) return;
    Sum sum = 0;
    for (int part = 0; part < parts; ++part) sum += from[part * count() + item];
    T* at = to;
    std::int64_t rest = item;
    for (int i = kDims - 1; i >= 0; --i) {
      at += rest % shape[i] * strides[i];
      rest /= shape[i];
    }
    *at = static_cast<T>(sum);
  }
};

}  // namespace natten::detail::cuda::simt
