#pragma once

#include <gtest/gtest.h>
#include <natten/natten.h>

#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "oracle.h"
#include "tensors.h"

namespace natten_tests {

/// All random cases follow from it. Set NATTEN_TEST_SEED to see others.
inline std::uint64_t base_seed() {
  const char* text = std::getenv("NATTEN_TEST_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 20240607;
}

/// How many random cases a property draws: `count`, or as many as NATTEN_TEST_CASES says.
inline int case_count(int count) {
  const char* text = std::getenv("NATTEN_TEST_CASES");
  return text ? std::atoi(text) : count;
}

inline const natten::DType kDTypes[] = {natten::DType::float64, natten::DType::float32,
                                        natten::DType::bfloat16, natten::DType::float16};

/// Whether kernels for the CPU multiply elements of a type in pairs, as they are.
inline bool are_multiplied_in_pairs(natten::DType dtype) {
  for (const natten::InstructionSetInfo& isa : natten::build_info().instruction_sets)
    if (isa.chosen && isa.name.find("bf16") != std::string::npos)
      return dtype == natten::DType::bfloat16;
  return false;
}

/// Largest relative errors that the definition of the library allows.
struct Bounds {
  double forward, gradient;
};
/// An element type, and how it is multiplied.
struct Precision {
  natten::DType dtype;
  bool allow_tf32;

  Precision(natten::DType a_dtype, bool allows_tf32 = false)
      : dtype(a_dtype), allow_tf32(allows_tf32) {}
  std::string name() const { return allow_tf32 ? "tf32" : name_of(dtype); }
  bool operator<(const Precision& other) const {
    return std::tie(dtype, allow_tf32) < std::tie(other.dtype, other.allow_tf32);
  }
};
/// TF32 has as many bits as float16.
inline Bounds bounds_of(const Precision& p) {
  switch (p.allow_tf32 ? natten::DType::float16 : p.dtype) {
    case natten::DType::float64: return {1e-13, 1e-12};
    case natten::DType::float32: return {1e-6, 1e-5};
    case natten::DType::bfloat16: return {1e-2, 2e-2};
    case natten::DType::float16:
    case natten::DType::boolean: break;
  }
  return {2e-3, 4e-3};
}

/// A problem without its data.
struct Case {
  std::uint64_t seed = 0;
  natten::DType dtype = natten::DType::float32;
  std::vector<oracle::Axis> axes;
  /// Set: general attention of axes[0].length queries over as many keys.
  std::optional<std::int64_t> keys;
  std::int64_t batch = 1, heads = 1, kv_heads = 1, dim = 4, value_dim = 4;
  std::optional<std::int64_t> additional;  ///< tensors with 0 tokens differ from none
  std::optional<double> scale;
  bool rpb = false, logsumexp = true, grad_logsumexp = false, is_contiguous = true;
  bool key_mask = false, shares_mask = false;  ///< one mask for all of the batch
  bool gives_grid = false;  ///< says the grid's size although queries and keys are all of it
  bool allow_tf32 = false;

  Precision precision() const { return {dtype, allow_tf32}; }
  int rank() const { return static_cast<int>(axes.size()); }
  bool is_causal() const {
    for (const oracle::Axis& axis : axes)
      if (axis.is_causal) return true;
    return false;
  }
  bool is_part() const {
    for (const oracle::Axis& axis : axes)
      if (axis.is_part()) return true;
    return false;
  }
};

inline std::ostream& operator<<(std::ostream& s, const Case& c) {
  s << "seed " << c.seed << ": " << c.precision().name();
  for (const oracle::Axis& a : c.axes) {
    s << " (length " << a.length << " kernel " << a.kernel_size << " stride " << a.stride
      << " dilation " << a.dilation << (a.is_causal ? " causal" : "");
    if (a.boundary != natten::Boundary::shift) s << " " << name_of(a.boundary);
    if (a.is_part())
      s << " queries " << a.queries() << " from " << a.query_offset << " keys " << a.keys()
        << " from " << a.key_offset;
    s << ")";
  }
  if (c.keys) s << " over " << *c.keys << " keys";
  s << " batch " << c.batch << " heads " << c.heads << "/" << c.kv_heads << " dims " << c.dim << "/"
    << c.value_dim;
  if (c.additional) s << " additional " << *c.additional;
  if (c.scale) s << " scale " << *c.scale;
  for (const auto& [flag, name] :
       {std::pair(c.key_mask, " mask"), std::pair(c.shares_mask, " shared"),
        std::pair(c.gives_grid, " grid given"), std::pair(c.rpb, " rpb"),
        std::pair(c.logsumexp, " logsumexp"), std::pair(c.grad_logsumexp, " grad_logsumexp"),
        std::pair(!c.is_contiguous, " strided")})
    if (flag) s << name;
  return s;
}

template <class T>
T pick(Rng& rng, std::initializer_list<T> choices) {
  return choices.begin()[uniform(rng, 0, static_cast<std::int64_t>(choices.size()) - 1)];
}

/// Borders that cut or wrap: changes an axis such that it is not refused.
inline void draw_border(Rng& rng, oracle::Axis& a) {
  if (chance(rng, 0.5)) {
    a.boundary = natten::Boundary::cut;
    if (chance(rng, 0.3)) a.kernel_size += uniform(rng, 0, a.length + 3);
    if (chance(rng, 0.1)) a.dilation = a.length + uniform(rng, 0, 1);
    return;
  }
  a.boundary = natten::Boundary::circular;
  a.is_causal = false;
  const std::int64_t most = std::max<std::int64_t>(a.length / a.dilation, a.stride);
  a.length = a.dilation * (most - most % a.stride);
  a.kernel_size = std::min(a.kernel_size, a.length / a.dilation);
}

/// Gives some queries and the keys that they need, or some more.
inline void draw_keys(Rng& rng, oracle::Axis& a, std::int64_t query_offset, std::int64_t queries) {
  a.query_offset = query_offset;
  a.given_queries = queries;
  natten::Axis axis;
  axis.query_length = a.given_queries;
  axis.kernel_size = a.kernel_size;
  axis.stride = a.stride;
  axis.dilation = a.dilation;
  axis.is_causal = a.is_causal;
  axis.boundary = a.boundary;
  axis.grid_length = a.length;
  axis.query_offset = a.query_offset;
  const natten::Interval needed = natten::key_range(axis);
  const bool is_circular = a.boundary == natten::Boundary::circular;
  a.key_offset = needed.begin - (chance(rng, 0.5) ? uniform(rng, 0, 3) : 0);
  const std::int64_t end = needed.end + (chance(rng, 0.5) ? uniform(rng, 0, 3) : 0);
  a.given_keys = end - a.key_offset;
  if (is_circular && (a.given_keys > a.length || chance(rng, 0.2))) {
    a.key_offset = uniform(rng, -a.length, a.length);
    a.given_keys = a.length;
  } else if (is_circular && chance(rng, 0.3)) {
    a.key_offset += a.length * uniform(rng, -1, 1);  // the same tokens
  }
}
inline void draw_part(Rng& rng, oracle::Axis& a) {
  const std::int64_t offset = uniform(rng, 0, a.length - 1);
  draw_keys(rng, a, offset, uniform(rng, 1, a.length - offset));
}

inline Case random_case(std::uint64_t seed, natten::DType dtype, int rank) {
  Rng rng(seed);
  Case c;
  c.seed = seed;
  c.dtype = dtype;
  const std::int64_t longest = rank == 1 ? 40 : rank == 2 ? 9 : 5;
  for (int i = 0; i < rank; ++i) {
    oracle::Axis a;
    a.length = uniform(rng, 1, longest);
    a.dilation = chance(rng, 0.4) ? uniform(rng, 1, std::min<std::int64_t>(a.length, 5)) : 1;
    const std::int64_t most = a.length / a.dilation;
    a.kernel_size = chance(rng, 0.15) ? most : uniform(rng, 1, most);
    if (chance(rng, 0.5)) a.stride = uniform(rng, 1, a.kernel_size);
    if (chance(rng, 0.1)) a.stride = a.kernel_size;
    a.is_causal = chance(rng, 0.35);
    c.axes.push_back(a);
  }
  // A kind of case of its own, so that plain ones stay frequent.
  if (chance(rng, 0.4))
    for (oracle::Axis& a : c.axes)
      if (chance(rng, 0.7)) draw_border(rng, a);
  if (chance(rng, 0.3))
    for (oracle::Axis& a : c.axes)
      if (chance(rng, 0.7)) draw_part(rng, a);
  c.gives_grid = chance(rng, 0.1);
  c.batch = chance(rng, 0.04) ? 0 : uniform(rng, 1, 2);
  c.key_mask = chance(rng, 0.3);
  c.shares_mask = c.key_mask && chance(rng, 0.3);
  c.kv_heads = uniform(rng, 1, 3);
  c.heads = c.kv_heads * pick<std::int64_t>(rng, {1, 1, 2, 3});
  c.dim = pick<std::int64_t>(rng, {1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 24, 32, 40});
  c.value_dim = chance(rng, 0.6) ? c.dim : pick<std::int64_t>(rng, {1, 2, 3, 5, 8, 11, 16, 33});
  if (chance(rng, 0.4)) c.additional = uniform(rng, 0, 3);
  if (chance(rng, 0.5))
    c.scale = pick<double>(rng, {0.0, -0.3, 0.1, 1.0 / 3, 1.0 / static_cast<double>(c.dim)});
  c.rpb = chance(rng, 0.4);
  c.logsumexp = chance(rng, 0.7);
  c.grad_logsumexp = chance(rng, 0.4);
  c.is_contiguous = chance(rng, 0.4);
  return c;
}

/// The neighborhood of a case as the library is told. Tuples that are all default may be left out.
inline natten::Neighborhood neighborhood_of(const Case& c, Rng& rng) {
  const auto tuple = [&](std::int64_t missing, auto&& member) {
    Shape values;
    for (const oracle::Axis& a : c.axes) values.push_back(member(a));
    const bool is_default =
        std::all_of(values.begin(), values.end(), [&](std::int64_t x) { return x == missing; });
    if (is_default && chance(rng, 0.5)) return natten::Tuple();
    return natten::Tuple(values.begin(), c.rank());
  };
  natten::Neighborhood n;
  n.kernel_size = tuple(-1, [](const oracle::Axis& a) { return a.kernel_size; });
  n.dilation = tuple(1, [](const oracle::Axis& a) { return a.dilation; });
  n.stride = tuple(1, [](const oracle::Axis& a) { return a.stride; });
  n.is_causal = tuple(0, [](const oracle::Axis& a) { return a.is_causal; });
  n.boundary =
      tuple(0, [](const oracle::Axis& a) { return static_cast<std::int64_t>(a.boundary); });
  if (c.is_part() || c.gives_grid) {
    n.query_offset = tuple(0, [](const oracle::Axis& a) { return a.query_offset; });
    n.key_offset = tuple(0, [](const oracle::Axis& a) { return a.key_offset; });
    n.grid_size = tuple(-1, [](const oracle::Axis& a) { return a.length; });
  }
  if (c.keys) n.kernel_size = {1};  // of which only the number of axes counts
  return n;
}

/// Of the given queries, and of the given keys.
inline Shape lengths_of(const Case& c) {
  Shape lengths;
  for (const oracle::Axis& a : c.axes) lengths.push_back(a.queries());
  return lengths;
}
inline Shape key_lengths_of(const Case& c) {
  if (c.keys) return {*c.keys};
  Shape lengths;
  for (const oracle::Axis& a : c.axes) lengths.push_back(a.keys());
  return lengths;
}
/// Empty where the case has none. Some examples may see nothing at all.
inline Dense mask_of(const Case& c) {
  if (!c.key_mask) return {};
  Shape shape = key_lengths_of(c);
  shape.insert(shape.begin(), c.shares_mask ? 1 : c.batch);
  Dense mask(shape);
  Rng rng(c.seed + 2);
  const double share = pick<double>(rng, {0.5, 0.9, 0.0, 1.0});
  for (std::int64_t i = 0; i < mask.size(); ++i) mask[i] = chance(rng, share) ? 1 : 0;
  return mask;
}
inline Shape offsets_of(const Case& c) {
  Shape offsets;
  for (const oracle::Axis& a : c.axes) offsets.push_back(2 * a.kernel_size - 1);
  return offsets;
}
inline std::int64_t window_of(const Case& c) {
  std::int64_t window = 1;
  for (const oracle::Axis& a : c.axes) window *= a.kernel_size;
  return window;
}
inline oracle::Sizes sizes_of(const Case& c) {
  const std::int64_t tokens = volume(lengths_of(c));
  return {c.batch,
          c.heads,
          c.kv_heads,
          c.dim,
          c.value_dim,
          c.additional.value_or(0),
          tokens,
          volume(key_lengths_of(c)),
          c.keys.value_or(window_of(c)),
          c.keys ? 2 * *c.keys - 1 : volume(offsets_of(c))};
}
inline oracle::Pairs pairs_of(const Case& c) {
  const oracle::Pairs pairs =
      c.keys ? oracle::all_pairs(c.axes[0].length, *c.keys, c.axes[0].is_causal)
             : oracle::pairs_of(c.axes);
  return c.key_mask ? oracle::masked(pairs, mask_of(c), c.batch, volume(key_lengths_of(c))) : pairs;
}

inline Shape join(std::initializer_list<Shape> parts) {
  Shape shape;
  for (const Shape& part : parts) shape.insert(shape.end(), part.begin(), part.end());
  return shape;
}

/// Buffers for every tensor of the operations, by the same names.
struct Buffers {
  Buffer query, key, value, rpb, additional_keys, additional_values, key_mask, attn;
  Buffer output, logsumexp;
  Buffer grad_output, grad_logsumexp;
  Buffer grad_query, grad_key, grad_value, grad_rpb, grad_additional_keys, grad_additional_values;

  template <class F>
  void for_each(F&& f) {
    using T = natten::Tensors;
    f("query", query, &T::query);
    f("key", key, &T::key);
    f("value", value, &T::value);
    f("rpb", rpb, &T::rpb);
    f("additional_keys", additional_keys, &T::additional_keys);
    f("additional_values", additional_values, &T::additional_values);
    f("key_mask", key_mask, &T::key_mask);
    f("attn", attn, &T::attn);
    f("output", output, &T::output);
    f("logsumexp", logsumexp, &T::logsumexp);
    f("grad_output", grad_output, &T::grad_output);
    f("grad_logsumexp", grad_logsumexp, &T::grad_logsumexp);
    f("grad_query", grad_query, &T::grad_query);
    f("grad_key", grad_key, &T::grad_key);
    f("grad_value", grad_value, &T::grad_value);
    f("grad_rpb", grad_rpb, &T::grad_rpb);
    f("grad_additional_keys", grad_additional_keys, &T::grad_additional_keys);
    f("grad_additional_values", grad_additional_values, &T::grad_additional_values);
  }
  natten::Tensors views() {
    natten::Tensors tensors;
    for_each([&](const char*, Buffer& buffer, natten::TensorView natten::Tensors::*member) {
      tensors.*member = buffer.view();
    });
    return tensors;
  }
  void expect_gaps_intact() {
    for_each([](const char* name, Buffer& buffer, natten::TensorView natten::Tensors::*) {
      EXPECT_TRUE(buffer.gaps_are_intact()) << name << ": written between its elements";
    });
  }
};

/// Fused attention on random data.
class FusedProblem {
 public:
  Case c;
  Buffers buffers;
  natten::Neighborhood neighborhood;

  explicit FusedProblem(const Case& a_case) : c(a_case), rng_(a_case.seed + 1) {
    neighborhood = neighborhood_of(c, rng_);
    const Shape lengths = lengths_of(c), key_lengths = key_lengths_of(c);
    const Shape q = join({{c.batch}, lengths, {c.heads, c.dim}});
    const Shape k = join({{c.batch}, key_lengths, {c.kv_heads, c.dim}});
    const Shape v = join({{c.batch}, key_lengths, {c.kv_heads, c.value_dim}});
    const Shape o = join({{c.batch}, lengths, {c.heads, c.value_dim}});
    const Shape stat = join({{c.batch}, lengths, {c.heads}});
    const Shape bias = join({{c.heads}, c.keys ? Shape{2 * *c.keys - 1} : offsets_of(c)});
    Buffers& b = buffers;
    if (c.key_mask)  // without elements that share memory, as the reference knows the values
      b.key_mask =
          Buffer(natten::DType::boolean, mask_of(c), {c.is_contiguous ? nullptr : &rng_, false});
    b.query = input(q);
    b.key = input(k);
    b.value = input(v);
    b.grad_output = input(o);
    b.output = result(o);
    b.grad_query = result(q);
    b.grad_key = result(k);
    b.grad_value = result(v);
    if (c.logsumexp) b.logsumexp = result(stat, statistic_of(c.dtype));
    if (c.grad_logsumexp) b.grad_logsumexp = input(stat, statistic_of(c.dtype));
    if (c.rpb) {
      b.rpb = input(bias);
      b.grad_rpb = result(bias);
    }
    if (c.additional) {
      const Shape additional_k{c.batch, *c.additional, c.kv_heads, c.dim};
      const Shape additional_v{c.batch, *c.additional, c.kv_heads, c.value_dim};
      b.additional_keys = input(additional_k);
      b.additional_values = input(additional_v);
      b.grad_additional_keys = result(additional_k);
      b.grad_additional_values = result(additional_v);
    }
  }

  natten::Call call(natten::Op op) {
    natten::Call call;
    call.op = op;
    call.neighborhood = neighborhood;
    call.tensors = buffers.views();
    call.options.scale = c.scale;
    call.options.separate_key_grid = c.keys.has_value();
    call.options.allow_tf32 = c.allow_tf32;
    return call;
  }
  natten::Call forward() { return call(natten::Op::attention_forward); }

  /// Needs the logsumexp that `forward_with_logsumexp` computes.
  natten::Call backward() {
    provide_logsumexp();
    return call(natten::Op::attention_backward);
  }
  void forward_with_logsumexp(const natten::Context& context = {}) {
    provide_logsumexp();
    natten::run(forward(), context);
  }
  void provide_logsumexp() {
    if (!buffers.logsumexp.view())
      buffers.logsumexp =
          result(join({{c.batch}, lengths_of(c), {c.heads}}), statistic_of(c.dtype));
  }

  oracle::FusedInputs oracle_inputs() {
    const double scale = c.scale.value_or(1.0 / std::sqrt(static_cast<double>(c.dim)));
    Buffers& b = buffers;
    return {sizes_of(c),
            pairs_of(c),
            scale,
            b.query.dense(),
            b.key.dense(),
            b.value.dense(),
            b.rpb.dense(),
            b.additional_keys.dense(),
            b.additional_values.dense(),
            b.grad_output.dense(),
            b.grad_logsumexp.dense()};
  }
  oracle::FusedResults expected() { return oracle::fused(oracle_inputs()); }

  double incoming_gradient() {
    return std::hypot(norm(buffers.grad_output.dense()), norm(buffers.grad_logsumexp.dense()));
  }

 private:
  Buffer input(const Shape& shape) { return input(shape, c.dtype); }
  Buffer input(const Shape& shape, natten::DType dtype) {
    return Buffer(dtype, normal(rng_, shape), {c.is_contiguous ? nullptr : &rng_, true});
  }
  Buffer result(const Shape& shape) { return result(shape, c.dtype); }
  Buffer result(const Shape& shape, natten::DType dtype) {
    return Buffer(dtype, shape, {c.is_contiguous ? nullptr : &rng_, false});
  }

  Rng rng_;
};

/// Calls `f(name, buffer, expected)` for the gradients that fused attention gives. Gradients that
/// the case leaves out have an empty buffer.
template <class F>
void for_each_gradient(Buffers& b, const oracle::FusedResults& expected, F&& f) {
  f("grad_query", b.grad_query, expected.grad_query);
  f("grad_key", b.grad_key, expected.grad_key);
  f("grad_value", b.grad_value, expected.grad_value);
  f("grad_rpb", b.grad_rpb, expected.grad_rpb);
  f("grad_additional_keys", b.grad_additional_keys, expected.grad_additional_keys);
  f("grad_additional_values", b.grad_additional_values, expected.grad_additional_values);
}

/// Largest errors seen, by what was computed, element type and rank.
class ErrorTable {
 public:
  void add(const std::string& what, const Precision& precision, int rank, double error) {
    double& largest = errors_[{what, precision, rank}];
    if (!(error <= largest)) largest = error;
  }
  /// Counts a random case, by its borders and what else it is.
  void add(const Case& c) {
    std::set<natten::Boundary> borders;
    for (const oracle::Axis& axis : c.axes) borders.insert(axis.boundary);
    ++cases_[borders.size() > 1 ? "several borders" : name_of(*borders.begin())][c.dtype];
    if (c.is_part()) ++cases_["part"][c.dtype];
    if (c.key_mask) ++cases_["key mask"][c.dtype];
  }
  void print(const char* title) const {
    std::cout << "\nLargest relative errors, " << title << "\n"
              << std::left << std::setw(28) << "" << std::setw(10) << "dtype";
    for (int rank = 1; rank <= natten::kMaxRank; ++rank)
      std::cout << std::setw(12) << "rank " + std::to_string(rank);
    std::cout << "bound\n";
    for (auto entry = errors_.begin(); entry != errors_.end();) {
      const auto& [name, precision, lowest_rank] = entry->first;
      std::cout << std::setw(28) << name << std::setw(10) << precision.name();
      for (int rank = 1; rank <= natten::kMaxRank; ++rank) {
        const auto found = errors_.find({name, precision, rank});
        std::ostringstream cell;
        if (found != errors_.end()) cell << std::setprecision(2) << found->second;
        std::cout << std::setw(12) << (cell.str().empty() ? "-" : cell.str());
      }
      std::cout << bound_of(name, precision) << "\n";
      entry = errors_.upper_bound({name, precision, natten::kMaxRank});
    }
    if (!cases_.empty()) std::cout << "Random cases";
    for (const auto& [kind, by_dtype] : cases_) {
      std::cout << "\n" << std::setw(28) << kind;
      for (const auto& [dtype, count] : by_dtype)
        std::cout << std::setw(10) << name_of(dtype) << std::setw(6) << count;
    }
    std::cout << std::endl;
  }
  static double bound_of(const std::string& what, const Precision& precision) {
    const Bounds bounds = bounds_of(precision);
    if (what == "logsumexp" && !precision.allow_tf32)
      return bounds_of(statistic_of(precision.dtype)).forward;
    return what.rfind("grad_", 0) == 0 ? bounds.gradient : bounds.forward;
  }
  /// Adds an error and fails the test where it exceeds its bound; a NaN does.
  void expect(const std::string& what, const Precision& precision, int rank, double error) {
    add(what, precision, rank, error);
    EXPECT_LE(error, bound_of(what, precision)) << what;
  }

 private:
  std::map<std::tuple<std::string, Precision, int>, double> errors_;
  std::map<std::string, std::map<natten::DType, int>> cases_;
};

/// Runs a problem's forward and backward pass by `run(call)` and compares with the reference.
template <class Run>
void expect_definition(FusedProblem& problem, ErrorTable& errors, Run&& run) {
  const Case& c = problem.c;
  SCOPED_TRACE(testing::Message() << c);
  problem.provide_logsumexp();
  run(problem.forward());
  run(problem.backward());
  const oracle::FusedResults expected = problem.expected();
  Buffers& b = problem.buffers;
  const auto expect = [&](const char* name, double error) {
    errors.expect(name, c.precision(), c.rank(), error);
  };
  expect("output", relative_error(b.output.dense(), expected.output));
  expect("logsumexp", logsumexp_error(b.logsumexp.dense(), expected.logsumexp));
  for_each_gradient(b, expected, [&](const char* name, Buffer& got, const Dense& reference) {
    if (got.view())
      expect(name, relative_error(got.dense(), reference, problem.incoming_gradient()));
  });
  b.expect_gaps_intact();
}

/// Biases give all queries of one head nothing but scores of -inf: its logsumexp is -inf, its
/// output and gradients are 0. The other head is as ever.
template <class Run>
void expect_zeros_where_all_scores_are_infinite(const Precision& precision, Run&& run) {
  Case c;
  c.seed = base_seed() + 500;
  c.dtype = precision.dtype;
  c.allow_tf32 = precision.allow_tf32;
  c.axes = {{9, 5, 1, 1, false}, {13, 3, 1, 2, false}};
  c.heads = c.kv_heads = 2;
  c.dim = c.value_dim = 8;
  c.rpb = c.grad_logsumexp = true;
  FusedProblem problem(c);
  const oracle::FusedResults expected = problem.expected();
  Buffers& b = problem.buffers;
  const std::int64_t biases = b.rpb.dense().size() / c.heads;
  for (std::int64_t i = 0; i < biases; ++i) b.rpb.set(i, -std::numeric_limits<double>::infinity());
  run(problem.forward());
  run(problem.backward());
  // `inner` elements of one head lie together. Those of the first are as `value`.
  const auto expect = [&](const char* name, const Buffer& buffer, Dense reference,
                          std::int64_t inner, double value = 0) {
    Dense got = buffer.dense();
    for (std::int64_t i = 0; i < got.size(); ++i) {
      if (i / inner % c.heads != 0) continue;
      ASSERT_EQ(got[i], value) << name << ", element " << i;
      got[i] = reference[i] = 0;
    }
    EXPECT_LE(relative_error(got, reference), ErrorTable::bound_of(name, precision)) << name;
  };
  expect("output", b.output, expected.output, c.value_dim);
  expect("logsumexp", b.logsumexp, expected.logsumexp, 1, -std::numeric_limits<double>::infinity());
  expect("grad_query", b.grad_query, expected.grad_query, c.dim);
  expect("grad_key", b.grad_key, expected.grad_key, c.dim);
  expect("grad_value", b.grad_value, expected.grad_value, c.value_dim);
  expect("grad_rpb", b.grad_rpb, expected.grad_rpb, biases);
}

/// Whether some backend runs the call, given what NATTEN_BACKEND forces.
inline bool is_runnable(const natten::Call& call) {
  for (const natten::Verdict& verdict : natten::explain(natten::describe(call)))
    if (verdict.chosen) return true;
  return false;
}

/// A backend for GPUs that runs on tensors in host memory: emulated, since its kernels are the same
/// code for both, or by copies on a device.
struct ProvidedBackend {
  const char* name;
  std::string (*refuse_reason)(const natten::Problem&);
  void (*run)(const natten::Call&);
  void (*run_packed)(const natten::Call&, const natten::Packing&);
};
/// Those that the tests of GPU backends add before tests are listed.
inline std::vector<ProvidedBackend>& provided_backends() {
  static std::vector<ProvidedBackend> backends;
  return backends;
}

/// A test that runs for every backend, element type and rank.
class Property : public testing::TestWithParam<std::tuple<std::string, natten::DType, int>> {
 protected:
  const std::string& backend() const { return std::get<0>(GetParam()); }
  natten::DType dtype() const { return std::get<1>(GetParam()); }
  int rank() const { return std::get<2>(GetParam()); }

  natten::Context context() const {
    natten::Context context;
    context.backend = backend().c_str();
    return context;
  }
  /// Null for backends of the registry.
  const ProvidedBackend* provided() const {
    for (const ProvidedBackend& b : provided_backends())
      if (backend() == b.name) return &b;
    return nullptr;
  }
  void run(const natten::Call& call) const {
    if (const ProvidedBackend* b = provided()) {
      if (!accepts(call)) throw std::logic_error(backend() + " refuses the call");
      return b->run(call);
    }
    natten::run(call, context());
  }
  void run_forward_with_logsumexp(FusedProblem& problem) const {
    problem.provide_logsumexp();
    run(problem.forward());
  }
  bool accepts(const natten::Call& call) const {
    if (const ProvidedBackend* b = provided())
      return b->refuse_reason(natten::describe(call)).empty();
    for (const natten::Verdict& verdict : natten::explain(natten::describe(call), context()))
      if (verdict.backend == backend()) return verdict.refusal.empty();
    return false;
  }

  /// For the end of a property. The readable backend runs everything; others may refuse a whole
  /// operation, which shows as a skipped test.
  void expect_accepted(int accepted, int cases) const {
    if (backend() == "naive") {
      EXPECT_EQ(accepted, cases);
    }
    if (accepted == 0) GTEST_SKIP() << backend() << " refuses all " << cases << " cases";
  }

  /// Calls `f(case)` for `case_count(count)` random cases. `salt` tells the properties of a suite
  /// apart.
  template <class F>
  void for_each_case(int count, std::uint64_t salt, F&& f) {
    for (int i = 0; i < case_count(count); ++i) {
      const std::uint64_t seed =
          base_seed() * 1000003 + salt * 100000 + static_cast<std::uint64_t>(dtype()) * 10000 +
          static_cast<std::uint64_t>(rank()) * 1000 + static_cast<std::uint64_t>(i);
      const Case c = random_case(seed, dtype(), rank());
      std::ostringstream text;
      text << c << " (NATTEN_TEST_SEED=" << base_seed() << ", case " << i << ")";
      SCOPED_TRACE(text.str());
      f(c);
      if (HasFatalFailure()) return;
    }
  }

 public:
  static std::string name(const testing::TestParamInfo<ParamType>& info) {
    return std::get<0>(info.param) + "_" + name_of(std::get<1>(info.param)) + "_rank" +
           std::to_string(std::get<2>(info.param));
  }
};

/// Names of the backends that properties run for.
inline std::vector<std::string> tested_backends() {
  const auto registered = natten::backends(natten::DeviceType::cpu);
  std::vector<std::string> names(registered.begin(), registered.end());
  for (const ProvidedBackend& b : provided_backends()) names.push_back(b.name);
  return names;
}
inline auto every_property() {
  return testing::Combine(testing::ValuesIn(tested_backends()), testing::ValuesIn(kDTypes),
                          testing::Values(1, 2, 3));
}

}  // namespace natten_tests
