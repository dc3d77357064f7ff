#pragma once

// The backend "fna": fused neighborhood attention on tensor cores, of half types and, in TF32, of
// float32.

#include <cstddef>
#include <cstdlib>
#include <string>
#include <type_traits>

#include "../simt.h"
#include "plan.h"

namespace natten::detail::cuda {

inline std::string fna_refuse_reason(const Problem& problem) {
  const Problem p = simplified(problem);
  if (p.op != Op::attention_forward && p.op != Op::attention_backward)
    return "computes fused attention only";
  std::string refusal = dtype_refusal(p);
  if (!refusal.empty()) return refusal;
  const int most = most_dims(size_of(p.dtype));
  if (p.head_dim > most || p.value_dim > most)
    return "head dims " + std::to_string(p.head_dim) + " and " + std::to_string(p.value_dim) +
           "; the most is " + std::to_string(most) + " for " + name_of(p.dtype);
  return grid_refusal(p);
}

/// Where the caller does not insist on determinism, one pass over the keys computes all gradients
/// of 16-bit elements, up to the dims whose sums fit into registers.
inline bool adds_queries(const Problem& p) {
  return !p.deterministic && p.dtype != DType::float32 && p.wants_grad_query && p.wants_grad_key &&
         p.wants_grad_value && padded_dims(p) <= kMostDimsOfTwo;
}

/// Blocks for each tile of additional tokens. These see all queries, so few blocks would work long.
inline int additional_splits(const Problem& p) {
  constexpr std::int64_t kEnoughBlocks = 264, kLeastTiles = 16, kTile = 64;
  const std::int64_t blocks = p.batch * p.kv_heads * ((p.additional + kTile - 1) / kTile);
  if (blocks == 0) return 1;
  const std::int64_t tiles = p.queries() / kTile * (p.heads / p.kv_heads);
  return static_cast<int>(
      std::max<std::int64_t>(1, std::min(kEnoughBlocks / blocks, tiles / kLeastTiles)));
}

/// The workspace of a backward pass.
struct FnaPieces {
  float* row_term;    ///< [B, H, queries]
  float* query_sums;  ///< of grad_all: [B, H, queries, D]
  std::int64_t query_sum_count;
  int splits;        ///< of the gradients of additional keys and values...
  Partial parts[2];  ///< ...where there are several
  void* bias;        ///< what the bias gradient needs
  std::size_t bytes;

  FnaPieces(const Problem& p, void* workspace)
      : splits(p.wants_grad_additional ? additional_splits(p) : 1) {
    simt::Pieces pieces(workspace);
    const std::int64_t rows = p.batch * p.heads * p.queries();
    row_term = pieces.take<float>(rows);
    query_sum_count = adds_queries(p) ? rows * p.head_dim : 0;
    query_sums = pieces.take<float>(query_sum_count);
    const std::int64_t dims[] = {p.head_dim, p.value_dim};
    for (int which = 0; which < 2; ++which) {
      parts[which].part = p.batch * p.kv_heads * p.additional * dims[which];
      parts[which].data = pieces.take<float>(splits > 1 ? splits * parts[which].part : 0);
    }
    bytes = pieces.bytes();
    bias = workspace ? static_cast<char*>(workspace) + bytes : nullptr;
    if (p.wants_grad_rpb) bytes += simt_grad_rpb_workspace_bytes(p);
  }
};
inline std::size_t fna_workspace_bytes(const Problem& p) {
  return p.op == Op::attention_backward ? FnaPieces(p, nullptr).bytes : 0;
}

/// Enqueues the passes of one job.
template <class T, class Launcher>
class TilePasses {
 public:
  TilePasses(const Job& job, Launcher& launch)
      : job_(job),
        p_(simplified(job.problem)),
        longest_(simplified(longest_of(job.problem, job.examples))),
        launch_(launch),
        pieces_(p_, job.workspace) {}

