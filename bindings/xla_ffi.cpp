#include <nanobind/nanobind.h>
#include <natten/natten.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "call.h"
#include "xla/ffi/api/ffi.h"

#if NATTEN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace natten::bindings {
namespace {

/// Runs the library's work on XLA's own thread pool.
class XlaExecutor final : public Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool& pool) : pool_(pool) {}
  int concurrency() const override {
    const auto threads = static_cast<int>(pool_.num_threads());
    return threads < 1 ? 1 : threads;
  }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

TensorView view_of(const ffi::AnyBuffer& buffer, Device device, const char* name) {
  const auto dtype = [&] {
    switch (buffer.element_type()) {
      case ffi::F64: return DType::float64;
      case ffi::F32: return DType::float32;
      case ffi::BF16: return DType::bfloat16;
      case ffi::F16: return DType::float16;
      case ffi::PRED: return DType::boolean;
      default:
        throw Error(
            ErrorKind::invalid_type,
            std::string(name) + ": dtype must be float64, float32, bfloat16, float16 or bool");
    }
  }();
  const auto shape = buffer.dimensions();
  if (shape.size() > static_cast<std::size_t>(kMaxDims))
    throw Error(ErrorKind::invalid_value, std::string(name) + ": too many dimensions");
  return contiguous_view(buffer.untyped_data(), dtype, device, shape.begin(),
                         static_cast<int>(shape.size()));
}

/// Copies from the memory of the device, after waiting for all earlier work of the stream.
void copy_to_host(void* to, const void* from, std::size_t bytes, Device device, void* stream) {
  if (device.type == DeviceType::cpu) {
    std::memcpy(to, from, bytes);
    return;
  }
#if NATTEN_WITH_CUDA
  const auto of = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, of);
  if (status == cudaSuccess) status = cudaStreamSynchronize(of);
  if (status != cudaSuccess)
    throw Error(ErrorKind::runtime,
                std::string("CUDA: reading integers: ") + cudaGetErrorString(status));
#else
  static_cast<void>(stream);
#endif
}

/// The integers of a buffer.
std::vector<std::int64_t> read(const char* name, const ffi::AnyBuffer& buffer, Device device,
                               void* stream) {
  std::vector<std::int64_t> values(buffer.element_count());
  if (buffer.element_type() == ffi::S64) {
    copy_to_host(values.data(), buffer.untyped_data(), buffer.size_bytes(), device, stream);
  } else if (buffer.element_type() == ffi::S32) {
    std::vector<std::int32_t> narrow(values.size());
    copy_to_host(narrow.data(), buffer.untyped_data(), buffer.size_bytes(), device, stream);
    values.assign(narrow.begin(), narrow.end());
  } else {
    throw Error(ErrorKind::invalid_type, std::string(name) + ": dtype must be int32 or int64");
  }
  return values;
}

/// Offsets that are known only at run time: those of queries, then those of keys, one per axis.
void set_offsets(Call& call, const ffi::AnyBuffer& buffer, Device device, void* stream) {
  const int rank = call.neighborhood.kernel_size.size;
  const std::vector<std::int64_t> values = read("offsets", buffer, device, stream);
  if (values.size() != 2 * static_cast<std::size_t>(rank))
    throw Error(ErrorKind::invalid_value, "offsets: must have two rows, one number per axis each");
  call.neighborhood.query_offset = Tuple(values.begin(), rank);
  call.neighborhood.key_offset = Tuple(values.begin() + rank, rank);
  call.options.unknown_offsets = false;
}

/// Lengths of examples: a row of cumulative_seqlen_Q and max_seqlen_Q, then one of keys'.
Packing packing_of(const ffi::AnyBuffer& buffer, Device device, void* stream) {
  const std::vector<std::int64_t> values = read("lengths", buffer, device, stream);
  if (values.size() < 2 || values.size() % 2 != 0)
    throw Error(ErrorKind::invalid_value, "lengths: must have two rows");
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  return {{values.begin(), middle - 1}, {middle, values.end() - 1}, *(middle - 1), values.back()};
}

