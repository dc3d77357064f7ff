#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <natten/natten.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"
#include "huge_pages.h"
#include "openmp.h"
#include "unlocked.h"
#include "views.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace natten::bindings {
#if NATTEN_WITH_XLA
void register_xla(nb::module_& module);
#endif

namespace {

using Config = std::vector<std::int64_t>;
using Scale = std::optional<double>;
using Spec = std::tuple<std::vector<std::int64_t>, std::string>;
using Stream = std::optional<std::uintptr_t>;
using Allocate = std::optional<nb::callable>;
using Cumulative = std::vector<std::int64_t>;
using PackingOf = std::optional<
    std::tuple<Cumulative, Cumulative, std::optional<std::int64_t>, std::optional<std::int64_t>>>;

/// Binds the inputs or the outputs of a call, one entry per role in table order.
template <class Bind>
void bind_tensors(Call& call, const nb::sequence& tensors, bool outputs, Bind&& bind) {
  const std::size_t given = nb::len(tensors);
  std::size_t at = 0;
  for (const Role& role : roles_of(call.op)) {
    if (role.is_output != outputs) continue;
    if (at < given) bind(role, nb::object(tensors[at]));
    ++at;
  }
  if (at != given)
    throw Error(ErrorKind::invalid_value,
                std::string(name_of(call.op)) + ": got " + std::to_string(given) +
                    (outputs ? " outputs" : " inputs") + "; must be " + std::to_string(at));
}

/// "cpu", "cuda" or "cuda:1". "cuda" is a device that need not be in this machine.
Device device_named(const std::string& name) {
  if (name == name_of(DeviceType::cpu)) return {};
  if (name == name_of(DeviceType::cuda)) return {DeviceType::cuda, -1};
  int index = 0;
  char rest = 0;
  if (std::sscanf(name.c_str(), "cuda:%d%c", &index, &rest) == 1 && index >= 0)
    return {DeviceType::cuda, index};
  throw Error(ErrorKind::invalid_value,
              "device: got \"" + name + "\"; must be cpu, cuda or cuda:<number>");
}

nb::tuple shape_of(const TensorView& view) {
  nb::list shape;
  for (int i = 0; i < view.ndim; ++i) shape.append(view.shape[i]);
  return nb::tuple(shape);
}

/// A call with its inputs bound, and its outputs where these are given. The views live as long as
/// `views`.
Call call_of(Views& views, const std::string& op, const Config& config, Scale scale,
             const nb::sequence& inputs, const std::optional<nb::sequence>& outputs = {}) {
  Call call = decode_call(op, config.data(), config.size(), scale.value_or(0.0));
  const auto view = [&](const Role& role, const nb::object& object) {
    call.tensors.*role.tensor = views.view(object, role.name);
  };
  bind_tensors(call, inputs, false, view);
  if (outputs) bind_tensors(call, *outputs, true, view);
  return call;
}

Packing packing_of(const PackingOf& packing) {
  return std::apply([](const auto&... lengths) { return Packing{lengths...}; }, *packing);
}

std::pair<std::vector<std::optional<Spec>>, std::size_t> plan(
    const std::string& op, const Config& config, Scale scale, const std::string& backend,
    const nb::sequence& inputs, const nb::sequence& outputs,
    const std::optional<std::string>& device, const PackingOf& packing) {
  HoldsLock lock;
  Views views(device_named(device.value_or("cpu")));
  Call call = call_of(views, op, config, scale, inputs);
  std::vector<TensorView Tensors::*> wanted;
  bind_tensors(call, outputs, true, [&](const Role& role, const nb::object& object) {
    if (object.is(nb::handle(Py_True)))
      wanted.push_back(role.tensor);
    else
      call.tensors.*role.tensor = views.view(object, role.name);
  });
  if (!wanted.empty()) {
    const Problem problem = describe(call);
    for (TensorView Tensors::*tensor : wanted) call.tensors.*tensor = expected(problem, tensor);
  }

  std::vector<std::optional<Spec>> specs;
  for (const Role& role : roles_of(call.op)) {
    if (!role.is_output) continue;
    const TensorView& v = call.tensors.*role.tensor;
    specs.emplace_back();
    if (v) specs.back() = Spec{{v.shape.begin(), v.shape.begin() + v.ndim}, name_of(v.dtype)};
  }
  if (!device) {  // for their checks
    packing ? static_cast<void>(examples_of(call, packing_of(packing)))
            : static_cast<void>(describe(call));
    return {std::move(specs), 0};
  }
  Context context;
  context.backend = backend.c_str();
  return {std::move(specs), packing ? workspace_bytes(call, packing_of(packing), context)
                                    : workspace_bytes(call, context)};
}

/// Runs a call, a list of calls in one parallel region, or a call and where its examples lie.
template <class... Calls>
void run_unlocked(HoldsLock& lock, const std::string& backend, std::optional<int> openmp_threads,
                  Stream stream, const Allocate& allocate, Views& views, const Calls&... calls) {
  Context context;
  context.backend = backend.c_str();
  context.stream = reinterpret_cast<void*>(stream.value_or(0));
  OpenMpExecutor openmp(openmp_threads.value_or(1));
  if (openmp_threads) context.executor = &openmp;
  nb::object workspace;
  if (allocate && views.has_cuda()) {
    // Kernels use it after this returns and frees it. That is safe with the frameworks' allocators,
    // which give memory again only to work that the same stream runs later.
    const std::size_t count = (workspace_bytes(calls..., context) + 3) / sizeof(float);
    if (count > 0) {
      workspace = (*allocate)(nb::make_tuple(count), "float32");
      context.workspace = views.view(workspace, "workspace").data;
      context.workspace_size = count * sizeof(float);
    }
  }
  context.interrupted = signal_check();
  lock.release_while([&] { run(calls..., context); });
}

/// `allocate(shape, dtype name)` makes the outputs that are not given, and the workspace.
nb::list run_call(const std::string& op, const Config& config, Scale scale,
                  const std::string& backend, const nb::sequence& inputs,
                  const nb::sequence& outputs, std::optional<int> openmp_threads,
                  const Allocate& allocate, Stream stream, const PackingOf& packing) {
  HoldsLock lock;
  Views views;
  Call call = call_of(views, op, config, scale, inputs);
  nb::list results;
  std::optional<Problem> problem;  // of the inputs, where that is asked for
  bind_tensors(call, outputs, true, [&](const Role& role, const nb::object& object) {
    nb::object result = object;
    const bool is_wanted = object.is(nb::handle(Py_True));
    const bool is_new = allocate && (is_wanted || nb::isinstance<nb::tuple>(object));
    if (is_new) {
      if (is_wanted && !problem) problem = describe(call);
      const TensorView view =
          is_wanted ? expected(*problem, role.tensor) : views.view(object, role.name);
      result = (*allocate)(shape_of(view), name_of(view.dtype));
    }
    const TensorView view = views.view(result, role.name, true);
    if (allocate) advise_huge_pages(view);  // outputs of adapters are new, whoever made them
    call.tensors.*role.tensor = view;
    results.append(result);
  });
  if (packing)
    run_unlocked(lock, backend, openmp_threads, stream, allocate, views, call, packing_of(packing));
  else
    run_unlocked(lock, backend, openmp_threads, stream, allocate, views, call);
  return results;
}

void run_calls(const std::string& op, const Config& config, Scale scale, const std::string& backend,
               const std::vector<std::pair<nb::sequence, nb::sequence>>& tensors,
               std::optional<int> openmp_threads, const Allocate& allocate, Stream stream) {
  HoldsLock lock;
  Views views;
  std::vector<Call> calls;
  for (const auto& [inputs, outputs] : tensors) {
    calls.push_back(call_of(views, op, config, scale, inputs));
    bind_tensors(calls.back(), outputs, true, [&](const Role& role, const nb::object& object) {
      calls.back().tensors.*role.tensor = views.view(object, role.name, true);
    });
  }
  run_unlocked(lock, backend, openmp_threads, stream, allocate, views, calls);
}

std::vector<std::tuple<std::string, std::string, bool>> explain_call(
    const std::string& op, const Config& config, Scale scale, const std::string& backend,
    const nb::sequence& inputs, const std::string& device,
    const std::optional<nb::sequence>& outputs) {
  HoldsLock lock;
  Views views(device_named(device));
  const Call call = call_of(views, op, config, scale, inputs, outputs);
  Context context;
  context.backend = backend.c_str();
  std::vector<std::tuple<std::string, std::string, bool>> rows;
  for (const Verdict& v : explain(describe(call), context))
    rows.emplace_back(v.backend, v.refusal, v.chosen);
  return rows;
}

nb::list work_of_call(const std::string& op, const Config& config, const nb::sequence& inputs,
                      const nb::sequence& outputs, const std::string& device, int threads,
                      bool fixed_tiles) {
  HoldsLock lock;
  Views views(device_named(device));
  const Call call = call_of(views, op, config, {}, inputs, outputs);
  const std::vector<PassWork> passes =
      fixed_tiles
          ? std::vector{work_of_fixed_tiles(call, call.options.query_tile, call.options.key_tile)}
          : work_of(call, threads);
  nb::list rows;
  for (const PassWork& p : passes) {
    nb::dict row;
    row["name"] = p.name;
    row["units"] = p.units;
    row["tiles"] = p.tiles;
    row["useful"] = p.useful;
    row["executed"] = p.executed;
    row["weights"] = p.weights;
    row["masked"] = p.masked;
    row["calls"] = p.calls;
    row["packs"] = p.packs;
    row["packed"] = p.packed;
    row["read"] = p.read;
    row["written"] = p.written;
    row["balance"] = p.balance;
    rows.append(row);
  }
  return rows;
}

std::pair<std::string, std::string> tuned(const std::string& op, const Config& config, Scale scale,
                                          const std::string& backend, const nb::sequence& inputs,
                                          const std::string& device,
                                          const std::optional<nb::sequence>& outputs,
                                          std::optional<int> openmp_threads) {
  HoldsLock lock;
  Views views(device_named(device));
  const Call call = call_of(views, op, config, scale, inputs, outputs);
  if (call.options.tuning == Tuning::none) return {to_string(Configuration()), name_of(Origin())};
  Context context;
  context.backend = backend.c_str();
  OpenMpExecutor openmp(openmp_threads.value_or(1));
  if (openmp_threads) context.executor = &openmp;
  const Choice choice = choice_for(describe(call), context);
  return {to_string(choice.configuration), name_of(choice.origin)};
}

using Limits = std::tuple<int, int, double, bool>;  // in the order of TuningLimits

constexpr const char* kTuningModes[] = {"off", "read", "record", "tune"};

TuningMode tuning_mode(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kTuningModes[i]) return static_cast<TuningMode>(i);
  throw Error(ErrorKind::invalid_value,
              "mode: got \"" + name + "\"; must be off, read, record or tune");
}

