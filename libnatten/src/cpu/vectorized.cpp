#include "vectorized.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "engine/additional.h"
#include "engine/bias.h"
#include "engine/candidates.h"
#include "engine/pass.h"
#include "engine/stream.h"
#include "engine/unseen.h"
#include "engine/workspace.h"
#include "naive.h"
#include "parallel.h"

// The backend: which passes of the engine an operation is made of, and what it refuses.

namespace natten::detail::cpu {
namespace {

using engine::PassKind;
using engine::Plan;

/// There are no sums to compute, only zeros to write.
bool is_empty(const Problem& p) { return p.queries() == 0 || p.keys() == 0; }

template <class E>
std::vector<Phase> backward_phases(const Job& job, int threads) {
  const Problem& p = job.problem;
  const Plan plan = engine::plan_for<E>(p, PassKind::backward_query, threads, job.configuration);
  std::vector<Phase> phases{engine::backward_query<E>(job, plan)};
  if (engine::gives_to_columns(plan))
    phases.push_back(engine::clear_unseen_keys<E>(job, plan));
  else if (p.wants_grad_key || p.wants_grad_value)
    phases.push_back(engine::backward_key<E>(job, threads));
  if (p.wants_grad_rpb) phases.push_back(engine::sum_grad_bias<E>(job, plan));
  if (plan.partial.additional > 0)
    phases.push_back(engine::sum_grad_additional<E>(job, plan));
  else if (p.wants_grad_additional && p.additional > 0)
    phases.push_back(engine::backward_key<E>(engine::additional_tokens_as_keys(job), threads));
  return phases;
}

template <class E>
std::vector<Phase> phases_of(const Job& job, int threads) {
  if (is_empty(job.problem)) return naive_phases(job);
  switch (job.problem.op) {
    case Op::attention_forward:
      return {engine::is_stream(job.problem) ? engine::stream<E>(job, threads)
                                             : engine::forward<E>(job, threads)};
    case Op::attention_backward: return backward_phases<E>(job, threads);
    case Op::qk: return {engine::qk<E>(job, threads)};
    case Op::av: return {engine::av<E>(job, threads)};
    case Op::av_transpose:
      if (!job.tensors.additional_keys) return {engine::av_transpose<E>(job, threads)};
      return {engine::av_transpose<E>(job, threads), additional_keys_phase(job)};
    case Op::rpb_gather: return {engine::rpb_gather(job)};
    case Op::rpb_scatter: break;
  }
  return {engine::rpb_scatter(job)};
}

std::string refuse_reason(const Problem& p) {
  if (is_empty(p)) return {};
  if (p.op != Op::qk && p.op != Op::av && p.op != Op::av_transpose) return {};
  const bool in_pieces = dispatch_dtype(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return engine::plan_for<E>(p, engine::first_pass(p.op), 1).in_pieces;
  });
  if (in_pieces || p.window_size() > engine::kMostWeights)
    return "the window is too large: the weights of a row must fit the cache";
  return {};
}

std::size_t workspace_bytes(const Problem& p) {
  if (p.op != Op::attention_backward) return 0;
  if (is_empty(p)) return naive.workspace_bytes(p);
  return dispatch_dtype(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    using T = StatisticOf<E>;
    const Plan plan = engine::plan_for<E>(p, PassKind::backward_query, 1);
    return static_cast<std::size_t>(engine::Workspace<T>::size(plan)) * sizeof(T);
  });
}

void run(const std::vector<Job>& jobs, const Context& context) {
  double total = 0;
  for (const Job& job : jobs) total += engine::multiply_adds(job.problem);
  Executor& executor = total < engine::kLeastSharedWork ? calling_thread()
                       : context.executor               ? *context.executor
                                                        : default_executor();
  std::vector<std::vector<Phase>> phases;
  phases.reserve(jobs.size());
  for (const Job& job : jobs)
    phases.push_back(dispatch_dtype(job.problem.dtype, [&](auto type) {
      return phases_of<typename decltype(type)::type>(job, executor.concurrency());
    }));
  run_phases(phases, &executor, context.interrupted);
}

const Tunable tunable = {
    [](const Problem& p, int threads, bool thorough) {
      return is_empty(p) ? std::vector<Configuration>(1) : engine::candidates(p, threads, thorough);
    },
    [](const Problem&) { return machine_name(); },
    [](const Context&) { return true; },
    [](const Problem&, const std::function<void()>& run, const Context&) {
      const auto start = std::chrono::steady_clock::now();
      run();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    },
};

}  // namespace

const Backend vectorized = {"vectorized", refuse_reason, workspace_bytes, run, &tunable};

}  // namespace natten::detail::cpu