/// What the handlers of all platforms do. `context` says where it runs. `inputs` and `outputs` have
/// one bit per role, in table order, set where a buffer is passed; after that of the key mask come
/// one of offsets and one of lengths. Where `has_workspace`, the last result is scratch.
ffi::Error run_on(Device device, Context context, ffi::RemainingArgs args,
                  ffi::RemainingRets results, std::string_view op,
                  ffi::Span<const std::int64_t> config, double scale, std::string_view backend,
                  std::int64_t inputs, std::int64_t outputs, bool has_workspace) {
  // Nothing may be thrown across XLA's boundary.
  try {
    Call call = decode_call(op, config.begin(), config.size(), scale);
    // A call inside a program of XLA's is not timed: the program would wait for it.
    if (call.options.tuning == Tuning::any) call.options.tuning = Tuning::read;
    std::optional<Packing> packing;
    std::size_t next_arg = 0, next_result = 0;
    const auto is_given = [](std::int64_t& bits) {
      const bool bit = bits & 1;
      bits >>= 1;
      return bit;
    };
    for (const Role& role : roles_of(call.op)) {
      if (is_given(role.is_output ? outputs : inputs)) {
        if (role.is_output) {
          auto buffer = results.get<ffi::AnyBuffer>(next_result++);
          if (buffer.has_error()) return buffer.error();
          call.tensors.*role.tensor = view_of(*buffer.value(), device, role.name);
        } else {
          auto buffer = args.get<ffi::AnyBuffer>(next_arg++);
          if (buffer.has_error()) return buffer.error();
          call.tensors.*role.tensor = view_of(buffer.value(), device, role.name);
        }
      }
      if (role.is_mask && is_given(inputs)) {
        auto buffer = args.get<ffi::AnyBuffer>(next_arg++);
        if (buffer.has_error()) return buffer.error();
        set_offsets(call, buffer.value(), device, context.stream);
      }
      if (role.is_mask && is_given(inputs)) {
        auto buffer = args.get<ffi::AnyBuffer>(next_arg++);
        if (buffer.has_error()) return buffer.error();
        packing = packing_of(buffer.value(), device, context.stream);
      }
    }
    const std::string backend_name(backend);
    context.backend = backend_name.c_str();
    if (has_workspace) {
      auto buffer = results.get<ffi::AnyBuffer>(next_result);
      if (buffer.has_error()) return buffer.error();
      context.workspace = buffer.value()->untyped_data();
      context.workspace_size = buffer.value()->size_bytes();
    }
    if (packing)
      run(call, *packing, context);
    else
      run(call, context);
    return ffi::Error::Success();
  } catch (const Error& e) {
    return e.kind() == ErrorKind::runtime ? ffi::Error::Internal(e.what())
                                          : ffi::Error::InvalidArgument(e.what());
  } catch (const std::exception& e) {
    return ffi::Error::Internal(e.what());
  }
}

/// The arguments of `run_on` after the context, added to what a platform binds itself.
template <class Binding>
auto with_call(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<std::string_view>("op")
      .template Attr<ffi::Span<const std::int64_t>>("config")
      .template Attr<double>("scale")
      .template Attr<std::string_view>("backend")
      .template Attr<std::int64_t>("inputs")
      .template Attr<std::int64_t>("outputs")
      .template Attr<bool>("has_workspace");
}

constexpr auto run_on_cpu = [](ffi::ThreadPool pool, auto&&... call) {
  XlaExecutor executor(pool);
  Context context;
  context.executor = &executor;
  return run_on({}, context, call...);
};
XLA_FFI_DEFINE_HANDLER(handler_on_cpu, run_on_cpu,
                       with_call(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

#if NATTEN_WITH_CUDA
constexpr auto run_on_cuda = [](void* stream, std::int32_t device, auto&&... call) {
  Context context;
  context.stream = stream;
  return run_on({DeviceType::cuda, device}, context, call...);
};
XLA_FFI_DEFINE_HANDLER(
    handler_on_cuda, run_on_cuda,
    with_call(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::DeviceOrdinal>()));
#endif

}  // namespace

void register_xla(nb::module_& m) {
  m.def(
      "xla_ffi_handlers",
      [] {
        nb::dict handlers;
        handlers["cpu"] = nb::capsule(reinterpret_cast<void*>(handler_on_cpu));
#if NATTEN_WITH_CUDA
        handlers["cuda"] = nb::capsule(reinterpret_cast<void*>(handler_on_cuda));
#endif
        return handlers;
      },
      "The XLA FFI handler of `run` for each platform of JAX, as capsules for jax.ffi.");
  m.attr("xla_ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace natten::bindings
