#include "unseen.h"

#include <algorithm>

namespace natten::detail::cpu::engine {

SeenKeys::SeenKeys(const RowGrid& queries) {
  std::int64_t seen = 1, keys = 1;
  for (int axis = 0; axis < kMaxRank; ++axis) {
    const Axis& a = queries.problem.axes[axis];
    keys *= a.key_length;
    if (a.query_length == a.grid_length && a.key_length == a.grid_length) {
      seen *= a.key_length;
      continue;
    }
    std::vector<char>& along = along_[axis];
    along.assign(static_cast<std::size_t>(a.key_length), 0);
    for (std::int64_t i = 0; i < queries.groups(axis); ++i) {
      const std::int64_t group = queries.group(axis, i);
      const Interval rows = queries.rows(axis, group);
      const std::int64_t end = queries.columns(axis, group, rows.end - 1).end;
      for (std::int64_t c = queries.columns(axis, group, rows.begin).begin; c < end; ++c)
        along.at(queries.column_index(axis, token_at(a, group, c))) = 1;
    }
    seen *= std::count(along.begin(), along.end(), 1);
  }
  others_ = keys - seen;
}

template <class E>
Phase clear_unseen_keys(const Job& job, const Plan& plan) {
  const Problem p = job.problem;
  const SeenKeys seen(plan.grid);
  if (seen.others() == 0) return {};
  const auto grad_key = operand<E>(p, job.tensors, &Tensors::grad_key);
  const auto grad_value = operand<E>(p, job.tensors, &Tensors::grad_value);
  const Coordinate lines{p.batch, p.axes[0].key_length, p.axes[1].key_length};
  const auto body = [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t line = first; line < last; ++line) {
      const Coordinate at = unravel(line, lines);
      checkpoint(p.axes[2].key_length * p.kv_heads * (p.head_dim + p.value_dim));
      const bool is_line_seen = seen.contains(0, at[1]) && seen.contains(1, at[2]);
      for (std::int64_t key = 0; key < p.axes[2].key_length; ++key) {
        if (is_line_seen && seen.contains(2, key)) continue;
        const auto clear = [&](const Operand<E>& to, std::int64_t dim) {
          for (std::int64_t head = 0; to && head < p.kv_heads; ++head)
            std::fill_n(to.at(at[0], head, {at[1], at[2], key}), dim, E(0.0f));
        };
        clear(grad_key, p.head_dim);
        clear(grad_value, p.value_dim);
      }
    }
  };
  return {volume(lines), body};
}
template Phase clear_unseen_keys<double>(const Job&, const Plan&);
template Phase clear_unseen_keys<float>(const Job&, const Plan&);
template Phase clear_unseen_keys<bfloat16>(const Job&, const Plan&);
template Phase clear_unseen_keys<float16>(const Job&, const Plan&);

}  // namespace natten::detail::cpu::engine
