#pragma once

// exp and log of vectors.

#include "vectors-inl.h"

namespace natten::detail::cpu::simd {
namespace {

/// n + magic has a whole number n, of either sign, in its low bits.
template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float log2e = 1.44269504088896341f, magic = 12582912.0f, lowest = -87.0f;
  static constexpr int mantissa = 23;
  static constexpr std::int32_t bias = 127;
  // Of (2^r - 1) / r on |r| <= 1/2, from the highest power down, by interpolation in Chebyshev's
  // points. That leaves an error of 5e-9.
  static constexpr float terms[] = {1.54531629e-4f, 1.33908634e-3f, 9.61808256e-3f,
                                    5.55035711e-2f, 2.40226508e-1f, 6.93147188e-1f};
};
template <>
struct Exp<double> {
  static constexpr double log2e = 1.44269504088896340736, magic = 6755399441055744.0;
  static constexpr double lowest = -708.0;
  static constexpr int mantissa = 52;
  static constexpr std::int64_t bias = 1023;
  // Likewise; an error of 2e-17.
  static constexpr double terms[] = {
      2.5729324177362304e-11, 4.4558179083360645e-10, 7.0548973041554993e-9, 1.0178057087733941e-7,
      1.3215486808705563e-6,  1.5252733841556773e-5,  1.5403530393370733e-4, 1.3333558146406471e-3,
      9.6181291076284795e-3,  5.5504108664821627e-2,  2.4022650695910071e-1, 6.9314718055994531e-1};
};

/// exp(x) for x <= 0 and a little above, to within |x| * 2^-mantissa of itself; 0 below the normal
/// range, NaN for NaN.
template <class T>
NATTEN_INLINE Vector<T> exp(Vector<T> x) {
  using E = Exp<T>;
  // x * log2(e) = n + r
  const Vector<T> shifted = x * E::log2e + E::magic;
  const Vector<T> r = x * E::log2e - (shifted - E::magic);
  Vector<T> sum = broadcast<T>(E::terms[0]);
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof(E::terms) / sizeof(T); ++i) sum = sum * r + E::terms[i];
  sum = sum * r + T(1);
  const Ints<T> exponent = (reinterpret_cast<Ints<T>>(shifted) + E::bias) << E::mantissa;
  return x < E::lowest ? Vector<T>{} : sum * reinterpret_cast<Vector<T>>(exponent);
}

/// log(x) for normal x >= 1, to within some 2^-mantissa, and for 0: Halley's iteration on
/// exp(y) = x.
template <class T>
NATTEN_INLINE Vector<T> log(Vector<T> x) {
  using E = Exp<T>;
  // Taking a mantissa for its own logarithm is off by less than 0.06.
  constexpr T unit = static_cast<T>(std::int64_t{1} << E::mantissa), ln2 = T(1) / E::log2e;
  Vector<T> y =
      (__builtin_convertvector(reinterpret_cast<Ints<T>>(x), Vector<T>) / unit - E::bias) * ln2;
  // Each round cubes the error and divides it by 12.
  for (int round = 0; round < (E::mantissa > 30 ? 3 : 2); ++round) {
    const Vector<T> power = exp<T>(y);
    y += 2 * (x - power) / (x + power);
  }
  return x == 0 ? broadcast<T>(-kInfinity<T>) : y;
}

}  // namespace
}  // namespace natten::detail::cpu::simd
