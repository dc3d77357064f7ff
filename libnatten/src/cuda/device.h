#pragma once

// Why a CUDA device cannot be used, in words. Needs no CUDA.

#include <string>

namespace natten::detail::cuda {

/// What CUDA's runtime says of a device.
struct DeviceAnswer {
  /// A driver that is missing and one that is too old are one error of CUDA's.
  enum class Status { found, no_driver, old_driver, no_device, no_such_device, failed };
  Status status = Status::failed;
  int capability = 0;               ///< 80 for 8.0; 0 where not found
  int devices = 0;                  ///< that there are
  int driver = 0, runtime = 0;      ///< versions of CUDA that they are for, 12040 for 12.4
  const char* error = "no answer";  ///< CUDA's own words, where not found
};

/// Empty if the device `index` can be used, else a sentence that says why not.
inline std::string device_refusal(int index, const DeviceAnswer& answer) {
  using Status = DeviceAnswer::Status;
  constexpr int kLeast = 80;
  const std::string name = "cuda:" + std::to_string(index);
  const std::string missing = "there is no device " + name + ": ";
  const std::string words = std::string(" (CUDA: ") + answer.error + ")";
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  switch (answer.status) {
    case Status::no_driver: return missing + "this machine has no CUDA driver" + words;
    case Status::no_device: return missing + "this machine has none" + words;
    case Status::no_such_device:
      return missing + "this machine has " + std::to_string(answer.devices) + words;
    case Status::old_driver:
      return name + " cannot be used: the driver is for CUDA " + version(answer.driver) +
             ", and this build of libnatten for " + version(answer.runtime) +
             "; update the driver, or build with a CUDA that it is for" + words;
    case Status::failed: return name + " cannot be used" + words;
    case Status::found: break;
  }
  if (answer.capability >= kLeast) return {};
  return name + " has compute capability " + std::to_string(answer.capability / 10) + "." +
         std::to_string(answer.capability % 10) + "; must be at least 8.0";
}

}  // namespace natten::detail::cuda
