#include <functional>

#include "cases.h"

namespace natten_tests {
namespace {

using natten::Call;
using natten::DType;
using natten::ErrorKind;
using natten::Op;
using natten::TensorView;
using natten::Tuple;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

/// A valid call of every operation with all its tensors: rank 2, spatial 6 x 7, kernel 3 x 4,
/// batch 2, heads 4/2 (fused) or 4, dim 5, value dim 3 (fused) or 5, 2 additional tokens, a
/// mask.
struct Valid {
  static constexpr std::int64_t kWindow = 12;
  Buffers buffers;
  Call call;

  explicit Valid(Op op, DType dtype = DType::float32) {
    Case c;
    c.seed = base_seed();
    c.dtype = dtype;
    c.axes = {{6, 3, 1, 1, false}, {7, 4, 1, 1, false}};
    c.batch = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.dim = 5;
    c.value_dim = 3;
    c.additional = 2;
    c.rpb = c.grad_logsumexp = true;
    if (op == Op::attention_forward || op == Op::attention_backward) {
      FusedProblem problem(c);
      problem.forward_with_logsumexp();
      buffers = problem.buffers;
      if (op == Op::attention_forward) {
        const Shape shape = buffers.output.dense().shape;
        buffers.output = Buffer(dtype, shape);
        buffers.logsumexp = Buffer(statistic_of(dtype), Shape{2, 6, 7, 4});
      }
    } else {
      Rng rng(c.seed);
      const Shape tokens{2, 4, 6, 7, 5}, slots{2, 4, 6, 7, kWindow + 2}, additional{2, 4, 2, 5},
          bias{4, 5, 7};
      Buffers& b = buffers;
      b.query = Buffer(dtype, normal(rng, tokens));
      b.key = op == Op::av_transpose ? Buffer(dtype, tokens) : b.query;
      b.value = b.query;
      b.rpb = Buffer(dtype, normal(rng, bias));
      b.grad_rpb = Buffer(dtype, bias);
      b.attn = op == Op::qk || op == Op::rpb_gather ? Buffer(dtype, slots)
                                                    : Buffer(dtype, normal(rng, slots));
      b.output = Buffer(dtype, tokens);
      b.additional_keys = op == Op::av_transpose ? Buffer(dtype, additional)
                                                 : Buffer(dtype, normal(rng, additional));
      b.additional_values = Buffer(dtype, normal(rng, additional));
    }
    buffers.key_mask = Buffer(DType::boolean, Dense({2, 6, 7}, 1.0));
    call.op = op;
    call.neighborhood.kernel_size = {3, 4};
    call.tensors = buffers.views();
  }

