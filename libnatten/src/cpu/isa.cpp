#include "isa.h"

#include <natten/error.h>

#include <cstdlib>
#include <string>

namespace natten::detail::cpu {

namespace simd {
extern const InstructionSet isa_base;
#if NATTEN_HAVE_X86_ISAS
extern const InstructionSet isa_avx2;
extern const InstructionSet isa_avx512;
#endif
}  // namespace simd

namespace {

struct Candidate {
  const simd::InstructionSet* isa;
  bool runs;
};

const simd::InstructionSet& choose() {
#if NATTEN_HAVE_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {
      {&simd::isa_avx512, avx512}, {&simd::isa_avx2, avx2}, {&simd::isa_base, true}};
#else
  const Candidate candidates[] = {{&simd::isa_base, true}};
#endif
  const char* forced = std::getenv("NATTEN_CPU_ISA");
  std::string names;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs) continue;
    if (!forced || !*forced || std::string(forced) == candidate.isa->name) return *candidate.isa;
    names += std::string(names.empty() ? "" : ", ") + candidate.isa->name;
  }
  throw Error(ErrorKind::invalid_value,
              std::string("NATTEN_CPU_ISA: got \"") + forced + "\"; this processor runs " + names);
}

}  // namespace

const simd::InstructionSet& instruction_set() {
  static const simd::InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace natten::detail::cpu
