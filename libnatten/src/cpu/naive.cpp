#include "naive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../dispatch.h"
#include "../operand.h"
#include "parallel.h"

// Sums are kept in float64 whatever the element type, so that their length does not matter and
// other backends can be judged by this one. Every work item writes its own results, so nothing
// depends on the number of threads.

namespace natten::detail::cpu {
namespace {

constexpr double kEmpty = -std::numeric_limits<double>::infinity();

template <class T>
double dot(const T* a, const T* b, std::int64_t n) {
  constexpr int kLanes = 8;  // independent sums, which the compiler turns into vectors
  double sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
  double sum = 0;
  for (; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (double lane : sums) sum += lane;
  return sum;
}

template <class T>
void add_scaled(std::vector<double>& sum, double factor, const T* x) {
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += factor * static_cast<double>(x[i]);
}

template <class T>
void store(T* to, const std::vector<double>& from) {
  for (std::size_t i = 0; i < from.size(); ++i) to[i] = static_cast<T>(from[i]);
}

/// exp(score) / exp(logsumexp). Where all scores of a query are -inf so is their logsumexp, and no
/// key has a weight.
double weight_of(double score, double logsumexp) {
  return std::exp(score - (logsumexp == kEmpty ? -kEmpty : logsumexp));
}

// Queries and keys go by their numbers among those that are given, positions by their place in the
// dilation group.

/// One key of a query's window: its slot, its number and its offset in relative positions.
struct Neighbor {
  std::int64_t slot;
  Coordinate key;
  Coordinate offset;
};

/// Where a query is along an axis.
struct Place {
  std::int64_t group, position;
};
Place place_of_query(const Axis& axis, std::int64_t query) {
  const std::int64_t token = query + axis.query_offset;
  return {group_of(axis, token), position_of(axis, token)};
}

/// The pair (query, key) seen from either side.
Neighbor neighbor(const Problem& p, const Coordinate& query, const Coordinate& key_position) {
  Neighbor n{0, {}, {}};
  for (int i = 0; i < kMaxRank; ++i) {
    const Axis& axis = p.axes[i];
    const Place at = place_of_query(axis, query[i]);
    const std::int64_t slot = key_position[i] - first_slot(axis, at.group, at.position);
    n.slot = n.slot * axis.kernel_size + slot;
    n.key[i] = key_index(axis, token_at(axis, at.group, key_position[i]));
    n.offset[i] = key_position[i] - at.position + axis.kernel_size - 1;
  }
  return n;
}

/// Visits a box of positions in row-major order.
template <class F>
void for_each_position(const Interval (&box)[kMaxRank], F&& f) {
  Coordinate at;
  for (at[0] = box[0].begin; at[0] < box[0].end; ++at[0])
    for (at[1] = box[1].begin; at[1] < box[1].end; ++at[1])
      for (at[2] = box[2].begin; at[2] < box[2].end; ++at[2]) f(at);
}

/// One row of a phase: batch entry, head and number of a query or key.
struct Row {
  std::int64_t batch, head;
  Coordinate token;
};

/// Visits the keys that a query sees: `f(Neighbor)`.
template <class F>
void for_each_key(const Problem& p, const KeyMask& mask, const Row& query, F&& f) {
  Interval box[kMaxRank];
  for (int i = 0; i < kMaxRank; ++i) {
    const Place at = place_of_query(p.axes[i], query.token[i]);
    box[i] = window(p.axes[i], at.group, at.position);
  }
  for_each_position(box, [&](const Coordinate& key) {
    const Neighbor n = neighbor(p, query.token, key);
    if (!mask.hides(query.batch, n.key)) f(n);
  });
}

/// Visits the queries that see a key: `f(number of the query, Neighbor)`.
template <class F>
void for_each_query(const Problem& p, const KeyMask& mask, const Row& key, F&& f) {
  if (mask.hides(key.batch, key.token)) return;
  Interval box[kMaxRank];
  Coordinate group, key_position;
  for (int i = 0; i < kMaxRank; ++i) {
    const std::int64_t token = key.token[i] + p.axes[i].key_offset;
    group[i] = group_of(p.axes[i], token);
    key_position[i] = position_of(p.axes[i], token);
    box[i] = inverse_window(p.axes[i], group[i], key_position[i]);
  }
  for_each_position(box, [&](const Coordinate& position) {
    Coordinate query, shifted;
    for (int i = 0; i < kMaxRank; ++i) {
      const std::int64_t token = token_at(p.axes[i], group[i], position[i]);
      query[i] = query_index(p.axes[i], token);
      if (query[i] < 0) return;  // not given
      // Of a query beyond the seam, the key is seen from the other end.
      shifted[i] = key_position[i] + place_of_query(p.axes[i], query[i]).position - position[i];
    }
    f(query, neighbor(p, query, shifted));
  });
}

/// Most keys that a query sees: cut windows may be larger than any grid.
std::int64_t most_seen(const Problem& p) {
  std::int64_t keys = 1;
  for (const Axis& axis : p.axes) keys *= std::min(axis.kernel_size, axis.key_length);
  return keys + p.additional;
}

/// A phase with one item per batch entry, head and token. `make_body()` is called once per chunk
/// of work and returns what handles a row, so that its buffers are reused.
template <class MakeBody>
Phase row_phase(const Problem& p, std::int64_t heads, const Coordinate& lengths,
                MakeBody make_body) {
  const std::int64_t tokens = volume(lengths);
  return {p.batch * heads * tokens, [=](std::int64_t begin, std::int64_t end) {
            auto body = make_body();
            for (std::int64_t i = begin; i < end; ++i) {
              checkpoint(most_seen(p) * (p.head_dim + p.value_dim + 1));
              body(Row{i / tokens / heads, i / tokens % heads, unravel(i % tokens, lengths)});
            }
          }};
}

/// Sums `value(row, neighbor)` over batch and all (query, key) pairs, per head and offset.
template <class T, class Value>
Phase rpb_phase(const Problem& p, const KeyMask& mask, const Operand<T>& grad_rpb, Value value) {
  const Coordinate offsets = relative_positions(p);
  const std::int64_t count = volume(offsets);
  return {p.heads * count, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t item = begin; item < end; ++item) {
              const std::int64_t head = item / count;
              const Coordinate offset = unravel(item % count, offsets);
              double sum = 0;
              for (std::int64_t batch = 0; batch < p.batch; ++batch) {
                checkpoint(p.queries() * (p.head_dim + p.value_dim + 1));
                for (std::int64_t i = 0; i < p.queries(); ++i) {
                  const Row row{batch, head, unravel(i, query_lengths(p))};
                  Coordinate key;
                  bool sees = true;
                  for (int d = 0; d < kMaxRank && sees; ++d) {
                    const Axis& axis = p.axes[d];
                    const Place at = place_of_query(axis, row.token[d]);
                    key[d] = at.position + offset[d] - (axis.kernel_size - 1);
                    sees = window(axis, at.group, at.position).contains(key[d]);
                  }
                  if (!sees) continue;
                  const Neighbor n = neighbor(p, row.token, key);
                  if (!mask.hides(batch, n.key)) sum += value(row, n);
                }
              }
              *grad_rpb.at(0, head, offset) = static_cast<T>(sum);
            }
          }};
}

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

/// Fused attention: what forward and backward share.
template <class T>
struct Attention {
  using In = Operand<const T>;
  Problem p;
  In query, key, value, rpb, additional_keys, additional_values;
  KeyMask mask;

