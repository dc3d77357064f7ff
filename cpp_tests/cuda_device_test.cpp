// What is said of CUDA devices that cannot be used. Needs neither CUDA nor a device.

#include <gtest/gtest.h>

#include "../libnatten/src/cuda/device.h"

namespace natten_tests {
namespace {

using natten::detail::cuda::device_refusal;
using natten::detail::cuda::DeviceAnswer;
using Status = DeviceAnswer::Status;

TEST(CudaDevice, SaysWhyItCannotBeUsed) {
  DeviceAnswer answer;
  const auto refusal = [&](Status status, const char* error) {
    answer.status = status;
    answer.error = error;
    return device_refusal(3, answer);
  };
  answer.devices = 2;
  answer.driver = 12020;
  answer.runtime = 13000;
  EXPECT_EQ(refusal(Status::no_driver, "insufficient"),
            "there is no device cuda:3: this machine has no CUDA driver (CUDA: insufficient)");
  EXPECT_EQ(refusal(Status::no_device, "no device is detected"),
            "there is no device cuda:3: this machine has none (CUDA: no device is detected)");
  EXPECT_EQ(refusal(Status::no_such_device, "invalid device ordinal"),
            "there is no device cuda:3: this machine has 2 (CUDA: invalid device ordinal)");
  EXPECT_EQ(refusal(Status::old_driver, "insufficient"),
            "cuda:3 cannot be used: the driver is for CUDA 12.2, and this build of libnatten for "
            "13.0; update the driver, or build with a CUDA that it is for (CUDA: insufficient)");
  EXPECT_EQ(refusal(Status::failed, "unknown error"),
            "cuda:3 cannot be used (CUDA: unknown error)");
}

TEST(CudaDevice, MustBeOfCapability8) {
  DeviceAnswer answer;
  answer.status = Status::found;
  answer.capability = 75;
  EXPECT_EQ(device_refusal(0, answer), "cuda:0 has compute capability 7.5; must be at least 8.0");
  for (const int capability : {80, 90, 120}) {
    answer.capability = capability;
    EXPECT_EQ(device_refusal(0, answer), "");
  }
}

}  // namespace
}  // namespace natten_tests
