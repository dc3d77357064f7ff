#pragma once

// Everything that the library defines, for all element types, by kernels that need nothing but
// threads: no shared memory, no barriers, no atomics. So results do not depend on the order in
// which threads run.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>

#include "../backend.h"
#include "../dispatch.h"
#include "simt_bias.h"
#include "simt_rows.h"
#include "simt_sums.h"

namespace natten::detail::cuda {

namespace simt {

/// Hands out pieces of a workspace; with none, counts how much there must be.
class Pieces {
 public:
  explicit Pieces(void* workspace) : workspace_(static_cast<char*>(workspace)) {}
  template <class T>
  T* take(std::int64_t count) {
    constexpr std::size_t kAlignment = 256;
    char* const at = workspace_ ? workspace_ + bytes_ : nullptr;
    bytes_ +=
        (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  char* workspace_;
  std::size_t bytes_ = 0;
};

inline FillSights fill_sights(const Problem& p, Pieces& pieces) {
  const bool has_key_rows = p.op == Op::attention_backward || p.op == Op::av_transpose;
  FillSights fill(p, has_key_rows ? 2 : 1);
  fill.data = pieces.take<Sight>(fill.count());
  return fill;
}

/// Gradients of additional tokens: sums over all queries, in parts of some hundred.
template <class Sum>
struct AdditionalParts {
  std::int64_t dims;
  int splits;
  Sum* partial;
  AdditionalParts(const Problem& p, Pieces& pieces)
      : dims(std::max(p.head_dim, p.value_dim)),
        splits(static_cast<int>(std::clamp<std::int64_t>(p.queries() / 256, 1, 256))),
        partial(pieces.take<Sum>(splits * p.batch * p.kv_heads * p.additional * dims)) {}
};

/// Gradients of biases: sums over parts of the tiles of queries, which are added up at last. So
/// many parts that the device has work, but for the memory that their sums take; parts of offsets
/// too where that is not enough, as tiles see some lines more than a part has.
template <class Sum>
struct BiasParts {
  static constexpr std::int64_t kThreads = 1 << 18;  // about as many as a large GPU has
  FillSights fill;
  Tiles tiles;
  OffsetSums<Sum> sums{};

  BiasParts(const Problem& p, Pieces& pieces)
      : fill(fill_sights(p, pieces)), tiles(cut(p, Rows::queries)) {
    const Coordinate offsets = relative_positions(p);
    for (int i = 0; i < kMaxRank; ++i) sums.offsets[i] = static_cast<int>(offsets[i]);
    while (sums.axis < kMaxRank - 1 && sums.offsets[sums.axis] == 1) ++sums.axis;
    sums.before = sums.offsets[sums.axis] / 2;
    sums.batches = static_cast<int>(p.batch);
    const std::int64_t arrays = std::max<std::int64_t>(p.heads, 1);
    if (p.op == Op::attention_backward) {
      constexpr std::int64_t kMostBytes = 64 << 20, kMostSplits = 256, kLeastLines = 16;
      constexpr std::int64_t kWarps = 1 << 12;  // several for each that a large GPU runs at once
      const std::int64_t bytes = arrays * sums.count() * static_cast<std::int64_t>(sizeof(Sum));
      const std::int64_t most = std::clamp<std::int64_t>(p.batch * tiles.total(), 1, kMostSplits);
      sums.splits = static_cast<int>(std::clamp<std::int64_t>(kMostBytes / bytes, 1, most));
      const std::int64_t parts = kWarps / (arrays * sums.splits);
      const std::int64_t lines = sums.offsets[sums.axis];
      sums.lines = static_cast<int>(std::clamp<std::int64_t>(
          lines / std::max<std::int64_t>(parts, 1), std::min(kLeastLines, lines), lines));
      sums.parts = static_cast<int>((lines + sums.lines - 1) / sums.lines);
    } else {
      sums.splits = static_cast<int>(
          std::clamp<std::int64_t>(kThreads / std::max<std::int64_t>(arrays * sums.count(), 1), 1,
                                   std::clamp<std::int64_t>(tiles.total(), 1, 32)));
    }
    sums.data = pieces.take<Sum>(sums.size(p.heads));
  }
};

/// Where the parts of the workspace of attention's backward pass are.
template <class Sum>
struct BackwardParts {
  FillSights fill;
  Sum* row_term;  // [B, H, queries]
  char* rest;     // of gradients of additional tokens, then of biases

  BackwardParts(const Problem& p, Pieces& pieces)
      : fill(fill_sights(p, pieces)), row_term(pieces.take<Sum>(p.batch * p.heads * p.queries())) {
    Pieces additional(nullptr), bias(nullptr);
    if (p.additional > 0) AdditionalParts<Sum>(p, additional);
    if (p.wants_grad_rpb) BiasParts<Sum>(p, bias);
    rest = pieces.take<char>(static_cast<std::int64_t>(std::max(additional.bytes(), bias.bytes())));
  }
};

/// Calls `f(Type<Sum>{})` with the type of a problem's sums.
template <class F>
void dispatch_sum(const Problem& p, F&& f) {
  if (p.dtype == DType::float64)
    f(Type<double>{});
  else
    f(Type<float>{});
}

/// Enqueues the kernels of a job.
template <class T, class Launcher>
class Run {
 public:
  using Sum = StatisticOf<T>;

  Run(const Job& job, Launcher& launch)
      : job_(job),
        p_(simplified(job.problem)),
        longest_(simplified(longest_of(job.problem, job.examples))),
        launch_(launch) {}

  void operator()() {
    examples_ = write_examples(job_, launch_);
    Pieces pieces(job_.workspace);
    switch (p_.op) {
      case Op::attention_forward: return forward(pieces);
      case Op::attention_backward: return backward(pieces);
      case Op::qk:
      case Op::rpb_gather: return scores(pieces);
      case Op::av: return av(pieces);
      case Op::av_transpose: return av_transpose(pieces);
      case Op::rpb_scatter: return rpb_scatter(pieces);
    }
  }

  template <bool kTf32 = false>
  void grad_rpb(const Sum* row_term, const BiasParts<Sum>& parts) {
    fill(parts.fill);
    Sums<T> s = grad_query_sums(parts.fill, row_term);
    s.additional = 0;  // tokens without a bias
    s.biases = parts.sums;
    launch_.clear(s.biases.data, static_cast<std::size_t>(s.biases.size(p_.heads)) * sizeof(Sum));
    run<Weight::grad_bias, false, false, kTf32>(s);
    add_bias_parts(parts);
  }

 private:
  using In = Operand<const T>;

  In in(TensorView Tensors::*member) const { return operand<const T>(p_, job_.tensors, member); }
  Operand<T> out(TensorView Tensors::*member) const { return operand<T>(p_, job_.tensors, member); }
  template <class S>
  Operand<S> statistic(TensorView Tensors::*member) const {
    return operand<S>(p_, job_.tensors, member);
  }
  static In as_rows(In additional) {
    additional.grid = {0, 0, additional.token};
    return additional;
  }

  void fill(FillSights f) {
    f.set_examples(examples_, longest_);
    launch_(f, (f.count() + FillSights::kThreads - 1) / FillSights::kThreads);
  }

  Sums<T> sums_of(Rows rows, std::int64_t heads) const {
    Sums<T> s{};
    s.tiles = cut(longest_, rows);
    s.examples = examples_;
    for (int i = 0; i < kMaxRank; ++i) s.kernel_size[i] = static_cast<int>(p_.axes[i].kernel_size);
    s.window_size = static_cast<int>(p_.window_size());
    s.heads = static_cast<int>(heads);
    s.group = static_cast<int>(p_.heads / std::max<std::int64_t>(p_.kv_heads, 1));
    s.splits = s.slices = 1;
    s.scale = static_cast<Sum>(p_.scale);
    return s;
  }
  Operand<const std::uint8_t> mask() const { return key_mask(p_, job_.tensors).seen; }
  Sums<T> query_rows(const FillSights& fill) const {
    Sums<T> s = sums_of(Rows::queries, p_.heads);
    s.sights = fill.sights(Rows::queries);
    s.column_mask = mask();
    s.additional = static_cast<int>(p_.additional);
    return s;
  }
  Sums<T> key_rows(const FillSights& fill) const {
    Sums<T> s = sums_of(Rows::keys, p_.kv_heads);
    s.sights = fill.sights(Rows::keys);
    s.column_sights = fill.sights(Rows::queries);
    s.row_mask = mask();
    return s;
  }
  Sums<T> additional_rows(const AdditionalParts<Sum>& parts) const {
    Sums<T> s = sums_of(Rows::additional, p_.kv_heads);
    s.splits = parts.splits;
    return s;
  }

  static bool is_aligned(const In& x, std::int64_t dims) {
    constexpr std::int64_t n = 16 / sizeof(T);
    const std::int64_t sizes[] = {dims, x.batch, x.head, x.token, x.grid[0], x.grid[1], x.grid[2]};
    return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 &&
           std::all_of(std::begin(sizes), std::end(sizes),
                       [](std::int64_t size) { return size % n == 0; });
  }

  /// Runs RowSums. Without `kSums`, no vectors are summed up.
  template <Weight kWeight, bool kKeyRows, bool kSums = true, bool kTf32 = false>
  void run(Sums<T> s) {
    constexpr int kVector = 16 / sizeof(T);
    constexpr int kWide = 512 / sizeof(Sum);  // elements
    const auto all_aligned = [](const ColumnOperand<const T>& x, std::int64_t dims) {
      return is_aligned(x.grid, dims) && is_aligned(x.additional, dims);
    };
    const bool aligned = is_aligned(s.row_a, s.score_dims) && is_aligned(s.row_b, s.grad_dims) &&
                         all_aligned(s.column_a, s.score_dims) &&
                         all_aligned(s.column_b, s.grad_dims) &&
                         all_aligned(s.column_c, s.sum_dims);
    for (ColumnOperand<const T>* x : {&s.column_a, &s.column_b, &s.column_c, &s.attn})
      x->set_step(s.tiles);
    for (ColumnOperand<const Sum>* x : {&s.logsumexp, &s.row_term}) x->set_step(s.tiles);
    s.column_mask.set_step(s.tiles);
    const auto launch = [&](auto kernel) {
      constexpr int kDims = decltype(kernel)::kSumDims;
      if constexpr (kDims > 0) s.slices = (s.sum_dims + kDims - 1) / kDims;
      kernel.in = s;
      constexpr int kWarps = decltype(kernel)::kWarps;
      const std::int64_t warps = kWeight == Weight::grad_bias
                                     ? std::int64_t{s.heads} * s.biases.splits * s.biases.parts
                                     : p_.batch * s.heads * s.splits * s.tiles.total() *
                                           std::max(s.examples.count, 1) * s.slices;
      launch_(kernel, (warps + kWarps - 1) / kWarps);
    };
    if constexpr (!kSums) {
      if (aligned) return launch(RowSums<T, kWeight, kKeyRows, 0, kVector, kTf32>{});
      launch(RowSums<T, kWeight, kKeyRows, 0, 1, kTf32>{});
    } else {
      if (!aligned) return launch(RowSums<T, kWeight, kKeyRows, kWide / 4, 1>{});
      if constexpr (kWeight != Weight::slot)  // whose weights cost little to find again
        if (s.sum_dims > kWide / 2) return launch(RowSums<T, kWeight, kKeyRows, kWide, kVector>{});
      launch(RowSums<T, kWeight, kKeyRows, kWide / 2, kVector>{});
    }
  }

  void forward(Pieces& pieces) {
    const FillSights sights = fill_sights(p_, pieces);
    fill(sights);
    Sums<T> s = query_rows(sights);
    set_scores(s, in(&Tensors::query), in(&Tensors::key), in(&Tensors::additional_keys));
    set_sums(s, in(&Tensors::value), in(&Tensors::additional_values), p_.value_dim);
    s.sums = out(&Tensors::output);
    s.statistic = statistic<Sum>(&Tensors::logsumexp);
    run<Weight::softmax, false>(s);
  }

  void set_scores(Sums<T>& s, In rows, In columns, In additional) const {
    s.row_a = rows;
    s.column_a = {columns, additional};
    s.score_dims = static_cast<int>(p_.head_dim);
    s.bias = in(&Tensors::rpb);
  }
  static void set_sums(Sums<T>& s, In columns, In additional, std::int64_t dims) {
    s.column_c = {columns, additional};
    s.sum_dims = static_cast<int>(dims);
  }
  /// What backward needs beside scores.
  void set_grads(Sums<T>& s, In rows, In columns, In additional, const Sum* row_term) const {
    s.row_b = rows;
    s.column_b = {columns, additional};
    s.grad_dims = static_cast<int>(p_.value_dim);
    s.row_term = row_term_operand(p_, row_term);
    s.logsumexp = statistic<const Sum>(&Tensors::logsumexp);
  }
  Sums<T> grad_query_sums(const FillSights& sights, const Sum* row_term) const {
    Sums<T> s = query_rows(sights);
    set_scores(s, in(&Tensors::query), in(&Tensors::key), in(&Tensors::additional_keys));
    set_grads(s, in(&Tensors::grad_output), in(&Tensors::value), in(&Tensors::additional_values),
              row_term);
    return s;
  }

  void backward(Pieces& pieces) {
    const BackwardParts<Sum> parts(p_, pieces);
    fill(parts.fill);
    Sums<T> s = grad_query_sums(parts.fill, nullptr);
    s.statistic = row_term_operand(p_, parts.row_term);
    s.subtracted = statistic<const Sum>(&Tensors::grad_logsumexp);
    run<Weight::grad_score, false, false>(s);

    if (const auto grad_query = out(&Tensors::grad_query)) {
      s = grad_query_sums(parts.fill, parts.row_term);
      set_sums(s, in(&Tensors::key), in(&Tensors::additional_keys), p_.head_dim);
      s.sums = grad_query;
      run<Weight::grad_score, false>(s);
    }

    s = key_rows(parts.fill);
    set_scores(s, in(&Tensors::key), in(&Tensors::query), {});
    set_grads(s, in(&Tensors::value), in(&Tensors::grad_output), {}, parts.row_term);
    if (const auto grad_key = out(&Tensors::grad_key)) {
      s.sums = grad_key;
      sum_over_queries<Weight::grad_score>(s);
    }
    if (const auto grad_value = out(&Tensors::grad_value)) {
      s.sums = grad_value;
      sum_over_queries<Weight::probability>(s);
    }

    if (p_.additional > 0) {
      Pieces rest(parts.rest);
      const AdditionalParts<Sum> additional(p_, rest);
      s = additional_rows(additional);
      set_scores(s, as_rows(in(&Tensors::additional_keys)), in(&Tensors::query), {});
      s.bias = {};
      set_grads(s, as_rows(in(&Tensors::additional_values)), in(&Tensors::grad_output), {},
                parts.row_term);
      if (const auto to = out(&Tensors::grad_additional_keys))
        sum_over_parts<Weight::grad_score>(s, additional, to);
      if (const auto to = out(&Tensors::grad_additional_values))
        sum_over_parts<Weight::probability>(s, additional, to);
    }
    if (out(&Tensors::grad_rpb)) {
      Pieces rest(parts.rest);
      grad_rpb(parts.row_term, BiasParts<Sum>(p_, rest));
    }
  }

  /// Rows are keys or additional tokens: grad_score sums up queries, probability grad_output, and
  /// slot queries again.
  template <Weight kWeight>
  void sum_over_queries(Sums<T> s) {
    constexpr bool kOfGrads = kWeight == Weight::probability;
    set_sums(s, in(kOfGrads ? &Tensors::grad_output : &Tensors::query), {},
             kOfGrads ? p_.value_dim : p_.head_dim);
    run<kWeight, true>(s);
  }
  template <Weight kWeight>
  void sum_over_parts(Sums<T> s, const AdditionalParts<Sum>& parts, const Operand<T>& to) {
    const std::int64_t n = p_.additional;
    const std::int64_t dims = kWeight == Weight::probability ? p_.value_dim : p_.head_dim;
    s.partial.data = parts.partial;
    s.partial.token = dims;
    s.partial.head = n * dims;
    s.partial.batch = p_.kv_heads * n * dims;
    s.partial_split = p_.batch * s.partial.batch;
    sum_over_queries<kWeight>(s);
    add_parts({parts.partial,
               parts.splits,
               to.data,
               {p_.batch, p_.kv_heads, n, dims},
               {to.batch, to.head, to.token, 1}});
  }
  void add_parts(const AddParts<T>& add) { launch_(add, add.blocks()); }

  void scores(Pieces& pieces) {
    const FillSights sights = fill_sights(p_, pieces);
    fill(sights);
    Sums<T> s = query_rows(sights);
    set_scores(s, in(&Tensors::query), in(&Tensors::key), in(&Tensors::additional_keys));
    if (p_.op == Op::rpb_gather) s.score_dims = 0;
    s.scale = 1;
    s.weights = out(&Tensors::attn);
    s.fills_empty = p_.has_key_mask;
    for (const Axis& axis : p_.axes)
      s.fills_empty = s.fills_empty || axis.is_causal || axis.boundary == Boundary::cut;
    s.empty = p_.empty_slots == EmptySlots::zero ? Sum(0) : -std::numeric_limits<Sum>::infinity();
    run<Weight::score, false, false>(s);
  }

  void av(Pieces& pieces) {
    const FillSights sights = fill_sights(p_, pieces);
    fill(sights);
    Sums<T> s = query_rows(sights);
    s.attn = in(&Tensors::attn);
    set_sums(s, in(&Tensors::value), in(&Tensors::additional_values), p_.head_dim);
    s.sums = out(&Tensors::output);
    run<Weight::slot, false>(s);
  }

  void av_transpose(Pieces& pieces) {
    const FillSights sights = fill_sights(p_, pieces);
    fill(sights);
    Sums<T> s = key_rows(sights);
    s.attn = in(&Tensors::attn);
    s.sums = out(&Tensors::key);
    sum_over_queries<Weight::slot>(s);
    if (p_.additional == 0) return;
    const AdditionalParts<Sum> parts(p_, pieces);
    s = additional_rows(parts);
    s.attn = in(&Tensors::attn);
    if (const auto to = out(&Tensors::additional_keys)) sum_over_parts<Weight::slot>(s, parts, to);
  }

  void rpb_scatter(Pieces& pieces) {
    const BiasParts<Sum> parts(p_, pieces);
    fill(parts.fill);
    BiasSums<T> b{};
    const Sums<T> s = query_rows(parts.fill);
    b.tiles = s.tiles;
    b.sights = s.sights;
    b.mask = {mask()};
    std::copy(s.kernel_size, s.kernel_size + kMaxRank, b.kernel_size);
    b.batches = static_cast<int>(p_.batch);
    b.heads = s.heads;
    b.splits = parts.sums.splits;
    b.attn = in(&Tensors::attn);
    b.partial = parts.sums.data;
    launch_(b, b.blocks());
    add_bias_parts(parts);
  }
  void add_bias_parts(const BiasParts<Sum>& parts) {
    const Operand<T> to = out(&Tensors::grad_rpb);
    const Coordinate n = relative_positions(p_);
    add_parts({parts.sums.data,
               parts.sums.splits,
               to.data,
               {p_.heads, n[0], n[1], n[2]},
               {to.head, to.grid[0], to.grid[1], to.grid[2]}});
  }

  const Job& job_;
  const Problem p_, longest_;
  Launcher& launch_;
  Examples examples_;
};

/// Blocks of the largest launch, at most.
inline std::int64_t most_blocks(const Problem& p) {
  constexpr std::int64_t kLeastDims = 16;  // that a block sums up
  const std::int64_t slices = std::max(p.head_dim, p.value_dim) / kLeastDims + 1;
  return p.batch * p.heads * std::max(cut(p, Rows::queries).total(), cut(p, Rows::keys).total()) *
         slices;
}

}  // namespace simt

/// Empty if the kernels run the problem, else why they do not.
inline std::string simt_refuse_reason(const Problem& problem) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const Problem p = simplified(problem);
  if (p.queries() > kMost || p.keys() > kMost) return "a grid has more than 2^31 - 1 tokens";
  for (const Axis& axis : p.axes) {
    if (axis.dilation > kMost) return "a dilation is more than 2^31 - 1";
    // Places go around a few times.
    if (axis.boundary == Boundary::circular && axis.grid_length > kMost / 8)
      return "a circular axis has more than 2^28 - 1 tokens";
  }
  if (p.slots() > kMost) return "a query sees more than 2^31 - 1 tokens";
  if (simt::most_blocks(p) > kMost)
    return "needs more than 2^31 - 1 blocks of threads; split the batch";
  return {};
}

/// Twice 16 bytes per token of each axis; for backward, a row term per query and head; for
/// gradients of additional tokens, at most 256 copies of them; for gradients of biases, some 64
/// MiB.
inline std::size_t simt_workspace_bytes(const Problem& problem) {
  const Problem p = simplified(problem);
  simt::Pieces pieces(nullptr);
  simt::dispatch_sum(p, [&](auto type) {
    using Sum = typename decltype(type)::type;
    if (p.op == Op::attention_backward) {
      simt::BackwardParts<Sum>(p, pieces);
    } else if (p.op == Op::rpb_scatter) {
      simt::BiasParts<Sum>(p, pieces);
    } else {
      simt::fill_sights(p, pieces);
      if (p.op == Op::av_transpose && p.additional > 0) simt::AdditionalParts<Sum>(p, pieces);
    }
  });
  return pieces.bytes();
}

/// Enqueues the kernels of a job whose tensors are of type `T`.
template <class T, class Launcher>
void run_simt_as(const Job& job, Launcher& launch) {
  simt::Run<T, Launcher>(job, launch)();
}

/// Enqueues the kernels of a job.
template <class Launcher>
void run_simt(const Job& job, Launcher& launch) {
  dispatch_dtype(job.problem.dtype,
                 [&](auto type) { run_simt_as<typename decltype(type)::type>(job, launch); });
}

/// The gradient of biases alone, for backends that find the rest otherwise, and multiply float in
/// TF32: dP and the row terms nearly cancel, so both must come from the same numbers. `row_term`
/// [B, H, queries] holds sum P dP / sum P minus grad_logsumexp.
template <class T, class Launcher>
void simt_grad_rpb(const Job& job, const StatisticOf<T>* row_term, void* workspace,
                   Launcher& launch) {
  simt::Pieces pieces(workspace);
  simt::Run<T, Launcher>(job, launch)
      .template grad_rpb<std::is_same_v<T, float>>(
          row_term, simt::BiasParts<StatisticOf<T>>(simplified(job.problem), pieces));
}
inline std::size_t simt_grad_rpb_workspace_bytes(const Problem& problem) {
  const Problem p = simplified(problem);
  simt::Pieces pieces(nullptr);
  simt::dispatch_sum(p,
                     [&](auto type) { simt::BiasParts<typename decltype(type)::type>(p, pieces); });
  return pieces.bytes();
}

}  // namespace natten::detail::cuda
