// A target for libFuzzer: `natten::run` on calls made of bytes, most of them nearly right.
//
// A call is either refused with natten::Error, and nothing is written, or it runs and writes its
// outputs and nothing else, and what it writes does not depend on what memory held before. Every
// buffer ends where its tensors do, so that AddressSanitizer finds what lies outside of them.
//
//   make fuzz                          for one minute
//   build/sanitize/natten_fuzz FILE    the call of one file, such as those that a failure leaves

#include <natten/natten.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace {

using natten::Call;
using natten::Context;
using natten::DType;
using natten::Op;
using natten::Role;
using natten::TensorView;
using natten::Tuple;
using Shape = std::vector<std::int64_t>;

/// Choices, read from bytes. After the last one all are 0.
class Choices {
 public:
  Choices(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  std::int64_t between(std::int64_t least, std::int64_t most) {
    return least + byte() % (most - least + 1);
  }
  /// Never once the bytes are used up.
  bool one_in(int count) { return byte() % count == 1; }

  /// What a caller may pass by mistake, or to overflow something.
  std::int64_t any_number() {
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    constexpr std::array<std::int64_t, 18> numbers = {
        -1, 0,   1,       2,         3,         5,         8,        64,   100,
        -2, -64, 1 << 16, 1LL << 31, 1LL << 32, 1LL << 57, most / 2, most, -most - 1};
    return numbers[byte() % numbers.size()];
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "natten_fuzz: %s\n", what.c_str());
  std::abort();
}

/// A tensor of the call, and where it lies: in its own buffer, or in that of another tensor.
struct Tensor {
  Role role;
  std::size_t buffer;
  std::int64_t shift = 0;  ///< bytes from the buffer's origin, a multiple of 8
};

struct Request {
  Call call;
  std::vector<Tensor> tensors;
  const char* backend = nullptr;
  bool any_bits = false;  ///< inputs hold any bits, also those of NaN
  enum { none, exact, too_small } workspace = none;
};

/// The bytes from the first of a tensor to past its last, relative to its pointer.
struct Range {
  std::int64_t begin = 0, end = 0;
  double elements = 0;
};

/// None for views that every call must refuse.
std::optional<Range> range_of(const TensorView& v) {
  if (v.ndim < 0 || v.ndim > natten::kMaxDims || v.dtype > DType::boolean) return {};
  const auto element = static_cast<std::int64_t>(natten::size_of(v.dtype));
  double below = 0, above = 0, elements = 1;
  for (int i = 0; i < v.ndim; ++i) {
    if (v.shape[i] < 0) return {};
    elements *= static_cast<double>(v.shape[i]);
    const double reach = static_cast<double>(v.shape[i] - 1) * static_cast<double>(v.strides[i]);
    (reach < 0 ? below : above) += reach;
  }
  if (elements == 0) return Range{};
  constexpr double most = 0x1p50;  // far more than is allocated
  return Range{static_cast<std::int64_t>(std::max(below, -most)) * element,
               (static_cast<std::int64_t>(std::min(above, most)) + 1) * element, elements};
}

/// Calls `use` with the bytes from the tensor's pointer to each element of it.
template <class Use>
void for_each_element(const TensorView& v, Use&& use, int dim = 0, std::int64_t offset = 0) {
  if (dim == 0 && std::count(v.shape.begin(), v.shape.begin() + v.ndim, 0) > 0) return;
  if (dim == v.ndim) {
    use(offset * static_cast<std::int64_t>(natten::size_of(v.dtype)));
    return;
  }
  for (std::int64_t i = 0; i < v.shape[dim]; ++i)
    for_each_element(v, use, dim + 1, offset + i * v.strides[dim]);
}

/// Makes a call that is right, and then may spoil it.
class Maker {
 public:
  explicit Maker(Choices& choices) : choices_(choices) {}

