#include "validate.h"

#include <natten/error.h>
#include <natten/roles.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>

namespace natten::detail {

std::string to_string(const std::int64_t* values, int count) {
  std::ostringstream s;
  s << '[';
  for (int i = 0; i < count; ++i) s << (i ? ", " : "") << values[i];
  s << ']';
  return s.str();
}

std::vector<std::int64_t> shape_of(const Problem& p, const char* dims) {
  std::vector<std::int64_t> shape;
  for (const char* d = dims; *d; ++d) {
    switch (*d) {
      case 'B':
      case 'M': shape.push_back(p.batch); break;
      case 'H': shape.push_back(p.heads); break;
      case 'G': shape.push_back(p.kv_heads); break;
      case 'D': shape.push_back(p.head_dim); break;
      case 'V': shape.push_back(p.value_dim); break;
      case 'N': shape.push_back(p.additional); break;
      case 'W':
      case 'X': shape.push_back(p.slots()); break;
      default:
        for (int i = kMaxRank - p.rank; i < kMaxRank; ++i)
          shape.push_back(*d == 'Q'   ? p.axes[i].query_length
                          : *d == 'K' ? p.axes[i].key_length
                                      : 2 * p.axes[i].kernel_size - 1);
    }
  }
  return shape;
}

namespace {

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  throw Error(kind, s.str());
}
template <class... Parts>
[[noreturn]] void bad_value(const Parts&... parts) {
  fail(ErrorKind::invalid_value, parts...);
}

std::string to_string(const Tuple& tuple) {
  return detail::to_string(tuple.values.data(), std::min(tuple.size, kMaxDims));
}
std::string shape_text(const TensorView& view) {
  return detail::to_string(view.shape.data(), std::min(view.ndim, kMaxDims));
}

/// Most bytes of a tensor. Sums of several such, in any unit, still fit 64-bit integers.
constexpr double kMostBytes = 0x1p60;
/// Most tokens of an axis. Sums of several such fit 64-bit integers.
constexpr std::int64_t kLongestAxis = std::int64_t{1} << 60;

struct DimNames {
  const char* meaning;
  const char* in_layout;
};
DimNames names_of(char dim) {
  switch (dim) {
    case 'B': return {"batch", "batch"};
    case 'M': return {"batch", "batch or 1"};
    case 'H': return {"the number of heads", "heads"};
    case 'G': return {"the number of key-value heads", "kv_heads"};
    case 'D': return {"the head dim", "head_dim"};
    case 'V': return {"the head dim", "value_head_dim"};
    case 'N': return {"the number of additional tokens", "additional"};
    case 'Q': return {"the spatial shape", "*spatial"};
    case 'K': return {"the number of keys", "*key_spatial"};
    case 'R':
      return {"the relative positions, 2 * kernel_size - 1 per axis,", "*(2 * kernel_size - 1)"};
    default: return {"the number of slots", "slots"};
  }
}

bool is_grid(char dim) { return std::strchr("QKR", dim) != nullptr; }

std::string layout_of(const Role& role) {
  std::string text = "[";
  for (const char* d = role.dims; *d; ++d) {
    if (d != role.dims) text += ", ";
    text += names_of(*d).in_layout;
  }
  return text + "]";
}

/// What a symbol of `Role::dims` stands for in this call, and the argument that said so.
struct Extent {
  Tuple values;
  const char* source = nullptr;
};

class Checker {
 public:
  Checker(const Call& call, bool for_execution) : call_(call), for_execution_(for_execution) {}

  /// Without tensors.
  std::vector<Axis> check_queries(const Tuple& length) {
    check_neighborhood();
    if (length.size == 0) bad_value("query_length: got []; must have one per spatial axis");
    check_tuple("query_length", length, 1);
    check_longest("query_length", length);
    if (!call_.neighborhood.grid_size.size)
      bad_value("grid_size: got []; must have one per spatial axis");
    extent('Q') = {length, "query_length"};
    check_grids();
    return {axes_, axes_ + rank_};
  }

