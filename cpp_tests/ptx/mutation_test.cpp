// What the tests would find: each barrier, wait and mask of the tensor-core kernels is left out
// once, and small problems have to notice. Prints the list.

#include <functional>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../../libnatten/src/cuda/gemm/gemm.h"
#include "../cuda_machine.h"
#include "../unfused_problem.h"

namespace natten_tests {
namespace {

namespace cuda = natten::detail::cuda;

std::optional<std::uint64_t> constant_of(const ptx::Entry& entry, const ptx::Operand& operand) {
  for (const ptx::Entry::Constant& constant : entry.constants)
    if (constant.operand.at == operand.at) return constant.value;
  return {};
}

struct Mutation {
  const char* defect;
  ptx::Instruction instruction;
};
/// An instruction with a defect, where it can have one that matters.
std::optional<Mutation> mutation_of(const ptx::Entry& entry, const ptx::Instruction& in) {
  using ptx::Opcode;
  ptx::Instruction changed = in;
  changed.opcode = Opcode::nop;
  switch (in.opcode) {
    case Opcode::barrier: return Mutation{"no barrier of a block", changed};
    case Opcode::warp_barrier: return Mutation{"no barrier of a warp", changed};
    case Opcode::copy_wait: return Mutation{"no wait for copies", changed};
    case Opcode::copy_async:
      // Zeros in place of what is hidden or not given, by a number of bytes that is found out.
      if (constant_of(entry, in.operands[2])) return {};
      for (const ptx::Entry::Constant& constant : entry.constants)
        if (constant.operand.bytes == 4 &&
            constant.value == static_cast<std::uint64_t>(in.elements)) {
          changed = in;
          changed.operands[2] = constant.operand;
          return Mutation{"no zeros in a copy", changed};
        }
      return {};
    case Opcode::select:
      if (in.type == ptx::Type::f32)
        for (int i = 1; i <= 2; ++i)
          if (constant_of(entry, in.operands[i]) == 0xff800000u) {  // the score of what is not seen
            changed = in;
            changed.opcode = Opcode::move;
            changed.operands[1] = in.operands[3 - i];
            return Mutation{"no mask of a score", changed};
          }
      return {};
    default: return {};
  }
}

class MutatedKernels : public testing::TestWithParam<Precision> {
 protected:
  /// Several tiles of columns along an axis that wraps, and rows and keys that are not there.
  std::vector<Case> cases() const {
    std::vector<Case> all(2);
    all[0].axes = {{230, 150, 1, 1, false}};
    all[1].axes = {{20, 9, 1, 1, false, natten::Boundary::circular}, {18, 7, 1, 1, true}};
    all[1].key_mask = true;
    all[1].additional = 3;
    std::uint64_t seed = base_seed();
    for (Case& c : all) {
      c.seed = ++seed;
      c.dtype = GetParam().dtype;
      c.allow_tf32 = GetParam().allow_tf32;
      c.dim = c.value_dim = 32;
    }
    return all;
  }