  Attention(const Job& job)
      : p(job.problem),
        query(operand<const T>(p, job.tensors, &Tensors::query)),
        key(operand<const T>(p, job.tensors, &Tensors::key)),
        value(operand<const T>(p, job.tensors, &Tensors::value)),
        rpb(operand<const T>(p, job.tensors, &Tensors::rpb)),
        additional_keys(operand<const T>(p, job.tensors, &Tensors::additional_keys)),
        additional_values(operand<const T>(p, job.tensors, &Tensors::additional_values)),
        mask(key_mask(p, job.tensors)) {}

  std::int64_t heads_per_kv_head() const { return p.heads / p.kv_heads; }

  double score(const T* q, const T* k) const { return p.scale * dot(q, k, p.head_dim); }
  double score(const Row& row, const T* q, const Neighbor& n) const {
    const double bias = rpb ? static_cast<double>(*rpb.at(0, row.head, n.offset)) : 0.0;
    return score(q, key.at(row.batch, row.head / heads_per_kv_head(), n.key)) + bias;
  }

  /// Visits all a query attends to, `f(score, key, value, number)`: window, then additional tokens;
  /// numbered as they come.
  template <class F>
  void for_each_score(const Row& row, F&& f) const {
    const T* q = query.at(row.batch, row.head, row.token);
    const std::int64_t kv_head = row.head / heads_per_kv_head();
    std::size_t number = 0;
    for_each_key(p, mask, row, [&](const Neighbor& n) {
      f(score(row, q, n), key.at(row.batch, kv_head, n.key), value.at(row.batch, kv_head, n.key),
        number++);
    });
    for (std::int64_t i = 0; i < p.additional; ++i) {
      const T* k = additional_keys.at(row.batch, kv_head, i);
      f(score(q, k), k, additional_values.at(row.batch, kv_head, i), number++);
    }
  }
};

template <class T>
std::vector<Phase> attention_forward(const Job& job) {
  const Attention<T> a(job);
  const auto output = operand<T>(a.p, job.tensors, &Tensors::output);
  const auto logsumexp = operand<StatisticOf<T>>(a.p, job.tensors, &Tensors::logsumexp);
  return {row_phase(a.p, a.p.heads, query_lengths(a.p), [=] {
    return [=, scores = std::vector<double>(size(most_seen(a.p))),
            sum = std::vector<double>(size(a.p.value_dim))](const Row& row) mutable {
      double largest = kEmpty;
      a.for_each_score(row, [&](double score, const T*, const T*, std::size_t i) {
        scores[i] = score;
        largest = std::max(largest, score);  // a NaN stays in scores and reaches the sums
      });
      double total = 0;
      std::fill(sum.begin(), sum.end(), 0.0);
      a.for_each_score(row, [&](double, const T*, const T* v, std::size_t i) {
        const double weight = weight_of(scores[i], largest);
        total += weight;
        add_scaled(sum, weight, v);
      });
      for (double& x : sum) x /= total == 0 ? 1 : total;
      store(output.at(row.batch, row.head, row.token), sum);
      if (logsumexp)
        *logsumexp.at(row.batch, row.head, row.token) =
            static_cast<StatisticOf<T>>(largest + std::log(total));
    };
  })};
}

/// With P = exp(score - logsumexp) and dP = <grad_output, value>, the gradient of a score is
/// dS = P * (dP - (sum of P * dP) / (sum of P) + grad_logsumexp), with sums over the row. That of P
/// is 1 only as well as logsumexp is rounded, which is the worse the larger scores are.
template <class T>
std::vector<Phase> attention_backward(const Job& job) {
  using Stat = StatisticOf<T>;
  const Attention<T> a(job);
  const Tensors& t = job.tensors;
  const Problem& p = a.p;
  const auto logsumexp = operand<const Stat>(p, t, &Tensors::logsumexp);
  const auto grad_output = operand<const T>(p, t, &Tensors::grad_output);
  const auto grad_logsumexp = operand<const Stat>(p, t, &Tensors::grad_logsumexp);
  const auto grad_query = operand<T>(p, t, &Tensors::grad_query);
  const auto grad_key = operand<T>(p, t, &Tensors::grad_key);
  const auto grad_value = operand<T>(p, t, &Tensors::grad_value);
  const auto grad_rpb = operand<T>(p, t, &Tensors::grad_rpb);
  const auto grad_additional_keys = operand<T>(p, t, &Tensors::grad_additional_keys);
  const auto grad_additional_values = operand<T>(p, t, &Tensors::grad_additional_values);

  // Per query and head: the quotient of sums, minus grad_logsumexp. Contiguous [B, H, queries].
  const Operand<Stat> row_term = row_term_operand(p, static_cast<Stat*>(job.workspace));

  // P and dP of one pair. The score and dP are rounded as logsumexp and row_term are: where one
  // weight of a row is all of it, it is 1 and its dP the row's term, and dS is 0.
  struct Pair {
    double weight, grad_weight;
  };
  const auto pair = [=](const Row& row, double score, const T* v) {
    const auto rounded = [](double x) { return static_cast<double>(static_cast<Stat>(x)); };
    return Pair{weight_of(rounded(score),
                          static_cast<double>(*logsumexp.at(row.batch, row.head, row.token))),
                rounded(dot(grad_output.at(row.batch, row.head, row.token), v, a.p.value_dim))};
  };
  // dS of one pair. Needs row_term, so it serves the phases after the first.
  const auto grad_score = [=](const Row& row, const Pair& x) {
    return x.weight *
           (x.grad_weight - static_cast<double>(*row_term.at(row.batch, row.head, row.token)));
  };

  std::vector<Phase> phases;
  phases.push_back(row_phase(p, p.heads, query_lengths(p), [=] {
    return [=, pairs = std::vector<Pair>(size(most_seen(a.p))),
            sum = std::vector<double>(size(a.p.head_dim))](const Row& row) mutable {
      double term = 0, total = 0;
      a.for_each_score(row, [&](double score, const T*, const T* v, std::size_t i) {
        const Pair x = pairs[i] = pair(row, score, v);
        term += x.weight * x.grad_weight;
        total += x.weight;
      });
      if (total == 0) total = 1;  // all scores are -inf
      term /= total;
      if (grad_logsumexp)
        term -= static_cast<double>(*grad_logsumexp.at(row.batch, row.head, row.token));
      *row_term.at(row.batch, row.head, row.token) = static_cast<Stat>(term);
      if (!grad_query) return;
      std::fill(sum.begin(), sum.end(), 0.0);
      a.for_each_score(row, [&](double, const T* k, const T*, std::size_t i) {
        add_scaled(sum, a.p.scale * grad_score(row, pairs[i]) / total, k);
      });
      store(grad_query.at(row.batch, row.head, row.token), sum);
    };
  }));

  if (grad_key || grad_value)
    phases.push_back(row_phase(p, p.kv_heads, key_lengths(p), [=] {
      return [=, key_sum = std::vector<double>(size(a.p.head_dim)),
              value_sum = std::vector<double>(size(a.p.value_dim))](const Row& at) mutable {
        std::fill(key_sum.begin(), key_sum.end(), 0.0);
        std::fill(value_sum.begin(), value_sum.end(), 0.0);
        const T* v = a.value.at(at.batch, at.head, at.token);
        for (std::int64_t i = 0; i < a.heads_per_kv_head(); ++i)
          for_each_query(a.p, a.mask, at, [&](const Coordinate& token, const Neighbor& n) {
            const Row row{at.batch, at.head * a.heads_per_kv_head() + i, token};
            const T* q = a.query.at(row.batch, row.head, row.token);
            const Pair x = pair(row, a.score(row, q, n), v);
            add_scaled(key_sum, a.p.scale * grad_score(row, x), q);
            add_scaled(value_sum, x.weight, grad_output.at(row.batch, row.head, row.token));
          });
        if (grad_key) store(grad_key.at(at.batch, at.head, at.token), key_sum);
        if (grad_value) store(grad_value.at(at.batch, at.head, at.token), value_sum);
      };
    }));

  if (grad_additional_keys || grad_additional_values)
    phases.push_back(row_phase(p, p.kv_heads, {1, 1, p.additional}, [=] {
      return [=, key_sum = std::vector<double>(size(a.p.head_dim)),
              value_sum = std::vector<double>(size(a.p.value_dim))](const Row& at) mutable {
        const std::int64_t n = at.token[2];
        std::fill(key_sum.begin(), key_sum.end(), 0.0);
        std::fill(value_sum.begin(), value_sum.end(), 0.0);
        const T* k = a.additional_keys.at(at.batch, at.head, n);
        const T* v = a.additional_values.at(at.batch, at.head, n);
        for (std::int64_t i = 0; i < a.heads_per_kv_head(); ++i) {
          checkpoint(a.p.queries() * (a.p.head_dim + a.p.value_dim));
          for (std::int64_t token = 0; token < a.p.queries(); ++token) {
            const Row row{at.batch, at.head * a.heads_per_kv_head() + i,
                          unravel(token, query_lengths(a.p))};
            const T* q = a.query.at(row.batch, row.head, row.token);
            const Pair x = pair(row, a.score(q, k), v);
            add_scaled(key_sum, a.p.scale * grad_score(row, x), q);
            add_scaled(value_sum, x.weight, grad_output.at(row.batch, row.head, row.token));
          }
        }
        if (grad_additional_keys) store(grad_additional_keys.at(at.batch, at.head, n), key_sum);
        if (grad_additional_values)
          store(grad_additional_values.at(at.batch, at.head, n), value_sum);
      };
    }));

  if (grad_rpb)
    phases.push_back(rpb_phase(p, a.mask, grad_rpb, [=](const Row& row, const Neighbor& n) {
      const T* q = a.query.at(row.batch, row.head, row.token);
      const T* v = a.value.at(row.batch, row.head / a.heads_per_kv_head(), n.key);
      return grad_score(row, pair(row, a.score(row, q, n), v));
    }));
  return phases;
}

/// Fills the slots of one query's weights that hold nothing.
template <class T>
void clear_slots(const Problem& p, T* attn, std::int64_t count) {
  const double fill = p.empty_slots == EmptySlots::zero ? 0.0 : kEmpty;
  std::fill(attn, attn + count, static_cast<T>(fill));
}

template <class T>
std::vector<Phase> qk(const Job& job) {
  const Problem p = job.problem;
  const auto query = operand<const T>(p, job.tensors, &Tensors::query);
  const auto key = operand<const T>(p, job.tensors, &Tensors::key);
  const auto rpb = operand<const T>(p, job.tensors, &Tensors::rpb);
  const auto additional_keys = operand<const T>(p, job.tensors, &Tensors::additional_keys);
  const auto attn = operand<T>(p, job.tensors, &Tensors::attn);
  const KeyMask mask = key_mask(p, job.tensors);
  return {row_phase(p, p.heads, query_lengths(p), [=] {
    return [=](const Row& row) {
      const T* q = query.at(row.batch, row.head, row.token);
      T* slots = attn.at(row.batch, row.head, row.token);
      clear_slots(p, slots, p.window_size());
      for_each_key(p, mask, row, [&](const Neighbor& n) {
        const double bias = rpb ? static_cast<double>(*rpb.at(0, row.head, n.offset)) : 0.0;
        slots[n.slot] =
            static_cast<T>(dot(q, key.at(row.batch, row.head, n.key), p.head_dim) + bias);
      });
      for (std::int64_t i = 0; i < p.additional; ++i)
        slots[p.window_size() + i] =
            static_cast<T>(dot(q, additional_keys.at(row.batch, row.head, i), p.head_dim));
    };
  })};
}

template <class T>
std::vector<Phase> av(const Job& job) {
  const Problem p = job.problem;
  const auto attn = operand<const T>(p, job.tensors, &Tensors::attn);
  const auto value = operand<const T>(p, job.tensors, &Tensors::value);
  const auto additional_values = operand<const T>(p, job.tensors, &Tensors::additional_values);
  const auto output = operand<T>(p, job.tensors, &Tensors::output);
  const KeyMask mask = key_mask(p, job.tensors);
  return {row_phase(p, p.heads, query_lengths(p), [=] {
    return [=, sum = std::vector<double>(size(p.head_dim))](const Row& row) mutable {
      const T* slots = attn.at(row.batch, row.head, row.token);
      std::fill(sum.begin(), sum.end(), 0.0);
      for_each_key(p, mask, row, [&](const Neighbor& n) {
        add_scaled(sum, static_cast<double>(slots[n.slot]), value.at(row.batch, row.head, n.key));
      });
      for (std::int64_t i = 0; i < p.additional; ++i)
        add_scaled(sum, static_cast<double>(slots[p.window_size() + i]),
                   additional_values.at(row.batch, row.head, i));
      store(output.at(row.batch, row.head, row.token), sum);
    };
  })};
}

template <class T>
Phase additional_keys(const Job& job) {
  const Problem p = job.problem;
  const auto attn = operand<const T>(p, job.tensors, &Tensors::attn);
  const auto query = operand<const T>(p, job.tensors, &Tensors::query);
  const auto keys = operand<T>(p, job.tensors, &Tensors::additional_keys);
  return row_phase(p, p.heads, {1, 1, p.additional}, [=] {
    return [=, sum = std::vector<double>(size(p.head_dim))](const Row& at) mutable {
      const std::int64_t n = at.token[2];
      std::fill(sum.begin(), sum.end(), 0.0);
      checkpoint(p.queries() * p.head_dim);
      for (std::int64_t i = 0; i < p.queries(); ++i) {
        const Coordinate token = unravel(i, query_lengths(p));
        add_scaled(sum, static_cast<double>(attn.at(at.batch, at.head, token)[p.window_size() + n]),
                   query.at(at.batch, at.head, token));
      }
      store(keys.at(at.batch, at.head, n), sum);
    };
  });
}

template <class T>
std::vector<Phase> av_transpose(const Job& job) {
  const Problem p = job.problem;
  const auto attn = operand<const T>(p, job.tensors, &Tensors::attn);
  const auto query = operand<const T>(p, job.tensors, &Tensors::query);
  const auto key = operand<T>(p, job.tensors, &Tensors::key);
  const KeyMask mask = key_mask(p, job.tensors);
  std::vector<Phase> phases;
  phases.push_back(row_phase(p, p.heads, key_lengths(p), [=] {
    return [=, sum = std::vector<double>(size(p.head_dim))](const Row& at) mutable {
      std::fill(sum.begin(), sum.end(), 0.0);
      for_each_query(p, mask, at, [&](const Coordinate& token, const Neighbor& n) {
        add_scaled(sum, static_cast<double>(attn.at(at.batch, at.head, token)[n.slot]),
                   query.at(at.batch, at.head, token));
      });
      store(key.at(at.batch, at.head, at.token), sum);
    };
  }));
  if (job.tensors.additional_keys) phases.push_back(additional_keys<T>(job));
  return phases;
}

template <class T>
std::vector<Phase> rpb_gather(const Job& job) {
  const Problem p = job.problem;
  const auto rpb = operand<const T>(p, job.tensors, &Tensors::rpb);
  const auto attn = operand<T>(p, job.tensors, &Tensors::attn);
  const KeyMask mask = key_mask(p, job.tensors);
  return {row_phase(p, p.heads, query_lengths(p), [=] {
    return [=](const Row& row) {
      T* slots = attn.at(row.batch, row.head, row.token);
      clear_slots(p, slots, p.window_size());
      std::fill(slots + p.window_size(), slots + p.slots(), T(0.0));
      for_each_key(p, mask, row,
                   [&](const Neighbor& n) { slots[n.slot] = *rpb.at(0, row.head, n.offset); });
    };
  })};
}

template <class T>
std::vector<Phase> rpb_scatter(const Job& job) {
  const Problem p = job.problem;
  const auto attn = operand<const T>(p, job.tensors, &Tensors::attn);
  const auto grad_rpb = operand<T>(p, job.tensors, &Tensors::grad_rpb);
  return {rpb_phase(p, key_mask(p, job.tensors), grad_rpb, [=](const Row& row, const Neighbor& n) {
    return static_cast<double>(attn.at(row.batch, row.head, row.token)[n.slot]);
  })};
}

template <class T>
std::vector<Phase> phases_of(const Job& job) {
  switch (job.problem.op) {
    case Op::attention_forward: return attention_forward<T>(job);
    case Op::attention_backward: return attention_backward<T>(job);
    case Op::qk: return qk<T>(job);
    case Op::av: return av<T>(job);
    case Op::av_transpose: return av_transpose<T>(job);
    case Op::rpb_gather: return rpb_gather<T>(job);
    case Op::rpb_scatter: return rpb_scatter<T>(job);
  }
  return {};
}

std::string refuse_reason(const Problem&) { return {}; }

std::size_t workspace_bytes(const Problem& p) {
  if (p.op != Op::attention_backward) return 0;
  const std::size_t rows = size(p.batch * p.heads * p.queries());
  return rows * size_of(statistic_dtype(p.dtype));
}

void run(const std::vector<Job>& jobs, const Context& context) {
  std::vector<std::vector<Phase>> phases;
  phases.reserve(jobs.size());
  for (const Job& job : jobs) phases.push_back(naive_phases(job));
  run_phases(phases, context.executor, context.interrupted);
}

}  // namespace

std::vector<Phase> naive_phases(const Job& job) {
  return dispatch_dtype(job.problem.dtype,
                        [&](auto type) { return phases_of<typename decltype(type)::type>(job); });
}

Phase additional_keys_phase(const Job& job) {
  return dispatch_dtype(job.problem.dtype, [&](auto type) {
    return additional_keys<typename decltype(type)::type>(job);
  });
}

const Backend naive = {"naive", refuse_reason, workspace_bytes, run};

}  // namespace natten::detail::cpu
