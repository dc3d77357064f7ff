#pragma once

#include <natten/attention.h>
#include <natten/problem.h>

#include <string>
#include <vector>

namespace natten::detail {

/// The only place that checks arguments, except for memory that tensors share (memory.h). Throws
/// Error. `for_execution` also demands the required outputs, and memory behind the tensors.
Problem check(const Call& call, bool for_execution);

/// Checks queries of a part of a grid, and returns its axes. Throws Error.
std::vector<Axis> axes_of(const Tuple& query_offset, const Tuple& query_length,
                          const Tuple& grid_size, const Neighborhood& neighborhood);

/// Checks a call on tensors that hold examples one after another, as `check` does, and where these
/// lie. Throws Error.
Problem check_packed(const Call& call, const Packing& packing, bool for_execution);

/// What must hold for any given view, whatever its role: dimensions, type and device that exist, a
/// size and strides that memory can have. Throws Error. Check this before anything else of a view.
void check_view(const char* name, const TensorView& view);

/// What must hold for a view that is read or written: that there is memory, in which elements lie
/// at multiples of their size. Throws Error.
void check_data(const char* name, const TensorView& view);

/// The shape of a tensor whose dimensions are spelled as in `Role::dims`.
std::vector<std::int64_t> shape_of(const Problem& problem, const char* dims);

/// "[2, 8, 8]", for messages.
std::string to_string(const std::int64_t* values, int count);

}  // namespace natten::detail