  Request make() {
    Call& call = request_.call;
    call.op = static_cast<Op>(choices_.between(0, 6));
    dtype_ = static_cast<DType>(choices_.between(0, 3));
    choose_neighborhood();
    choose_options();
    is_fused_ = call.op == Op::attention_forward || call.op == Op::attention_backward;
    kv_heads_ = choices_.between(1, 2);
    sizes_of('B') = {choices_.between(1, 3) % 3};
    sizes_of('G') = {kv_heads_};
    sizes_of('H') = {kv_heads_ * choices_.between(1, 2)};
    sizes_of('D') = {choices_.between(1, 18)};
    sizes_of('V') = {choices_.between(1, 18)};
    sizes_of('N') = {choices_.between(0, 3)};
    has_additional_ = choices_.one_in(3);
    has_rpb_ = choices_.one_in(3) && !call.options.separate_key_grid;
    has_mask_ = choices_.one_in(3);
    sizes_of('M') = {choices_.one_in(3) ? 1 : sizes_of('B')[0]};
    std::int64_t slots = has_additional_ ? sizes_of('N')[0] : 0;
    std::int64_t window = 1;
    for (int i = 0; i < rank_; ++i) window *= call.neighborhood.kernel_size[i];
    sizes_of('W') = sizes_of('X') = {window + slots};
    for (const Role& role : natten::roles_of(call.op))
      if (is_given(role)) add(role);
    for (std::int64_t spoils = choices_.byte() % 4; spoils > 1; --spoils) spoil();
    return std::move(request_);
  }

 private:
  Shape& sizes_of(char dim) { return sizes_[static_cast<std::size_t>(dim - 'A')]; }

  void choose_neighborhood() {
    natten::Neighborhood& n = request_.call.neighborhood;
    rank_ = static_cast<int>(choices_.between(1, 3));
    const std::int64_t longest = rank_ == 1 ? 40 : rank_ == 2 ? 9 : 5;
    const bool own_grid = request_.call.options.separate_key_grid = choices_.one_in(6);
    n.kernel_size.size = n.dilation.size = n.is_causal.size = n.stride.size = rank_;
    for (int i = 0; i < rank_; ++i) {
      const std::int64_t length = choices_.between(1, longest);
      const std::int64_t queries = own_grid ? choices_.between(1, longest) : length;
      const std::int64_t dilation = choices_.between(1, std::min<std::int64_t>(length, 3));
      const std::int64_t kernel = choices_.between(1, length / dilation);
      n.kernel_size.values[i] = kernel;
      n.dilation.values[i] = dilation;
      n.stride.values[i] = choices_.between(1, kernel);
      n.is_causal.values[i] = choices_.one_in(3);
      sizes_of('Q').push_back(queries);
      sizes_of('K').push_back(length);
      sizes_of('R').push_back(2 * kernel - 1);
    }
    if (!own_grid && choices_.one_in(3)) choose_borders();
    if (!own_grid && choices_.one_in(3)) choose_parts();
  }

  void choose_borders() {
    natten::Neighborhood& n = request_.call.neighborhood;
    n.boundary.size = rank_;
    for (int i = 0; i < rank_; ++i) {
      const std::int64_t group = sizes_of('K')[i] / n.dilation[i];
      const bool may_be_circular =
          !n.is_causal[i] && sizes_of('K')[i] % n.dilation[i] == 0 && group % n.stride[i] == 0;
      n.boundary.values[i] = choices_.between(0, may_be_circular ? 2 : 1);
    }
  }

  /// Some of the queries, and the keys that they need or some more.
  void choose_parts() {
    natten::Neighborhood& n = request_.call.neighborhood;
    n.grid_size = Tuple(sizes_of('K').begin(), rank_);
    n.query_offset.size = n.key_offset.size = rank_;
    for (int i = 0; i < rank_; ++i) {
      n.query_offset.values[i] = choices_.between(0, n.grid_size[i] - 1);
      sizes_of('Q')[i] = choices_.between(1, n.grid_size[i] - n.query_offset[i]);
    }
    const auto ranges =
        natten::key_range(n.query_offset, Tuple(sizes_of('Q').begin(), rank_), n.grid_size, n);
    for (int i = 0; i < rank_; ++i) {
      n.key_offset.values[i] = ranges[i].begin - choices_.between(0, 2);
      const std::int64_t length = ranges[i].end + choices_.between(0, 2) - n.key_offset[i];
      const bool is_circular = n.boundary.size > 0 && n.boundary[i] == 2;
      sizes_of('K')[i] = is_circular ? std::min(length, n.grid_size[i]) : length;
    }
  }

