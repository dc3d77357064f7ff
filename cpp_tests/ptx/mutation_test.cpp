// What the tests would find: each barrier, wait and mask of the tensor-core kernels is left out
// once, and small problems have to notice. Prints the list.

#include <iomanip>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../../libnatten/src/cuda/fna/fna.h"
#include "../cases.h"
#include "../cuda_machine.h"

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
  static std::string run(const natten::Call& call, std::uint64_t seed) {
    const natten::Problem problem = natten::describe(call);
    DeviceMemory memory;
    const natten::Tensors tensors = memory.tensors(call.op, call.tensors);
    ptx::Launcher launch(seed);
    try {
      cuda::run_fna({problem, tensors, memory.workspace(cuda::fna_workspace_bytes(problem))},
                    launch);
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
      const std::string fault = run(call, seed);
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

TEST_P(MutatedKernels, AreNoticed) {
  for (const auto& entry : ptx::kernels().parsed()) {  // by tests before
    entry->blocks = 0;
    entry->counts.assign(entry->counts.size(), 0);
  }
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
  const auto noticed = [&]() -> std::string {
    for (std::uint64_t seed = 1; seed <= 2; ++seed)
      for (Prepared& p : problems)
        for (const bool deterministic : {true, false}) {
          const std::string what = run(p.problem, p.expected, deterministic, seed);
          if (!what.empty()) return what;
        }
    return {};
  };
  ASSERT_EQ(noticed(), "");

  std::map<std::string, std::pair<int, int>> totals;  // noticed, and all
  for (const auto& entry : ptx::kernels().parsed()) {
    if (entry->blocks == 0 || entry->name.rfind("TileKernel<", 0) != 0) continue;
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
                << in.line << (what.empty() ? "NOT NOTICED" : what) << "  " << entry->name << "\n";
    }
  }
  for (const auto& [defect, count] : totals)
    std::cout << defect << ": " << count.first << " of " << count.second << " noticed\n";
}

INSTANTIATE_TEST_SUITE_P(Precisions, MutatedKernels,
                         testing::Values(Precision(natten::DType::bfloat16),
                                         Precision(natten::DType::float32, true)),
                         [](const auto& info) { return info.param.name(); });

}  // namespace
}  // namespace natten_tests
