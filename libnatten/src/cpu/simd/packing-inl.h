#pragma once

// Packs tokens for the kernels, and writes sums to tokens.

#include "conversions-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// Elements of a token that are converted at a time.
template <class T>
constexpr int kPiece = 256 / static_cast<int>(sizeof(T));

/// Converts `length` elements, and sets the rest of the last vector to 0. Inlined twice: for whole
/// pieces the length is a constant.
template <class Type, class T>
NATTEN_INLINE void convert(const typename Type::Element* from, std::int64_t length, T scale,
                           T* piece) {
  std::int64_t i = 0;
  for (; i + kWidth<T> <= length; i += kWidth<T>) store(piece + i, Type::read(from + i) * scale);
  if (i < length) store(piece + i, read_rest<Type>(from, i, length) * scale);
}

/// Transposes elements d to d + length of some tokens from `first` on.
template <class T>
NATTEN_INLINE void spread(const Packing<T>& p, int head, std::int64_t first, std::int64_t d,
                          std::int64_t length, const T* const (&tokens)[kWidth<T>]) {
  constexpr int kW = kWidth<T>;
  for (std::int64_t e = 0; e < length; e += kW) {
    Vector<T> square[kW];
    for (int i = 0; i < kW; ++i) square[i] = load(tokens[i] + e);
    transpose<T>(square);
    const std::int64_t ld = p.ld ? p.ld : kW;
    T* to =
        p.transposed + head * p.transposed_stride + (p.ld ? first : first * p.dim) + (d + e) * ld;
    if (length - e >= kW) {
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) store(to + i * ld, square[i]);
    } else {
      for (std::int64_t i = 0; i < length - e; ++i) store(to + i * ld, square[i]);
    }
  }
}

/// Bytes of a cache line.
constexpr std::int64_t kLine = 64;
/// How many tokens before it is packed a token is fetched, to the L2 cache: in the L1 cache those
/// of one head displace each other.
constexpr std::int64_t kAhead = 16;

/// Fetches a token of those that follow.
template <class Element, class T>
NATTEN_INLINE void fetch(const Packing<T>& first, std::int64_t index) {
  const Packing<T>* p = &first;
  while (index >= p->count) {
    index -= p->count;
    p = p->next;
    if (!p) return;
  }
  if (!p->from) return;
  constexpr std::int64_t per_line = kLine / static_cast<std::int64_t>(sizeof(Element));
  const auto* token = static_cast<const Element*>(p->from) + index * p->stride;
  const bool is_one = p->head_stride == p->dim;  // run of elements
  const std::int64_t length = is_one ? p->heads * p->dim : p->dim;
  for (int head = 0; head < (is_one ? 1 : p->heads); ++head, token += p->head_stride) {
    for (std::int64_t d = 0; d < length; d += per_line) __builtin_prefetch(token + d, 0, 1);
    // It may end in one more line than it fills.
    if (length % per_line != 0) __builtin_prefetch(token + length - 1, 0, 1);
  }
}

template <class Type>
void pack(const Packing<typename Type::Sum>& p) {
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  const auto* from = static_cast<const typename Type::Element*>(p.from);
  // Then elements that are sums already are read where they lie.
  const bool transposes_alone = !p.plain && p.scale == T(1);
  for (std::int64_t first = 0; first < p.count; first += kW) {
    const int count = static_cast<int>(min(kW, p.count - first));
    for (std::int64_t d = 0; d < p.dim; d += kPiece<T>) {
      const std::int64_t length = min(kPiece<T>, p.dim - d);
      T pieces[kMostHeads][kW][kPiece<T>];
      const T* converted[kMostHeads][kW];
      // In the order of memory, where heads of a token follow each other. The padding of a square
      // is the first token.
      for (int i = 0; i < (p.transposed ? kW : count); ++i) {
        const std::int64_t index = first + (i < count ? i : 0);
        const bool is_zero = !from || (p.seen && p.seen[index * p.seen_stride] == 0);
        std::int64_t element = index * p.stride + d;
        if (d == 0) fetch<typename Type::Element>(p, first + i + kAhead);
        for (int head = 0; head < p.heads; ++head, element += p.head_stride) {
          if constexpr (sizeof(typename Type::Element) == sizeof(T)) {
            if (transposes_alone && !is_zero && length % kW == 0) {
              converted[head][i] = from + element;
              continue;
            }
          }
          T* to = p.plain && i < count
                      ? p.plain + head * p.plain_stride + (first + i) * p.padded + d
                      : pieces[head][i];
          converted[head][i] = to;
          if (is_zero)
            for (std::int64_t e = 0; e < length; e += kW) store(to + e, Vector<T>{});
          else if (length == kPiece<T>)
            convert<Type, T>(from + element, kPiece<T>, p.scale, to);
          else
            convert<Type, T>(from + element, length, p.scale, to);
        }
      }
      for (int head = 0; head < p.heads && p.transposed; ++head)
        spread(p, head, first, d, length, converted[head]);
    }
  }
}