  void choose_options() {
    natten::Options& o = request_.call.options;
    if (choices_.one_in(3)) o.scale = static_cast<double>(choices_.between(-9, 9)) / 8;
    if (choices_.one_in(4)) o.empty_slots = natten::EmptySlots::zero;
    o.deterministic = !choices_.one_in(4);
    o.allow_tf32 = choices_.one_in(4);
    constexpr std::array<const char*, 6> backends = {nullptr, "",      "vectorized",
                                                     "naive", "fused", "abacus"};
    request_.backend = backends[choices_.byte() % backends.size()];
    request_.workspace = static_cast<decltype(request_.workspace)>(choices_.between(0, 2));
    request_.any_bits = choices_.one_in(8);
  }

  bool is_given(const Role& role) {
    const std::string name = role.name;
    if (name.find("additional") != std::string::npos && !has_additional_) return false;
    if (role.is_mask) return has_mask_;
    if (is_fused_ && name.find("rpb") != std::string::npos && !has_rpb_) return false;
    if (!is_fused_ && name == "rpb" && !role.is_required && !has_rpb_) return false;
    // Inputs that are optional come together; outputs come in any number.
    return role.is_required || !role.is_output ? name != "grad_logsumexp" || choices_.one_in(2)
                                               : !choices_.one_in(3);
  }

  void add(const Role& role) {
    TensorView v;
    Shape shape;
    for (const char* dim = role.dims; *dim; ++dim) {
      const Shape& sizes = sizes_of(*dim);
      shape.insert(shape.end(), sizes.begin(), sizes.end());
    }
    v.dtype = role.is_mask        ? DType::boolean
              : role.is_statistic ? natten::statistic_dtype(dtype_)
                                  : dtype_;
    v.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), v.shape.begin());
    set_strides(v, role.is_output);
    request_.call.tensors.*role.tensor = v;
    request_.tensors.push_back({role, request_.tensors.size()});
  }

  /// Dimensions in any order in memory, with gaps and backwards, but for the innermost one.
  void set_strides(TensorView& v, bool is_output) {
    std::array<int, natten::kMaxDims> order{};
    for (int i = 0; i < v.ndim; ++i) order[i] = v.ndim - 1 - i;
    if (choices_.one_in(3) && v.ndim > 2)
      std::swap(order[1], order[choices_.between(1, v.ndim - 1)]);
    std::int64_t stride = 1;
    for (int i = 0; i < v.ndim; ++i) {
      const int dim = order[i];
      v.strides[dim] = stride;
      stride *= std::max<std::int64_t>(v.shape[dim], 1);
      if (choices_.one_in(6)) stride += choices_.between(1, 5);
      if (i > 0 && choices_.one_in(12)) v.strides[dim] = -v.strides[dim];
      if (i > 0 && !is_output && choices_.one_in(16)) v.strides[dim] = 0;
    }
  }

  TensorView& any_view() {
    const Tensor& tensor = request_.tensors[choices_.byte() % request_.tensors.size()];
    return request_.call.tensors.*tensor.role.tensor;
  }

  void spoil(Tuple& tuple) {
    if (choices_.one_in(2))
      tuple.size = static_cast<int>(choices_.between(0, 9)) - 1;
    else
      tuple.values[choices_.byte() % natten::kMaxRank] = choices_.any_number();
  }

  void spoil() {
    Call& call = request_.call;
    natten::Neighborhood& n = call.neighborhood;
    natten::Options& o = call.options;
    switch (choices_.byte() % 20) {
      case 0: spoil(n.kernel_size); break;
      case 1: spoil(n.dilation); break;
      case 2: spoil(n.stride); break;
      case 3: spoil(n.is_causal); break;
      case 4: spoil(o.query_tile); break;
      case 5: spoil(o.backward_key_tile); break;
      case 6: spoil(o.key_splits); break;
      case 7: o.separate_key_grid = !o.separate_key_grid; break;
      case 8: any_view().shape[choices_.byte() % natten::kMaxDims] = choices_.any_number(); break;
      case 9: any_view().strides[choices_.byte() % natten::kMaxDims] = choices_.any_number(); break;
      case 10: any_view().ndim = static_cast<int>(choices_.between(0, 11)) - 1; break;
      case 11: any_view().dtype = static_cast<DType>(choices_.byte() % 6); break;
      case 12: {
        natten::Device& device = any_view().device;
        device.type = static_cast<natten::DeviceType>(choices_.byte() % 3);
        device.index = static_cast<int>(choices_.between(0, 3)) - 1;
        break;
      }
      case 13: {  // shares memory with another tensor
        Tensor& tensor = request_.tensors[choices_.byte() % request_.tensors.size()];
        tensor.buffer = choices_.byte() % request_.tensors.size();
        tensor.shift = 8 * (choices_.between(0, 64) - 32);
        break;
      }
      case 14: {
        constexpr double infinity = std::numeric_limits<double>::infinity();
        constexpr std::array<double, 5> scales = {0, infinity, -infinity, 1e300, -1e30};
        o.scale = choices_.one_in(4) ? std::nan("") : scales[choices_.byte() % scales.size()];
        break;
      }
      case 15: call.op = static_cast<Op>(choices_.byte() % 9); break;
      case 16: spoil(n.boundary); break;
      case 17: spoil(n.query_offset); break;
      case 18: spoil(n.key_offset); break;
      case 19: spoil(n.grid_size); break;
    }
  }

  Choices& choices_;
  Request request_;
  std::array<Shape, 26> sizes_;
  DType dtype_ = DType::float32;
  int rank_ = 1;
  std::int64_t kv_heads_ = 1;
  bool is_fused_ = true, has_additional_ = false, has_rpb_ = false, has_mask_ = false;
};

