#pragma once

#include <natten/types.h>

#include <cstddef>
#include <vector>

namespace natten::detail {

/// A tensor that a call reads or writes.
struct Use {
  const char* name;        ///< of the argument
  const TensorView* view;  ///< checked by `check_view`; may be missing
  bool is_output;
  std::size_t call = 0;  ///< its number in a list of calls that run at once
};

/// Throws Error where an output holds an element twice or shares memory with an input or another
/// output. Exact for views of one buffer that interleave without sharing an element; where that
/// cannot be told in short time, which takes strides that do not divide each other, it counts as
/// shared.
void check_memory(const std::vector<Use>& uses, std::size_t calls = 1);

}  // namespace natten::detail