  Problem check() {
    const Roles roles = roles_of(call_.op);
    if (roles.begin() == roles.end())
      bad_value("op: got number ", static_cast<int>(call_.op), ", which is unknown");
    check_neighborhood();
    check_options();
    // Masks last, because errors about other tensors are clearer.
    for (const Role& role : roles)
      if (!role.is_mask) check_tensor(role);
    for (const Role& role : roles)
      if (role.is_mask) check_tensor(role);
    check_scale();
    check_pairs();
    check_grids();
    check_slots();
    return make_problem();
  }

 private:
  Extent& extent(char dim) { return extents_[dim - 'A']; }
  std::int64_t number(char dim) { return extent(dim).source ? extent(dim).values[0] : 0; }

  void check_tuple(const char* name, const Tuple& tuple, std::int64_t minimum) const {
    if (tuple.size == 0) return;
    if (tuple.size != rank_)
      bad_value(name, ": got ", to_string(tuple), ", ", tuple.size,
                " elements; must have one per spatial axis, ", rank_, " here");
    for (int i = 0; i < rank_; ++i)
      if (tuple[i] < minimum)
        bad_value(name, ": got ", to_string(tuple), "; must be at least ", minimum,
                  " on every axis");
  }

  static void check_longest(const char* name, const Tuple& tuple) {
    for (int i = 0; i < tuple.size; ++i)
      if (tuple[i] > kLongestAxis)
        bad_value(name, ": got ", to_string(tuple), "; must not be larger than memory can be");
  }

  void check_neighborhood() {
    const Neighborhood& n = call_.neighborhood;
    rank_ = n.kernel_size.size;
    if (rank_ < 1 || rank_ > kMaxRank)
      bad_value("kernel_size: got ", to_string(n.kernel_size), ", ", rank_,
                " elements; there must be 1, 2 or 3 spatial axes");
    window_ = n.kernel_size;
    if (!call_.options.separate_key_grid) check_tuple("kernel_size", window_, 1);
    check_tuple("dilation", n.dilation, 1);
    check_tuple("stride", n.stride, 1);
    check_tuple("is_causal", n.is_causal, 0);
    check_tuple("boundary", n.boundary, 0);
    for (int i = 0; i < rank_; ++i) {
      if (value_or(n.is_causal, i, 0) > 1)
        bad_value("is_causal: got ", to_string(n.is_causal), "; must be 0 or 1 on every axis");
      if (boundary(i) > Boundary::circular)
        bad_value("boundary: got ", to_string(n.boundary),
                  "; must be 0 (shift), 1 (cut) or 2 (circular) on every axis");
      if (boundary(i) == Boundary::circular && value_or(n.is_causal, i, 0))
        bad_value("is_causal: got true on axis ", i, ", whose boundary is circular; a causal axis ",
                  "must have an end (boundary shift or cut)");
    }
    check_parts();
    if (!call_.options.separate_key_grid) check_stride();
    Tuple relative = window_;
    // Saturated: a kernel too large for its axis is refused only when the axis is known.
    for (int i = 0; i < rank_; ++i)
      relative.values[i] =
          2 * std::min(relative[i], std::numeric_limits<std::int64_t>::max() / 2) - 1;
    extent('R') = {relative, "kernel_size"};
  }

  Boundary boundary(int axis) const {
    return static_cast<Boundary>(
        std::min<std::int64_t>(value_or(call_.neighborhood.boundary, axis, 0), 3));
  }