  void run() {
    examples_ = write_examples(job_, launch_);
    if (p_.batch > 0) run_tiles();
    if (p_.op == Op::attention_backward && p_.wants_grad_rpb)  // zero for an empty batch
      simt_grad_rpb<T>(job_, pieces_.row_term, pieces_.bias, launch_);
  }

 private:
  void run_tiles() {
    if (p_.op == Op::attention_forward) return run_pass<TilePass::forward>(Rows::queries);
    const Tensors& t = job_.tensors;
    // The pass over queries finds the row term on its way.
    const bool finds_term = t.grad_query && !adds_queries(p_) && padded_dims(p_) <= kMostDimsOfTwo;
    if (!finds_term) run_pass<TilePass::row_term>(Rows::queries);
    if constexpr (!std::is_same_v<T, float>) {
      if (adds_queries(p_)) {
        launch_.clear(pieces_.query_sums,
                      static_cast<std::size_t>(pieces_.query_sum_count) * sizeof(float));
        run_pass<TilePass::grad_all>(Rows::keys);
        if (p_.additional > 0) run_pass<TilePass::grad_all>(Rows::additional);
        add_parts();
        return scale_queries();
      }
    }
    if (t.grad_query) run_pass<TilePass::grad_query>(Rows::queries);
    if (t.grad_key || t.grad_value) run_key_passes(Rows::keys, t.grad_key, t.grad_value);
    if (p_.additional > 0 && (t.grad_additional_keys || t.grad_additional_values))
      run_key_passes(Rows::additional, t.grad_additional_keys, t.grad_additional_values);
    add_parts();
  }

  /// Adds up gradients of additional tokens from the parts of the queries.
  void add_parts() {
    if (pieces_.splits == 1) return;
    for (int which = 0; which < 2; ++which) {
      const Operand<T> to = operand<T>(p_, job_.tensors, kGradAdditional[which]);
      if (!to) continue;
      const std::int64_t dims = which == 0 ? p_.head_dim : p_.value_dim;
      const simt::AddParts<T> add{pieces_.parts[which].data,
                                  pieces_.splits,
                                  to.data,
                                  {p_.batch, p_.kv_heads, p_.additional, dims},
                                  {to.batch, to.head, to.token, 1}};
      launch_(add, add.blocks());
    }
  }

  void scale_queries() {
    ScaleQueries<T> kernel;
    kernel.to = operand<T>(p_, job_.tensors, &Tensors::grad_query);
    kernel.from = pieces_.query_sums;
    kernel.lengths = query_lengths(p_);
    kernel.count = pieces_.query_sum_count;
    kernel.heads = p_.heads;
    kernel.dims = p_.head_dim;
    kernel.scale = static_cast<float>(p_.scale);
    launch_(kernel, (kernel.count + kernel.kThreads - 1) / kernel.kThreads, 0);
  }

  void run_key_passes(Rows rows, const TensorView& grad_key, const TensorView& grad_value) {
    const bool together = padded_dims(p_) <= kMostDimsOfTwo;
    if (grad_key && grad_value && together) return run_pass<TilePass::grad_key_value>(rows);
    if (grad_key) run_pass<TilePass::grad_key>(rows);
    if (grad_value) run_pass<TilePass::grad_value>(rows);
  }

  template <TilePass kPass>
  void run_pass(Rows rows) {
    switch (padded_dims(p_)) {
      case 32: return run_bucket<kPass, 32>(rows);
      case 64: return run_bucket<kPass, 64>(rows);
      case 96: return run_bucket<kPass, 96>(rows);
      case 128: return run_bucket<kPass, 128>(rows);
      case 192: return run_bucket<kPass, 192>(rows);
      default: return run_bucket<kPass, 256>(rows);
    }
  }

