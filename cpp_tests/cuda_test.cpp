// The backends for CUDA on a real GPU. Their tests are the suites of all backends, which run calls
// through `provided_backends`: here by copies of host tensors in memory of the device.

#include <cuda_runtime_api.h>

#include <memory>
#include <stdexcept>
#include <utility>

#include "cases.h"

namespace natten_tests {
namespace {

using natten::Call;
using natten::Context;
using natten::Problem;
using natten::TensorView;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

/// Why nothing can run here; empty where something can.
std::string missing() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count > 0 ? "" : "this machine has no CUDA device";
}

/// Memory of the device; all bytes start as NaN, as the buffers of the tests do.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
    check(cudaMemset(data_, 0xff, bytes), "cudaMemset");
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

/// The copy of a host tensor on the device, with the gaps between its elements: a kernel that
/// writes one is found when they have been copied back.
class DeviceTensor {
 public:
  explicit DeviceTensor(const TensorView& host) : view_(host), host_(extent_of(host)) {
    memory_ = std::make_unique<DeviceMemory>(host_.bytes);
    check(cudaMemcpy(memory_->data(), host_.begin, host_.bytes, cudaMemcpyHostToDevice),
          "copy to device");
    view_.device = {natten::DeviceType::cuda, 0};
    view_.data =
        static_cast<char*>(memory_->data()) + (static_cast<const char*>(host.data) - host_.begin);
  }
  const TensorView& view() const { return view_; }
  void copy_back() const {
    check(cudaMemcpy(host_.begin, memory_->data(), host_.bytes, cudaMemcpyDeviceToHost),
          "copy from device");
  }

 private:
  TensorView view_;
  Extent host_;
  std::unique_ptr<DeviceMemory> memory_;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Runs a call, or one and where its examples lie, on host tensors by a backend for the device.
template <class... Lengths>
void run_on_gpu(const char* backend, const Call& host, const Lengths&... lengths) {
  Call call = host;
  std::vector<DeviceTensor> tensors;
  Buffers().for_each([&](const char*, Buffer&, TensorView natten::Tensors::*member) {
    if (!(host.tensors.*member)) return;
    tensors.emplace_back(host.tensors.*member);
    call.tensors.*member = tensors.back().view();
  });
  const Stream stream;  // not the default one: what is enqueued there would not wait for it
  Context context;
  context.backend = backend;
  context.stream = stream.get();
  context.workspace_size = natten::workspace_bytes(call, lengths..., context);
  const DeviceMemory workspace(context.workspace_size);
  context.workspace = workspace.data();
  check(cudaDeviceSynchronize(), "preparing a call");
  natten::run(call, lengths..., context);
  check(cudaStreamSynchronize(stream.get()), "running a call");
  for (const DeviceTensor& tensor : tensors) tensor.copy_back();
}

std::string refuse_reason_on_gpu(Problem problem, const char* backend) {
  problem.device = {natten::DeviceType::cuda, 0};
  for (const natten::Verdict& verdict : natten::explain(problem))
    if (verdict.backend == backend) return verdict.refusal;
  return "this build has no such backend";
}

constexpr char kFna[] = "fna", kGemm[] = "gemm", kSimt[] = "simt";

template <const char* kBackend>
void provide(const char* name) {
  provided_backends().push_back(
      {name, [](const Problem& problem) { return refuse_reason_on_gpu(problem, kBackend); },
       [](const Call& call) { run_on_gpu(kBackend, call); },
       [](const Call& call, const natten::Packing& packing) {
         run_on_gpu(kBackend, call, packing);
       }});
}

const bool kProvided = [] {
  if (!missing().empty()) return false;
  provide<kFna>("fna_on_gpu");
  provide<kGemm>("gemm_on_gpu");
  provide<kSimt>("simt_on_gpu");
  return true;
}();

/// Shows in the results of a machine without a GPU that something has not been tested.
TEST(OnGpu, IsThereAndSupported) {
  if (!kProvided && std::getenv("NATTEN_TEST_NEEDS_GPU")) FAIL() << missing();
  if (!kProvided) GTEST_SKIP() << "no test has run on a GPU: " << missing();
  EXPECT_GE(natten::compute_capability(0), 80);
  EXPECT_EQ(natten::backends(natten::DeviceType::cuda),
            (std::vector<std::string>{kFna, kGemm, kSimt}));
}

/// Many tiles along every axis and the head dims of models, more than random cases have.
class OnGpuAtLength : public testing::TestWithParam<std::tuple<const char*, Precision>> {
 protected:
  static void TearDownTestSuite() { errors_.print("larger problems on a GPU"); }
  static ErrorTable errors_;
};
ErrorTable OnGpuAtLength::errors_;

TEST_P(OnGpuAtLength, ForwardAndBackwardTwiceTheSame) {
  if (!kProvided) GTEST_SKIP() << missing();
  const auto& [backend, precision] = GetParam();
  std::uint64_t seed = base_seed();
  for (const std::vector<oracle::Axis>& axes : std::vector<std::vector<oracle::Axis>>{
           {{1500, 300, 1, 1, false}},
           {{1100, 128, 64, 1, false}},
           {{700, 99, 1, 3, true}},
           {{40, 13, 1, 1, false}, {37, 15, 1, 1, false}},
           {{48, 16, 8, 1, false}, {64, 16, 8, 1, false}},
           {{31, 7, 2, 2, true}, {45, 11, 1, 1, false}},
           {{9, 5, 1, 1, false}, {14, 7, 1, 1, false}, {17, 7, 1, 1, false}},
           {{8, 4, 4, 1, false}, {12, 5, 2, 2, false}, {16, 8, 8, 1, true}},
       })
    for (const std::int64_t dim : {32, 64, 128}) {
      Case c;
      c.seed = ++seed;
      c.dtype = precision.dtype;
      c.allow_tf32 = precision.allow_tf32;
      c.axes = axes;
      c.heads = 2;
      c.kv_heads = seed % 2 == 0 ? 2 : 1;
      c.dim = c.value_dim = dim;
      c.additional = seed % 4 == 0 ? 40 : 0;
      FusedProblem problem(c);
      const Problem described = natten::describe(problem.backward());
      if (!refuse_reason_on_gpu(described, backend).empty()) continue;
      const char* name = backend;
      expect_definition(problem, errors_, [&](const Call& call) { run_on_gpu(name, call); });
      Buffers& b = problem.buffers;

      FusedProblem again(c);
      again.provide_logsumexp();
      run_on_gpu(backend, again.forward());
      run_on_gpu(backend, again.backward());
      for (Buffer Buffers::*member :
           {&Buffers::output, &Buffers::logsumexp, &Buffers::grad_query, &Buffers::grad_key,
            &Buffers::grad_value, &Buffers::grad_additional_keys, &Buffers::grad_additional_values})
        EXPECT_EQ((b.*member).bytes(), (again.buffers.*member).bytes());
    }
}

INSTANTIATE_TEST_SUITE_P(
    Backends, OnGpuAtLength,
    testing::Combine(testing::Values(kFna, kSimt),
                     testing::Values(natten::DType::float64, natten::DType::float32,
                                     Precision(natten::DType::float32, true),
                                     natten::DType::bfloat16, natten::DType::float16)),
    [](const auto& info) {
      return std::string(std::get<0>(info.param)) + "_on_gpu_" + std::get<1>(info.param).name();
    });

}  // namespace
}  // namespace natten_tests
