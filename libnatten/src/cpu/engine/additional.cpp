#include "additional.h"

#include "workspace.h"

namespace natten::detail::cpu::engine {

Job additional_tokens_as_keys(const Job& job) {
  Job own{job.problem, {}, job.workspace};
  Problem& p = own.problem;
  for (Axis& axis : p.axes) {
    const std::int64_t queries = axis.query_length;
    axis = Axis{};
    axis.query_length = queries;
  }
  Axis& axis = p.axes[kMaxRank - 1];
  axis.key_length = axis.grid_length = axis.kernel_size = p.additional;
  p.additional = 0;
  p.has_key_mask = p.has_rpb = p.wants_grad_rpb = p.wants_grad_additional = false;
  const Tensors& t = job.tensors;
  // [B, N, ..] to [B, 1, 1, N, ..], of the problem's rank.
  const auto on_grid = [&](TensorView v) {
    const auto spread = [&](auto& values, std::int64_t trivial) {
      std::copy_backward(values.begin() + 1, values.begin() + v.ndim,
                         values.begin() + v.ndim + p.rank - 1);
      std::fill_n(values.begin() + 1, p.rank - 1, trivial);
    };
    if (!v) return v;
    spread(v.shape, 1);
    spread(v.strides, 0);
    v.ndim += p.rank - 1;
    return v;
  };
  own.tensors.query = t.query;
  own.tensors.logsumexp = t.logsumexp;
  own.tensors.grad_output = t.grad_output;
  own.tensors.key = on_grid(t.additional_keys);
  own.tensors.value = on_grid(t.additional_values);
  own.tensors.grad_key = on_grid(t.grad_additional_keys);
  own.tensors.grad_value = on_grid(t.grad_additional_values);
  return own;
}

template <class E>
Phase sum_grad_additional(const Job& job, const Plan& backward_query) {
  const Problem p = job.problem;
  const Workspace<StatisticOf<E>> workspace(job, backward_query);
  const auto grad_keys = operand<E>(p, job.tensors, &Tensors::grad_additional_keys);
  const auto grad_values = operand<E>(p, job.tensors, &Tensors::grad_additional_values);
  const std::int64_t padded = backward_query.padded, value_padded = backward_query.value_padded;
  const std::int64_t first_key = backward_query.partial.bias;
  const std::int64_t first_value = first_key + p.additional * padded;
  const std::int64_t group = p.heads / p.kv_heads;  // heads that share one of keys
  const auto body = [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i % p.additional;
      const std::int64_t head = i / p.additional % p.kv_heads;
      const std::int64_t batch = i / p.additional / p.kv_heads;
      const auto write = [&](const Operand<E>& to, std::int64_t dim, std::int64_t element) {
        if (!to) return;
        E* out = to.at(batch, head, n);
        for (std::int64_t d = 0; d < dim; ++d)
          out[d] = static_cast<E>(workspace.sum(batch, head * group, group, element + d));
      };
      write(grad_keys, p.head_dim, first_key + n * padded);
      write(grad_values, p.value_dim, first_value + n * value_padded);
    }
  };
  return {p.batch * p.kv_heads * p.additional, body};
}
template Phase sum_grad_additional<double>(const Job&, const Plan&);
template Phase sum_grad_additional<float>(const Job&, const Plan&);
template Phase sum_grad_additional<bfloat16>(const Job&, const Plan&);
template Phase sum_grad_additional<float16>(const Job&, const Plan&);

}  // namespace natten::detail::cpu::engine
