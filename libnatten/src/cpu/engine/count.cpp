#include "count.h"

#include <algorithm>
#include <numeric>

#include "../parallel.h"
#include "engine.h"
#include "stream.h"
#include "unseen.h"

// The engine runs a pass whose functions count where others compute, so what is counted is what is
// done: the plan, its strips and pieces, the ring of packed lines and the steps of the kernels.

namespace natten::detail::cpu::engine {
namespace {

constexpr const char* kNames[] = {"forward", "backward_query", "backward_key"};
constexpr const char* kNameOfBoth = "backward";  // of the last two

double as_double(std::int64_t n) { return static_cast<double>(n); }

/// Gradients that a key has in one head.
std::int64_t gradient_elements(const Problem& p) {
  return (p.wants_grad_key ? p.head_dim : 0) + (p.wants_grad_value ? p.value_dim : 0);
}

/// Of a unit, in multiply-adds.
double work_in(const PassWork& pass) { return pass.executed + kPackedByte * pass.packed; }

/// PassWork::balance of units that are handed out as threads get free. `groups`: the units of each
/// group of heads of a batch entry, in turn.
double balance_of(const std::vector<std::vector<double>>& groups, std::int64_t batch, int threads) {
  std::vector<double> units;
  for (std::int64_t b = 0; b < batch; ++b)
    for (const std::vector<double>& group : groups)
      units.insert(units.end(), group.begin(), group.end());
  std::vector<double> busy(static_cast<std::size_t>(threads));  // until when each thread is
  const auto count = static_cast<std::int64_t>(units.size());
  const std::int64_t chunks = chunks_of(count, threads);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
    *std::min_element(busy.begin(), busy.end()) += std::accumulate(
        units.begin() + count * chunk / chunks, units.begin() + count * (chunk + 1) / chunks, 0.0);
  return std::accumulate(busy.begin(), busy.end(), 0.0) / threads /
         *std::max_element(busy.begin(), busy.end());
}

template <class E>
class Count final : public Pass<E> {
 public:
  using T = StatisticOf<E>;
  using Pass<E>::plan;

  /// `by_unit` gets the work done before each unit.
  Count(const Job& job, PassKind kind, int threads, PassWork& to, std::vector<double>& by_unit)
      : Pass<E>(job, kind, threads), to_(to), by_unit_(by_unit) {}

  void take_memory(Arena&) override {}

  void begin_unit(const Work&) override { by_unit_.push_back(work_in(to_)); }

  void load_rows(const Work& work, Loader<T>&) override {
    const Problem& p = plan.problem();
    rows_ = as_double(work.line_count * work.row_count * work.head_count);
    std::int64_t elements = p.head_dim, packed = plan.elements(p.head_dim), numbers = 0;
    if (plan.kind() != PassKind::forward) {
      elements += p.value_dim;
      packed += plan.elements(p.value_dim);
    }
    if (plan.kind() == PassKind::backward_query) numbers = 1;  // logsumexp
    to_.read += rows_ * bytes_of(elements, numbers);
    to_.packed += rows_ * as_double(packed) * sizeof(T);
  }

  int rounds() const override {
    return plan.kind() == PassKind::backward_query && plan.has_pieces() ? 2 : 1;
  }

  void pack_line(const Work& work, const LineToPack<T>& line, Loader<T>&) override {
    const Problem& p = plan.problem();
    const ColumnShape& c = plan.column;
    for_each_run(plan, work, line.first, line.count,
                 [&](const Coordinate*, std::int64_t, std::int64_t count) {
                   const double columns = as_double(count * work.column_head_count);
                   to_.packs += 1;
                   to_.read += columns * bytes_of(p.head_dim + p.value_dim, c.statistics ? 2 : 0);
                   to_.packed += columns *
                                 as_double(c.transposed + c.transposed_grad + c.plain +
                                           c.plain_grad + (c.statistics ? 2 : 0)) *
                                 sizeof(T);
                 });
  }

  void run_block(const Work& work, const Columns<T>&, const simd::Block<T>& block) override {
    const Problem& p = plan.problem();
    simd::StepCount n;
    n.at_once = plan.kind() == PassKind::backward_query && rounds() == 1;
    this->kernels().count(block, n);
    const bool is_first = work.round == 0, is_last = work.round == rounds() - 1;
    std::int64_t scores = p.head_dim, sums = plan.value_padded;
    if (plan.kind() == PassKind::backward_query) sums = is_last ? plan.padded : 0;
    if (plan.kind() == PassKind::backward_key) sums += plan.padded;
    if (plan.kind() != PassKind::forward) scores += p.value_dim;
    // Row terms first, where the steps of a row do not fit into one batch; then what is not kept
    // is computed again.
    double times = 1;
    if (plan.kind() == PassKind::backward_query && n.batches > (is_first ? 1 : 0) && is_last)
      times = (is_first ? 1 : 0) +
              as_double(std::max<std::int64_t>(n.batches - KeptPart(plan, work).count, 0)) /
                  as_double(n.batches);
    const std::int64_t of_columns = (p.wants_grad_key ? plan.column.grad_key : 0) +
                                    (p.wants_grad_value ? plan.column.grad_value : 0);
    to_.calls += 1;
    to_.tiles += as_double(n.visits);
    to_.weights += times * as_double(n.steps * plan.width);
    to_.masked += times * as_double(n.masked * plan.width);
    to_.executed += times * as_double(n.steps * plan.width * scores) +
                    as_double(n.sums * sums + (is_last ? n.column_sums : 0) * of_columns);
  }