  /// Everything that the call would write.
  bool outputs_are_untouched() {
    const auto untouched = [](std::initializer_list<Buffer*> outputs) {
      for (Buffer* b : outputs)
        if (!b->is_untouched()) return false;
      return true;
    };
    Buffers& b = buffers;
    switch (call.op) {
      case Op::attention_forward: return untouched({&b.output, &b.logsumexp});
      case Op::attention_backward:
        return untouched({&b.grad_query, &b.grad_key, &b.grad_value, &b.grad_rpb,
                          &b.grad_additional_keys, &b.grad_additional_values});
      case Op::qk:
      case Op::rpb_gather: return untouched({&b.attn});
      case Op::av: return untouched({&b.output});
      case Op::av_transpose: return untouched({&b.key, &b.additional_keys});
      case Op::rpb_scatter: return untouched({&b.grad_rpb});
    }
    return false;
  }
};

constexpr Op kOps[] = {Op::attention_forward, Op::attention_backward, Op::qk,         Op::av,
                       Op::av_transpose,      Op::rpb_gather,         Op::rpb_scatter};

/// Runs `f` and expects an Error whose message begins with the argument's name and says what it
/// got.
template <class F>
void expect_error(F&& f, ErrorKind kind, const std::string& argument, const std::string& got) {
  try {
    f();
    ADD_FAILURE() << "accepted; must refuse " << argument;
  } catch (const natten::Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.kind(), kind) << message;
    EXPECT_EQ(message.rfind(argument + ":", 0), 0u) << message;
    EXPECT_NE(message.find(got), std::string::npos) << message << "\nmust contain: " << got;
  } catch (const std::exception& other) {
    ADD_FAILURE() << "threw something that is not natten::Error: " << other.what();
  }
}

/// Spoils a valid call, expects the refusal from everything that checks, and that nothing has been
/// written and the valid call still runs.
void expect_refused(Op op, const std::function<void(Call&)>& spoil, ErrorKind kind,
                    const std::string& argument, const std::string& got,
                    bool known_without_data = true) {
  SCOPED_TRACE(testing::Message() << name_of(op) << ", " << argument);
  Valid valid(op);
  if (!is_runnable(valid.call)) return;  // NATTEN_BACKEND names one without the operation
  Call bad = valid.call;
  spoil(bad);
  expect_error([&] { natten::run(bad); }, kind, argument, got);
  expect_error([&] { natten::run(std::vector<Call>{valid.call, bad}); }, kind, argument, got);
  if (known_without_data) {
    expect_error([&] { natten::describe(bad); }, kind, argument, got);
    expect_error([&] { natten::workspace_bytes(bad); }, kind, argument, got);
    expect_error([&] { natten::workspace_bytes(std::vector<Call>{bad}); }, kind, argument, got);
  }
  EXPECT_TRUE(valid.outputs_are_untouched());
  EXPECT_NO_THROW(natten::run(valid.call)) << "the library must stay usable";
  EXPECT_FALSE(valid.outputs_are_untouched());
}

constexpr ErrorKind kValue = ErrorKind::invalid_value;

/// Neighborhoods that are refused: 6 x 7 tokens, kernel 3 x 4.
TEST(Refusals, Borders) {
  using N = natten::Neighborhood;
  constexpr std::int64_t kShift = 0, kCut = 1, kCircular = 2;
  const auto refuse = [](const std::function<void(N&)>& spoil, const char* argument,
                         const char* got) {
    for (Op op : kOps)
      expect_refused(
          op, [&](Call& call) { spoil(call.neighborhood); }, kValue, argument, got);
  };
  refuse([](N& n) { n.boundary = {kCut}; }, "boundary", "[1]");
  refuse([](N& n) { n.boundary = {kCut, 3}; }, "boundary", "[1, 3]");
  refuse([](N& n) { n.boundary = {kCut, kHuge}; }, "boundary", "2 (circular)");
  refuse([](N& n) { n.boundary = {kCut, -1}; }, "boundary", "[1, -1]");
  refuse(
      [](N& n) {
        n.boundary = {kCircular, kShift};
        n.is_causal = {1, 0};
      },
      "is_causal", "axis 0");
  expect_refused(
      Op::attention_forward,
      [](Call& call) {
        call.neighborhood.boundary = {kShift, kCircular};
        call.neighborhood.kernel_size = {3, 2};
        call.neighborhood.dilation = {1, 2};
        call.tensors.rpb = call.tensors.grad_rpb = {};
      },
      kValue, "dilation", "divide the axis, 7");
  refuse(
      [](N& n) {
        n.boundary = {kShift, kCircular};
        n.stride = {1, 2};
      },
      "stride", "got 2 on axis 1");
  refuse(
      [](N& n) {
        n.boundary = {kCircular, kCut};
        n.dilation = {3, 1};
      },
      "kernel_size", "with dilation 3 on axis 0");
  // The way to run such windows is named.
  refuse([](N& n) { n.dilation = {3, 1}; }, "kernel_size", "boundary \"cut\"");
  expect_refused(
      Op::attention_forward,
      [](Call& call) {
        call.neighborhood.boundary = {kCut, kCut};
        call.neighborhood.kernel_size = {std::int64_t{1} << 40, std::int64_t{1} << 40};
        call.tensors.rpb = call.tensors.grad_rpb = {};
      },
      kValue, "kernel_size", "memory");
  // Positions would overflow.
  refuse(
      [](N& n) {
        n.boundary = {kCut, kCut};
        n.dilation = {1, kHuge};
      },
      "dilation", "memory");
}

TEST(Refusals, Parts) {
  using N = natten::Neighborhood;
  const auto refuse = [](const std::function<void(N&)>& spoil, const char* argument,
                         const char* got) {
    for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk, Op::av, Op::av_transpose})
      expect_refused(
          op, [&](Call& call) { spoil(call.neighborhood); }, kValue, argument, got);
  };
  refuse([](N& n) { n.grid_size = {12}; }, "grid_size", "[12]");
  refuse([](N& n) { n.grid_size = {12, 0}; }, "grid_size", "[12, 0]");
  refuse([](N& n) { n.query_offset = {-1, 0}; }, "query_offset", "[-1, 0]");
  refuse([](N& n) { n.query_offset = {kHuge, 0}; }, "query_offset", "9223372036854775807");
  refuse([](N& n) { n.key_offset = {1, 0}; }, "key_offset", "without grid_size");
  refuse([](N& n) { n.query_offset = {1, 0}; }, "query_offset", "6 tokens here");
  refuse(
      [](N& n) {
        n.grid_size = {20, 7};
        n.query_offset = {15, 0};
      },
      "query_offset", "20 tokens here");
  for (Op op : {Op::attention_forward, Op::qk})
    expect_refused(
        op,
        [](Call& call) {  // query 8 sees tokens 7 to 9
          call.neighborhood.grid_size = {20, 7};
          call.neighborhood.query_offset = {3, 0};
          call.neighborhood.key_offset = {3, 0};
        },
        kValue, "key", "need tokens 2 to 9 (see natten.key_range)");
  expect_refused(
      Op::av_transpose,
      [](Call& call) {
        call.neighborhood.grid_size = {6, 7};
        call.tensors.key = call.tensors.key_mask = {};
      },
      kValue, "key", "missing");
  expect_refused(
      Op::rpb_gather,
      [](Call& call) {
        call.neighborhood.query_offset = {1, 0};
        call.tensors.key_mask = {};
      },
      kValue, "grid_size", "missing");
}

TEST(Refusals, Masks) {
  const std::int64_t shape[] = {2, 6, 7};
  std::vector<unsigned char> bytes(84, 1);
  const auto mask = [&] {
    return natten::contiguous_view(bytes.data(), DType::boolean, {}, shape, 3);
  };
  for (Op op : kOps) {
    expect_refused(
        op,
        [&](Call& call) {
          call.tensors.key_mask = mask();
          call.tensors.key_mask.dtype = DType::float32;
        },
        ErrorKind::invalid_type, "key_mask", "got dtype float32; must be bool");
    expect_refused(
        op,
        [&](Call& call) {
          call.tensors.key_mask = mask();
          call.tensors.key_mask.shape[2] = 6;
        },
        kValue, "key_mask", "[2, 6, 6]");
    expect_refused(
        op,
        [&](Call& call) {
          call.tensors.key_mask = mask();
          call.tensors.key_mask.shape[0] = 3;
        },
        kValue, "key_mask", "[3, 6, 7]");
    expect_refused(
        op,
        [&](Call& call) {
          call.tensors.key_mask = mask();
          call.tensors.key_mask.device = {natten::DeviceType::cuda, 0};
        },
        kValue, "key_mask", "cuda:0");
  }
  expect_refused(
      Op::attention_forward, [](Call& call) { call.tensors.query.dtype = DType::boolean; },
      ErrorKind::invalid_type, "query", "got dtype bool");
}

TEST(Refusals, ValidCallsOfEveryOperationRun) {
  for (Op op : kOps) {
    Valid valid(op);
    if (!is_runnable(valid.call)) continue;
    EXPECT_TRUE(valid.outputs_are_untouched()) << name_of(op);
    EXPECT_NO_THROW(natten::run(valid.call)) << name_of(op);
    EXPECT_FALSE(valid.outputs_are_untouched()) << name_of(op);
  }
}

TEST(Refusals, Rank) {
  for (Op op : kOps) {
    const auto with_kernel = [](Tuple kernel) {
      return [=](Call& call) { call.neighborhood.kernel_size = kernel; };
    };
    expect_refused(op, with_kernel({}), kValue, "kernel_size", "got []");
    expect_refused(op, with_kernel({3, 3, 3, 3}), kValue, "kernel_size", "got [3, 3, 3, 3]");
    expect_refused(op, with_kernel({3, 3, 3, 3, 3, 3, 3, 3, 3, 3}), kValue, "kernel_size",
                   "10 elements");
  }
}