  void check_parts() const {
    const Neighborhood& n = call_.neighborhood;
    check_tuple("query_offset", n.query_offset, 0);
    check_tuple("key_offset", n.key_offset, -kLongestAxis);
    check_tuple("grid_size", n.grid_size, 1);
    for (const auto& [name, tuple] :
         {std::pair("query_offset", &n.query_offset), std::pair("key_offset", &n.key_offset),
          std::pair("grid_size", &n.grid_size)})
      check_longest(name, *tuple);
    bool is_bordered = false;
    for (int i = 0; i < rank_; ++i) is_bordered |= boundary(i) != Boundary::shift;
    if (call_.options.separate_key_grid && (has_parts() || is_bordered))
      bad_value(has_parts() ? "grid_size" : "boundary",
                ": got keys on a grid of their own (separate_key_grid); it must be whole, and has ",
                "no border");
    if (call_.options.unknown_offsets) {
      if (for_execution_)
        bad_value("query_offset, key_offset: not known (unknown_offsets); must be to run the call");
      return;
    }
    for (int i = 0; i < n.key_offset.size && !n.grid_size.size; ++i)
      if (n.key_offset[i] != 0)
        bad_value("key_offset: got ", to_string(n.key_offset), " without grid_size; must be 0 ",
                  "where it is not said how large the whole grid is");
  }

  void check_stride() const {
    const Tuple& stride = call_.neighborhood.stride;
    for (int i = 0; i < stride.size; ++i)
      if (stride[i] > std::max<std::int64_t>(window_[i], 1))  // 0 where there are no keys
        bad_value("stride: got ", to_string(stride), "; must not exceed kernel_size, ",
                  to_string(window_), ", on any axis");
  }

  void check_options() const {
    const Options& o = call_.options;
    check_tuple("q_tile_shape", o.query_tile, 1);
    check_tuple("kv_tile_shape", o.key_tile, 1);
    check_tuple("backward_q_tile_shape", o.backward_query_tile, 1);
    check_tuple("backward_kv_tile_shape", o.backward_key_tile, 1);
    check_tuple("backward_kv_splits", o.key_splits, 1);
  }

  /// Scores are multiplied by it in the type of sums.
  void check_scale() const {
    const std::optional<double>& scale = call_.options.scale;
    const DType sums = statistic_dtype(dtype_);
    const double largest = sums == DType::float64 ? std::numeric_limits<double>::max()
                                                  : std::numeric_limits<float>::max();
    if (scale && !(std::abs(*scale) <= largest))
      bad_value("scale: got ", *scale, "; must be finite in ", name_of(sums));
  }

  void check_tensor(const Role& role) {
    const TensorView& v = call_.tensors.*role.tensor;
    if (call_.options.separate_key_grid && std::strchr(role.dims, 'R') && (v || role.is_required))
      bad_value(role.name, ": got keys on a grid of their own (separate_key_grid); there must be ",
                "one grid for a bias by relative position");
    if (!v) {
      if (role.is_required && (for_execution_ || !role.is_output))
        bad_value(role.name, ": missing; ", name_of(call_.op), " needs it");
      return;
    }
    check_view(role.name, v);
    check_type(role, v);
    int ndim = 0;
    for (const char* d = role.dims; *d; ++d) ndim += is_grid(*d) ? rank_ : 1;
    if (v.ndim != ndim)
      bad_value(role.name, ": got ", v.ndim, " dimensions, shape ", shape_text(v), "; must have ",
                ndim, ", ", layout_of(role), ", for ", rank_, " spatial ",
                rank_ == 1 ? "axis" : "axes",
                call_.options.separate_key_grid ? "" : ", as many as kernel_size has elements");
    int at = 0;
    for (const char* d = role.dims; *d; ++d) {
      const Tuple values(v.shape.begin() + at, is_grid(*d) ? rank_ : 1);
      check_extent(role, v, *d, values);
      at += values.size;
    }
    if (v.size() == 0) return;
    if (v.shape[ndim - 1] > 1 && v.strides[ndim - 1] != 1)
      bad_value(role.name, ": got ", v.strides[ndim - 1],
                " as innermost stride; must be 1 (make the tensor contiguous)");
    if (for_execution_) check_data(role.name, v);
  }