  template <TilePass kPass, int kDims>
  void run_bucket(Rows rows) {
    constexpr bool kSumsTwo = kPass == TilePass::grad_key_value || kPass == TilePass::grad_all;
    if constexpr (kDims > (kSumsTwo ? kMostDimsOfTwo : most_dims(sizeof(T)))) {
      return;  // never asked for
    } else {
      PassGrid grid = grid_of(longest_, rows);
      using Kernel = TileKernel<T, kDims, 1, kPass>;
      if constexpr (kPass == TilePass::forward && kDims <= most_wide_dims(sizeof(T))) {
        using Wide = TileKernel<T, kDims, 2, kPass>;
        if (uses_wide_rows<Kernel, Wide>(grid)) return enqueue<Wide>(grid);
      }
      set_tiles(grid, Kernel::Traits::kRows, Kernel::Traits::kColumns);
      enqueue<Kernel>(grid);
    }
  }

  /// Returns what they cost.
  double set_tiles(PassGrid& grid, int rows, int columns) const {
    const TileCost cost(rows / 64, padded_dims(p_));
    const TileVisits visits = choose_tiles(grid, p_.rank, bits_of(rows), bits_of(columns), cost);
    const bool queries = grid.rows == Rows::queries;
    const Tuple& row_tile = queries ? p_.query_tile : p_.key_tile;
    const Tuple& column_tile = queries ? p_.key_tile : p_.query_tile;
    if (row_tile.size > 0 && grid.rows != Rows::additional)
      set_row_tile(grid, shrunk(tile_of(row_tile), rows));
    if (column_tile.size > 0) grid.column_tile = shrunk(tile_of(column_tile), columns);
    return cost(visits);
  }
  /// Kernels of many dims take half of a tile's columns at a time.
  static TileShape shrunk(TileShape tile, int size) {
    while (tile.size() > size) --*std::max_element(tile.bits, tile.bits + kMaxRank);
    return tile;
  }

  /// Chooses tiles for blocks of 128 rows; whether these beat blocks of 64. They read columns from
  /// shared memory half as often, but see wider unions of windows, and there are fewer of them; and
  /// on some devices a multiprocessor has room for one of them only, which nothing works beside.
  /// Where windows are small what a block takes for itself may decide.
  template <class Narrow, class Wide>
  bool uses_wide_rows(PassGrid& grid) const {
    if (!takes_wide_rows(p_)) return false;
    if (p_.query_tile.size > 0 && tile_of(p_.query_tile).size() == 64) return false;
    PassGrid one = grid;
    const double visits_of_one = choose_tiles(one, p_.rank, 6, 6, fewest_tiles).tiles;
    const double visits_of_two = choose_tiles(grid, p_.rank, 7, 6, fewest_tiles).tiles;
    const bool is_demanded = p_.query_tile.size > 0;
    const double cost_of_two = set_tiles(grid, 128, 64), cost_of_one = set_tiles(one, 64, 64);
    constexpr double kGain = 1.2, kCheaper = 0.9;
    constexpr std::int64_t kFewBlocks = 256;
    const int shared_bytes = launch_.shared_bytes();
    const bool has_room = blocks_beside(Wide::kSharedBytes, shared_bytes) >=
                          blocks_beside(Narrow::kSharedBytes, shared_bytes);
    const bool is_better =
        2 * visits_of_two <= kGain * visits_of_one || cost_of_two < kCheaper * cost_of_one;
    return is_demanded ||
           (has_room && is_better && batches() * p_.heads * grid.blocks_per_head() >= kFewBlocks);
  }

  /// Examples are one after another for each of the batch.
  std::int64_t batches() const { return p_.batch * std::max(examples_.count, 1); }

  template <class Kernel>
  void enqueue(const PassGrid& grid) {
    const Kernel kernel{arguments(grid, Kernel::Traits::kRowsAreQueries)};
    const std::int64_t blocks =
        batches() * kernel.a.heads * kernel.a.splits * kernel.a.blocks_per_head;
    launch_(kernel, blocks, Kernel::kSharedBytes);
  }

  using Member = TensorView Tensors::*;
  static constexpr Member kGradAdditional[] = {&Tensors::grad_additional_keys,
                                               &Tensors::grad_additional_values};
  Tokens<const T> input(Member member, bool is_additional = false) const {
    return tokens(operand<const T>(p_, job_.tensors, member), is_additional);
  }
  Tokens<T> output(Member member, bool is_additional = false) const {
    return tokens(operand<T>(p_, job_.tensors, member), is_additional);
  }