TEST(Refusals, KernelSizeAndTensorsOfDifferentRanks) {
  const std::pair<Op, const char*> first_tensor[] = {{Op::attention_forward, "query"},
                                                     {Op::attention_backward, "query"},
                                                     {Op::qk, "query"},
                                                     {Op::av, "attn"},
                                                     {Op::av_transpose, "attn"},
                                                     {Op::rpb_gather, "rpb"},
                                                     {Op::rpb_scatter, "attn"}};
  for (const auto& [op, tensor] : first_tensor) {
    const auto with_kernel = [](Tuple kernel) {
      return [=](Call& call) { call.neighborhood.kernel_size = kernel; };
    };
    expect_refused(op, with_kernel({3}), kValue, tensor, "dimensions");
    expect_refused(op, with_kernel({3, 3, 3}), kValue, tensor, "dimensions");
  }
}

TEST(Refusals, TupleLengths) {
  const std::pair<const char*, std::function<Tuple&(Call&)>> tuples[] = {
      {"dilation", [](Call& c) -> Tuple& { return c.neighborhood.dilation; }},
      {"stride", [](Call& c) -> Tuple& { return c.neighborhood.stride; }},
      {"is_causal", [](Call& c) -> Tuple& { return c.neighborhood.is_causal; }},
      {"q_tile_shape", [](Call& c) -> Tuple& { return c.options.query_tile; }},
      {"kv_tile_shape", [](Call& c) -> Tuple& { return c.options.key_tile; }},
      {"backward_q_tile_shape", [](Call& c) -> Tuple& { return c.options.backward_query_tile; }},
      {"backward_kv_tile_shape", [](Call& c) -> Tuple& { return c.options.backward_key_tile; }},
      {"backward_kv_splits", [](Call& c) -> Tuple& { return c.options.key_splits; }}};
  for (Op op : kOps)
    for (const auto& [name, member] : tuples) {
      const auto& tuple = member;  // a lambda may not capture what is bound by []
      expect_refused(
          op, [&](Call& c) { tuple(c) = {1}; }, kValue, name, "got [1]");
      expect_refused(
          op,
          [&](Call& c) {
            tuple(c) = {1, 1, 1};
          },
          kValue, name, "got [1, 1, 1]");
      expect_refused(
          op, [&](Call& c) { tuple(c) = {1, 1, 1, 1, 1, 1, 1, 1, 1}; }, kValue, name, "9 elements");
    }
}

TEST(Refusals, NeighborhoodValues) {
  const auto set = [](Tuple natten::Neighborhood::*member, Tuple value) {
    return [=](Call& call) { call.neighborhood.*member = value; };
  };
  using N = natten::Neighborhood;
  for (Op op : kOps) {
    for (std::int64_t bad : {std::int64_t{0}, std::int64_t{-1}, -kHuge}) {
      const std::string got = "got [3, " + std::to_string(bad) + "]";
      expect_refused(op, set(&N::kernel_size, {3, bad}), kValue, "kernel_size", got);
      expect_refused(op, set(&N::dilation, {3, bad}), kValue, "dilation", got);
      expect_refused(op, set(&N::stride, {3, bad}), kValue, "stride", got);
    }
    expect_refused(op, set(&N::is_causal, {0, -1}), kValue, "is_causal", "got [0, -1]");
    expect_refused(op, set(&N::is_causal, {2, 0}), kValue, "is_causal", "got [2, 0]");
    expect_refused(op, set(&N::stride, {4, 1}), kValue, "stride", "got [4, 1]");
    expect_refused(op, set(&N::stride, {1, 5}), kValue, "stride", "got [1, 5]");
    expect_refused(op, set(&N::stride, {1, kHuge}), kValue, "stride", std::to_string(kHuge));
  }
}

TEST(Refusals, WindowsLargerThanTheAxis) {
  // Operations with a bias, or with slots, may refuse its shape first.
  for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk, Op::av, Op::av_transpose}) {
    const auto set = [](Tuple kernel, Tuple dilation) {
      return [=](Call& call) {
        call.neighborhood.kernel_size = kernel;
        call.neighborhood.dilation = dilation;
        call.tensors.rpb = call.tensors.grad_rpb = TensorView{};
      };
    };
    expect_refused(op, set({7, 4}, {1, 1}), kValue, "kernel_size", "got [7, 4]");
    expect_refused(op, set({6, 8}, {1, 1}), kValue, "kernel_size", "got [6, 8]");
    expect_refused(op, set({3, 4}, {3, 1}), kValue, "kernel_size", "dilation 3");
    expect_refused(op, set({3, 4}, {1, 2}), kValue, "kernel_size", "dilation 2");
    expect_refused(op, set({3, 4}, {1, kHuge}), kValue, "kernel_size", std::to_string(kHuge));
    expect_refused(op, set({kHuge, 4}, {1, 1}), kValue, "kernel_size", std::to_string(kHuge));
    expect_refused(op, set({kHuge, kHuge}, {kHuge, kHuge}), kValue, "kernel_size",
                   std::to_string(kHuge));
  }
}

TEST(Refusals, TileShapesThatAreNotPositive) {
  const std::pair<const char*, Tuple natten::Options::*> tuples[] = {
      {"q_tile_shape", &natten::Options::query_tile},
      {"kv_tile_shape", &natten::Options::key_tile},
      {"backward_q_tile_shape", &natten::Options::backward_query_tile},
      {"backward_kv_tile_shape", &natten::Options::backward_key_tile},
      {"backward_kv_splits", &natten::Options::key_splits}};
  for (Op op : {Op::attention_forward, Op::attention_backward})
    for (const auto& [name, member] : tuples)
      for (Tuple bad : {Tuple{0, 8}, Tuple{8, -8}}) {
        const std::string got =
            "got [" + std::to_string(bad[0]) + ", " + std::to_string(bad[1]) + "]";
        expect_refused(
            op, [&, tile = member](Call& c) { c.options.*tile = bad; }, kValue, name, got);
      }
}

TEST(Refusals, Scale) {
  for (Op op : {Op::attention_forward, Op::attention_backward})
    for (const auto& [scale, got] :
         {std::pair(kNan, "nan"), std::pair(HUGE_VAL, "inf"), std::pair(-HUGE_VAL, "-inf")})
      expect_refused(
          op, [&, s = scale](Call& c) { c.options.scale = s; }, kValue, "scale", got);
}