void set_tuning(const std::optional<std::string>& forward,
                const std::optional<std::string>& backward,
                const std::optional<Limits>& forward_limits,
                const std::optional<Limits>& backward_limits,
                const std::optional<std::string>& cache_dir) {
  TuningSettings settings = tuning_settings();
  const auto limits = [](const Limits& l) {
    return std::apply([](const auto&... fields) { return TuningLimits{fields...}; }, l);
  };
  if (forward) settings.forward = tuning_mode(*forward);
  if (backward) settings.backward = tuning_mode(*backward);
  if (forward_limits) settings.forward_limits = limits(*forward_limits);
  if (backward_limits) settings.backward_limits = limits(*backward_limits);
  if (cache_dir) settings.cache_dir = *cache_dir;
  set_tuning_settings(settings);
}

std::tuple<std::string, std::string, std::string, std::string> tuning() {
  const TuningSettings settings = tuning_settings();
  return {kTuningModes[static_cast<int>(settings.forward)],
          kTuningModes[static_cast<int>(settings.backward)], settings.cache_dir,
          settings.record_file};
}

std::tuple<std::string, std::string, double, double> tune_problem(const std::string& text,
                                                                  bool again) {
  HoldsLock lock;
  Choice choice;
  Context context;
  context.interrupted = signal_check();
  lock.release_while([&] {
    const Problem problem = problem_of(text);
    choice = choice_for(problem, context);
    if (again || choice.origin == Origin::default_choice) choice = tune(problem, context);
  });
  return {to_string(choice.configuration), name_of(choice.origin), choice.default_seconds,
          choice.seconds};
}