/// Memory that ends where the tensors in it do.
struct Buffer {
  std::int64_t begin = 0, end = 0;  ///< bytes from the origin
  std::unique_ptr<unsigned char[]> bytes;
  std::vector<bool> is_output;  ///< of each byte

  std::size_t size() const { return static_cast<std::size_t>(end - begin); }
};

/// All memory of a request. None where that would be too much to allocate.
class Memory {
 public:
  static std::optional<Memory> of(Request& request) {
    Memory memory;
    memory.buffers_.resize(request.tensors.size());
    for (const Tensor& tensor : request.tensors) {
      const auto range = range_of(request.call.tensors.*tensor.role.tensor);
      if (!range) continue;
      if (range->elements > kMost) return {};  // more than memory where strides are 0
      Buffer& buffer = memory.buffers_[tensor.buffer];
      buffer.begin = std::min(buffer.begin, tensor.shift + range->begin);
      buffer.end = std::max(buffer.end, tensor.shift + range->end);
    }
    for (Buffer& buffer : memory.buffers_) {
      buffer.begin = -((7 - buffer.begin) / 8 * 8);  // elements are aligned
      if (buffer.end - buffer.begin > kMost) return {};
      buffer.bytes = std::make_unique<unsigned char[]>(buffer.size());
      buffer.is_output.resize(buffer.size());
    }
    for (const Tensor& tensor : request.tensors) {
      TensorView& v = request.call.tensors.*tensor.role.tensor;
      Buffer& buffer = memory.buffers_[tensor.buffer];
      v.data = buffer.bytes.get() + (tensor.shift - buffer.begin);
      if (is_written(request.call.op, tensor) && range_of(v))
        for_each_element(v, [&](std::int64_t at) {
          for (std::size_t i = 0; i < natten::size_of(v.dtype); ++i)
            buffer.is_output[static_cast<std::size_t>(tensor.shift - buffer.begin + at) + i] = true;
        });
    }
    return memory;
  }

  /// Inputs hold the same each time; what is around them and the outputs holds `pattern`.
  void fill(const Request& request, unsigned char pattern) {
    for (Buffer& buffer : buffers_) std::memset(buffer.bytes.get(), pattern, buffer.size());
    std::uint32_t state = 1;
    for (const Tensor& tensor : request.tensors) {
      const TensorView& v = request.call.tensors.*tensor.role.tensor;
      if (is_written(request.call.op, tensor) || !range_of(v)) continue;
      auto* const data = static_cast<unsigned char*>(v.data);
      for_each_element(v, [&](std::int64_t at) {
        state = state * 1664525u + 1013904223u;
        write(data + at, v.dtype, state, request.any_bits);
      });
    }
  }

  using Contents = std::vector<std::vector<unsigned char>>;
  Contents contents() const {
    Contents all;
    for (const Buffer& buffer : buffers_)
      all.emplace_back(buffer.bytes.get(), buffer.bytes.get() + buffer.size());
    return all;
  }