TEST(Refusals, HeadsThatDoNotDivide) {
  for (Op op : {Op::attention_forward, Op::attention_backward})
    for (std::int64_t heads : {3, 8}) {
      // More or other key-value heads, in every tensor that has them.
      const auto spoil = [&](Call& c) {
        natten::Tensors& t = c.tensors;
        for (TensorView* v : {&t.key, &t.value, &t.grad_key, &t.grad_value})
          if (*v) v->shape[3] = heads;
        for (TensorView* v : {&t.additional_keys, &t.additional_values, &t.grad_additional_keys,
                              &t.grad_additional_values})
          if (*v) v->shape[2] = heads;
      };
      expect_refused(op, spoil, kValue, "key", "got " + std::to_string(heads));
    }
}

/// Every tensor of every operation, every dimension: a size that fits no other tensor.
TEST(Refusals, MismatchedShapes) {
  struct Expectation {
    Op op;
    const char* tensor;
    TensorView natten::Tensors::*member;
  };
  using T = natten::Tensors;
  const Expectation expectations[] = {
      {Op::attention_forward, "key", &T::key},
      {Op::attention_forward, "value", &T::value},
      {Op::attention_forward, "rpb", &T::rpb},
      {Op::attention_forward, "additional_keys", &T::additional_keys},
      {Op::attention_forward, "additional_values", &T::additional_values},
      {Op::attention_forward, "output", &T::output},
      {Op::attention_forward, "logsumexp", &T::logsumexp},
      {Op::attention_backward, "key", &T::key},
      {Op::attention_backward, "value", &T::value},
      {Op::attention_backward, "rpb", &T::rpb},
      {Op::attention_backward, "additional_keys", &T::additional_keys},
      {Op::attention_backward, "additional_values", &T::additional_values},
      {Op::attention_backward, "logsumexp", &T::logsumexp},
      {Op::attention_backward, "grad_output", &T::grad_output},
      {Op::attention_backward, "grad_logsumexp", &T::grad_logsumexp},
      {Op::attention_backward, "grad_query", &T::grad_query},
      {Op::attention_backward, "grad_key", &T::grad_key},
      {Op::attention_backward, "grad_value", &T::grad_value},
      {Op::attention_backward, "grad_rpb", &T::grad_rpb},
      {Op::attention_backward, "grad_additional_keys", &T::grad_additional_keys},
      {Op::attention_backward, "grad_additional_values", &T::grad_additional_values},
      {Op::qk, "key", &T::key},
      {Op::qk, "rpb", &T::rpb},
      {Op::qk, "additional_keys", &T::additional_keys},
      {Op::qk, "attn", &T::attn},
      {Op::av, "value", &T::value},
      {Op::av, "additional_values", &T::additional_values},
      {Op::av, "output", &T::output},
      {Op::av_transpose, "query", &T::query},
      {Op::av_transpose, "key", &T::key},
      {Op::av_transpose, "additional_keys", &T::additional_keys},
      {Op::rpb_scatter, "grad_rpb", &T::grad_rpb},
  };
  // These define a size that others follow: the next tensor that has it is named.
  const auto defines = [](const Expectation& e, int dim, int ndim) {
    const bool is_fused = e.op == Op::attention_forward || e.op == Op::attention_backward;
    const std::string name = e.tensor;
    if (is_fused && name == "key") return dim == 3;                      // key-value heads
    if (is_fused && name == "value") return dim == ndim - 1;             // value dim
    if (is_fused && name == "additional_keys") return dim == 1;          // additional tokens
    if (!is_fused && name.rfind("additional", 0) == 0) return dim == 2;  // likewise
    if (e.op == Op::av && name == "value") return dim == ndim - 1;       // head dim
    if (e.op == Op::av_transpose && name == "query") return dim == ndim - 1;
    return false;
  };
  for (const Expectation& e : expectations) {
    const TensorView shape = Valid(e.op).call.tensors.*e.member;
    ASSERT_TRUE(bool(shape)) << name_of(e.op) << " " << e.tensor;
    for (int dim = 0; dim < shape.ndim; ++dim) {
      if (defines(e, dim, shape.ndim)) continue;
      for (std::int64_t wrong : {shape.shape[index(dim)] + 17, std::int64_t{0}, std::int64_t{-3}}) {
        SCOPED_TRACE(testing::Message() << "dimension " << dim << " is " << wrong);
        expect_refused(
            e.op, [&](Call& c) { (c.tensors.*e.member).shape[index(dim)] = wrong; }, kValue,
            e.tensor, std::to_string(wrong));
      }
    }
    // One dimension more or fewer.
    for (int ndim : {shape.ndim - 1, shape.ndim + 1, natten::kMaxDims + 3})
      expect_refused(
          e.op, [&](Call& c) { (c.tensors.*e.member).ndim = ndim; }, kValue, e.tensor,
          "got " + std::to_string(ndim) + " dimensions");
  }
}

/// Products that overflow, also to 0, and what no enumeration has.
TEST(Refusals, ViewsThatCannotBe) {
  for (Op op : kOps) {
    Valid valid(op);
    valid.buffers.for_each([&](const char* name, Buffer&, TensorView natten::Tensors::*member) {
      if (!natten::dims_of(op, member) || !(valid.call.tensors.*member)) return;
      const auto with = [&](auto change) { return [=](Call& c) { change(c.tensors.*member); }; };
      expect_refused(op, with([](TensorView& v) { v.ndim = 100; }), kValue, name, "100 dimensions");
      for (std::int64_t size : {std::int64_t{1} << 32, std::int64_t{1} << 62, kHuge})
        expect_refused(op, with([=](TensorView& v) {
                         std::fill_n(v.shape.begin(), v.ndim, size);
                         v.data = nullptr;
                       }),
                       kValue, name, std::to_string(size));
      for (std::int64_t stride : {std::int64_t{1} << 60, kHuge, -kHuge - 1})
        expect_refused(op, with([=](TensorView& v) { v.strides[1] = stride; }), kValue, name,
                       std::to_string(stride));
      expect_refused(op, with([](TensorView& v) { v.dtype = static_cast<DType>(99); }),
                     ErrorKind::invalid_type, name, "99");
      expect_refused(
          op, with([](TensorView& v) { v.device.type = static_cast<natten::DeviceType>(99); }),
          kValue, name, "99");
    });
    expect_refused(
        op, [](Call& c) { c.op = static_cast<Op>(99); }, kValue, "op", "99");
    for (int size : {-1, 100})
      expect_refused(
          op, [=](Call& c) { c.neighborhood.kernel_size.size = size; }, kValue, "kernel_size",
          std::to_string(size) + " elements");
  }
}