#if NATTEN_PAIRS
/// Packs pairs of bfloat16, without a scale.
void pack_pairs(const Packing<float>& p) {
  using Element = BFloat16::Element;
  constexpr std::int64_t kW = kWidth<float>;
  constexpr std::int64_t kElements = std::int64_t{2} * kPiece<float>;  // of a token, at a time
  static constexpr Element zeros[kElements] = {};
  const auto* from = static_cast<const Element*>(p.from);
  Packing<float> in_pairs = p;
  in_pairs.dim = ceil_div(p.dim, 2);
  for (std::int64_t first = 0; first < p.count; first += kW) {
    const int count = static_cast<int>(min(kW, p.count - first));
    for (std::int64_t d = 0; d < p.dim; d += kElements) {
      const std::int64_t length = min(kElements, p.dim - d);
      Element parts[kMostHeads][kW + 1][kElements];
      // The token after these is the second of the last pair.
      const Element* tokens[kMostHeads][kW + 1];
      for (int i = 0; i <= kW; ++i) {
        const std::int64_t index = first + i;
        const bool is_zero =
            !from || index >= p.count || (p.seen && p.seen[index * p.seen_stride] == 0);
        if (d == 0 && i < count) fetch<Element>(p, index + kAhead);
        for (int head = 0; head < p.heads; ++head) {
          const Element* token = zeros;
          if (!is_zero) token = from + index * p.stride + head * p.head_stride + d;
          if (!is_zero && length % (2 * kW) != 0) {
            Element* part = parts[head][i];
            for (std::int64_t e = 0; e < length; ++e) part[e] = token[e];
            for (std::int64_t e = length; e % (2 * kW) != 0; ++e) part[e] = 0;
            token = part;
          }
          tokens[head][i] = token;
        }
      }
      for (int head = 0; head < p.heads; ++head) {
        if (p.transposed) {
          const float* pairs[kW];
          for (int i = 0; i < kW; ++i) pairs[i] = reinterpret_cast<const float*>(tokens[head][i]);
          spread(in_pairs, head, first, d / 2, ceil_div(length, 2), pairs);
        }
        if (!p.plain) continue;
        float* to = p.plain + head * p.plain_stride + first * p.padded + d;
        const auto bits = [](const Element* token) {
          return __builtin_convertvector(load_halves(token), Bits);
        };
        for (std::int64_t e = 0; e < length && first == 0 && p.continues; e += kW)
          store(to - p.padded + e,
                reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(load(to - p.padded + e)) |
                                                bits(tokens[head][0] + e) << 16));
        for (int i = 0; i < count; ++i, to += p.padded)
          for (std::int64_t e = 0; e < length; e += kW)
            store(to + e, reinterpret_cast<Vector<float>>(bits(tokens[head][i] + e) |
                                                          bits(tokens[head][i + 1] + e) << 16));
      }
    }
  }
}
#endif

template <class Type>
void unpack(const Unpacking<typename Type::Sum>& u) {
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  auto* token = static_cast<typename Type::Element*>(u.to);
  for (std::int64_t r = 0; r < u.count; ++r, token += u.stride) {
    auto* to = token;
    for (int head = 0; head < u.heads; ++head, to += u.head_stride) {
      const T* from = u.from + head * u.from_stride + r * u.padded;
      const T scale = u.scales ? u.scale * u.scales[head * u.scales_stride + r] : u.scale;
      std::int64_t i = 0;
      if constexpr (kCanStream && sizeof(typename Type::Element) == sizeof(T))
        if (u.streams && reinterpret_cast<std::uintptr_t>(to) % kLine == 0)
          for (; i + kW <= u.dim; i += kW) stream_to<T>(to + i, load(from + i) * scale);
      for (; i + kW <= u.dim; i += kW) Type::write(to + i, load(from + i) * scale);
      if (i == u.dim) continue;
      if (i > 0) {  // once more with some of those before
        i = u.dim - kW;
        Type::write(to + i, load(from + i) * scale);
        continue;
      }
      typename Type::Element rest[kW];
      Type::write(rest, load(from) * scale);
      copy_part<kW>(to, rest, u.dim);
    }
  }
  if (u.streams) end_stream();
}

}  // namespace
}  // namespace natten::detail::cpu::simd