  void check_type(const Role& role, const TensorView& v) {
    if (!first_) {
      first_ = &role;
      dtype_ = v.dtype;
      device_ = v.device;
    }
    if (role.is_mask) {
      if (v.dtype != DType::boolean)
        fail(ErrorKind::invalid_type, role.name, ": got dtype ", name_of(v.dtype),
             "; must be bool, true where a key may be seen");
    } else if (v.dtype == DType::boolean) {
      fail(ErrorKind::invalid_type, role.name,
           ": got dtype bool; must be float64, float32, bfloat16 or float16");
    }
    const DType expected = role.is_mask        ? DType::boolean
                           : role.is_statistic ? statistic_dtype(dtype_)
                                               : dtype_;
    if (v.dtype != expected)
      fail(ErrorKind::invalid_type, role.name, ": got dtype ", name_of(v.dtype), "; must be ",
           name_of(expected), ", as ", first_->name, " is ", name_of(dtype_));
    if (v.device != device_)
      bad_value(role.name, ": is on ", name_of(v.device.type), ":", v.device.index,
                "; must be on the device of ", first_->name, ", ", name_of(device_.type), ":",
                device_.index);
  }

  void check_extent(const Role& role, const TensorView& v, char dim, const Tuple& values) {
    const bool is_of_one_grid = dim == 'K' && has_one_grid();
    if (is_of_one_grid) dim = 'Q';
    if (dim == 'M') {
      if (values[0] == 1) return;
      dim = 'B';
    }
    // The slots depend on tensors that may come later in the table.
    if (dim == 'W' || dim == 'X') {
      extent(dim) = {values, role.name};
      return;
    }
    if (!extent(dim).source) {
      if (role.is_mask && dim != 'K') return;  // it says nothing of queries
      const bool may_be_zero =
          dim == 'B' || dim == 'N' || (dim == 'Q' && call_.options.separate_key_grid) ||
          (dim == 'K' && call_.options.separate_key_grid && call_.options.allow_no_keys);
      for (int i = 0; i < values.size; ++i)
        if (values[i] < (may_be_zero ? 0 : 1))
          bad_value(role.name, ": got shape ", shape_text(v), "; ", names_of(dim).meaning,
                    " must be at least 1");
      extent(dim) = {values, role.name};
      return;
    }
    const Tuple& known = extent(dim).values;
    if (std::equal(known.values.begin(), known.values.begin() + known.size, values.values.begin()))
      return;
    const char* advice = is_of_one_grid && !role.is_mask
                             ? ", unless query_offset, key_offset or grid_size say that they are "
                               "parts of a grid"
                             : "";
    bad_value(role.name, ": got shape ", shape_text(v), "; ", names_of(dim).meaning, " must be ",
              role.is_mask && dim == 'B' && known[0] != 1 ? "1 or " : "",
              known.size == 1 ? std::to_string(known[0]) : to_string(known), ", to match ",
              extent(dim).source, advice);
  }

  /// Tensors that come together, and heads that share keys.
  void check_pairs() {
    const Tensors& t = call_.tensors;
    if (!is_fused(call_.op)) return;
    if (bool(t.additional_keys) != bool(t.additional_values))
      bad_value(t.additional_keys ? "additional_values" : "additional_keys",
                ": missing; additional_keys and additional_values must be given together");
    if (number('H') % number('G') != 0)
      bad_value("key: got ", number('G'), " key-value heads; must divide the ", number('H'),
                " heads of query");
    const auto check_gradient = [&](const char* name, const TensorView& wanted,
                                    const TensorView& given) {
      if (wanted && !given) bad_value(name, ": its tensor was not given, so it has no gradient");
    };
    check_gradient("grad_rpb", t.grad_rpb, t.rpb);
    check_gradient("grad_additional_keys", t.grad_additional_keys, t.additional_keys);
    check_gradient("grad_additional_values", t.grad_additional_values, t.additional_values);
  }