/// A bias by relative position, or its gradient, needs one grid for queries and keys.
TEST(Refusals, BiasWithKeysOnTheirOwnGrid) {
  const auto separate = [](Call& c) { c.options.separate_key_grid = true; };
  for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk, Op::rpb_gather})
    expect_refused(op, separate, kValue, "rpb", "separate_key_grid");
  expect_refused(Op::rpb_scatter, separate, kValue, "grad_rpb", "separate_key_grid");
}

/// Every output over every other tensor, by its first element.
TEST(Refusals, OutputsThatShareMemory) {
  for (Op op : kOps)
    for (const natten::Role& output : natten::roles_of(op))
      for (const natten::Role& other : natten::roles_of(op)) {
        if (!output.is_output || output.tensor == other.tensor) continue;
        const auto spoil = [&](Call& c) {
          (c.tensors.*output.tensor).data = (c.tensors.*other.tensor).data;
        };
        SCOPED_TRACE(std::string(output.name) + " and " + other.name);
        Valid valid(op);
        if (!is_runnable(valid.call)) continue;
        Call bad = valid.call;
        spoil(bad);
        EXPECT_NO_THROW(natten::describe(bad)) << "nothing is written";
        EXPECT_NO_THROW(natten::workspace_bytes(bad));
        std::string found;
        try {
          natten::run(bad);
        } catch (const natten::Error& error) {
          found = error.what();
        }
        const std::string shares = "shares memory with ";
        const bool is_named = found.rfind(output.name + (": " + shares + other.name), 0) == 0;
        const bool is_named_reversed =
            other.is_output && found.rfind(other.name + (": " + shares + output.name), 0) == 0;
        EXPECT_TRUE(is_named || is_named_reversed) << found;
        EXPECT_TRUE(valid.outputs_are_untouched());
      }
}

TEST(Refusals, OutputsThatOverlapThemselves) {
  for (Op op : kOps)
    for (const natten::Role& role : natten::roles_of(op)) {
      if (!role.is_output) continue;
      for (std::int64_t stride : {0, 1})
        expect_refused(
            op, [&](Call& c) { (c.tensors.*role.tensor).strides[0] = stride; }, kValue, role.name,
            "got strides [" + std::to_string(stride), false);
    }
}

TEST(Refusals, CallsThatShareOutputs) {
  Valid first(Op::attention_forward), second(Op::attention_forward);
  Call a = first.call, b = second.call;
  b.tensors.query = a.tensors.query;
  EXPECT_NO_THROW(natten::run(std::vector<Call>{a, b})) << "inputs may be shared";
  b.tensors.output = a.tensors.output;
  expect_error(
      [&] {
        natten::run(std::vector<Call>{a, b});
      },
      kValue, "output", "shares memory with output of call");
  b = second.call;
  b.tensors.key = b.tensors.value;
  b.tensors.key.data = a.tensors.output.data;
  b.tensors.key.shape[4] = 5;
  b.tensors.key.strides = second.call.tensors.key.strides;
  expect_error(
      [&] {
        natten::run(std::vector<Call>{b, a});
      },
      kValue, "output", "that of call 1 shares memory with key of call 0");
}

/// The derivatives by name are several operations: none may write what a later one reads.
TEST(Refusals, GradientsInPlace) {
  Rng rng(base_seed());
  const auto input = [&](const Shape& shape) { return Buffer(DType::float32, normal(rng, shape)); };
  Buffer query = input({1, 1, 9, 4}), key = input({1, 1, 9, 4}), attn = input({1, 1, 9, 3});
  Buffer grad(DType::float32, Shape{1, 1, 9, 4}), other = grad, grad_attn = attn;
  const auto qk_backward = [&](Buffer& d_query, Buffer& d_key) {
    natten::na1d_qk_backward(d_query.view(), d_key.view(), {}, attn.view(), query.view(),
                             key.view(), {3}, {1}, {0});
  };
  expect_error([&] { qk_backward(query, grad); }, kValue, "output", "query of call 1");
  expect_error([&] { qk_backward(grad, key); }, kValue, "key", "value of call 0");
  expect_error(
      [&] {
        natten::na1d_av_backward(attn.view(), grad.view(), query.view(), attn.view(), key.view(),
                                 {3}, {1}, {0});
      },
      kValue, "attn", "attn of call 1");
  EXPECT_TRUE(grad.is_untouched());
  EXPECT_NO_THROW(qk_backward(grad, other));
}