  /// Whether all bytes are the same in both, or all of those of outputs, or all others.
  bool same(const Contents& a, const Contents& b, bool of_outputs, bool of_others) const {
    for (std::size_t i = 0; i < buffers_.size(); ++i)
      for (std::size_t at = 0; at < a[i].size(); ++at)
        if ((buffers_[i].is_output[at] ? of_outputs : of_others) && a[i][at] != b[i][at])
          return false;
    return true;
  }

 private:
  static constexpr int kMost = 1 << 20;

  static bool is_written(Op op, const Tensor& tensor) {
    for (const Role& role : natten::roles_of(op))  // of a spoiled `op` these are others
      if (role.tensor == tensor.role.tensor) return role.is_output;
    return false;
  }

  static void write(unsigned char* to, DType dtype, std::uint32_t bits, bool any_bits) {
    const double value = static_cast<double>(bits >> 8) / (1 << 22) - 2;  // in [-2, 2)
    switch (dtype) {
      case DType::float64: {
        const std::uint64_t wide = bits * 0x100000001ull;
        any_bits ? std::memcpy(to, &wide, 8) : std::memcpy(to, &value, 8);
        break;
      }
      case DType::float32: {
        const auto single = static_cast<float>(value);
        any_bits ? std::memcpy(to, &bits, 4) : std::memcpy(to, &single, 4);
        break;
      }
      case DType::bfloat16: {
        const natten::bfloat16 half(value);
        any_bits ? std::memcpy(to, &bits, 2) : std::memcpy(to, &half, 2);
        break;
      }
      case DType::float16: {
        const natten::float16 half(value);
        any_bits ? std::memcpy(to, &bits, 2) : std::memcpy(to, &half, 2);
        break;
      }
      case DType::boolean: *to = static_cast<unsigned char>(bits >> 30); break;
    }
  }

  std::vector<Buffer> buffers_;
};

/// Multiplications, roughly.
double work_of(const natten::Problem& p) {
  return static_cast<double>(p.batch * p.heads) * static_cast<double>(p.queries()) *
         static_cast<double>(p.slots()) * static_cast<double>(p.head_dim + p.value_dim);
}

struct Workspace {
  std::vector<unsigned char> bytes;

  void lend(const Request& request, Context& context, unsigned char pattern) {
    if (request.workspace == Request::none) return;
    const std::size_t needed = natten::workspace_bytes(request.call, context);
    if (needed == 0) return;
    const std::size_t given = needed - (request.workspace == Request::too_small ? 1 : 0);
    constexpr std::size_t alignment = 64;
    bytes.assign(given + alignment, pattern);
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
    context.workspace = bytes.data() + (alignment - address % alignment) % alignment;
    context.workspace_size = given;
  }
};

/// Whether the call was run, and not refused.
bool run(const Request& request, unsigned char pattern) {
  try {
    Context context;
    context.backend = request.backend;
    Workspace workspace;
    workspace.lend(request, context, pattern);
    natten::run(request.call, context);
    return true;
  } catch (const natten::Error& error) {
    if (!*error.what()) fail("an error without a message");
    return false;
  }
}

void check(Request request) {
  std::optional<natten::Problem> problem;
  try {
    problem = natten::describe(request.call);
  } catch (const natten::Error&) {
    // `run` must refuse it too.
  }
  if (problem && work_of(*problem) > 1e7) return;
  std::optional<Memory> memory = Memory::of(request);
  if (!memory) return;  // what would run it has been tried: `describe` reads no memory

  Memory::Contents results[2];
  for (const unsigned char pattern : {0x5a, 0xff}) {  // of 0xff bytes all types make a NaN
    memory->fill(request, pattern);
    const Memory::Contents before = memory->contents();
    const bool ran = run(request, pattern);
    if (ran && !problem) fail("a call runs that `describe` refuses");
    Memory::Contents after = memory->contents();
    if (!memory->same(before, after, !ran, true))
      fail(ran ? "a call wrote what is not its output" : "a call was refused, but it wrote");
    if (!ran) return;
    results[pattern == 0xff] = std::move(after);
  }
  if (!memory->same(results[0], results[1], true, false))
    fail("results depend on what memory held before");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Choices choices(data, size);
  check(Maker(choices).make());
  return 0;
}