std::vector<std::pair<bool, std::string>> tuning_notes() {
  std::vector<std::pair<bool, std::string>> notes;
  for (const TuningNote& note : take_tuning_notes()) notes.emplace_back(note.is_warning, note.text);
  return notes;
}

std::vector<std::tuple<std::string, std::string, bool, bool, bool, bool>> roles(
    const std::string& op) {
  std::vector<std::tuple<std::string, std::string, bool, bool, bool, bool>> rows;
  for (const Role& role : roles_of(op_named(op)))
    rows.emplace_back(role.name, role.dims, role.is_output, role.is_required, role.is_statistic,
                      role.is_mask);
  return rows;
}

/// Tokens of one axis that a query attends to, or that attend to a key.
std::vector<std::int64_t> tokens_of(bool inverse, std::int64_t token, std::int64_t length,
                                    std::int64_t kernel_size, std::int64_t stride,
                                    std::int64_t dilation, bool is_causal, std::int64_t boundary) {
  Call call;  // borrows the core's checks
  call.op = Op::rpb_scatter;
  call.neighborhood = {{kernel_size}, {dilation}, {is_causal}, {stride}, {boundary}, {}, {}, {}};
  const std::int64_t shape[] = {1, 1, length, kernel_size};
  call.tensors.attn = contiguous_view(nullptr, DType::float32, {}, shape, 4);
  const Axis axis = describe(call).axes[kMaxRank - 1];
  if (token < 0 || token >= length)
    throw Error(ErrorKind::invalid_value, "token: got " + std::to_string(token) +
                                              "; must lie in [0, " + std::to_string(length) + ")");
  const std::int64_t group = group_of(axis, token), position = position_of(axis, token);
  const Interval seen =
      inverse ? inverse_window(axis, group, position) : window(axis, group, position);
  std::vector<std::int64_t> tokens;
  for (std::int64_t i = seen.begin; i < seen.end; ++i)
    tokens.push_back(key_index(axis, token_at(axis, group, i)));
  return tokens;
}