/// Exact: views of one buffer are refused if, and only if, they share an element.
TEST(Refusals, SharedMemoryIsFoundExactly) {
  Rng rng(base_seed() + 1);
  int refused = 0, accepted = 0;
  for (int i = 0; i < 4000; ++i) {
    const int ndim = static_cast<int>(uniform(rng, 1, 3));
    Shape rows;
    for (int d = 0; d < ndim; ++d) rows.push_back(uniform(rng, 1, 4));
    const auto random_view = [&](std::vector<std::int64_t>& elements) {
      TensorView v;
      v.ndim = ndim;
      std::copy(rows.begin(), rows.end(), v.shape.begin());
      std::int64_t first = uniform(rng, 0, 12);
      for (int d = 0; d < ndim; ++d) {
        std::int64_t& stride = v.strides[index(d)];
        stride = chance(rng, 0.5) ? uniform(rng, -12, 12) : 4 * uniform(rng, -6, 6);
        if (stride < 0) first -= (rows[index(d)] - 1) * stride;
      }
      for (std::int64_t j = 0; j < volume(rows); ++j) {
        std::int64_t at = first, left = j;
        for (int d = ndim - 1; d >= 0; --d) {
          at += left % rows[index(d)] * v.strides[index(d)];
          left /= rows[index(d)];
        }
        elements.push_back(at);
      }
      std::sort(elements.begin(), elements.end());
      return v;
    };
    std::vector<float> memory(400);
    std::vector<std::int64_t> read, written, both;
    TensorView lse = random_view(read), merged_lse = random_view(written);
    for (TensorView* v : {&lse, &merged_lse}) {
      const auto& elements = v == &lse ? read : written;
      v->data = memory.data() + elements[0];
      for (int d = 0; d < ndim; ++d)  // to the view's first element
        if (v->strides[index(d)] < 0)
          v->data = static_cast<float*>(v->data) - (rows[index(d)] - 1) * v->strides[index(d)];
    }
    std::set_intersection(read.begin(), read.end(), written.begin(), written.end(),
                          std::back_inserter(both));
    const bool is_bad =
        !both.empty() || std::adjacent_find(written.begin(), written.end()) != written.end();
    const Shape wide = join({rows, {1}});
    Buffer part(DType::float32, normal(rng, wide)), merged(DType::float32, wide);
    std::string message;
    try {
      natten::merge_attentions({part.view()}, {lse}, merged.view(), merged_lse);
    } catch (const natten::Error& error) {
      message = error.what();
    }
    EXPECT_EQ(is_bad, !message.empty()) << message;
    ++(is_bad ? refused : accepted);
  }
  EXPECT_GT(refused, 500);
  EXPECT_GT(accepted, 500);
}

TEST(Refusals, SlotsThatFitNoWindow) {
  for (Op op : {Op::qk, Op::av, Op::av_transpose})
    for (std::int64_t slots : {0, 11, 13, 15})
      expect_refused(
          op, [&](Call& c) { c.tensors.attn.shape[4] = slots; }, kValue, "attn",
          "got " + std::to_string(slots));
  for (Op op : {Op::rpb_gather, Op::rpb_scatter})
    for (std::int64_t slots : {0, 11})
      expect_refused(
          op, [&](Call& c) { c.tensors.attn.shape[4] = slots; }, kValue, "attn",
          "got " + std::to_string(slots));
}

TEST(Refusals, EmptyAxesHeadsAndDims) {
  for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk})
    for (int dim = 1; dim < 5; ++dim)
      expect_refused(
          op, [&](Call& c) { c.tensors.query.shape[index(dim)] = 0; }, kValue, "query", "got");
  for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk})
    expect_refused(
        op, [&](Call& c) { c.tensors.query.shape[0] = -1; }, kValue, "query", "got shape [-1");
}

/// Every tensor of every operation in another type, and on another device.
TEST(Refusals, MismatchedTypesAndDevices) {
  for (Op op : kOps) {
    Valid valid(op);
    // The first tensor of an operation sets type and device; the first that differs is named.
    const TensorView natten::Tensors::*first = natten::roles_of(op).begin()->tensor;
    valid.buffers.for_each([&](const char* name, Buffer&, TensorView natten::Tensors::*member) {
      if (!natten::dims_of(op, member)) return;  // not a tensor of this operation
      if (member == first || !(valid.call.tensors.*member)) return;
      for (DType wrong : kDTypes)
        if (wrong != DType::float32)
          expect_refused(
              op, [&](Call& c) { (c.tensors.*member).dtype = wrong; }, ErrorKind::invalid_type,
              name, std::string("got dtype ") + name_of(wrong));
      expect_refused(
          op,
          [&](Call& c) {
            (c.tensors.*member).device = {natten::DeviceType::cuda, 1};
          },
          kValue, name, "cuda:1");
      expect_refused(
          op, [&](Call& c) { (c.tensors.*member).device.index = 3; }, kValue, name, "cpu:3");
    });
  }
}

TEST(Refusals, LogsumexpKeepsMoreDigitsThanHalfTypes) {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float64}) {
    Valid valid(Op::attention_forward, dtype);
    valid.call.tensors.logsumexp.dtype = dtype == DType::float64 ? DType::float32 : dtype;
    expect_error([&] { natten::run(valid.call); }, ErrorKind::invalid_type, "logsumexp",
                 name_of(valid.call.tensors.logsumexp.dtype));
  }
}

TEST(Refusals, MissingTensors) {
  using T = natten::Tensors;
  const auto expect_missing = [](Op op, const char* name, TensorView T::*member, bool is_output) {
    expect_refused(
        op, [&](Call& c) { c.tensors.*member = TensorView{}; }, kValue, name, "missing",
        !is_output);
    expect_refused(
        op, [&](Call& c) { (c.tensors.*member).data = nullptr; }, kValue, name, "null data pointer",
        false);
  };
  for (Op op : {Op::attention_forward, Op::attention_backward}) {
    expect_missing(op, "query", &T::query, false);
    expect_missing(op, "key", &T::key, false);
    expect_missing(op, "value", &T::value, false);
  }
  expect_missing(Op::attention_forward, "output", &T::output, true);
  expect_missing(Op::attention_backward, "logsumexp", &T::logsumexp, false);
  expect_missing(Op::attention_backward, "grad_output", &T::grad_output, false);
  expect_missing(Op::qk, "query", &T::query, false);
  expect_missing(Op::qk, "key", &T::key, false);
  expect_missing(Op::qk, "attn", &T::attn, true);
  expect_missing(Op::av, "attn", &T::attn, false);
  expect_missing(Op::av, "value", &T::value, false);
  expect_missing(Op::av, "output", &T::output, true);
  expect_missing(Op::av_transpose, "attn", &T::attn, false);
  expect_missing(Op::av_transpose, "query", &T::query, false);
  expect_missing(Op::av_transpose, "key", &T::key, true);
  expect_missing(Op::rpb_gather, "rpb", &T::rpb, false);
  expect_missing(Op::rpb_scatter, "attn", &T::attn, false);
  expect_missing(Op::rpb_scatter, "grad_rpb", &T::grad_rpb, true);
  // rpb_gather takes its batch and grid from the attention weights.
  expect_refused(
      Op::rpb_gather, [](Call& c) { c.tensors.attn = TensorView{}; }, kValue, "attn", "missing");
}

