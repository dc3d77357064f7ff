#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <natten/natten.h>

#include <vector>

namespace natten::bindings {

/// Views of Python objects, and what keeps them alive. Accepts torch tensors (through DLPack's C
/// exchange API: no capsule, no allocation), anything else with `__dlpack__`, and, where only
/// shapes matter, `(shape, dtype name)` tuples.
class Views {
 public:
  /// `name` is the argument's name in messages. Throws Error.
  TensorView view(nanobind::handle object, const char* name);

 private:
  std::vector<nanobind::ndarray<nanobind::ro>> kept_;
};

}  // namespace natten::bindings
