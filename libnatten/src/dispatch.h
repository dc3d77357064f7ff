#pragma once

#include <natten/types.h>

#include <type_traits>

namespace natten::detail {

template <class T>
struct Type {
  using type = T;
};

/// The C++ type of `statistic_dtype`: of logsumexp, and of sums in vector kernels.
template <class T>
using StatisticOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Calls `f(Type<T>{})` with the C++ type of an element type.
template <class F>
decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(Type<double>{});
    case DType::float32: return f(Type<float>{});
    case DType::bfloat16: return f(Type<bfloat16>{});
    case DType::float16:
    case DType::boolean: break;  // of masks alone
  }
  return f(Type<float16>{});
}

}  // namespace natten::detail