TEST(Refusals, OneOfAdditionalKeysAndValues) {
  using T = natten::Tensors;
  for (Op op : {Op::attention_forward, Op::attention_backward}) {
    const auto without = [](TensorView T::*member) {
      return [=](Call& c) {
        c.tensors.*member = TensorView{};
        c.tensors.grad_additional_keys = c.tensors.grad_additional_values = TensorView{};
      };
    };
    expect_refused(op, without(&T::additional_keys), kValue, "additional_keys", "missing");
    expect_refused(op, without(&T::additional_values), kValue, "additional_values", "missing");
  }
}

TEST(Refusals, GradientsOfWhatWasNotGiven) {
  const Op op = Op::attention_backward;
  expect_refused(
      op, [](Call& c) { c.tensors.rpb = TensorView{}; }, kValue, "grad_rpb", "not given");
  expect_refused(
      op, [](Call& c) { c.tensors.additional_keys = c.tensors.additional_values = TensorView{}; },
      kValue, "grad_additional_keys", "not given");
}

TEST(Refusals, InnermostStride) {
  for (Op op : kOps) {
    Valid valid(op);
    valid.buffers.for_each([&](const char* name, Buffer&, TensorView natten::Tensors::*member) {
      if (!natten::dims_of(op, member)) return;  // not a tensor of this operation
      if (!(valid.call.tensors.*member)) return;
      for (std::int64_t stride : {2, 0, -1})
        expect_refused(
            op,
            [&](Call& c) {
              TensorView& view = c.tensors.*member;
              view.strides[index(view.ndim - 1)] = stride;
            },
            kValue, name, "got " + std::to_string(stride));
    });
  }
}

TEST(Refusals, TensorsBetweenElements) {
  for (Op op : kOps) {
    Valid valid(op);
    valid.buffers.for_each([&](const char* name, Buffer&, TensorView natten::Tensors::*member) {
      if (!natten::dims_of(op, member) || !(valid.call.tensors.*member)) return;
      if ((valid.call.tensors.*member).dtype == DType::boolean) return;  // of a byte each
      const auto shift = [&](Call& c) {
        TensorView& view = c.tensors.*member;
        view.data = static_cast<char*>(view.data) + 1;
      };
      expect_refused(op, shift, kValue, name, "must be a multiple of 4", false);
    });
  }
}

/// The call, as if its tensors were on a CUDA device.
Call on_cuda(Valid& valid, int index) {
  Call call = valid.call;
  valid.buffers.for_each([&](const char*, Buffer&, TensorView natten::Tensors::*member) {
    (call.tensors.*member).device = {natten::DeviceType::cuda, index};
  });
  return call;
}

TEST(Refusals, DeviceWithoutKernels) {
  if (natten::built_for(natten::DeviceType::cuda)) GTEST_SKIP() << "built with CUDA kernels";
  for (Op op : kOps) {
    Valid valid(op);
    const Call bad = on_cuda(valid, 0);
    expect_error([&] { natten::run(bad); }, kValue, "device", "NATTEN_WITH_CUDA=ON");
    expect_error([&] { natten::workspace_bytes(bad); }, kValue, "device", "cuda");
    EXPECT_NO_THROW(natten::describe(bad)) << "describing needs no kernels";
    EXPECT_TRUE(valid.outputs_are_untouched());
  }
  EXPECT_TRUE(natten::backends(natten::DeviceType::cuda).empty());
  EXPECT_EQ(natten::compute_capability(), 0);
}

TEST(Refusals, MissingCudaDevice) {
  constexpr int kMissing = 999;
  EXPECT_EQ(natten::compute_capability(kMissing), 0);
  EXPECT_EQ(natten::compute_capability(-7), 0);
  if (!natten::built_for(natten::DeviceType::cuda)) GTEST_SKIP() << "built without CUDA kernels";
  for (Op op : kOps) {
    Valid valid(op);
    const Call bad = on_cuda(valid, kMissing);
    for (const natten::Verdict& verdict : natten::explain(natten::describe(bad)))
      EXPECT_EQ(verdict.refusal.find("there is no device cuda:999"), 0u) << verdict.refusal;
    expect_error([&] { natten::run(bad); }, kValue, "backend", "there is no device cuda:999");
    EXPECT_NO_THROW(natten::workspace_bytes(on_cuda(valid, -1))) << "planning needs no device";
    EXPECT_TRUE(valid.outputs_are_untouched());
  }
}

TEST(Refusals, WorkspaceOnCuda) {
  if (!natten::built_for(natten::DeviceType::cuda)) GTEST_SKIP() << "built without CUDA kernels";
  Valid valid(Op::attention_backward);
  const Call call = on_cuda(valid, -1);
  const std::size_t needed = natten::workspace_bytes(call);
  ASSERT_GT(needed, 0u);
  expect_error([&] { natten::run(call); }, kValue, "workspace", std::to_string(needed) + " bytes");
  natten::Context context;
  context.workspace = &context;
  context.workspace_size = needed - 1;
  expect_error([&] { natten::run(call, context); }, kValue, "workspace", std::to_string(needed));
  expect_error(
      [&] {
        natten::run(std::vector<Call>{valid.call, call});
      },
      kValue, "calls", "must be on one device");
  EXPECT_TRUE(valid.outputs_are_untouched());
}

TEST(Refusals, ShapesOfTensorsThatAnOperationLacks) {
  Valid valid(Op::qk);
  expect_error([&] { natten::expected(valid.call, &natten::Tensors::logsumexp); }, kValue, "tensor",
               "qk");
}

TEST(Refusals, GeneralAttention) {
  Case c;
  c.axes = {{4, 1, 1, 1, false}};
  c.keys = 6;
  FusedProblem problem(c);
  const natten::Tensors good = problem.buffers.views();
  const auto refused = [&](auto spoil, const char* argument, const char* got) {
    natten::Tensors bad = good;
    spoil(bad);
    expect_error([&] { natten::run(natten::attention_call(bad)); }, kValue, argument, got);
  };
  refused([](natten::Tensors& t) { t.key.shape[1] = t.value.shape[1] = 0; }, "key", "[1, 0, 1, 4]");
  refused([](natten::Tensors& t) { t.value.shape[1] = 5; }, "value", "5");
  refused([](natten::Tensors& t) { t.key = TensorView{}; }, "key", "missing");
  refused([](natten::Tensors& t) { t.query.ndim = 5; }, "query", "5 dimensions");
  refused([](natten::Tensors& t) { t.output.shape[1] = 6; }, "output", "6");
  expect_error([&] { natten::run(natten::attention_call(good, false, kNan)); }, kValue, "scale",
               "nan");
  EXPECT_TRUE(problem.buffers.output.is_untouched());
  EXPECT_NO_THROW(natten::run(natten::attention_call(good)));
}

