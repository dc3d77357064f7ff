#include <natten/error.h>

#include <string>
#include <vector>

#include "backends.h"
#include "fna/fna.h"
#include "launch.h"
#include "simt.h"

namespace natten::detail::cuda {

// Compiled from instance.cu.in.
extern template void run_fna_as<bfloat16>(const Job& job, Launcher& launch);
extern template void run_fna_as<float16>(const Job& job, Launcher& launch);
extern template void run_fna_as<float>(const Job& job, Launcher& launch);
extern template void run_simt_as<double>(const Job& job, Launcher& launch);
extern template void run_simt_as<float>(const Job& job, Launcher& launch);
extern template void run_simt_as<bfloat16>(const Job& job, Launcher& launch);
extern template void run_simt_as<float16>(const Job& job, Launcher& launch);

namespace {

/// Makes a device the current one for the life of a scope. Below 0: leaves the one that is.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    check(cudaGetDevice(&before_), "current device");
    now_ = index < 0 ? before_ : index;
    if (now_ != before_) check(cudaSetDevice(now_), "choosing the device");
  }
  ~CurrentDevice() {
    if (now_ != before_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0, now_ = 0;
};

/// What is wrong with the problem's device, if anything. Below 0 it is not known yet.
std::string device_refusal(const Problem& problem) {
  constexpr int kLeast = 80;
  const int index = problem.device.index;
  if (index < 0) return {};
  const int capability = compute_capability(index);
  if (capability >= kLeast) return {};
  const std::string name = "cuda:" + std::to_string(index);
  if (capability == 0) return "there is no device " + name + ", or no driver for it";
  return name + " has compute capability " + std::to_string(capability / 10) + "." +
         std::to_string(capability % 10) + "; must be at least 8.0";
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

}  // namespace

const Backend fna_backend = {"fna", DeviceType::cuda, refuse_reason<fna_refuse_reason>,
                             fna_workspace_bytes, run<run_fna<Launcher>>};
const Backend simt_backend = {"simt", DeviceType::cuda, refuse_reason<simt_refuse_reason>,
                              simt_workspace_bytes, run<run_simt<Launcher>>};

int compute_capability(int device_index) noexcept {
  int major = 0, minor = 0;
  const bool found = (device_index != -1 || cudaGetDevice(&device_index) == cudaSuccess) &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                                            device_index) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor,
                                            device_index) == cudaSuccess;
  if (found) return 10 * major + minor;
  cudaGetLastError();  // or the next launch would report this
  return 0;
}

}  // namespace natten::detail::cuda