std::vector<std::pair<std::int64_t, std::int64_t>> key_range_of(const Config& config,
                                                                const Config& query_length) {
  const Neighborhood n =
      decode_call(name_of(Op::rpb_gather), config.data(), config.size(), 0.0).neighborhood;
  const Tuple length(query_length.begin(), static_cast<int>(query_length.size()));
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
  for (const Interval& range : key_range(n.query_offset, length, n.grid_size, n))
    ranges.emplace_back(range.begin, range.end);
  return ranges;
}

/// The windows of one axis of a grid. For each given query: (dilation group, position, position of
/// slot 0, first position that it sees, position past the last). For each dilation group that has
/// queries: (group, first position, the numbers of the keys from there to the last that is seen).
using AxisWindows = std::pair<
    std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>>,
    std::vector<std::tuple<std::int64_t, std::int64_t, std::vector<std::int64_t>>>>;

AxisWindows windows_of(const Axis& axis) {
  AxisWindows result;
  std::map<std::int64_t, Interval> seen_by_group;
  for (std::int64_t i = 0; i < axis.query_length; ++i) {
    const std::int64_t token = axis.query_offset + i;
    const std::int64_t group = group_of(axis, token), position = position_of(axis, token);
    const Interval seen = window(axis, group, position);
    result.first.emplace_back(group, position, first_slot(axis, group, position), seen.begin,
                              seen.end);
    const auto [found, is_new] = seen_by_group.try_emplace(group, seen);
    if (!is_new)
      found->second = {std::min(found->second.begin, seen.begin),
                       std::max(found->second.end, seen.end)};
  }
  for (const auto& [group, seen] : seen_by_group) {
    std::vector<std::int64_t> keys;
    for (std::int64_t i = seen.begin; i < seen.end; ++i)
      keys.push_back(key_index(axis, token_at(axis, group, i)));
    result.second.emplace_back(group, seen.begin, std::move(keys));
  }
  return result;
}

