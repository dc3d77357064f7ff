#include <natten/roles.h>

namespace natten {
namespace {

constexpr Role input(const char* name, TensorView Tensors::*t, const char* dims) {
  return {name, t, dims, false, true, false, false};
}
constexpr Role output(const char* name, TensorView Tensors::*t, const char* dims) {
  return {name, t, dims, true, true, false, false};
}
constexpr Role optional(Role role) {
  role.is_required = false;
  return role;
}
constexpr Role statistic(Role role) {
  role.is_statistic = true;
  return role;
}

using T = Tensors;

/// The roles that every operation can have.
constexpr Role key_mask() {
  Role role = optional(input("key_mask", &T::key_mask, "MK"));
  role.is_mask = true;
  return role;
}

constexpr Role kAttentionForward[] = {
    input("query", &T::query, "BQHD"),
    input("key", &T::key, "BKGD"),
    input("value", &T::value, "BKGV"),
    optional(input("rpb", &T::rpb, "HR")),
    optional(input("additional_keys", &T::additional_keys, "BNGD")),
    optional(input("additional_values", &T::additional_values, "BNGV")),
    key_mask(),
    output("output", &T::output, "BQHV"),
    optional(statistic(output("logsumexp", &T::logsumexp, "BQH"))),
};

constexpr Role kAttentionBackward[] = {
    input("query", &T::query, "BQHD"),
    input("key", &T::key, "BKGD"),
    input("value", &T::value, "BKGV"),
    optional(input("rpb", &T::rpb, "HR")),
    optional(input("additional_keys", &T::additional_keys, "BNGD")),
    optional(input("additional_values", &T::additional_values, "BNGV")),
    key_mask(),
    statistic(input("logsumexp", &T::logsumexp, "BQH")),
    input("grad_output", &T::grad_output, "BQHV"),
    optional(statistic(input("grad_logsumexp", &T::grad_logsumexp, "BQH"))),
    optional(output("grad_query", &T::grad_query, "BQHD")),
    optional(output("grad_key", &T::grad_key, "BKGD")),
    optional(output("grad_value", &T::grad_value, "BKGV")),
    optional(output("grad_rpb", &T::grad_rpb, "HR")),
    optional(output("grad_additional_keys", &T::grad_additional_keys, "BNGD")),
    optional(output("grad_additional_values", &T::grad_additional_values, "BNGV")),
};

constexpr Role kQk[] = {
    input("query", &T::query, "BHQD"),
    input("key", &T::key, "BHKD"),
    optional(input("rpb", &T::rpb, "HR")),
    optional(input("additional_keys", &T::additional_keys, "BHND")),
    key_mask(),
    output("attn", &T::attn, "BHQW"),
};

constexpr Role kAv[] = {
    input("attn", &T::attn, "BHQW"),
    input("value", &T::value, "BHKD"),
    optional(input("additional_values", &T::additional_values, "BHND")),
    key_mask(),
    output("output", &T::output, "BHQD"),
};

constexpr Role kAvTranspose[] = {
    input("attn", &T::attn, "BHQW"),
    input("query", &T::query, "BHQD"),
    key_mask(),
    output("key", &T::key, "BHKD"),
    optional(output("additional_keys", &T::additional_keys, "BHND")),
};

constexpr Role kRpbGather[] = {
    input("rpb", &T::rpb, "HR"),
    key_mask(),
    output("attn", &T::attn, "BHQX"),
};

constexpr Role kRpbScatter[] = {
    input("attn", &T::attn, "BHQX"),
    key_mask(),
    output("grad_rpb", &T::grad_rpb, "HR"),
};

template <std::size_t N>
constexpr Roles table(const Role (&roles)[N]) {
  return {roles, roles + N};
}

}  // namespace

Roles roles_of(Op op) {
  switch (op) {
    case Op::attention_forward: return table(kAttentionForward);
    case Op::attention_backward: return table(kAttentionBackward);
    case Op::qk: return table(kQk);
    case Op::av: return table(kAv);
    case Op::av_transpose: return table(kAvTranspose);
    case Op::rpb_gather: return table(kRpbGather);
    case Op::rpb_scatter: return table(kRpbScatter);
  }
  return {nullptr, nullptr};
}

const char* dims_of(Op op, TensorView Tensors::*tensor) {
  for (const Role& role : roles_of(op))
    if (role.tensor == tensor) return role.dims;
  return nullptr;
}

}  // namespace natten
