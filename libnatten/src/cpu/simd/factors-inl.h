#pragma once

// What operands of products are made of, and how their vectors multiply.

#include "conversions-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// Operands have one number in an element: of the type that sums are kept in.
template <class T>
struct Single {
  using Sum = T;
  static constexpr int kCount = 1;
  static NATTEN_INLINE Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> sum) {
    return sum + a * b;
  }
  static NATTEN_INLINE Vector<T> broadcast_from(const T* from) { return broadcast<T>(*from); }
};

#if NATTEN_PAIRS
/// Operands have a pair of bfloat16 in an element, the first in its low half: of dims that follow
/// each other in operands of scores, and of columns that do in those of weights.
struct Pair {
  using Sum = float;
  using V = Vector<float>;
  static constexpr int kCount = 2;

  static NATTEN_INLINE V broadcast_from(const float* from) {
    std::int32_t pair;  // may look like a number that arithmetic changes
    __builtin_memcpy(&pair, from, sizeof pair);
    return reinterpret_cast<V>(Ints<float>{} + pair);
  }
#if defined(__AVX512BF16__)
  static_assert(kVectorBytes == 64);
  static NATTEN_INLINE V multiply_add(V a, V b, V sum) {
    return reinterpret_cast<V>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                reinterpret_cast<__m512bh>(a),
                                                reinterpret_cast<__m512bh>(b)));
  }
  /// Lane l is the pair of first[l] and second[l], rounded.
  static NATTEN_INLINE V of(V first, V second) {
    typedef std::int16_t Shorts __attribute__((vector_size(kVectorBytes)));
    Shorts index;
#pragma GCC unroll 16
    for (int l = 0; l < kWidth<float>; ++l) {
      index[2 * l] = static_cast<std::int16_t>(l);
      index[2 * l + 1] = static_cast<std::int16_t>(kWidth<float> + l);
    }
    const __m512bh rounded =
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
    return reinterpret_cast<V>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(index),
                                                        reinterpret_cast<__m512i>(rounded)));
  }
#else
  static NATTEN_INLINE V multiply_add(V a, V b, V sum) {
    return sum + low(a) * low(b) + high(a) * high(b);
  }
  static NATTEN_INLINE V of(V first, V second) {
    return reinterpret_cast<V>(BFloat16::rounded(first) >> 16 |
                               (BFloat16::rounded(second) & 0xffff0000u));
  }

 private:
  static NATTEN_INLINE V low(V pair) {
    return reinterpret_cast<V>(reinterpret_cast<Bits>(pair) << 16);
  }
  static NATTEN_INLINE V high(V pair) {
    return reinterpret_cast<V>(reinterpret_cast<Bits>(pair) & 0xffff0000u);
  }
#endif
};
#endif

}  // namespace
}  // namespace natten::detail::cpu::simd
