#pragma once

// Element types: how vectors of sums are read from them and written to them.

#include "vectors-inl.h"

namespace natten::detail::cpu::simd {
namespace {

// Element types, by vectors of as many elements as sums fit one.

template <class T>
struct Same {
  using Element = T;
  using Sum = T;
  static NATTEN_INLINE Vector<T> read(const T* from) { return load(from); }
  static NATTEN_INLINE void write(T* to, Vector<T> v) { store(to, v); }
};

typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

NATTEN_INLINE Halves load_halves(const std::uint16_t* from) {
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
NATTEN_INLINE void store_halves(std::uint16_t* to, Halves v) { __builtin_memcpy(to, &v, sizeof v); }

/// As natten::bfloat16, which is not used here because its functions are inline.
struct BFloat16 {
  using Element = std::uint16_t;
  using Sum = float;
  static NATTEN_INLINE Vector<float> read(const Element* from) {
    return reinterpret_cast<Vector<float>>(__builtin_convertvector(load_halves(from), Bits) << 16);
  }
  static NATTEN_INLINE void write(Element* to, Vector<float> v) {
    store_halves(to, __builtin_convertvector(rounded(v) >> 16, Halves));
  }
  /// The nearest, in the high half; the low one is to be ignored.
  static NATTEN_INLINE Bits rounded(Vector<float> v) {
    const Bits b = reinterpret_cast<Bits>(v);
    return (b & 0x7fffffffu) > 0x7f800000u ? b | 0x400000u : b + 0x7fffu + ((b >> 16) & 1u);
  }
};

/// As natten::float16.
struct Float16 {
  using Element = std::uint16_t;
  using Sum = float;
  static NATTEN_INLINE Vector<float> read(const Element* from) {
#if defined(__F16C__)
    float sums[kWidth<float>];
    for (int i = 0; i < kWidth<float>; i += 8)
      _mm256_storeu_ps(
          sums + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    return load(sums);
#else
    const Bits x = __builtin_convertvector(load_halves(from), Bits);
    const Bits sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    const Vector<float> subnormal =
        __builtin_convertvector(reinterpret_cast<Ints<float>>(magnitude), Vector<float>) * 0x1p-24f;
    const Bits normal =
        (magnitude << 13) + (magnitude >= 0x7c00u ? Bits{} + 0x70000000u : Bits{} + 0x38000000u);
    return reinterpret_cast<Vector<float>>(
        (magnitude < 0x400u ? reinterpret_cast<Bits>(subnormal) : normal) | sign);
#endif
  }
  static NATTEN_INLINE void write(Element* to, Vector<float> v) {
#if defined(__F16C__)
    float sums[kWidth<float>];
    store(sums, v);
    for (int i = 0; i < kWidth<float>; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(sums + i), 0));
#else
    const Bits b = reinterpret_cast<Bits>(v);
    const Bits magnitude = b & 0x7fffffffu;
    const Bits tiny =
        reinterpret_cast<Bits>(reinterpret_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
    const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    Bits half = magnitude < 0x38800000u ? tiny : normal;
    half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? nan : half;
    store_halves(to, __builtin_convertvector(half | ((b >> 16) & 0x8000u), Halves));
#endif
  }
};

/// Copies fewer elements than `kMost`, in at most one move of each size.
template <int kMost, class Element>
NATTEN_INLINE void copy_part(Element* to, const Element* from, std::int64_t count) {
#pragma GCC unroll 8
  for (int n = kMost / 2; n > 0; n /= 2)
    if (count & n) {
      __builtin_memcpy(to, from, static_cast<std::size_t>(n) * sizeof(Element));
      to += n;
      from += n;
    }
}

/// The first `count` elements, fewer than fill a vector, and zeros.
template <class Type>
NATTEN_INLINE Vector<typename Type::Sum> read_part(const typename Type::Element* from,
                                                   std::int64_t count) {
  using T = typename Type::Sum;
#if defined(__AVX512VL__)
  // By a mask: a vector that has just been stored in parts would have to wait for them.
  if constexpr (sizeof(typename Type::Element) == sizeof(T)) {
    const auto mask = static_cast<std::uint8_t>((1u << count) - 1);
    if constexpr (kVectorBytes == 64) {
      if constexpr (sizeof(T) == 4)
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
      else
        return _mm512_maskz_loadu_pd(mask, from);
    } else {
      if constexpr (sizeof(T) == 4)
        return _mm256_maskz_loadu_ps(mask, from);
      else
        return _mm256_maskz_loadu_pd(mask, from);
    }
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(typename Type::Element) == sizeof(T) && kVectorBytes == 32) {
    const auto mask =
        reinterpret_cast<__m256i>(lanes<T>() < static_cast<typename VectorOf<T>::Int>(count));
    if constexpr (sizeof(T) == 4)
      return _mm256_maskload_ps(from, mask);
    else
      return _mm256_maskload_pd(from, mask);
  }
#endif
  typename Type::Element part[kWidth<T>] = {};
  copy_part<kWidth<T>>(part, from, count);
  return Type::read(part);
}

/// Elements `first` to `length` of a token, fewer than fill a vector, and zeros.
template <class Type>
NATTEN_INLINE Vector<typename Type::Sum> read_rest(const typename Type::Element* token,
                                                   std::int64_t first, std::int64_t length) {
#if defined(__AVX2__) || defined(__aarch64__)
  // With those before them, if that makes a vector: by masked loads of tokens that lie apart
  // packing takes three times as long on a Zen 4.
  using T = typename Type::Sum;
  constexpr int kW = kWidth<T>;
  if (length >= kW) {
    const Ints<T> from = lanes<T>() + static_cast<typename VectorOf<T>::Int>(first - length + kW);
    return from < kW ? permute<T>(Type::read(token + length - kW), from) : Vector<T>{};
  }
#endif
  return read_part<Type>(token + first, length - first);
}

}  // namespace
}  // namespace natten::detail::cpu::simd
