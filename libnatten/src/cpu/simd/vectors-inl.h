#pragma once

// Vectors of numbers, and what kernels do with them that has no operator.

#include "kernels.h"

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace natten::detail::cpu::simd {
namespace {

// Vectors may be shorter than the processor's, which halves the work on 512 bits where it pays, or
// longer: the compiler then makes each of several.
constexpr int kVectorBytes = NATTEN_VECTOR_BYTES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

#define NATTEN_INLINE inline __attribute__((always_inline))

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t ints __attribute__((vector_size(kVectorBytes)));
  using Int = std::int32_t;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t ints __attribute__((vector_size(kVectorBytes)));
  using Int = std::int64_t;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Ints = typename VectorOf<T>::ints;
template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
NATTEN_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
NATTEN_INLINE void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

/// Whether vectors can be written past the caches, to where they are aligned.
#if defined(__AVX__)
constexpr bool kCanStream = true;
template <class T>
NATTEN_INLINE void stream_to(T* to, Vector<T> v) {
#if defined(__AVX512F__)
  if constexpr (kVectorBytes == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#endif
  if constexpr (kVectorBytes == 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
  else
    store(to, v);
}
/// Other threads then see what has been written.
NATTEN_INLINE void end_stream() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
template <class T>
NATTEN_INLINE void stream_to(T* to, Vector<T> v) {
  store(to, v);
}
NATTEN_INLINE void end_stream() {}
#endif

template <class T>
NATTEN_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // not +, which would make 0 of -0
}
template <class T>
NATTEN_INLINE Ints<T> lanes() {
  Ints<T> v;
  for (int i = 0; i < kWidth<T>; ++i) v[i] = i;
  return v;
}
/// Lanes a[first], b[first], a[first + 1], b[first + 1], ...
template <class T>
NATTEN_INLINE Vector<T> interleave(Vector<T> a, Vector<T> b, int first) {
#if defined(__clang__)
  Vector<T> interleaved;  // makes one instruction of it, as gcc does of the function below
#pragma GCC unroll 8
  for (int i = 0; i < kWidth<T> / 2; ++i) {
    interleaved[2 * i] = a[first + i];
    interleaved[2 * i + 1] = b[first + i];
  }
  return interleaved;
#else
  Ints<T> index;
  for (int i = 0; i < kWidth<T>; ++i) index[i] = (i % 2) * kWidth<T> + i / 2 + first;
  return __builtin_shuffle(a, b, index);
#endif
}
/// Lane l is v[index[l]].
template <class T>
NATTEN_INLINE Vector<T> permute(Vector<T> v, Ints<T> index) {
#if defined(__clang__)
  // It has no such function, and makes an instruction of the loop only if that is in no other loop.
#if defined(__AVX512VL__)
  if constexpr (kVectorBytes == 32) {
    if constexpr (sizeof(T) == 4)
      return _mm256_permutexvar_ps(reinterpret_cast<__m256i>(index), v);
    else
      return _mm256_permutexvar_pd(reinterpret_cast<__m256i>(index), v);
  } else if constexpr (kVectorBytes == 64) {
    if constexpr (sizeof(T) == 4)
      return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), v);
    else
      return _mm512_permutexvar_pd(reinterpret_cast<__m512i>(index), v);
  }
#elif defined(__AVX2__)
  if constexpr (kVectorBytes == 32) {
    if constexpr (sizeof(T) == 8) index = index << 1 | index << 33 | std::int64_t{1} << 32;
    return reinterpret_cast<Vector<T> >(
        _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256i>(index)));
  }
#elif defined(__aarch64__)
  // By bytes.
  if constexpr (sizeof(T) == 4)
    index = index * 0x04040404 + 0x03020100;
  else
    index = index * 0x0808080808080808 + 0x0706050403020100;
  return reinterpret_cast<Vector<T> >(
      vqtbl1q_u8(reinterpret_cast<uint8x16_t>(v), reinterpret_cast<uint8x16_t>(index)));
#endif
  Vector<T> permuted;
#pragma GCC unroll 16
  for (int l = 0; l < kWidth<T>; ++l) permuted[l] = v[index[l]];
  return permuted;
#else
  return __builtin_shuffle(v, index);
#endif
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

constexpr std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t max(std::int64_t a, std::int64_t b) { return a < b ? b : a; }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class T>
NATTEN_INLINE T sum_of(Vector<T> v) {
  T sum = v[0];
  for (int i = 1; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}

/// Transposes a square of vectors in place: each round interleaves the halves.
template <class T>
NATTEN_INLINE void transpose(Vector<T> (&rows)[kWidth<T>]) {
  constexpr int kW = kWidth<T>;
#pragma GCC unroll 8
  for (int round = 1; round < kW; round *= 2) {
    Vector<T> next[kW];
#pragma GCC unroll 16
    for (int i = 0; i < kW / 2; ++i) {
      next[2 * i] = interleave<T>(rows[i], rows[i + kW / 2], 0);
      next[2 * i + 1] = interleave<T>(rows[i], rows[i + kW / 2], kW / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace natten::detail::cpu::simd