std::vector<AxisWindows> all_windows(const Config& config, const Config& query_grid,
                                     const Config& key_grid) {
  Call call = decode_call(name_of(Op::attention_forward), config.data(), config.size(), 0.0);
  const auto heads_last = [](const Config& grid) {
    std::vector<std::int64_t> shape{1};
    shape.insert(shape.end(), grid.begin(), grid.end());
    shape.insert(shape.end(), {1, 1});
    return contiguous_view(nullptr, DType::float32, {}, shape.data(),
                           static_cast<int>(shape.size()));
  };
  call.tensors.query = heads_last(query_grid);
  call.tensors.key = call.tensors.value = heads_last(key_grid);
  const Problem problem = describe(call);
  std::vector<AxisWindows> result;
  for (std::size_t i = kMaxRank - query_grid.size(); i < kMaxRank; ++i)
    result.push_back(windows_of(problem.axes[i]));
  return result;
}

std::map<std::string, std::string> build_facts() {
  const BuildInfo info = build_info();
  return {{"compiler", info.compiler},
          {"build_type", info.build_type},
          {"system", info.system},
          {"cuda_compiler", info.cuda_compiler},
          {"cuda_architectures", info.cuda_architectures},
          {"machine", info.machine}};
}

std::vector<std::tuple<std::string, bool, bool>> instruction_sets() {
  std::vector<std::tuple<std::string, bool, bool>> rows;
  for (const InstructionSetInfo& isa : build_info().instruction_sets)
    rows.emplace_back(isa.name, isa.available, isa.chosen);
  return rows;
}

PyObject* exception_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::invalid_value: return PyExc_ValueError;
    case ErrorKind::invalid_type: return PyExc_TypeError;
    case ErrorKind::unsupported: return PyExc_NotImplementedError;
    case ErrorKind::runtime:
    case ErrorKind::interrupted: break;
  }
  return PyExc_RuntimeError;
}

}  // namespace
}  // namespace natten::bindings