  void store_columns(const Work& work, const LineSums<T>& sums) override {
    const Problem& p = plan.problem();
    to_.written += as_double(sums.count * work.head_count * p.kv_heads / p.heads) *
                   bytes_of(gradient_elements(p), 0);
  }

  void store_rows(const Work&) override {
    const Problem& p = plan.problem();
    const std::int64_t elements = plan.kind() == PassKind::forward ? p.value_dim
                                  : plan.kind() == PassKind::backward_query
                                      ? p.head_dim
                                      : p.head_dim + p.value_dim;
    const bool has_number = plan.kind() == PassKind::backward_query || p.has_logsumexp;
    to_.written += rows_ * bytes_of(elements, plan.kind() != PassKind::backward_key && has_number);
  }

 private:
  static double bytes_of(std::int64_t elements, std::int64_t numbers) {
    return as_double(elements) * sizeof(E) + as_double(numbers) * sizeof(T);
  }

  PassWork& to_;
  std::vector<double>& by_unit_;
  double rows_ = 0;  // at hand
};

/// Adds `from`, `times` over.
void add(PassWork& to, const PassWork& from, double times) {
  for (double PassWork::*x :
       {&PassWork::tiles, &PassWork::executed, &PassWork::weights, &PassWork::masked,
        &PassWork::calls, &PassWork::packs, &PassWork::packed, &PassWork::read, &PassWork::written})
    to.*x += times * (from.*x);
}

template <class E>
PassWork count_pass(const Job& job, PassKind kind, int threads) {
  PassWork result;
  const Problem& p = job.problem;
  const Plan plan = plan_for<E>(p, kind, threads);
  // Batch entries are alike, and so are groups of heads but the last, which may hold fewer.
  const std::int64_t groups = plan.head_groups();
  std::vector<std::vector<double>> units;  // of each group
  const auto count_group = [&](std::int64_t group, std::int64_t times) {
    PassWork one;
    std::vector<double> by_unit;
    Count<E> pass(job, kind, threads, one, by_unit);
    Engine<E> engine(pass, AdditionalTokens<E>(job), BiasTables<E>(job, plan));
    engine.run(group * plan.units, (group + 1) * plan.units);
    add(result, one, as_double(times * p.batch));
    by_unit.push_back(work_in(one));
    std::adjacent_difference(by_unit.begin(), by_unit.end(), by_unit.begin());
    by_unit.erase(by_unit.begin());
    units.insert(units.end(), static_cast<std::size_t>(times), by_unit);
  };
  const bool is_even = plan.grid.heads() % plan.row_heads == 0;
  if (is_even || groups > 1) count_group(0, is_even ? groups : groups - 1);
  if (!is_even) count_group(groups - 1, 1);
  if (gives_to_columns(plan))
    result.written += as_double(p.batch * p.kv_heads * SeenKeys(plan.grid).others() *
                                gradient_elements(p) * sizeof(E));
  result.name = gives_to_columns(plan) ? kNameOfBoth : kNames[static_cast<int>(kind)];
  result.units = plan.total_units();
  result.balance = balance_of(units, p.batch, threads);
  return result;
}

}  // namespace

std::vector<PassWork> count_passes(const Problem& problem, int threads) {
  const Job job{problem, {}, nullptr};
  std::vector<PassWork> passes;
  if (problem.op == Op::attention_forward && is_stream(problem)) {
    passes.push_back(count_stream(problem, threads));
    passes[0].name = kNames[0];
    return passes;
  }
  dispatch_dtype(problem.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    if (problem.op == Op::attention_forward) {
      passes.push_back(count_pass<E>(job, PassKind::forward, threads));
      return;
    }
    passes.push_back(count_pass<E>(job, PassKind::backward_query, threads));
    if ((problem.wants_grad_key || problem.wants_grad_value) && passes[0].name != kNameOfBoth)
      passes.push_back(count_pass<E>(job, PassKind::backward_key, threads));
  });
  return passes;
}

}  // namespace natten::detail::cpu::engine
