#pragma once

#include <natten/export.h>
#include <natten/half.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace natten {

inline constexpr int kMaxRank = 3;  ///< spatial axes
inline constexpr int kMaxDims = 8;  ///< dimensions of a tensor view

/// `boolean` is for masks only: one byte, 0 or 1.
enum class DType : std::uint8_t { float64, float32, bfloat16, float16, boolean };
enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  friend bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
  friend bool operator!=(Device a, Device b) { return !(a == b); }
};

NATTEN_EXPORT const char* name_of(DType);
NATTEN_EXPORT const char* name_of(DeviceType);
NATTEN_EXPORT std::size_t size_of(DType);
/// Element type of logsumexp for inputs of a type: float64 for float64, else float32.
constexpr DType statistic_dtype(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<bfloat16> {
  static constexpr DType value = DType::bfloat16;
};
template <>
struct DTypeOf<float16> {
  static constexpr DType value = DType::float16;
};
template <>
struct DTypeOf<bool> {
  static constexpr DType value = DType::boolean;
};

/// A strided view of memory that somebody else owns. Strides count elements, not bytes. A default
/// constructed view means "not given". Inputs are never written through, although `data` is not
/// const.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device;
  int ndim = -1;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};

  explicit operator bool() const { return ndim >= 0; }
  /// Number of elements, for a view that a call would accept; in others the product may overflow.
  std::int64_t size() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape.data()[i];
    return n;
  }
};

/// A row-major (C-contiguous) view.
inline TensorView contiguous_view(void* data, DType dtype, Device device, const std::int64_t* shape,
                                  int ndim) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.device = device;
  v.ndim = ndim;
  std::int64_t stride = 1;
  for (int i = (ndim < kMaxDims ? ndim : kMaxDims) - 1; i >= 0; --i) {
    v.shape.data()[i] = shape[i];
    v.strides.data()[i] = stride;
    stride *= shape[i];
  }
  return v;
}

/// A row-major view of CPU memory: `view(pointer, {batch, height, width, heads, dim})`.
template <class T>
TensorView view(T* data, std::initializer_list<std::int64_t> shape) {
  using Element = std::remove_const_t<T>;
  return contiguous_view(const_cast<Element*>(data), DTypeOf<Element>::value, {}, shape.begin(),
                         static_cast<int>(shape.size()));
}

/// One integer per spatial axis. Holds its own length so that a tuple of the wrong length can be
/// reported; an empty tuple means "not given".
struct Tuple {
  int size = 0;
  std::array<std::int64_t, kMaxDims> values{};

  Tuple() = default;
  Tuple(std::initializer_list<std::int64_t> list)
      : Tuple(list.begin(), static_cast<int>(list.size())) {}
  template <class Iterator>
  Tuple(Iterator first, int count) : size(count) {
    for (int i = 0; i < count && i < kMaxDims; ++i, ++first) values.data()[i] = *first;
  }
  std::int64_t operator[](int i) const { return values.data()[i]; }
};

}  // namespace natten