  /// Whether queries and keys lie on the same tokens, so that their shapes are one.
  bool has_one_grid() const { return !call_.options.separate_key_grid && !has_parts(); }
  bool has_parts() const { return call_.options.unknown_offsets || call_.neighborhood.has_parts(); }

  void check_grids() {
    const Neighborhood& n = call_.neighborhood;
    if (!extent('Q').source)
      bad_value("attn: missing; ", name_of(call_.op), " takes batch and spatial shape from it");
    if (has_one_grid()) extent('K') = extent('Q');
    if (!extent('K').source && call_.options.separate_key_grid)
      bad_value("key: missing; where keys lie on a grid of their own (separate_key_grid) ",
                name_of(call_.op), " takes that from it");
    // Operations on biases alone have no keys: these count as whole.
    keys_are_whole_ = !extent('K').source;
    if (keys_are_whole_ && (call_.op == Op::av_transpose || !n.grid_size.size))
      bad_value(call_.op == Op::av_transpose ? "key" : "grid_size", ": missing; ",
                name_of(call_.op), " of a part of a grid takes the number of ",
                call_.op == Op::av_transpose ? "keys" : "tokens on each axis", " from it");
    if (keys_are_whole_) extent('K') = {n.grid_size, "grid_size"};
    if (call_.options.separate_key_grid) {
      window_ = extent('K').values;
      check_stride();
    }
    for (int i = 0; i < rank_; ++i) {
      axes_[i].query_length = extent('Q').values[i];
      axes_[i].key_length = extent('K').values[i];
      axes_[i].kernel_size = window_[i];
      axes_[i].stride = value_or(n.stride, i, 1);
      axes_[i].dilation = value_or(n.dilation, i, 1);
      axes_[i].is_causal = value_or(n.is_causal, i, 0) != 0;
      axes_[i].boundary = boundary(i);
      axes_[i].grid_length = value_or(n.grid_size, i, axes_[i].key_length);
      if (!call_.options.unknown_offsets) {
        axes_[i].query_offset = value_or(n.query_offset, i, 0);
        axes_[i].key_offset = keys_are_whole_ ? 0 : value_or(n.key_offset, i, 0);
      }
      check_axis(i, axes_[i]);
    }
  }

  void check_axis(int i, const Axis& axis) {
    const std::int64_t length = axis.grid_length;
    const auto tokens = [](std::int64_t count) { return count == 1 ? " token" : " tokens"; };
    if (axis.boundary != Boundary::cut && window_[i] > length / axis.dilation)
      bad_value("kernel_size: got ", to_string(window_), " with dilation ", axis.dilation,
                " on axis ", i, "; kernel_size * dilation must not exceed the axis, ", length,
                tokens(length), " here", layout_of_grid(),
                call_.options.separate_key_grid || axis.boundary == Boundary::circular
                    ? ""
                    : ", unless its border cuts windows (boundary \"cut\")");
    // Where the border cuts.
    if (axis.dilation > kLongestAxis) check_longest("dilation", call_.neighborhood.dilation);
    if (axis.boundary == Boundary::circular) {
      if (length % axis.dilation != 0)
        bad_value("dilation: got ", axis.dilation, " on axis ", i, ", which is circular; must ",
                  "divide the axis, ", length, tokens(length), " here");
      const std::int64_t group = length / axis.dilation;
      if (group % axis.stride != 0)
        bad_value("stride: got ", axis.stride, " on axis ", i, ", which is circular; must divide ",
                  "the axis in steps of its dilation, ", group, tokens(group), " here");
    }
    if (has_one_grid()) return;
    if (call_.options.separate_key_grid) return;
    if (axis.query_offset + axis.query_length > length)
      bad_value("query_offset: got ", axis.query_offset, " with ", axis.query_length,
                axis.query_length == 1 ? " query" : " queries", " on axis ", i,
                "; they must lie on the grid, ", length, tokens(length), " here (",
                call_.neighborhood.grid_size.size ? "grid_size" : extent('K').source, ")");
    if (keys_are_whole_) return;
    if (axis.boundary == Boundary::circular && axis.key_length > length)
      bad_value(extent('K').source, ": got ", axis.key_length, " keys on axis ", i,
                ", which is circular; must be at most the ", length, tokens(length),
                " of the whole axis, so that each is there once");
    if (call_.options.unknown_offsets || has_all_keys(axis)) return;
    const Interval needed = key_range(axis);
    bad_value(extent('K').source, ": got tokens ", axis.key_offset, " to ",
              axis.key_offset + axis.key_length - 1, " on axis ", i, "; the windows of queries ",
              axis.query_offset, " to ", axis.query_offset + axis.query_length - 1, " need tokens ",
              needed.begin, " to ", needed.end - 1, " (see natten.key_range)");
  }