NB_MODULE(_core, m) {
  using namespace natten::bindings;
  m.doc() = "libnatten over DLPack. The adapters in natten.torch and natten.jax are its callers.";
  m.attr("version") = natten::version();

  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const natten::Error& e) {
      PyErr_SetString(exception_of(e.kind()), e.what());
    }
  });

  m.def(
      "plan", &plan, "op"_a, "config"_a, "scale"_a.none(), "backend"_a, "inputs"_a, "outputs"_a,
      "device"_a.none() = "cpu", "packing"_a = nb::none(),
      "Checks a call and returns (outputs, workspace bytes). inputs: arrays, (shape, dtype name)\n"
      "tuples or None; outputs: True (wanted, described in the result), None, or as inputs. Each\n"
      "described output is (shape, dtype name), or None where it is not wanted.\n"
      "device: where tuples are: \"cpu\", \"cuda:1\", or \"cuda\" for one that is not known yet.\n"
      "None: nothing is known; no backend is chosen, and the workspace is 0.\n"
      "packing: as in run.");
  m.def(
      "run", &run_call, "op"_a, "config"_a, "scale"_a.none(), "backend"_a, "inputs"_a, "outputs"_a,
      "openmp_threads"_a = nb::none(), "allocate"_a = nb::none(), "stream"_a = nb::none(),
      "packing"_a = nb::none(),
      "Checks a call, runs it and returns its outputs. outputs: arrays to write to, None (not\n"
      "wanted), or, given allocate(shape, dtype name), True or a (shape, dtype name) tuple.\n"
      "openmp_threads: runs on so many threads of the process's OpenMP runtime where it has one;\n"
      "None: on the library's pool. stream: address of the CUDA stream; None: the default one. On\n"
      "CUDA allocate also makes the memory to work in. packing: (cumulative_seqlen_Q,\n"
      "cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV) of tensors that hold many examples, "
      "which\n"
      "run in one parallel region.");
  m.def(
      "run_all", &run_calls, "op"_a, "config"_a, "scale"_a.none(), "backend"_a, "tensors"_a,
      "openmp_threads"_a = nb::none(), "allocate"_a = nb::none(), "stream"_a = nb::none(),
      "Runs one operation on several problems in one parallel region. tensors: (inputs, outputs)\n"
      "of each. All else as in run.");
  m.def("explain", &explain_call, "op"_a, "config"_a, "scale"_a.none(), "backend"_a, "inputs"_a,
        "device"_a = "cpu", "outputs"_a = nb::none(),
        "The backends for a call, best first, as (name, why it refuses or \"\", is chosen).\n"
        "outputs: arrays, (shape, dtype name) tuples or None (not wanted) each; None: not said.");
  m.def("work_of", &work_of_call, "op"_a, "config"_a, "inputs"_a, "outputs"_a, "device"_a = "cpu",
        "threads"_a = 1, "fixed_tiles"_a = false,
        "What the passes of fused attention do, counted without running them: a dict each, as\n"
        "natten::PassWork. Tensors: (shape, dtype name) tuples or None. fixed_tiles: by the "
        "config's\n"
        "q_tile_shape and kv_tile_shape, of tiles on a grid of their own.");
  m.def(
      "tuned", &tuned, "op"_a, "config"_a, "scale"_a.none(), "backend"_a, "inputs"_a,
      "device"_a = "cpu", "outputs"_a = nb::none(), "openmp_threads"_a = nb::none(),
      "The configuration that the chosen backend would run a call with, and where it comes from:\n"
      "\"default\", \"tuned\" or \"cache\". Nothing is timed. Arguments as of explain and run.");
  m.def("set_tuning", &set_tuning, "forward"_a = nb::none(), "backward"_a = nb::none(),
        "forward_limits"_a = nb::none(), "backward_limits"_a = nb::none(),
        "cache_dir"_a = nb::none(),
        "Sets what the tuner does for forward and for backward passes: \"off\", \"read\",\n"
        "\"record\" or \"tune\". limits: (warm-up steps, steps, seconds, thorough). None: as "
        "before.");
  m.def("tuning", &tuning,
        "(mode of forward passes, of backward passes, folder of the cache, file of records).");
  m.def(
      "tune_problem", &tune_problem, "problem"_a, "again"_a = false,
      "Tunes a problem that a line of text describes, on tensors of its own, and keeps what comes\n"
      "of it: (configuration, origin, seconds of the default, seconds). again: although it is\n"
      "known already.");
  m.def("tuning_notes", &tuning_notes,
        "What the tuner has to say since the last time, as (is a warning, text).");
  m.def(
      "roles", &roles, "op"_a,
      "The tensors of an operation, inputs then outputs, as (name, dims, is output, is required,\n"
      "is statistic, is mask); dims as in natten/roles.h.");
  m.def("window", &tokens_of, "inverse"_a, "token"_a, "length"_a, "kernel_size"_a, "stride"_a = 1,
        "dilation"_a = 1, "is_causal"_a = false, "boundary"_a = 0,
        "The tokens of one axis that a query token attends to, in slot order; with inverse=True\n"
        "the query tokens that attend to a key token.");
  m.def(
      "key_range", &key_range_of, "config"_a, "query_length"_a,
      "The tokens that a part of the queries sees, as (begin, end) of each axis. The config says\n"
      "the window, where the part begins and how large the grid is.");
  m.def(
      "windows", &all_windows, "config"_a, "query_grid"_a, "key_grid"_a,
      "The windows of each axis, as (queries, groups). Of each query that is given queries has\n"
      "(dilation group, position in it, position of slot 0 of its window, first position that it\n"
      "sees, past the last); positions may count on beyond the grid's ends. Of each dilation "
      "group\n"
      "that has queries groups has (group, first position that one sees, numbers of the keys from\n"
      "there on, among those that are given, to the last that one sees).");
  m.def(
      "backends",
      [](const std::string& device) { return natten::backends(device_named(device).type); },
      "device"_a, "Names of the backends built for \"cpu\" or \"cuda\", best first.");
  m.def(
      "compute_capability", &natten::compute_capability, "device_index"_a = -1,
      "Compute capability of a CUDA device, 80 for 8.0; -1: the current device. 0 without such a\n"
      "device, and in builds without CUDA.");
  m.def("build_info", &build_facts, "How the library was built, as in natten/build_info.h.");
  m.def(
      "instruction_sets", &instruction_sets,
      "What kernels for the CPU were compiled for, best first, as (name, this processor runs it,\n"
      "calls use it).");
  m.def("num_threads", &natten::num_threads, "Threads of the library's pool.");
  m.def("set_num_threads", &natten::set_num_threads, "count"_a);
  watch_interpreter();
#if NATTEN_WITH_XLA
  register_xla(m);
#endif
}
