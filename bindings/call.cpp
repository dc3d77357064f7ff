#include "call.h"

#include <string>

namespace natten::bindings {

Op op_named(std::string_view name) {
  for (Op op : {Op::attention_forward, Op::attention_backward, Op::qk, Op::av, Op::av_transpose,
                Op::rpb_gather, Op::rpb_scatter})
    if (name == name_of(op)) return op;
  throw Error(ErrorKind::invalid_value, "op: got \"" + std::string(name) + "\", which is unknown");
}

Call decode_call(std::string_view op, const std::int64_t* config, std::size_t count, double scale) {
  Call call;
  call.op = op_named(op);
  const std::int64_t* at = config;
  const std::int64_t* end = config + count;
  const auto malformed = [] {
    return Error(ErrorKind::invalid_value, "config: malformed list of integers");
  };
  const auto next_tuple = [&] {
    if (at == end) throw malformed();
    const std::int64_t size = *at++;
    if (size < 0 || size > end - at) throw malformed();
    const Tuple tuple(at, static_cast<int>(size));
    at += size;
    return tuple;
  };
  Neighborhood& n = call.neighborhood;
  Options& o = call.options;
  for (Tuple* tuple : {&n.kernel_size, &n.dilation, &n.is_causal, &n.stride, &n.boundary,
                       &n.query_offset, &n.key_offset, &n.grid_size, &o.query_tile, &o.key_tile,
                       &o.backward_query_tile, &o.backward_key_tile, &o.key_splits})
    *tuple = next_tuple();
  if (end - at != 1) throw malformed();
  const std::int64_t flags = *at;
  if (flags & ~kAllFlags) throw malformed();
  if (flags & has_scale) o.scale = scale;
  if (flags & empty_slots_zero) o.empty_slots = EmptySlots::zero;
  o.separate_key_grid = flags & separate_key_grid;
  o.deterministic = !(flags & nondeterministic);
  o.allow_tf32 = flags & allow_tf32;
  o.allow_gemm = !(flags & no_gemm);
  o.unknown_offsets = flags & unknown_offsets;
  o.allow_no_keys = flags & allow_no_keys;
  o.tuning = flags & nothing_tuned ? Tuning::none : flags & no_timing ? Tuning::read : Tuning::any;
  return call;
}

}  // namespace natten::bindings
