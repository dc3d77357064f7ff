#include <cuda.h>
#include <natten/error.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "backends.h"
#include "device.h"
#include "fna/fna.h"
#include "gemm/gemm.h"
#include "launch.h"
#include "simt.h"

namespace natten::detail::cuda {

// What libnatten/CMakeLists.txt has compiled from instance.cu.in.
#include "cuda/instances.inc"

namespace {

// Contexts, which take hundreds of MB of a device's memory: since CUDA 12, cudaSetDevice makes one;
// so do calls that need one (memory, streams, launches, cudaFuncSetAttribute), on the current
// device, which is device 0 for a thread that has chosen none. cudaGetDevice, cudaGetDeviceCount,
// cudaDeviceGetAttribute and questions for versions make none.

/// A function of the driver, which the library does not link to.
template <class F>
F* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
#else
  check(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found), name);
#endif
  if (!function) throw Error(ErrorKind::runtime, std::string("CUDA: the driver lacks ") + name);
  return reinterpret_cast<F*>(function);
}

/// Makes a device the current one for the life of a scope. Below 0: leaves the one that is.
///
/// By the driver's stack of contexts: to go back by cudaSetDevice would make a context on a device
/// that nobody may have used. This touches the device of the tensors only, which has one.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    int current = 0;
    check(cudaGetDevice(&current), "current device");
    if (index < 0 || index == current) return;
    static const auto get = driver_function<decltype(cuDeviceGet)>("cuDeviceGet");
    static const auto retain =
        driver_function<decltype(cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
    static const auto push = driver_function<decltype(cuCtxPushCurrent)>("cuCtxPushCurrent");
    static const auto pop = driver_function<decltype(cuCtxPopCurrent)>("cuCtxPopCurrent");
    static const auto release =
        driver_function<decltype(cuDevicePrimaryCtxRelease)>("cuDevicePrimaryCtxRelease");
    CUcontext context;
    check_driver(get(&device_, index));
    check_driver(retain(&context, device_));
    release_ = release;
    const CUresult pushed = push(context);
    if (pushed == CUDA_SUCCESS)
      pop_ = pop;
    else
      release(device_);
    check_driver(pushed);
  }
  ~CurrentDevice() {
    if (!pop_) return;
    CUcontext context;
    pop_(&context);
    release_(device_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  static void check_driver(CUresult status) {
    if (status != CUDA_SUCCESS)
      throw Error(ErrorKind::runtime, "CUDA: choosing the device: error " +
                                          std::to_string(static_cast<int>(status)) +
                                          " of the driver");
  }

  CUdevice device_ = 0;
  decltype(cuCtxPopCurrent)* pop_ = nullptr;
  decltype(cuDevicePrimaryCtxRelease)* release_ = nullptr;
};

/// What CUDA says of a device; -1 is the current one. Makes no context, and leaves no error behind
/// for the next launch to report.
DeviceAnswer ask(int index) noexcept {
  using Status = DeviceAnswer::Status;
  DeviceAnswer answer;
  cudaDriverGetVersion(&answer.driver);  // 0 where there is none
  cudaRuntimeGetVersion(&answer.runtime);
  int major = 0, minor = 0;
  cudaError_t status = index == -1 ? cudaGetDevice(&index) : cudaSuccess;
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (status == cudaSuccess) {
    answer.status = Status::found;
    answer.capability = 10 * major + minor;
    return answer;
  }
  answer.error = cudaGetErrorString(status);
  if (status == cudaErrorInsufficientDriver)
    answer.status = answer.driver == 0 ? Status::no_driver : Status::old_driver;
  else if (status == cudaErrorNoDevice)
    answer.status = Status::no_device;
  else if (status == cudaErrorInvalidDevice && cudaGetDeviceCount(&answer.devices) == cudaSuccess)
    answer.status = Status::no_such_device;
  cudaGetLastError();
  return answer;
}

/// What is wrong with the problem's device, if anything. Below 0 it is not known yet.
std::string device_refusal(const Problem& problem) {
  const int index = problem.device.index;
  return index < 0 ? std::string() : device_refusal(index, ask(index));
}

template <std::string (*kRefuseReason)(const Problem&)>
std::string refuse_reason(const Problem& problem) {
  std::string refusal = device_refusal(problem);
  // A shape that no kernel has is an error, also where the problem goes to kernels without tiles.
  if (refusal.empty()) refusal = tile_refusal(problem);
  return refusal.empty() ? kRefuseReason(problem) : refusal;
}

template <void (*kRun)(const Job&, Launcher&)>
void run(const std::vector<Job>& jobs, const Context& context) {
  const CurrentDevice current(jobs.front().problem.device.index);
  Launcher launch(context.stream);
  for (const Job& job : jobs) kRun(job, launch);
}

/// Names the GPU of a problem.
std::string_view machine(const Problem& problem) {
  static std::mutex mutex;
  static std::map<int, std::string> names;
  const std::lock_guard lock(mutex);
  std::string& name = names[problem.device.index];
  cudaDeviceProp properties;
  if (name.empty() && cudaGetDeviceProperties(&properties, problem.device.index) == cudaSuccess)
    name = std::string(properties.name) + ", " + std::to_string(properties.multiProcessorCount) +
           " multiprocessors, compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor);
  cudaGetLastError();
  return name;
}

/// What is captured runs later, and an event there tells no time.
bool can_time(const Context& context) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
  const cudaError_t answer =
      cudaStreamIsCapturing(static_cast<cudaStream_t>(context.stream), &status);
  cudaGetLastError();
  return answer == cudaSuccess && status == cudaStreamCaptureStatusNone;
}

/// Seconds between two events around what is enqueued.
double seconds(const Problem& problem, const std::function<void()>& run, const Context& context) {
  const CurrentDevice current(problem.device.index);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const auto event = [] {
    cudaEvent_t made;
    check(cudaEventCreate(&made), "making an event");
    return std::shared_ptr<CUevent_st>(made, [](cudaEvent_t e) { cudaEventDestroy(e); });
  };
  const auto first = event(), last = event();
  check(cudaEventRecord(first.get(), stream), "recording an event");
  run();
  check(cudaEventRecord(last.get(), stream), "recording an event");
  check(cudaEventSynchronize(last.get()), "waiting for an event");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, first.get(), last.get()), "asking events");
  return milliseconds * 1e-3;
}

}  // namespace

const Backends& backends() {
  static const Tunable tunable = {
      [](const Problem& p, int, bool thorough) { return tile_candidates(p, thorough); }, machine,
      can_time, seconds};
  // Tiles on tensor cores; plain arithmetic for everything else.
  static const Backend fna = {"fna", refuse_reason<fna_refuse_reason>, fna_workspace_bytes,
                              run<run_fna<Launcher>>, &tunable};
  static const Backend gemm = {"gemm", refuse_reason<gemm_refuse_reason>, gemm_workspace_bytes,
                               run<run_gemm<Launcher>>};
  static const Backend simt = {"simt", refuse_reason<simt_refuse_reason>, simt_workspace_bytes,
                               run<run_simt<Launcher>>};
  static const Backends all = {&fna, &gemm, &simt};
  return all;
}

int compute_capability(int device_index) noexcept { return ask(device_index).capability; }

}  // namespace natten::detail::cuda
