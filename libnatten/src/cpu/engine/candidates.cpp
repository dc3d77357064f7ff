#include "candidates.h"

#include <algorithm>
#include <tuple>

#include "plan.h"
#include "stream.h"

namespace natten::detail::cpu::engine {
namespace {

using Plans = std::vector<Plan>;  // of an operation's passes

Plans plans_of(const Problem& problem, int threads, const Configuration& configuration) {
  return dispatch_dtype(problem.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    Plans plans{plan_for<E>(problem, first_pass(problem.op), threads, configuration)};
    if (problem.op != Op::attention_backward) return plans;
    plans[0] = plan_for<E>(problem, PassKind::backward_query, threads, configuration);
    if (problem.wants_grad_key || problem.wants_grad_value)
      plans.push_back(plan_for<E>(problem, PassKind::backward_key, threads, configuration));
    return plans;
  });
}

bool sum_alike(const Plans& a, const Plans& b) {
  return std::equal(a.begin(), a.end(), b.begin(), sums_alike);
}

bool are_same(const Plans& a, const Plans& b) {
  const auto cut = [](const Plan& p) {
    return std::tuple(p.width, p.row_heads, p.stack, p.strip, p.sweeps, p.slabs, p.ring0, p.ring1);
  };
  return std::equal(a.begin(), a.end(), b.begin(),
                    [&](const Plan& x, const Plan& y) { return cut(x) == cut(y); });
}

}  // namespace

std::vector<Configuration> candidates(const Problem& problem, int threads, bool thorough) {
  std::vector<Configuration> found(1);
  // Sums over queries are cut by items, so that they change with those.
  if (!is_fused(problem.op) || problem.wants_grad_rpb || problem.wants_grad_additional)
    return found;
  if (problem.op == Op::attention_forward && is_stream(problem)) return found;
  std::vector<Plans> known{plans_of(problem, threads, {})};
  const Plan plan = known[0][0];
  std::vector<std::int64_t> strips{0, 2 * plan.strip, plan.strip / 2}, heads{0, 2 * plan.row_heads},
      stacks{0};
  for (std::int64_t count = plan.row_heads / 2; count > 0; count /= 2) heads.push_back(count);
  if (thorough) strips.insert(strips.end(), {4 * plan.strip, plan.strip / 4});
  for (std::int64_t stack = plan.stack - 1; stack > 0; --stack) stacks.push_back(stack);
  // What differs from the default in fewer ways comes first, as there may be no time for all.
  for (int ways = 1; ways <= (thorough ? 3 : 2); ++ways)
    for (const std::int64_t stack : stacks)
      for (const std::int64_t count : heads)
        for (const std::int64_t strip : strips) {
          const Configuration asked{strip, stack, count, {}, {}};
          if ((strip > 0) + (stack > 0) + (count > 0) != ways) continue;
          Plans plans = plans_of(problem, threads, asked);
          const bool is_new = std::none_of(known.begin(), known.end(),
                                           [&](const Plans& p) { return are_same(p, plans); });
          if (!is_new || !sum_alike(known[0], plans)) continue;
          found.push_back(asked);
          known.push_back(std::move(plans));
        }
  return found;
}

}  // namespace natten::detail::cpu::engine
