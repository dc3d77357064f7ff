#pragma once

#include <natten/natten.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

/// Tensors of the tests: dense float64 for what the reference computes, and buffers of any element
/// type and strides for what the library sees.
namespace natten_tests {

using Rng = std::mt19937_64;
using Shape = std::vector<std::int64_t>;

inline std::int64_t volume(const Shape& shape) {
  std::int64_t n = 1;
  for (std::int64_t x : shape) n *= x;
  return n;
}
inline std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

inline std::int64_t uniform(Rng& rng, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(rng);
}
inline bool chance(Rng& rng, double probability) {
  return std::uniform_real_distribution<double>()(rng) < probability;
}

/// Row-major float64.
struct Dense {
  Shape shape;
  std::vector<double> data;

  Dense() = default;
  explicit Dense(Shape s, double fill = 0)
      : shape(std::move(s)), data(index(volume(shape)), fill) {}
  double& operator[](std::int64_t i) { return data[index(i)]; }
  double operator[](std::int64_t i) const { return data[index(i)]; }
  std::int64_t size() const { return static_cast<std::int64_t>(data.size()); }
  bool is_given() const { return !shape.empty(); }
};

inline Dense normal(Rng& rng, const Shape& shape) {
  Dense x(shape);
  std::normal_distribution<double> distribution;
  for (double& e : x.data) e = distribution(rng);
  return x;
}

inline double norm(const Dense& x) {
  double sum = 0;
  for (double e : x.data) sum += e * e;
  return std::sqrt(sum);
}

/// Shapes may differ in how they count tokens.
inline double distance(const Dense& a, const Dense& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double sum = 0;
  for (std::int64_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

/// |got - expected| / |expected|. A derivative may be zero by its nature (a window of one): then
/// its rounding errors, from terms that cancel, are compared with the incoming gradient.
inline double relative_error(const Dense& got, const Dense& expected, double incoming = 0) {
  const double size = norm(expected), error = distance(got, expected);
  if (error == 0) return 0;
  return error / (size > 1e-6 * incoming ? size : incoming);
}

/// An error in a logsumexp scales weights by its exponential, so it counts absolutely where the
/// logsumexp is small. Those of queries that see nothing have to be the same -inf.
inline double logsumexp_error(Dense got, Dense expected) {
  for (std::int64_t i = 0; i < expected.size(); ++i)
    if (got[i] == expected[i]) got[i] = expected[i] = 0;
  const double error = distance(got, expected);
  if (error == 0) return 0;
  return error / std::max(norm(expected), std::sqrt(static_cast<double>(expected.size())));
}

inline double load(natten::DType dtype, const void* from) {
  const auto as = [&](auto x) {
    std::memcpy(&x, from, sizeof x);
    return static_cast<double>(x);
  };
  switch (dtype) {
    case natten::DType::float64: return as(double{});
    case natten::DType::float32: return as(float{});
    case natten::DType::bfloat16: return as(natten::bfloat16{});
    case natten::DType::boolean: return as(bool{});
    case natten::DType::float16: break;
  }
  return as(natten::float16{});
}

inline void store(natten::DType dtype, void* to, double value) {
  const auto as = [&](auto x) { std::memcpy(to, &x, sizeof x); };
  switch (dtype) {
    case natten::DType::float64: return as(value);
    case natten::DType::float32: return as(static_cast<float>(value));
    case natten::DType::bfloat16: return as(natten::bfloat16(value));
    case natten::DType::boolean: return as(value != 0);
    case natten::DType::float16: break;
  }
  as(natten::float16(value));
}

/// The memory from the first to the last element of a tensor, with the gaps between them.
struct Extent {
  char* begin;
  std::size_t bytes;
};
inline Extent extent_of(const natten::TensorView& v) {
  if (v.size() == 0) return {static_cast<char*>(v.data), 0};
  const auto element = static_cast<std::int64_t>(natten::size_of(v.dtype));
  std::int64_t before = 0, bytes = element;
  for (int d = 0; d < v.ndim; ++d) {
    const std::int64_t reach = (v.shape[index(d)] - 1) * std::abs(v.strides[index(d)]) * element;
    bytes += reach;
    if (v.strides[index(d)] < 0) before += reach;
  }
  return {static_cast<char*>(v.data) - before, static_cast<std::size_t>(bytes)};
}

/// The type of logsumexp and its gradient.
inline natten::DType statistic_of(natten::DType dtype) {
  return dtype == natten::DType::float64 ? dtype : natten::DType::float32;
}

/// How elements lie in memory; the innermost ones are always adjacent.
struct Layout {
  Rng* rng = nullptr;  ///< null: contiguous. Else: axes in any order, gaps, reversed axes.
  /// Also allows stride 0 on the first axis. Tokens that are all alike would make gradients cancel
  /// to rounding errors.
  bool is_input = false;
};

/// Owns the memory behind a view. All bytes start as NaN of every element type, the gaps between
/// elements too: what reads a gap computes NaN, what writes one is found by `gaps_are_intact`.
class Buffer {
 public:
  Buffer() = default;  ///< a tensor that is not given

  Buffer(natten::DType dtype, const Shape& shape, Layout layout = {}) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), view_.shape.begin());
    lay_out(layout);
  }
  Buffer(natten::DType dtype, const Dense& values, Layout layout = {})
      : Buffer(dtype, values.shape, layout) {
    if (!values.is_given()) *this = Buffer();
    std::int64_t i = 0;
    for_each_offset(
        [&](std::int64_t at) { store(view_.dtype, bytes_.data() + at * element(), values[i++]); });
  }