TEST(Refusals, MergingAttentions) {
  Rng rng(base_seed());
  const Shape wide{2, 3, 4}, narrow{2, 3};
  Buffer a(DType::float32, normal(rng, wide)), lse(DType::float32, normal(rng, narrow));
  Buffer output(DType::float32, wide), logsumexp(DType::float32, narrow);
  using Views = std::vector<TensorView>;
  const auto merge = [&](Views outputs, Views lses, TensorView to, TensorView to_lse) {
    return [=] { natten::merge_attentions(outputs, lses, to, to_lse); };
  };
  const TensorView x = a.view(), l = lse.view(), o = output.view(), ol = logsumexp.view();
  const auto changed = [](TensorView v, auto change) {
    change(v);
    return v;
  };
  expect_error(merge({}, {}, o, ol), kValue, "outputs", "got none");
  expect_error(merge({x, x}, {l}, o, ol), kValue, "lse_tensors", "got 1");
  const TensorView half = changed(x, [](TensorView& v) { v.dtype = DType::float16; });
  expect_error(merge({x, half}, {l, l}, o, ol), ErrorKind::invalid_type, "outputs", "float16");
  const TensorView wide_lse = changed(l, [](TensorView& v) { v.dtype = DType::float64; });
  expect_error(merge({x}, {wide_lse}, o, ol), ErrorKind::invalid_type, "lse_tensors", "float64");
  const TensorView longer = changed(x, [](TensorView& v) { v.shape[1] = 9; });
  expect_error(merge({x, longer}, {l, l}, o, ol), kValue, "outputs", "9");
  expect_error(merge({x}, {l}, longer, ol), kValue, "outputs", "9");
  const TensorView longer_lse = changed(l, [](TensorView& v) { v.shape[1] = 9; });
  expect_error(merge({x}, {longer_lse}, o, ol), kValue, "lse_tensors", "9");
  expect_error(merge({x}, {x}, o, ol), kValue, "lse_tensors", "[2, 3, 4]");
  expect_error(merge({TensorView{}}, {l}, o, ol), kValue, "outputs", "without dimensions");
  expect_error(merge({x}, {TensorView{}}, o, ol), kValue, "lse_tensors", "[]");
  const TensorView sparse = changed(x, [](TensorView& v) { v.strides[2] = 2; });
  expect_error(merge({sparse}, {l}, o, ol), kValue, "outputs", "got 2");
  const TensorView empty = changed(x, [](TensorView& v) { v.data = nullptr; });
  expect_error(merge({empty}, {l}, o, ol), kValue, "outputs", "null data pointer");
  const auto shift = [](TensorView& v) { v.data = static_cast<char*>(v.data) + 2; };
  expect_error(merge({changed(x, shift)}, {l}, o, ol), kValue, "outputs", "multiple of 4");
  expect_error(merge({x}, {changed(l, shift)}, o, ol), kValue, "lse_tensors", "multiple of 4");
  expect_error(merge({x}, {l}, changed(o, shift), ol), kValue, "outputs", "multiple of 4");
  const TensorView elsewhere =
      changed(x, [](TensorView& v) { v.device.type = natten::DeviceType::cuda; });
  expect_error(merge({elsewhere}, {l}, o, ol), kValue, "outputs", "CPU");
  for (int ndim : {9, 100}) {
    const TensorView deep = changed(x, [&](TensorView& v) { v.ndim = ndim; });
    const std::string got = std::to_string(ndim) + " dimensions";
    expect_error(merge({deep}, {l}, o, ol), kValue, "outputs", got);
    expect_error(merge({x}, {deep}, o, ol), kValue, "lse_tensors", got);
    expect_error(merge({x}, {l}, deep, ol), kValue, "outputs", got);
  }
  const TensorView strange = changed(x, [](TensorView& v) { v.dtype = static_cast<DType>(99); });
  expect_error(merge({strange}, {l}, strange, ol), ErrorKind::invalid_type, "outputs", "99");
  const TensorView long_view =
      changed(x, [](TensorView& v) { v.shape[0] = v.shape[1] = std::int64_t{1} << 32; });
  expect_error(merge({long_view}, {l}, long_view, ol), kValue, "outputs", "4294967296");
  expect_error(merge({x}, {l}, x, ol), kValue, "output", "shares memory with outputs");
  expect_error(merge({x, o}, {l, l}, o, ol), kValue, "output", "shares memory with outputs");
  expect_error(merge({x}, {l}, o, l), kValue, "logsumexp", "shares memory with lse_tensors");
  EXPECT_TRUE(output.is_untouched() && logsumexp.is_untouched());
  EXPECT_NO_THROW(merge({x, x}, {l, l}, o, ol)());
  const auto backward = [&](Views grads, Views lse_grads, TensorView grad) {
    return
        [=] { natten::merge_attentions_backward({x}, {l}, grad, TensorView{}, grads, lse_grads); };
  };
  expect_error(backward({}, {ol}, x), kValue, "lse_tensors", "got 0");
  expect_error(backward({o}, {}, x), kValue, "lse_tensors", "got 0");
  expect_error(backward({longer}, {ol}, x), kValue, "outputs", "9");
  expect_error(backward({o}, {ol}, half), ErrorKind::invalid_type, "outputs", "float16");
  expect_error(backward({x}, {ol}, x), kValue, "grad_outputs", "shares memory with");
  expect_error(backward({o}, {l}, x), kValue, "grad_logsumexps", "shares memory with lse_tensors");
  EXPECT_NO_THROW(backward({o}, {ol}, x)());
}

TEST(Refusals, ThreadCounts) {
  const int before = natten::num_threads();
  expect_error([] { natten::set_num_threads(0); }, kValue, "num_threads", "got 0");
  expect_error([] { natten::set_num_threads(-4); }, kValue, "num_threads", "got -4");
  EXPECT_EQ(natten::num_threads(), before);
}

}  // namespace
}  // namespace natten_tests
