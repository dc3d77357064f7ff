#pragma once

// Chunks of tokens that are not copied 16 bytes at a time, because of where tokens lie or because
// they end within a chunk: by pieces of 16, 8 or 4 bytes, or of any element.

#include <cstdint>
#include <type_traits>

#include "matrices.h"

namespace natten::detail::cuda {

/// Calls `f(std::integral_constant)` with the bytes of the pieces for tokens at multiples of `unit`
/// elements: 16, 8 or 4; or 2 where elements have as many.
template <class T, class F>
NATTEN_DEVICE void with_piece_bytes(int unit, F&& f) {
  if (unit == kChunk<T>) return f(std::integral_constant<int, kChunkBytes>());
  if (unit == kChunk<T> / 2) return f(std::integral_constant<int, kChunkBytes / 2>());
  if constexpr (sizeof(T) < 4)
    if (unit < kChunk<T> / 4) return f(std::integral_constant<int, kChunkBytes / 8>());
  f(std::integral_constant<int, kChunkBytes / 4>());
}

/// Begins to copy a chunk, `kBytes` at a time, of which `given` bytes exist.
template <int kBytes, class Machine>
NATTEN_DEVICE void copy_pieces(Machine& gpu, int to, const void* from, int given) {
  NATTEN_UNROLL
  for (int at = 0; at < kChunkBytes; at += kBytes) {
    const int left = given - at;
    gpu.template copy_async<kBytes>(to + at, static_cast<const char*>(from) + at,
                                    left < 0        ? 0
                                    : left < kBytes ? left
                                                    : kBytes);
  }
}

/// Copies the first `count` elements of a chunk to memory, by pieces of `kBytes` but for the rest.
template <int kBytes, class T, class Machine>
NATTEN_DEVICE void store_pieces(Machine& gpu, T* to, const T* from, int count) {
  constexpr int kPiece = kBytes / int(sizeof(T));
  NATTEN_UNROLL
  for (int at = 0; at < kChunk<T>; at += kPiece) {
    if (at + kPiece <= count) {
      gpu.template copy<kBytes>(to + at, from + at);
    } else {
      NATTEN_UNROLL
      for (int j = at; j < at + kPiece - 1; ++j)
        if (j < count) to[j] = from[j];
    }
  }
}

/// Whether an element of two bytes is the second of its word of memory.
template <class T>
NATTEN_DEVICE bool is_second(const T* element) {
  static_assert(sizeof(T) == 2);
  return reinterpret_cast<std::uintptr_t>(element) % 4 != 0;
}

/// Copies a chunk of elements of two bytes that lies anywhere, of which `left` exist, at once:
/// memory is read by its words, and by elements where these would reach past what exists. Word by
/// word where registers are scarce.
template <bool kSparesRegisters, class T, class Machine>
NATTEN_DEVICE void load_shifted(Machine& gpu, int to, const T* from, int left) {
  const int before = is_second(from);
  const auto word_at = [&](int i) {
    std::uint32_t word = 0;
    if (i + 1 < left)
      gpu.template copy<4>(&word, from + i);
    else if (i < left)
      word = from[i].bits;
    return word;
  };
  std::uint32_t word = before ? std::uint32_t{from[0].bits} << 16 : word_at(0);
  const auto take = [&](int i) {
    const std::uint32_t next = word_at(2 * i + 2 - before);
    const std::uint32_t taken = gpu.funnel(word, next, 16 * before);
    word = next;
    return taken;
  };
  if constexpr (kSparesRegisters) {
    NATTEN_DO_NOT_UNROLL
    for (int i = 0; i < 4; ++i) *gpu.template shared<std::uint32_t>(to + 4 * i) = take(i);
  } else {
    std::uint32_t chunk[4];
    NATTEN_EACH (i, 4) chunk[i] = take(i);
    gpu.write_chunk(to, chunk);
  }
}

/// Copies the first `count` elements of a chunk, which have two bytes, to anywhere in memory.
template <class T, class Machine>
NATTEN_DEVICE void store_shifted(Machine& gpu, T* to, int from, int count) {
  const int before = is_second(to);
  std::uint32_t chunk[4];
  gpu.read_chunk(chunk, from);
  if (before) to[0].bits = static_cast<std::uint16_t>(chunk[0]);
  NATTEN_EACH (i, 4) {
    const std::uint32_t word = gpu.funnel(chunk[i], i < 3 ? chunk[i + 1] : 0, 16 * before);
    const int at = 2 * i + before;
    if (at + 1 < count && at + 1 < kChunk<T>)
      gpu.template copy<4>(to + at, &word);
    else if (at < count)
      to[at].bits = static_cast<std::uint16_t>(word);
  }
}

}  // namespace natten::detail::cuda
