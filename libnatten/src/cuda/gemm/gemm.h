#pragma once

// The backend "gemm": the unfused operations on tensor cores, of half types and, in TF32, of
// float32.

#include <cstddef>
#include <string>

#include "../fna/fna.h"
#include "../simt.h"
#include "kernel.h"

namespace natten::detail::cuda {

inline constexpr int kMostGemmDims = 128;

inline std::string gemm_refuse_reason(const Problem& problem) {
  const Problem p = simplified(problem);
  if (p.op != Op::qk && p.op != Op::av && p.op != Op::av_transpose)
    return "computes qk, av and av_transpose only";
  if (!p.allow_gemm) return "the call does not allow it";
  std::string refusal = dtype_refusal(p);
  if (!refusal.empty()) return refusal;
  if (p.head_dim > kMostGemmDims)
    return "head dim " + std::to_string(p.head_dim) + "; the most is " +
           std::to_string(kMostGemmDims);
  if (p.slots() >= 1 << 24) return "a query sees more than 2^24 - 1 tokens";
  return grid_refusal(p);
}

/// The workspace of an operation.
struct GemmPieces {
  simt::FillSights sights;  ///< of queries, where these are columns
  int splits;               ///< of the sums of additional tokens...
  Partial part;             ///< ...where there are several
  std::size_t bytes;

  GemmPieces(const Problem& p, void* workspace)
      : sights(p, 1), splits(p.op == Op::av_transpose ? additional_splits(p) : 1) {
    simt::Pieces pieces(workspace);
    if (p.op == Op::av_transpose) sights.data = pieces.take<Sight>(sights.count());
    part.part = p.batch * p.heads * p.additional * p.head_dim;
    part.data = pieces.take<float>(splits > 1 ? splits * part.part : 0);
    bytes = pieces.bytes();
  }
};
inline std::size_t gemm_workspace_bytes(const Problem& p) {
  return GemmPieces(simplified(p), nullptr).bytes;
}

/// Enqueues the kernels of one job.
template <class T, class Launcher>
class GemmJob {
 public:
  GemmJob(const Job& job, Launcher& launch)
      : job_(job), p_(simplified(job.problem)), launch_(launch), pieces_(p_, job.workspace) {}

  void run() {
    if (p_.batch == 0) return;
    switch (p_.op) {
      case Op::qk: return enqueue<Op::qk>(Rows::queries);
      case Op::av: return enqueue<Op::av>(Rows::queries);
      default: return transpose();
    }
  }

 private:
  using Member = TensorView Tensors::*;

  void transpose() {
    const simt::FillSights& fill = pieces_.sights;
    launch_(fill, (fill.count() + fill.kThreads - 1) / fill.kThreads);
    enqueue<Op::av_transpose>(Rows::keys);
    const Operand<T> to = operand<T>(p_, job_.tensors, &Tensors::additional_keys);
    if (!to || p_.additional == 0) return;
    enqueue<Op::av_transpose>(Rows::additional);
    if (pieces_.splits == 1) return;
    const simt::AddParts<T> add{pieces_.part.data,
                                pieces_.splits,
                                to.data,
                                {p_.batch, p_.heads, p_.additional, p_.head_dim},
                                {to.batch, to.head, to.token, 1}};
    launch_(add, add.blocks());
  }

  template <Op kOp>
  void enqueue(Rows rows) {
    if (p_.head_dim <= 64) return enqueue<kOp, 64>(rows);
    enqueue<kOp, kMostGemmDims>(rows);
  }
  template <Op kOp, int kDims>
  void enqueue(Rows rows) {
    using Kernel = GemmKernel<T, kDims, kOp>;
    using Traits = typename Kernel::Traits;
    const SlotChunks slots = cut_slots(p_, Traits::kMostSlots, Traits::kColumns);
    PassGrid grid = grid_of(p_, rows);
    if (Traits::kRowsAreQueries)  // for the windows that blocks go through
      for (int i = 0; i < kMaxRank; ++i) grid.axes[i].kernel_size = slots.extent[i];
    choose_tiles(grid, p_.rank, bits_of(Traits::kRows), bits_of(Traits::kColumns), fewest_tiles);
    std::copy(p_.axes, p_.axes + kMaxRank, grid.axes);
    Kernel kernel{arguments(grid, slots)};
    if (kOp == Op::qk) kernel.a.splits = slots.count();
    launch_(kernel, p_.batch * p_.heads * kernel.a.splits * kernel.a.blocks_per_head,
            Kernel::kSharedBytes);
  }

  Tokens<const T> input(Member member, bool is_additional = false) const {
    return tokens(operand<const T>(p_, job_.tensors, member), is_additional);
  }
  Tokens<T> output(Member member, bool is_additional = false) const {
    return tokens(operand<T>(p_, job_.tensors, member), is_additional);
  }

  GemmArguments<T> arguments(const PassGrid& grid, const SlotChunks& slots) const {
    using M = Tensors;
    GemmArguments<T> a(grid);
    a.slots = slots;
    a.blocks_per_head = grid.blocks_per_head();
    a.heads = static_cast<int>(p_.heads);
    a.queries_per_kv = 1;
    a.dims[0] = static_cast<int>(p_.head_dim);
    a.dims[1] = 0;
    a.additional_columns = 0;
    a.scale = 1;
    a.has_offsets[1] = a.copies_chunks[1] = false;
    set_masks(a, p_, job_.tensors);
    if (p_.op == Op::av_transpose) {
      const bool is_additional = grid.rows == Rows::additional;
      a.columns[0] = input(&M::query);
      a.weights = operand<const T>(p_, job_.tensors, &M::attn);
      a.sights = pieces_.sights.sights(Rows::queries);
      a.sums[0] = output(is_additional ? &M::additional_keys : &M::key, is_additional);
      if (is_additional) {
        a.splits = pieces_.splits;
        a.partial[0] = pieces_.part;
      }
    } else {
      const bool is_qk = p_.op == Op::qk;
      a.columns[0] = input(is_qk ? &M::key : &M::value);
      a.additional[0] = input(is_qk ? &M::additional_keys : &M::additional_values, true);
      a.additional_columns = static_cast<int>(p_.additional);
      if (is_qk) {
        a.rows[0] = input(&M::query);
        a.rpb = operand<const T>(p_, job_.tensors, &M::rpb);
        a.scores = operand<T>(p_, job_.tensors, &M::attn);
        a.fills_empty = p_.has_key_mask;
        for (const Axis& axis : p_.axes)
          a.fills_empty = a.fills_empty || axis.is_causal || axis.boundary == Boundary::cut;
        a.empty = p_.empty_slots == EmptySlots::zero ? 0.0f : kNone;
      } else {
        a.weights = operand<const T>(p_, job_.tensors, &M::attn);
        a.sums[0] = output(&M::output);
      }
    }
    set_copies(a, 0);
    return a;
  }

  const Job& job_;
  const Problem p_;
  Launcher& launch_;
  const GemmPieces pieces_;
};

/// Enqueues the kernels of a job.
template <class T, class Launcher>
void run_gemm_as(const Job& job, Launcher& launch) {
  GemmJob<T, Launcher>(job, launch).run();
}
template <class Launcher>
void run_gemm(const Job& job, Launcher& launch) {
  switch (job.problem.dtype) {
    case DType::float16: return run_gemm_as<float16>(job, launch);
    case DType::bfloat16: return run_gemm_as<bfloat16>(job, launch);
    default: return run_gemm_as<float>(job, launch);
  }
}

}  // namespace natten::detail::cuda