  /// Runs a call. What is wrong with it, by a fault; empty where nothing is.
  template <class Run, class WorkspaceBytes>
  static std::string run(const natten::Call& call, std::uint64_t seed, Run&& run_backend,
                         WorkspaceBytes&& workspace_bytes) {
    const natten::Problem problem = natten::describe(call);
    DeviceMemory memory;
    const natten::Tensors tensors = memory.tensors(call.op, call.tensors);
    ptx::Launcher launch(seed);
    try {
      run_backend({problem, tensors, memory.workspace(workspace_bytes(problem))}, launch);
    } catch (const ptx::Fault& fault) {
      return fault.what();
    }
    return {};
  }
  /// The same of forward and backward passes, and wrong results.
  std::string run(FusedProblem& problem, const oracle::FusedResults& expected, bool deterministic,
                  std::uint64_t seed) const {
    for (natten::Call call : {problem.forward(), problem.backward()}) {
      call.options.deterministic = deterministic;
      const std::string fault =
          run(call, seed, cuda::run_fna<ptx::Launcher>, cuda::fna_workspace_bytes);
      if (!fault.empty()) return fault;
    }
    Buffers& b = problem.buffers;
    const Bounds bounds = bounds_of(GetParam());
    if (!(relative_error(b.output.dense(), expected.output) <= bounds.forward)) return "output";
    std::string wrong;
    for_each_gradient(b, expected, [&](const char* name, Buffer& got, const Dense& reference) {
      if (got.view() &&
          !(relative_error(got.dense(), reference, problem.incoming_gradient()) <= bounds.gradient))
        wrong = name;
    });
    return wrong;
  }
};

/// Leaves out one thing after another of kernels whose names begin so, and that `noticed` runs: it
/// returns what was wrong.
void list_mutations(const std::string& kernels, const std::function<std::string()>& noticed) {
  for (const auto& entry : ptx::kernels().parsed()) {  // by tests before
    entry->blocks = 0;
    entry->counts.assign(entry->counts.size(), 0);
  }
  ASSERT_EQ(noticed(), "");

  std::map<std::string, std::pair<int, int>> totals;  // noticed, and all
  for (const auto& entry : ptx::kernels().parsed()) {
    if (entry->blocks == 0 || entry->name.rfind(kernels, 0) != 0) continue;
    int scores = 0;
    for (std::size_t at = 0; at < entry->code.size(); ++at) {
      ptx::Instruction& in = entry->code[at];
      const std::optional<Mutation> mutation = mutation_of(*entry, in);
      if (!mutation || entry->counts[at] == 0) continue;
      constexpr int kScores = 64;  // one of so many, as they are all alike
      if (in.opcode == ptx::Opcode::select && scores++ % kScores != 0) continue;
      const ptx::Instruction before = std::exchange(in, mutation->instruction);
      const std::string what = noticed();
      in = before;
      auto& [found, all] = totals[mutation->defect];
      ++all;
      if (!what.empty()) ++found;
      std::cout << std::left << std::setw(24) << mutation->defect << "line " << std::setw(8)
                << in.line << (what.empty() ? "NOT NOTICED" : what) << "  " << entry->name
                << std::endl;
    }
  }
  for (const auto& [defect, count] : totals)
    std::cout << defect << ": " << count.first << " of " << count.second << " noticed\n";
}

TEST_P(MutatedKernels, AreNoticed) {
  struct Prepared {
    FusedProblem problem;
    oracle::FusedResults expected;
  };
  std::vector<Prepared> problems;
  for (const Case& c : cases()) {
    FusedProblem problem(c);
    problem.provide_logsumexp();
    problems.push_back({problem, problem.expected()});
  }
  list_mutations("TileKernel<", [&]() -> std::string {
    for (std::uint64_t seed = 1; seed <= 2; ++seed)
      for (Prepared& p : problems)
        for (const bool deterministic : {true, false}) {
          const std::string what = run(p.problem, p.expected, deterministic, seed);
          if (!what.empty()) return what;
        }
    return {};
  });
}

TEST_P(MutatedKernels, OfUnfusedOperationsAreNoticed) {
  struct Prepared {
    natten::Call call;
    Buffers buffers;
    Buffer Buffers::*result;
    Dense expected;
  };
  std::vector<std::unique_ptr<Prepared>> problems;  // calls refer to their buffers
  for (const Case& c : cases()) {
    UnfusedProblem problem(c);
    const auto add = [&](natten::Op op, Buffer Buffers::*result, auto&& fill, auto&& expected) {
      problems.push_back(std::make_unique<Prepared>());
      Prepared& p = *problems.back();
      fill(p.buffers);
      p.result = result;
      p.call = problem.call(op, p.buffers);
      p.call.options.empty_slots = natten::EmptySlots::zero;
      p.expected = expected(p.buffers);
    };
    add(
        natten::Op::qk, &Buffers::attn,
        [&](Buffers& b) {
          b.query = problem.input(problem.tokens);
          b.key = problem.input(problem.keys);
          b.additional_keys = problem.additional_input();
          b.attn = problem.result(problem.slots);
        },
        [&](Buffers& b) {
          return oracle::qk(problem.n, problem.pairs, b.query.dense(), b.key.dense(), Dense(),
                            b.additional_keys.dense(), 0.0);
        });
    add(
        natten::Op::av, &Buffers::output,
        [&](Buffers& b) {
          b.attn = problem.input(problem.slots);
          poison_empty_slots(problem, b.attn);
          b.value = problem.input(problem.keys);
          b.additional_values = problem.additional_input();
          b.output = problem.result(problem.tokens);
        },
        [&](Buffers& b) {
          return oracle::av(problem.n, problem.pairs, b.attn.dense(), b.value.dense(),
                            b.additional_values.dense());
        });
    add(
        natten::Op::av_transpose, &Buffers::key,
        [&](Buffers& b) {
          b.attn = problem.input(problem.slots);
          poison_empty_slots(problem, b.attn);
          b.query = problem.input(problem.tokens);
          b.key = problem.result(problem.keys);
          b.additional_keys = problem.additional_result();
        },
        [&](Buffers& b) {
          return oracle::av_transpose(problem.n, problem.pairs, b.attn.dense(), b.query.dense())
              .key;
        });
  }
  list_mutations("GemmKernel<", [&]() -> std::string {
    for (std::uint64_t seed = 1; seed <= 2; ++seed)
      for (const auto& p : problems) {
        Buffer& result = p->buffers.*p->result;
        for (std::int64_t i = 0; i < p->expected.size(); ++i) result.set(i, std::nan(""));
        const std::string fault =
            run(p->call, seed, cuda::run_gemm<ptx::Launcher>, cuda::gemm_workspace_bytes);
        if (!fault.empty()) return fault;
        if (!(relative_error(result.dense(), p->expected) <= bounds_of(GetParam()).forward))
          return name_of(p->call.op);
      }
    return {};
  });
}

INSTANTIATE_TEST_SUITE_P(Precisions, MutatedKernels,
                         testing::Values(Precision(natten::DType::bfloat16),
                                         Precision(natten::DType::float16),
                                         Precision(natten::DType::float32, true)),
                         [](const auto& info) { return info.param.name(); });

}  // namespace
}  // namespace natten_tests
