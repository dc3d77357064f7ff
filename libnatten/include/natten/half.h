#pragma once

#include <natten/host_device.h>

#include <cstdint>
#include <cstring>

namespace natten {

namespace detail {
NATTEN_HOST_DEVICE inline std::uint32_t bits_of(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}
NATTEN_HOST_DEVICE inline float float_of(std::uint32_t b) {
  float x;
  std::memcpy(&x, &b, sizeof x);
  return x;
}
}  // namespace detail

/// Storage type for bfloat16: the upper half of a float32. Conversion rounds to nearest even.
struct bfloat16 {
  std::uint16_t bits = 0;

  bfloat16() = default;
  NATTEN_HOST_DEVICE explicit bfloat16(float x) {
    const std::uint32_t b = detail::bits_of(x);
    const bool is_nan = (b & 0x7fffffffu) > 0x7f800000u;
    // A NaN keeps its sign and stays quiet: rounding could carry its payload into an infinity.
    bits = static_cast<std::uint16_t>(is_nan ? (b >> 16) | 0x40u
                                             : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
  NATTEN_HOST_DEVICE explicit bfloat16(double x) : bfloat16(static_cast<float>(x)) {}
  NATTEN_HOST_DEVICE operator float() const {
    return detail::float_of(static_cast<std::uint32_t>(bits) << 16);
  }
};

/// Storage type for IEEE binary16. Conversion rounds to nearest even and keeps subnormals.
struct float16 {
  std::uint16_t bits = 0;

  float16() = default;
  NATTEN_HOST_DEVICE explicit float16(float x) {
    const std::uint32_t b = detail::bits_of(x);
    const std::uint32_t sign = (b >> 16) & 0x8000u;
    const std::uint32_t magnitude = b & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
      // Adding 0.5 aligns the last mantissa bit of the sum with 2^-24, so the adder rounds.
      half = detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    bits = static_cast<std::uint16_t>(sign | half);
  }
  NATTEN_HOST_DEVICE explicit float16(double x) : float16(static_cast<float>(x)) {}
  NATTEN_HOST_DEVICE operator float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1fu;
    const std::uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float32
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      return sign ? -magnitude : magnitude;
    }
    const std::uint32_t wide = exponent == 0x1fu ? 0xffu : exponent + 112u;
    return detail::float_of(sign | (wide << 23) | (mantissa << 13));
  }
};

}  // namespace natten
