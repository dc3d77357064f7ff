#include <natten/attention.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../dispatch.h"
#include "../memory.h"
#include "../validate.h"
#include "parallel.h"

namespace natten {
namespace {

using Views = std::vector<TensorView>;

[[noreturn]] void fail(const std::string& message, ErrorKind kind = ErrorKind::invalid_value) {
  throw Error(kind, message);
}

/// Element offset of row `index`, row-major over all but the last `inner` dimensions.
std::int64_t row_offset(const TensorView& v, std::int64_t index, int inner) {
  std::int64_t offset = 0;
  for (int d = v.ndim - 1 - inner; d >= 0; --d) {
    offset += index % v.shape[d] * v.strides[d];
    index /= v.shape[d];
  }
  return offset;
}

/// Rows are the logsumexps' elements; each has `dim` outputs.
struct Rows {
  std::int64_t count, dim;
};

/// `like_output[i]` must be [..., dim] of one shape and type; `like_logsumexp[i]` its [...].
Rows check(const Views& like_output, const Views& like_logsumexp) {
  for (const TensorView& v : like_output) detail::check_view("outputs", v);
  for (const TensorView& v : like_logsumexp) detail::check_view("lse_tensors", v);
  const TensorView& first = like_output.at(0);
  if (first.ndim < 1) fail("outputs: got a tensor without dimensions; must be [..., heads, dim]");
  if (first.dtype == DType::boolean)
    fail("outputs: got dtype bool; must be float64, float32, bfloat16 or float16",
         ErrorKind::invalid_type);
  const DType statistic = statistic_dtype(first.dtype);
  const auto check_one = [&](const TensorView& v, bool is_output) {
    const char* const argument = is_output ? "outputs" : "lse_tensors";
    const std::string name = std::string(argument) + ": ";
    const DType dtype = is_output ? first.dtype : statistic;
    if (v.dtype != dtype)
      fail(name + "got dtype " + name_of(v.dtype) + "; must be " + name_of(dtype),
           ErrorKind::invalid_type);
    const int ndim = first.ndim - (is_output ? 0 : 1);
    if (v.ndim != ndim || !std::equal(v.shape.begin(), v.shape.begin() + ndim, first.shape.begin()))
      fail(name + "got shape " + detail::to_string(v.shape.data(), v.ndim) + "; must be " +
           detail::to_string(first.shape.data(), ndim));
    if (v.device.type != DeviceType::cpu) fail(name + "must be on the CPU");
    detail::check_data(argument, v);
    if (is_output && v.shape[ndim - 1] > 1 && v.strides[ndim - 1] != 1)
      fail(name + "got " + std::to_string(v.strides[ndim - 1]) + " as innermost stride; must be 1");
  };
  for (const TensorView& v : like_output) check_one(v, true);
  for (const TensorView& v : like_logsumexp) check_one(v, false);
  const std::int64_t dim = first.shape[first.ndim - 1];
  return {dim == 0 ? 0 : first.size() / dim, dim};
}

struct Argument {
  const char* name;
  const Views& views;
  bool is_output;
};
void check_memory(std::initializer_list<Argument> arguments) {
  std::vector<detail::Use> uses;
  for (const Argument& argument : arguments)
    for (const TensorView& v : argument.views)
      uses.push_back({argument.name, &v, argument.is_output});
  detail::check_memory(uses);
}

void check_counts(std::size_t outputs, std::size_t logsumexps) {
  if (outputs == 0) fail("outputs: got none; must be at least one");
  if (outputs != logsumexps)
    fail("lse_tensors: got " + std::to_string(logsumexps) + "; must be one per output, " +
         std::to_string(outputs));
}

template <class T>
T* row(const TensorView& v, std::int64_t index, int inner) {
  return static_cast<T*>(v.data) + row_offset(v, index, inner);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// log of the sum of exp over the results that are merged; -inf where all are empty, +inf where one
/// is, NaN where one is.
template <class S>
double merged_logsumexp(const Views& logsumexps, std::int64_t index) {
  double largest = -kInfinity, total = 0;
  for (const TensorView& v : logsumexps)
    largest = std::isnan(largest) ? largest
                                  : std::max(static_cast<double>(*row<S>(v, index, 0)), largest);
  if (std::isinf(largest)) return largest;
  for (const TensorView& v : logsumexps)
    total += std::exp(static_cast<double>(*row<S>(v, index, 0)) - largest);
  return largest + std::log(total);
}

/// Calls `f(i, share)` for the results that are merged. Those over no keys (-inf) take no part, and
/// their outputs may hold anything.
template <class S, class F>
void for_each_share(const Views& logsumexps, std::int64_t index, double merged, F&& f) {
  for (std::size_t i = 0; i < logsumexps.size(); ++i) {
    const double own = static_cast<double>(*row<S>(logsumexps[i], index, 0));
    if (own != -kInfinity) f(i, std::exp(own - merged));
  }
}

/// `work` is that of one row.
void for_each_row(std::int64_t count, std::int64_t work, const Context& context,
                  const std::function<void(std::int64_t)>& body) {
  detail::cpu::run_phases({{{count,
                             [&](std::int64_t begin, std::int64_t end) {
                               for (std::int64_t i = begin; i < end; ++i) {
                                 detail::cpu::checkpoint(work);
                                 body(i);
                               }
                             }}}},
                          context.executor, context.interrupted);
}

Views joined(Views views, const Views& more) {
  views.insert(views.end(), more.begin(), more.end());
  return views;
}

}  // namespace

void merge_attentions(const Views& outputs, const Views& logsumexps, const TensorView& output,
                      const TensorView& logsumexp, const Context& context) {
  check_counts(outputs.size(), logsumexps.size());
  const Rows rows = check(joined(outputs, {output}), joined(logsumexps, {logsumexp}));
  check_memory({{"outputs", outputs, false},
                {"lse_tensors", logsumexps, false},
                {"output", {output}, true},
                {"logsumexp", {logsumexp}, true}});
  const auto work = static_cast<std::int64_t>(outputs.size()) * rows.dim;
  detail::dispatch_dtype(output.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = detail::StatisticOf<T>;
    for_each_row(rows.count, work, context, [&](std::int64_t r) {
      const double merged = merged_logsumexp<S>(logsumexps, r);
      T* to = row<T>(output, r, 1);
      for (std::int64_t d = 0; d < rows.dim; ++d) {
        double sum = 0;
        for_each_share<S>(logsumexps, r, merged, [&](std::size_t i, double share) {
          sum += share * static_cast<double>(row<T>(outputs[i], r, 1)[d]);
        });
        to[d] = static_cast<T>(sum);
      }
      *row<S>(logsumexp, r, 0) = static_cast<S>(merged);
    });
  });
}

/// With w = exp(logsumexps[i] - logsumexp): grad_outputs[i] = w * grad_output and
/// grad_logsumexps[i] = w * (<grad_output, outputs[i] - output> + grad_logsumexp).
void merge_attentions_backward(const Views& outputs, const Views& logsumexps,
                               const TensorView& grad_output, const TensorView& grad_logsumexp,
                               const Views& grad_outputs, const Views& grad_logsumexps,
                               const Context& context) {
  check_counts(outputs.size(), logsumexps.size());
  check_counts(outputs.size(), grad_outputs.size());
  check_counts(outputs.size(), grad_logsumexps.size());
  Views statistics = joined(logsumexps, grad_logsumexps);
  if (grad_logsumexp) statistics.push_back(grad_logsumexp);
  const Rows rows = check(joined(joined(outputs, grad_outputs), {grad_output}), statistics);
  check_memory({{"outputs", outputs, false},
                {"lse_tensors", logsumexps, false},
                {"grad_output", {grad_output}, false},
                {"grad_logsumexp", {grad_logsumexp}, false},
                {"grad_outputs", grad_outputs, true},
                {"grad_logsumexps", grad_logsumexps, true}});
  const auto work = static_cast<std::int64_t>(outputs.size()) * rows.dim;
  detail::dispatch_dtype(grad_output.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = detail::StatisticOf<T>;
    for_each_row(rows.count, work, context, [&](std::int64_t r) {
      const double merged = merged_logsumexp<S>(logsumexps, r);
      const T* g = row<T>(grad_output, r, 1);
      const auto project = [&](const TensorView& v) {
        double sum = 0;
        for (std::int64_t d = 0; d < rows.dim; ++d)
          sum += static_cast<double>(g[d]) * static_cast<double>(row<T>(v, r, 1)[d]);
        return sum;
      };
      double projected_output = 0;
      for_each_share<S>(logsumexps, r, merged, [&](std::size_t i, double share) {
        projected_output += share * project(outputs[i]);
      });
      const double from_logsumexp =
          grad_logsumexp ? static_cast<double>(*row<S>(grad_logsumexp, r, 0)) : 0.0;
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        std::fill_n(row<T>(grad_outputs[i], r, 1), rows.dim, static_cast<T>(0.0));
        *row<S>(grad_logsumexps[i], r, 0) = 0;
      }
      for_each_share<S>(logsumexps, r, merged, [&](std::size_t i, double share) {
        for (std::int64_t d = 0; d < rows.dim; ++d)
          row<T>(grad_outputs[i], r, 1)[d] = static_cast<T>(share * static_cast<double>(g[d]));
        *row<S>(grad_logsumexps[i], r, 0) =
            static_cast<S>(share * (project(outputs[i]) - projected_output + from_logsumexp));
      });
    });
  });
}

}  // namespace natten