  const natten::TensorView& view() {
    if (view_.ndim >= 0) view_.data = bytes_.data() + first_ * element();
    return view_;
  }

  /// Element `i` in row-major order.
  void set(std::int64_t i, double value) {
    store(view_.dtype, bytes_.data() + offset(i) * element(), value);
  }
  double get(std::int64_t i) const {
    return load(view_.dtype, bytes_.data() + offset(i) * element());
  }

  Dense dense() const {
    if (view_.ndim < 0) return {};
    Dense x(Shape(view_.shape.begin(), view_.shape.begin() + view_.ndim));
    std::int64_t i = 0;
    for_each_offset(
        [&](std::int64_t at) { x[i++] = load(view_.dtype, bytes_.data() + at * element()); });
    return x;
  }

  bool gaps_are_intact() const {
    std::vector<unsigned char> rest = bytes_;
    for_each_offset(
        [&](std::int64_t at) { std::fill_n(rest.begin() + at * element(), element(), kGap); });
    return std::all_of(rest.begin(), rest.end(), [](unsigned char b) { return b == kGap; });
  }
  /// No byte has been written since construction without values.
  bool is_untouched() const {
    return std::all_of(bytes_.begin(), bytes_.end(), [](unsigned char b) { return b == kGap; });
  }

  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  static constexpr unsigned char kGap = 0xff;

  std::int64_t element() const { return static_cast<std::int64_t>(natten::size_of(view_.dtype)); }

  std::int64_t offset(std::int64_t i) const {
    std::int64_t at = first_;
    for (int d = view_.ndim - 1; d >= 0; --d) {
      at += i % view_.shape[index(d)] * view_.strides[index(d)];
      i /= view_.shape[index(d)];
    }
    return at;
  }

  /// Calls `f(offset)` for all elements in row-major order, without the divisions of
  /// `offset`.
  template <class F>
  void for_each_offset(const F& f) const {
    if (view_.ndim >= 0) for_each_offset_from(0, first_, f);
  }
  template <class F>
  void for_each_offset_from(int d, std::int64_t at, const F& f) const {
    if (d == view_.ndim) return f(at);
    for (std::int64_t i = 0; i < view_.shape[index(d)]; ++i)
      for_each_offset_from(d + 1, at + i * view_.strides[index(d)], f);
  }

  void lay_out(Layout layout) {
    std::vector<int> order(index(view_.ndim));  // innermost first
    std::iota(order.rbegin(), order.rend(), 0);
    if (layout.rng) std::shuffle(order.begin() + 1, order.end(), *layout.rng);
    std::int64_t stride = 1;
    first_ = layout.rng ? uniform(*layout.rng, 0, 5) : 0;
    for (int d : order) {
      const std::int64_t n = view_.shape[index(d)];
      view_.strides[index(d)] = stride;
      if (layout.rng && d != order[0]) {
        if (layout.is_input && d == 0 && chance(*layout.rng, 0.15)) {
          view_.strides[index(d)] = 0;
          continue;
        }
        if (n > 0 && chance(*layout.rng, 0.1)) {
          view_.strides[index(d)] = -stride;
          first_ += (n - 1) * stride;
        }
      }
      stride *= std::max<std::int64_t>(n, 1);
      if (layout.rng) stride += uniform(*layout.rng, 0, 3);
    }
    // The stride of a single element means nothing, and frameworks put anything there.
    if (layout.rng && view_.shape[index(order[0])] == 1 && chance(*layout.rng, 0.5))
      view_.strides[index(order[0])] = uniform(*layout.rng, 0, 9);
    std::int64_t end = first_;  // past the last element in memory
    for (int d = 0; d < view_.ndim; ++d)
      if (view_.shape[index(d)] > 0 && view_.strides[index(d)] > 0)
        end += (view_.shape[index(d)] - 1) * view_.strides[index(d)];
    bytes_.assign(index((end + 1) * element()), kGap);
  }

  natten::TensorView view_;
  std::vector<unsigned char> bytes_;
  std::int64_t first_ = 0;  // of the view, in elements
};

}  // namespace natten_tests
