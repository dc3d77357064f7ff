#include <gtest/gtest.h>
#include <natten/half.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "cases.h"

namespace natten_tests {
namespace {

template <class T>
struct Format;
template <>
struct Format<natten::float16> {
  static constexpr int kMantissa = 10, kMinExponent = -14, kMaxExponent = 15;
};
template <>
struct Format<natten::bfloat16> {
  static constexpr int kMantissa = 7, kMinExponent = -126, kMaxExponent = 127;
};

/// What the bits mean, by the definition of the IEEE formats.
template <class T>
double decode(unsigned bits) {
  using F = Format<T>;
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  const unsigned mantissa = bits & ((1u << F::kMantissa) - 1);
  const int exponent = static_cast<int>((bits & 0x7fffu) >> F::kMantissa);
  if (exponent == F::kMaxExponent * 2 + 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(mantissa, F::kMinExponent - F::kMantissa);
  return sign *
         std::ldexp(mantissa + (1u << F::kMantissa), exponent - F::kMaxExponent - F::kMantissa);
}

/// Rounds by scaling the format's spacing at x to one; float64 holds all of this exactly.
template <class T>
double round_to(double x) {
  using F = Format<T>;
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), F::kMinExponent);
  const double spacing = std::ldexp(1.0, exponent - F::kMantissa);
  const double rounded = std::nearbyint(x / spacing) * spacing;
  const double past_largest = std::ldexp(1.0, F::kMaxExponent + 1);
  return std::fabs(rounded) >= past_largest ? std::copysign(HUGE_VAL, x) : rounded;
}

template <class T>
T from_bits(unsigned bits) {
  T x;
  x.bits = static_cast<std::uint16_t>(bits);
  return x;
}

template <class T>
void expect_rounds(float x) {
  const T got(x);
  if (std::isnan(x)) {
    ASSERT_TRUE(std::isnan(static_cast<float>(got)));
    ASSERT_EQ(std::signbit(static_cast<float>(got)), std::signbit(x));
    return;
  }
  const double expected = round_to<T>(static_cast<double>(x));
  ASSERT_EQ(decode<T>(got.bits), expected) << std::hexfloat << x;
  ASSERT_EQ(got.bits >> 15, std::signbit(x) ? 1 : 0) << std::hexfloat << x;
}

template <class T>
class Half : public testing::Test {};
using HalfTypes = testing::Types<natten::float16, natten::bfloat16>;
TYPED_TEST_SUITE(Half, HalfTypes);

TYPED_TEST(Half, AllPatternsConvertExactlyAndBack) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto x = from_bits<TypeParam>(bits);
    const double expected = decode<TypeParam>(bits);
    const float wide = x;
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(wide)) << bits;
      const TypeParam back(wide);
      ASSERT_TRUE(std::isnan(static_cast<float>(back))) << bits;
      ASSERT_EQ(back.bits & 0x8000u, bits & 0x8000u) << bits;
      ASSERT_TRUE(back.bits & (1u << (Format<TypeParam>::kMantissa - 1))) << "signalling " << bits;
      continue;
    }
    ASSERT_EQ(static_cast<double>(wide), expected) << bits;
    ASSERT_EQ(TypeParam(wide).bits, bits);
    ASSERT_EQ(TypeParam(static_cast<double>(wide)).bits, bits);
  }
}

TYPED_TEST(Half, MidpointsGoToEvenAndTheirNeighborsToTheNearest) {
  constexpr unsigned kInfinity = static_cast<unsigned>(Format<TypeParam>::kMaxExponent * 2 + 1)
                                 << Format<TypeParam>::kMantissa;
  for (unsigned sign : {0u, 0x8000u})
    for (unsigned bits = 0; bits + 1 < kInfinity; ++bits) {
      const double low = decode<TypeParam>(sign | bits),
                   high = decode<TypeParam>(sign | (bits + 1));
      const auto middle = static_cast<float>((low + high) / 2);
      ASSERT_EQ(static_cast<double>(middle), (low + high) / 2);
      const unsigned even = bits % 2 == 0 ? bits : bits + 1;
      ASSERT_EQ(TypeParam(middle).bits, sign | even);
      const float towards_low = std::nextafter(middle, static_cast<float>(low));
      const float towards_high = std::nextafter(middle, static_cast<float>(high));
      ASSERT_EQ(TypeParam(towards_low).bits, sign | bits);
      ASSERT_EQ(TypeParam(towards_high).bits, sign | (bits + 1));
    }
}

TYPED_TEST(Half, RandomPatternsRoundToNearest) {
  Rng rng(base_seed());
  for (int i = 0; i < 1'000'000; ++i) {
    const auto bits = static_cast<std::uint32_t>(rng());
    float x;
    std::memcpy(&x, &bits, sizeof x);
    expect_rounds<TypeParam>(x);
    if (this->HasFatalFailure()) return;
  }
}

TYPED_TEST(Half, RandomNumbersRoundToNearest) {
  Rng rng(base_seed() + 1);
  std::uniform_real_distribution<float> exponent(-30, 17);
  for (int i = 0; i < 500'000; ++i) {
    const float magnitude = std::exp2(exponent(rng));
    expect_rounds<TypeParam>(i % 2 ? magnitude : -magnitude);
    if (this->HasFatalFailure()) return;
  }
}

TYPED_TEST(Half, ExtremeValues) {
  using Limits = std::numeric_limits<float>;
  const auto largest = static_cast<float>(std::ldexp(
      2 - std::ldexp(1.0, -Format<TypeParam>::kMantissa), Format<TypeParam>::kMaxExponent));
  for (float x :
       {0.0f, Limits::denorm_min(), Limits::min(), Limits::max(), Limits::infinity(),
        Limits::quiet_NaN(), 1.0f, largest, std::nextafter(largest, Limits::infinity())}) {
    expect_rounds<TypeParam>(x);
    expect_rounds<TypeParam>(-x);
  }
  EXPECT_EQ(TypeParam().bits, 0);
  EXPECT_TRUE(std::isinf(static_cast<float>(TypeParam(Limits::max()))));
  EXPECT_EQ(static_cast<float>(TypeParam(largest)), largest);
}

}  // namespace
}  // namespace natten_tests
