#include <natten/attention.h>
#include <natten/error.h>
#include <natten/simulate.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "cpu/engine/count.h"
#include "cuda/count.h"
#include "validate.h"

namespace natten {
namespace {

/// Checks a call of which the work can be counted.
Problem countable(const Call& call) {
  const Problem problem = describe(call);
  if (!is_fused(problem.op))
    throw Error(ErrorKind::invalid_value,
                std::string("op: got ") + name_of(problem.op) + "; must be fused attention");
  const auto refuse = [](const char* what) {
    throw Error(ErrorKind::unsupported, std::string(what) + ": calls with them are not counted");
  };
  if (problem.has_rpb || problem.wants_grad_rpb) refuse("rpb");
  if (problem.has_key_mask) refuse("key_mask");
  if (problem.additional > 0) refuse("additional_keys, additional_values");
  return problem;
}

/// Pairs of a query and a key that it sees, of all heads.
double pairs_of(const Problem& problem) {
  auto pairs = static_cast<double>(problem.batch * problem.heads);
  for (const Axis& axis : problem.axes) {
    double of_axis = 0;
    for (std::int64_t i = 0; i < axis.query_length; ++i) {
      const std::int64_t token = axis.query_offset + i;
      const Interval seen = window(axis, group_of(axis, token), position_of(axis, token));
      of_axis += static_cast<double>(seen.size());
    }
    pairs *= of_axis;
  }
  return pairs;
}

void check_tile(const char* name, const Tuple& tile, int rank) {
  bool fits = tile.size == rank;
  for (int i = 0; fits && i < rank; ++i) fits = tile[i] >= 1 && tile[i] <= (1 << 20);
  if (!fits)
    throw Error(ErrorKind::invalid_value,
                std::string(name) + ": got " +
                    detail::to_string(tile.values.data(), std::min(tile.size, kMaxDims)) +
                    "; must be " + std::to_string(rank) + " positive integers up to 2^20");
}

}  // namespace

std::vector<PassWork> work_of(const Call& call, int threads) {
  const Problem problem = countable(call);
  if (threads < 1)
    throw Error(ErrorKind::invalid_value,
                "threads: got " + std::to_string(threads) + "; must be at least 1");
  const bool is_empty = problem.batch == 0 || problem.queries() == 0 || problem.keys() == 0;
  if (is_empty) return {};
  std::vector<PassWork> passes = problem.device.type == DeviceType::cuda
                                     ? detail::cuda::count_passes({problem, call.tensors, nullptr})
                                     : detail::cpu::engine::count_passes(problem, threads);
  // Each product of the definition counts once: scores and gradients of weights, which every pass
  // that needs them computes again, count for the first.
  const double pairs = pairs_of(problem);
  const auto d = static_cast<double>(problem.head_dim), dv = static_cast<double>(problem.value_dim);
  for (PassWork& pass : passes) {
    const auto is = [&](std::initializer_list<const char*> names) {
      return std::find(names.begin(), names.end(), pass.name) != names.end();
    };
    double dims = &pass == passes.data() ? d + dv : 0;
    if (is({"backward_query", "backward", "grad_query", "grad_all"}) && problem.wants_grad_query)
      dims += d;
    const bool of_keys = is({"backward_key", "backward", "grad_key_value", "grad_all"});
    if ((of_keys || is({"grad_key"})) && problem.wants_grad_key) dims += d;
    if ((of_keys || is({"grad_value"})) && problem.wants_grad_value) dims += dv;
    pass.useful = pairs * dims;
  }
  return passes;
}

PassWork work_of_fixed_tiles(const Call& call, const Tuple& query_tile, const Tuple& key_tile) {
  const Problem problem = countable(call);
  if (problem.op != Op::attention_forward)
    throw Error(ErrorKind::invalid_value, "op: got attention_backward; must be attention_forward");
  check_tile("query_tile", query_tile, problem.rank);
  check_tile("key_tile", key_tile, problem.rank);
  if (call.neighborhood.has_parts() || call.options.separate_key_grid)
    throw Error(ErrorKind::unsupported, "call: queries and keys must be the whole of one grid");
  for (const Axis& axis : problem.axes)
    if (axis.boundary == Boundary::circular)
      throw Error(ErrorKind::unsupported, "boundary: got circular, where fixed tiles have a seam");
  PassWork work = detail::cuda::count_fixed_tiles(problem, query_tile, key_tile);
  work.useful = pairs_of(problem) * static_cast<double>(problem.head_dim + problem.value_dim);
  return work;
}

}  // namespace natten