  /// How the tensor that gives the grid is read: in the wrong layout, heads are taken for an axis.
  std::string layout_of_grid() {
    for (const Role& role : roles_of(call_.op))
      if (role.name == extent('Q').source)
        return std::string(" (") + role.name + ", " + shape_text(call_.tensors.*role.tensor) +
               ", is read as " + layout_of(role) + ")";
    return "";
  }

  void check_slots() {
    std::int64_t window = 1;
    double slots = 1;  // in float64, as cut windows may be larger than any grid
    for (int i = 0; i < rank_; ++i) {
      window = static_cast<std::int64_t>(static_cast<std::uint64_t>(window) *
                                         static_cast<std::uint64_t>(window_[i]));
      slots *= static_cast<double>(window_[i]);
    }
    if (slots > kMostBytes / 16)
      bad_value("kernel_size: got ", to_string(window_), "; must not be larger than memory can be");
    if (extent('X').source) {
      const std::int64_t slots = number('X');
      if (slots < window)
        bad_value(extent('X').source, ": got ", slots, " slots in its last dimension; must be ",
                  "at least ", window, ", the product of kernel_size");
      extent('N') = {{slots - window}, extent('X').source};
    } else if (extent('W').source && number('W') != window + number('N')) {
      bad_value(extent('W').source, ": got ", number('W'), " slots in its last dimension; must be ",
                window + number('N'), ", ", window,
                " for the window (the product of kernel_size) and ", number('N'),
                " for additional tokens");
    }
  }

  static std::int64_t value_or(const Tuple& tuple, int i, std::int64_t missing) {
    return tuple.size ? tuple[i] : missing;
  }

  /// Elements between the first and the last bias of a head.
  static std::int64_t span_of_biases(const TensorView& rpb) {
    std::int64_t span = 0;
    for (int i = 1; i < rpb.ndim; ++i)
      if (rpb.shape[i] > 1) span += std::abs(rpb.strides[i]) * (rpb.shape[i] - 1);
    return span;
  }

