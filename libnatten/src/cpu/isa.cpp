#include "isa.h"

#include <natten/error.h>

#include <cstdlib>
#include <string>

#if NATTEN_HAVE_X86_ISAS
#include <cpuid.h>
#endif

namespace natten::detail::cpu {

namespace simd {
extern const InstructionSet isa_base;
#if NATTEN_HAVE_X86_ISAS
extern const InstructionSet isa_avx2;
extern const InstructionSet isa_avx512;
extern const InstructionSet isa_avx512wide;
#endif
#if NATTEN_HAVE_AVX2WIDE
extern const InstructionSet isa_avx2wide;
#endif
}  // namespace simd

namespace {

struct Candidate {
  const simd::InstructionSet* isa;
  bool runs, is_chosen;  // is_chosen: unless another is forced
};

#if NATTEN_HAVE_X86_ISAS
/// Of AMD's processors with AVX-512.
bool is_zen5_or_later() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  return family >= 0x1a;  // Zen 3 and 4 are family 0x19
}
#endif

const simd::InstructionSet& choose() {
#if NATTEN_HAVE_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  // Vectors of 512 bits are faster only on processors with units that wide: Intel's, and AMD's
  // since Zen 5. A Zen 4 takes 3 to 15 % longer with them.
  const bool wide_units = __builtin_cpu_is("intel") || is_zen5_or_later();
  const Candidate candidates[] = {
    {&simd::isa_avx512wide, avx512, wide_units},
    {&simd::isa_avx512, avx512, true},
    {&simd::isa_avx2, avx2, true},
#if NATTEN_HAVE_AVX2WIDE
    {&simd::isa_avx2wide, avx2, false},
#endif
    {&simd::isa_base, true, true}
  };
#else
  const Candidate candidates[] = {{&simd::isa_base, true, true}};
#endif
  const char* forced = std::getenv("NATTEN_CPU_ISA");
  std::string names;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs) continue;
    if (forced && *forced ? std::string(forced) == candidate.isa->name : candidate.is_chosen)
      return *candidate.isa;
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
