#include "registry.h"

#include <natten/error.h>

#include <cstdlib>
#include <cstring>

#include "cpu/naive.h"
#include "cpu/vectorized.h"
#include "cuda/backends.h"

namespace natten {
namespace detail {
namespace {

const Backends& backends_of(DeviceType device) {
  static const Backends cpu = {&cpu::vectorized, &cpu::naive};  // the readable reference is last
  return device == DeviceType::cpu ? cpu : cuda::backends();
}

/// Stands for every backend but the reference.
constexpr const char* kFused = "fused";

bool answers_to(const Backend& backend, const std::string& forced) {
  return forced.empty() || forced == backend.name ||
         (forced == kFused && std::strcmp(backend.name, "naive") != 0);
}

bool is_named(const Context& context) { return context.backend && *context.backend; }

std::string forced_name(const Context& context) {
  if (is_named(context)) return context.backend;
  const char* from_environment = std::getenv("NATTEN_BACKEND");
  return from_environment ? from_environment : "";
}

void require_device(DeviceType device) {
  if (built_for(device)) return;
  throw Error(ErrorKind::invalid_value,
              std::string("device: the tensors are on ") + name_of(device) +
                  ", for which this build of libnatten has no kernels; rebuild it with "
                  "-DNATTEN_WITH_CUDA=ON (pip install . -Ccmake.define.NATTEN_WITH_CUDA=ON) or "
                  "move the tensors to the CPU");
}

}  // namespace

const Backend& select(const Problem& problem, const Context& context) {
  require_device(problem.device.type);
  const std::string forced = forced_name(context);
  std::string refusals, names;
  bool known = false;
  for (const Backend* backend : backends_of(problem.device.type)) {
    names += std::string(names.empty() ? "" : ", ") + backend->name;
    if (!answers_to(*backend, forced)) continue;
    known = true;
    const std::string refusal = backend->refuse_reason(problem);
    if (refusal.empty()) return *backend;
    refusals += std::string(backend->name) + ": " + refusal + "; ";
  }
  if (!known)
    throw Error(ErrorKind::invalid_value,
                "backend: got \"" + forced + "\"" +
                    (is_named(context) ? "" : " from the environment variable NATTEN_BACKEND") +
                    "; must be one of " + names + ", or " + kFused +
                    " (any but naive), for tensors on " + name_of(problem.device.type));
  throw Error(ErrorKind::invalid_value,
              "backend: none runs this problem: " + refusals + "see natten::explain");
}

}  // namespace detail

std::vector<std::string> backends(DeviceType device) {
  std::vector<std::string> names;
  for (const detail::Backend* backend : detail::backends_of(device)) names.push_back(backend->name);
  return names;
}

std::vector<Verdict> explain(const Problem& problem, const Context& context) {
  const std::string forced = detail::forced_name(context);
  std::vector<Verdict> verdicts;
  bool chosen = false;
  for (const detail::Backend* backend : detail::backends_of(problem.device.type)) {
    Verdict verdict{backend->name, backend->refuse_reason(problem), false};
    verdict.chosen = !chosen && verdict.refusal.empty() && detail::answers_to(*backend, forced);
    chosen = chosen || verdict.chosen;
    verdicts.push_back(verdict);
  }
  return verdicts;
}

bool built_for(DeviceType device) { return !detail::backends_of(device).empty(); }

int compute_capability(int device_index) noexcept {
  return detail::cuda::compute_capability(device_index);
}

}  // namespace natten
