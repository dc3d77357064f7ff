#include <natten/attention.h>
#include <natten/operations.h>
#include <natten/roles.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "memory.h"
#include "registry.h"
#include "tuner.h"
#include "validate.h"

namespace natten {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::string name_of(Device device) {
  return std::string(natten::name_of(device.type)) + ":" + std::to_string(device.index);
}

/// A checked call and the backend that runs it.
struct Selected {
  detail::Job job;
  const detail::Backend* backend;
  std::size_t workspace_bytes;

  Selected(const Problem& problem, const Tensors& tensors, const Context& context)
      : job{problem, tensors, nullptr},
        backend(&detail::select(problem, context)),
        workspace_bytes(aligned(backend->workspace_bytes(problem))) {}
};

std::vector<Selected> select_all(const Call* calls, std::size_t count, const Context& context,
                                 bool for_execution) {
  std::vector<Selected> selected;
  selected.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const Problem problem = detail::check(calls[i], for_execution);
    if (i > 0 && problem.device != selected[0].job.problem.device)
      throw Error(ErrorKind::invalid_value,
                  "calls: got calls on " + name_of(selected[0].job.problem.device) + " and " +
                      name_of(problem.device) + "; must be on one device");
    selected.emplace_back(problem, calls[i].tensors, context);
  }
  return selected;
}

std::size_t total_workspace(const std::vector<Selected>& selected) {
  std::size_t bytes = 0;
  for (const Selected& s : selected) bytes += s.workspace_bytes;
  return bytes;
}

/// The calls run at once, so the outputs of one must not overlap the tensors of another either.
void check_memory(const Call* calls, std::size_t count) {
  std::vector<detail::Use> uses;
  uses.reserve(count * 16);  // more than any operation has
  for (std::size_t i = 0; i < count; ++i)
    for (const Role& role : roles_of(calls[i].op))
      uses.push_back({role.name, &(calls[i].tensors.*role.tensor), role.is_output, i});
  detail::check_memory(uses, count);
}

/// `own` holds the workspace where the caller has given none. It is first written by the threads
/// that use it, so that on a machine of several nodes it is near to them.
char* find_workspace(const std::vector<Selected>& selected, const Context& context,
                     std::unique_ptr<char[]>& own) {
  const std::size_t needed = total_workspace(selected);
  char* workspace = static_cast<char*>(context.workspace);
  if (!workspace && needed > 0) {
    const Device device = selected[0].job.problem.device;
    if (device.type != DeviceType::cpu)
      throw Error(ErrorKind::invalid_value, "workspace: missing; on " + name_of(device) +
                                                " this needs " + std::to_string(needed) +
                                                " bytes of its memory");
    own.reset(new char[needed + kAlignment]);
    const auto address = reinterpret_cast<std::uintptr_t>(own.get());
    workspace = own.get() + (aligned(address) - address);
  } else if (workspace && context.workspace_size < needed) {
    throw Error(ErrorKind::invalid_value,
                "workspace: got " + std::to_string(context.workspace_size) +
                    " bytes; must hold at least " + std::to_string(needed));
  } else if (needed > 0 && reinterpret_cast<std::uintptr_t>(workspace) % kAlignment != 0) {
    throw Error(ErrorKind::invalid_value,
                "workspace: got memory that is not aligned; its address "
                "must be a multiple of " +
                    std::to_string(kAlignment));
  }
  return workspace;
}

void run_all(const Call* calls, std::size_t count, const Context& context) {
  std::vector<Selected> selected = select_all(calls, count, context, true);
  check_memory(calls, count);
  std::unique_ptr<char[]> own;
  char* workspace = find_workspace(selected, context, own);
  // Jobs of the same backend run together; in a list of similar problems that is all of them.
  std::vector<detail::Job> jobs;
  for (std::size_t i = 0; i < selected.size(); ++i) {
    selected[i].job.workspace = workspace;
    workspace += selected[i].workspace_bytes;
    detail::configure(selected[i].job, *selected[i].backend, context, calls[i].options.tuning,
                      count == 1);
    jobs.push_back(selected[i].job);
    if (i + 1 < selected.size() && selected[i + 1].backend == selected[i].backend) continue;
    selected[i].backend->run(jobs, context);
    jobs.clear();
  }
}

/// Leaves the part from `begin` to `end` of an axis.
void narrow(TensorView& view, int axis, std::int64_t begin, std::int64_t end) {
  const auto at = static_cast<std::size_t>(axis);
  if (view.data)
    view.data = static_cast<char*>(view.data) +
                begin * view.strides[at] * static_cast<std::int64_t>(size_of(view.dtype));
  view.shape[at] = end - begin;
}

/// A checked call on examples that lie one after another.
class Packed {
 public:
  Packed(const Call& packed, const Packing& packing, bool for_execution)
      : whole_(packed), packing_(packing) {
    whole_.options.allow_no_keys = true;
    problem_ = detail::check_packed(whole_, packing_, for_execution);
  }

