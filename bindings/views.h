#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <natten/natten.h>

#include <vector>

namespace natten::bindings {

/// Views of Python objects, and what keeps them alive. Memory is not touched, so that it may be a
/// device's. Accepts torch tensors (through DLPack's C
/// exchange API: no capsule, no allocation), anything else with `__dlpack__`, and, where only
/// shapes matter, `(shape, dtype name)` tuples.
class Views {
 public:
  /// Tuples describe tensors on `device`.
  explicit Views(Device device = {}) : device_(device) {}
  /// `name` is the argument's name in messages. Outputs must be writable. Throws Error.
  TensorView view(nanobind::handle object, const char* name, bool is_output = false);
  /// Whether a view so far was of a CUDA device's memory.
  bool has_cuda() const { return has_cuda_; }

 private:
  TensorView make(nanobind::handle object, const char* name, bool is_output);

  Device device_;
  bool has_cuda_ = false;
  std::vector<nanobind::ndarray<nanobind::ro>> kept_;
};

}  // namespace natten::bindings