  Problem make_problem() {
    const Options& o = call_.options;
    const Tensors& t = call_.tensors;
    Problem p;
    p.op = call_.op;
    p.dtype = dtype_;
    p.device = device_;
    p.rank = rank_;
    for (int i = 0; i < rank_; ++i) p.axes[kMaxRank - rank_ + i] = axes_[i];
    p.batch = number('B');
    p.heads = number('H');
    p.kv_heads = extent('G').source ? number('G') : p.heads;
    p.head_dim = number('D');
    p.value_dim = extent('V').source ? number('V') : p.head_dim;
    p.additional = number('N');
    p.scale = is_fused(call_.op)
                  ? o.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)))
                  : 1.0;
    p.has_rpb = bool(t.rpb);
    if (p.has_rpb) p.rpb_span = span_of_biases(t.rpb);
    p.has_key_mask = bool(t.key_mask);
    p.has_logsumexp = bool(t.logsumexp);
    // Tensors that an operation does not have may be given, and say nothing.
    const bool is_backward = call_.op == Op::attention_backward;
    p.has_grad_logsumexp = is_backward && t.grad_logsumexp;
    p.wants_grad_query = is_backward && t.grad_query;
    p.wants_grad_key = is_backward && t.grad_key;
    p.wants_grad_value = is_backward && t.grad_value;
    p.wants_grad_rpb = (is_backward || call_.op == Op::rpb_scatter) && t.grad_rpb;
    p.wants_grad_additional = is_backward && (t.grad_additional_keys || t.grad_additional_values);
    p.empty_slots = o.empty_slots;
    p.deterministic = o.deterministic;
    p.allow_tf32 = o.allow_tf32;
    p.allow_gemm = o.allow_gemm;
    p.query_tile = is_backward ? o.backward_query_tile : o.query_tile;
    p.key_tile = is_backward ? o.backward_key_tile : o.key_tile;
    p.key_splits = o.key_splits;
    return p;
  }

  const Call& call_;
  const bool for_execution_;
  int rank_ = 0;
  Tuple window_;  // the kernel size, or the whole grid of keys that have one of their own
  Axis axes_[kMaxRank];
  bool keys_are_whole_ = false;  // no tensor says which there are
  const Role* first_ = nullptr;
  DType dtype_ = DType::float32;
  Device device_;
  Extent extents_['Z' - 'A'];
};

}  // namespace

void check_view(const char* name, const TensorView& v) {
  if (v.ndim > kMaxDims)
    bad_value(name, ": got ", v.ndim, " dimensions; must have at most ", kMaxDims);
  const auto dtype = static_cast<int>(v.dtype), device = static_cast<int>(v.device.type);
  if (dtype > static_cast<int>(DType::boolean))
    fail(ErrorKind::invalid_type, name, ": got dtype number ", dtype,
         "; must be float64, float32, bfloat16 or float16");
  if (device > static_cast<int>(DeviceType::cuda))
    bad_value(name, ": got device number ", device, "; must be cpu or cuda");
  // In float64, as the products of integers may overflow.
  const auto element = static_cast<double>(size_of(v.dtype));
  double bytes = element, reach = 0;
  for (int i = 0; i < v.ndim; ++i) {
    const auto size = static_cast<double>(v.shape[i]);
    if (size < 0) bad_value(name, ": got shape ", shape_text(v), "; must not be negative");
    bytes *= std::max(size, 1.0);
    if (size > 1) reach += (size - 1) * std::abs(static_cast<double>(v.strides[i])) * element;
  }
  if (bytes > kMostBytes)
    bad_value(name, ": got shape ", shape_text(v), "; must not be larger than memory can be");
  if (reach > kMostBytes)
    bad_value(name, ": got strides ", detail::to_string(v.strides.data(), v.ndim), " for shape ",
              shape_text(v), "; must not reach further than memory does");
}

void check_data(const char* name, const TensorView& v) {
  if (v.size() == 0) return;
  if (!v.data) bad_value(name, ": has no memory (null data pointer), shape ", shape_text(v));
  const std::size_t element = size_of(v.dtype);
  if (reinterpret_cast<std::uintptr_t>(v.data) % element != 0)
    bad_value(name, ": got address ", v.data, "; must be a multiple of ", element,
              ", the bytes of an element of ", name_of(v.dtype), " (copy the tensor)");
}