  /// Whether backends take all examples at once. Circular axes have their seams in other places.
  bool is_one_job() const {
    return problem_.device.type != DeviceType::cpu &&
           problem_.axes[kMaxRank - 1].boundary != Boundary::circular;
  }
  Selected job(const Context& context) const {
    Selected selected(problem_, whole_.tensors, context);
    selected.job.examples = detail::examples_in(packing_);
    selected.workspace_bytes += aligned(count() * sizeof(detail::Example));
    return selected;
  }
  /// A call for each example.
  std::vector<Call> examples() const {
    std::vector<Call> examples(count(), whole_);
    for (const Role& role : roles_of(whole_.op))
      for (int axis = 0; role.dims[axis]; ++axis) {
        const bool is_of_keys = role.dims[axis] == 'K';
        if (!(whole_.tensors.*role.tensor) || (!is_of_keys && role.dims[axis] != 'Q')) continue;
        const std::vector<std::int64_t>& ends = is_of_keys ? keys() : queries();
        for (std::size_t i = 0; i < count(); ++i)
          narrow(examples[i].tensors.*role.tensor, axis, ends[i], ends[i + 1]);
      }
    return examples;
  }

 private:
  std::size_t count() const { return queries().size() - 1; }
  const std::vector<std::int64_t>& queries() const { return packing_.cumulative_seqlen_Q; }
  const std::vector<std::int64_t>& keys() const { return packing_.cumulative_seqlen_KV; }

  Call whole_;
  const Packing& packing_;
  Problem problem_;
};

}  // namespace

Problem describe(const Call& call) { return detail::check(call, false); }

std::size_t workspace_bytes(const Call& call, const Context& context) {
  return total_workspace(select_all(&call, 1, context, false));
}
std::size_t workspace_bytes(const std::vector<Call>& calls, const Context& context) {
  return total_workspace(select_all(calls.data(), calls.size(), context, false));
}

void run(const Call& call, const Context& context) { run_all(&call, 1, context); }
void run(const std::vector<Call>& calls, const Context& context) {
  run_all(calls.data(), calls.size(), context);
}

std::size_t workspace_bytes(const Call& packed, const Packing& packing, const Context& context) {
  const Packed checked(packed, packing, false);
  return checked.is_one_job() ? checked.job(context).workspace_bytes
                              : workspace_bytes(checked.examples(), context);
}
void run(const Call& packed, const Packing& packing, const Context& context) {
  const Packed checked(packed, packing, true);
  if (!checked.is_one_job()) return run(checked.examples(), context);
  check_memory(&packed, 1);
  std::vector<Selected> selected = {checked.job(context)};
  std::unique_ptr<char[]> own;
  char* const workspace = find_workspace(selected, context, own);
  detail::Job& job = selected[0].job;
  job.example_table = reinterpret_cast<detail::Example*>(workspace);
  job.workspace = workspace + aligned(job.examples.size() * sizeof(detail::Example));
  selected[0].backend->run({job}, context);
}

TensorView expected(const Problem& problem, TensorView Tensors::*tensor) {
  for (const Role& role : roles_of(problem.op))
    if (role.tensor == tensor) {
      const std::vector<std::int64_t> shape = detail::shape_of(problem, role.dims);
      const DType dtype = role.is_statistic ? statistic_dtype(problem.dtype) : problem.dtype;
      return contiguous_view(nullptr, dtype, problem.device, shape.data(),
                             static_cast<int>(shape.size()));
    }
  throw Error(ErrorKind::invalid_value,
              std::string("tensor: ") + name_of(problem.op) + " does not have this tensor");
}
TensorView expected(const Call& call, TensorView Tensors::*tensor) {
  return expected(describe(call), tensor);
}

std::vector<Interval> key_range(const Tuple& query_offset, const Tuple& query_length,
                                const Tuple& grid_size, const Neighborhood& neighborhood) {
  std::vector<Interval> ranges;
  for (const Axis& axis : detail::axes_of(query_offset, query_length, grid_size, neighborhood))
    ranges.push_back(natten::key_range(axis));
  return ranges;
}

Call attention_call(const Tensors& tensors, bool is_causal, std::optional<double> scale) {
  Call call;
  call.op = Op::attention_forward;
  call.tensors = tensors;
  call.neighborhood.kernel_size = {1};
  call.neighborhood.is_causal = {is_causal};
  call.options.separate_key_grid = true;
  call.options.scale = scale;
  return call;
}

std::vector<Call> examples_of(const Call& packed, const Packing& packing) {
  return Packed(packed, packing, false).examples();
}

void detail::run_of_rank(int rank, const Call* calls, int count, const Context& context) {
  const Tuple& kernel_size = calls[0].neighborhood.kernel_size;
  if (kernel_size.size != rank)
    throw Error(
        ErrorKind::invalid_value,
        "kernel_size: got " +
            detail::to_string(kernel_size.values.data(), std::min(kernel_size.size, kMaxDims)) +
            "; must have " + std::to_string(rank) + " elements");
  run_all(calls, static_cast<std::size_t>(count), context);
}

}  // namespace natten