  Arguments<T> arguments(const PassGrid& grid, bool rows_are_queries) const {
    using M = Tensors;
    Arguments<T> a(grid);
    a.blocks_per_head = grid.blocks_per_head();
    if (examples_) {
      a.examples = examples_;
      constexpr int kAxis = kMaxRank - 1;
      const Places all = places_of(p_, kAxis, grid.rows);
      a.grid.places[kAxis].row_length = all.row_length;
      a.grid.places[kAxis].column_length = all.column_length;
    }
    a.heads = static_cast<int>(rows_are_queries ? p_.heads : p_.kv_heads);
    a.queries_per_kv = static_cast<int>(p_.heads / p_.kv_heads);
    a.dims[0] = static_cast<int>(p_.head_dim);
    a.dims[1] = static_cast<int>(p_.value_dim);
    a.rpb = operand<const T>(p_, job_.tensors, &M::rpb);
    a.scale = static_cast<float>(p_.scale);
    a.scales_first = a.rpb || !(a.scale > 0);
    a.factor = a.scales_first ? 1.0f : a.scale * kLog2E;
    a.logsumexp = operand<const float>(p_, job_.tensors, &M::logsumexp);
    a.grad_logsumexp = operand<const float>(p_, job_.tensors, &M::grad_logsumexp);
    const Operand<float> row_term = row_term_operand(p_, pieces_.row_term);
    a.row_term = {row_term.data, row_term.batch, row_term.head, row_term.token, row_term.grid};
    const bool forward = p_.op == Op::attention_forward;
    a.statistic = forward ? operand<float>(p_, job_.tensors, &M::logsumexp) : row_term;
    set_masks(a, p_, job_.tensors);
    const Tokens<const T> query = input(&M::query), grad_output = input(&M::grad_output);
    if (rows_are_queries) {
      a.rows[0] = query;
      a.rows[1] = grad_output;
      a.columns[0] = input(&M::key);
      a.columns[1] = input(&M::value);
      a.additional[0] = input(&M::additional_keys, true);
      a.additional[1] = input(&M::additional_values, true);
      a.additional_columns = static_cast<int>(p_.additional);
      a.query_sums = nullptr;
      a.sums[0] = output(&M::grad_query);
      a.sums[1] = output(&M::output);
    } else {
      const bool is_additional = grid.rows == Rows::additional;
      a.rows[0] = input(is_additional ? &M::additional_keys : &M::key, is_additional);
      a.rows[1] = input(is_additional ? &M::additional_values : &M::value, is_additional);
      a.columns[0] = query;
      a.columns[1] = grad_output;
      a.additional_columns = 0;
      a.query_sums = pieces_.query_sums;
      a.sums[0] = output(is_additional ? kGradAdditional[0] : &M::grad_key, is_additional);
      a.sums[1] = output(is_additional ? kGradAdditional[1] : &M::grad_value, is_additional);
      if (is_additional) {
        a.splits = pieces_.splits;
        std::copy(pieces_.parts, pieces_.parts + 2, a.partial);
      }
    }
    for (int which = 0; which < 2; ++which) set_copies(a, which);
    return a;
  }

  const Job& job_;
  const Problem p_, longest_;
  Launcher& launch_;
  const FnaPieces pieces_;
  Examples examples_;
};

/// Enqueues the kernels of a job.
template <class T, class Launcher>
void run_fna_as(const Job& job, Launcher& launch) {
  TilePasses<T, Launcher>(job, launch).run();
}
template <class Launcher>
void run_fna(const Job& job, Launcher& launch) {
  switch (job.problem.dtype) {
    case DType::float16: return run_fna_as<float16>(job, launch);
    case DType::bfloat16: return run_fna_as<bfloat16>(job, launch);
    default: return run_fna_as<float>(job, launch);
  }
}

}  // namespace natten::detail::cuda