namespace {

void check_packing(const Packing& packing, std::int64_t queries, std::int64_t keys) {
  const auto& ends_of_queries = packing.cumulative_seqlen_Q;
  const auto check = [&](const char* side, const std::vector<std::int64_t>& ends,
                         const std::optional<std::int64_t>& most, std::int64_t tokens,
                         const char* tensor) {
    const std::string name = std::string("cumulative_seqlen_") + side;
    if (ends.size() < 2)
      bad_value(name, ": got ", ends.size(), " numbers; must be a 0, and for each of one example ",
                "or more where it ends");
    if (ends.size() != ends_of_queries.size())
      bad_value(name, ": got ", ends.size(), " numbers; must be ", ends_of_queries.size(),
                ", as many as in cumulative_seqlen_Q");
    if (ends[0] != 0) bad_value(name, ": got ", ends[0], " as its first number; must be 0");
    std::int64_t longest = 0;
    for (std::size_t i = 1; i < ends.size(); ++i) {
      if (ends[i] < ends[i - 1])
        bad_value(name, ": got ", ends[i], " after ", ends[i - 1], " for example ", i - 1,
                  "; must not decrease, as no length in seqlens_", side, " may be negative");
      longest = std::max(longest, ends[i] - ends[i - 1]);
    }
    if (ends.back() != tokens)
      bad_value(name, ": got ", ends.back(), " as its last number, the sum of seqlens_", side,
                "; must be ", tokens, ", the number of tokens in ", tensor);
    if (most && *most < longest)
      bad_value("max_seqlen_", side, ": got ", *most, "; must be at least ", longest,
                ", the largest length in ", name);
  };
  check("Q", ends_of_queries, packing.max_seqlen_Q, queries, "query");
  check("KV", packing.cumulative_seqlen_KV, packing.max_seqlen_KV, keys, "key");
}

/// Checks that each example can have the neighborhood of a packed call, which is that of its own
/// grid.
void check_examples(const Neighborhood& neighborhood, const Packing& packing) {
  const std::vector<std::int64_t>& ends = packing.cumulative_seqlen_Q;
  if (packing.cumulative_seqlen_KV != ends)
    bad_value("cumulative_seqlen_KV: must be as cumulative_seqlen_Q where windows are of the ",
              "tokens around a query");
  const bool is_circular =
      neighborhood.boundary.size > 0 &&
      neighborhood.boundary[0] == static_cast<std::int64_t>(Boundary::circular);
  std::int64_t shortest = std::numeric_limits<std::int64_t>::max();
  for (std::size_t i = 0; i + 1 < ends.size(); ++i) {
    const std::int64_t length = ends[i + 1] - ends[i];
    if (length == 0)
      bad_value("cumulative_seqlen_Q: got no tokens for example ", i, "; must be one or more");
    // On other axes one that fits the shortest fits all.
    if (length >= shortest && !is_circular) continue;
    shortest = length;
    try {
      axes_of({}, {length}, {length}, neighborhood);
    } catch (const Error& e) {
      throw Error(e.kind(), std::string(e.what()) + " (example " + std::to_string(i) + ")");
    }
  }
}

}  // namespace

Problem check_packed(const Call& call, const Packing& packing, bool for_execution) {
  const Problem problem = check(call, for_execution);
  if (!is_fused(problem.op) || problem.rank != 1)
    bad_value("packed: got ", name_of(problem.op), " of rank ", problem.rank,
              "; must be attention_forward or attention_backward of rank 1");
  if (call.neighborhood.has_parts())
    bad_value("packed: got a part of a grid (query_offset, key_offset, grid_size); each example ",
              "must be a whole grid");
  if (call.tensors.additional_keys)
    bad_value("additional_keys: got a tensor for examples that lie one after another; must be ",
              "missing");
  if (problem.wants_grad_rpb)
    bad_value("grad_rpb: got a tensor for examples that lie one after another, which share rpb; ",
              "must be missing");
  check_packing(packing, problem.queries(), problem.keys());
  if (!call.options.separate_key_grid) check_examples(call.neighborhood, packing);
  return problem;
}

std::vector<Axis> axes_of(const Tuple& query_offset, const Tuple& query_length,
                          const Tuple& grid_size, const Neighborhood& neighborhood) {
  Call call;
  call.op = Op::rpb_gather;
  call.neighborhood = neighborhood;
  call.neighborhood.query_offset = query_offset;
  call.neighborhood.grid_size = grid_size;
  call.neighborhood.key_offset = {};
  return Checker(call, false).check_queries(query_length);
}

Problem check(const Call& call, bool for_execution) { return Checker(call, for_execution).check(); }

}  // namespace natten::detail
