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
#endif
#if NATTEN_HAVE_AVX512
extern const InstructionSet isa_avx512;
extern const InstructionSet isa_avx512wide;
#endif
#if NATTEN_HAVE_AVX512BF16
extern const PairKernels isa_avx512bf16;
#endif
#if NATTEN_HAVE_AVX2WIDE
extern const InstructionSet isa_avx2wide;
#endif
#if NATTEN_HAVE_AVX2BF16
extern const PairKernels isa_avx2bf16;
#endif
}  // namespace simd

namespace {

struct Candidate {
  const simd::InstructionSet* isa;
  bool runs, is_chosen;  // is_chosen: unless another is forced
};

#if NATTEN_HAVE_X86_ISAS
/// What the processor has and the operating system saves. Compilers have functions for it, but
/// clang only since 19 for all of these, and not every runtime library defines what they need.
struct Processor {
  bool avx2 = false;    // with FMA and F16C
  bool avx512 = false;  // with all that kernels are compiled for
  bool bf16 = false;    // AVX512-BF16
  bool wide_units;      // faster with vectors of 512 bits

  Processor() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    __get_cpuid(0, &eax, &ebx, &ecx, &edx);
    const bool intel = ebx == signature_INTEL_ebx;
    const bool amd = ebx == signature_AMD_ebx;
    __get_cpuid(1, &eax, &ebx, &ecx, &edx);
    const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
    // Units that wide are Intel's, and AMD's since Zen 5: Zen 3 and 4 are family 0x19. A Zen 4
    // takes 3 to 15 % longer with them.
    wide_units = intel || (amd && family >= 0x1a);

    constexpr unsigned fma = 1u << 12, saves_state = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if (!has(ecx, fma | saves_state | avx | f16c)) return;
    unsigned saved, high;
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    constexpr unsigned sse_and_avx_registers = 0x6, avx512_registers = 0xe0;
    if (!has(saved, sse_and_avx_registers) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
      return;
    avx2 = has(ebx, 1u << 5);
    constexpr unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    avx512 = avx2 && has(saved, avx512_registers) && has(ebx, f | dq | bw | vl);
    bf16 = avx512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && has(eax, 1u << 5);
  }

  static bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }
};
#endif

/// `isa`, with kernels for pairs of bfloat16 beside its others.
[[maybe_unused]] simd::InstructionSet with_pairs(const char* name, simd::InstructionSet isa,
                                                 const simd::PairKernels& pairs) {
  isa.name = name;
  isa.pairs = pairs.kernels;
  isa.convert.pack_pairs = pairs.pack;
  return isa;
}

/// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if NATTEN_HAVE_X86_ISAS
  const Processor processor;
#if NATTEN_HAVE_AVX512BF16
  // Pairs are faster with vectors of 512 bits on a Zen 4 too.
  static const simd::InstructionSet avx512bf16 =
      with_pairs("avx512bf16", processor.wide_units ? simd::isa_avx512wide : simd::isa_avx512,
                 simd::isa_avx512bf16);
  found.push_back({&avx512bf16, processor.bf16, true});
#endif
#if NATTEN_HAVE_AVX512
  found.push_back({&simd::isa_avx512wide, processor.avx512, processor.wide_units});
  found.push_back({&simd::isa_avx512, processor.avx512, true});
#endif
  found.push_back({&simd::isa_avx2, processor.avx2, true});
#if NATTEN_HAVE_AVX2WIDE
  found.push_back({&simd::isa_avx2wide, processor.avx2, false});
#endif
#if NATTEN_HAVE_AVX2BF16
  static const simd::InstructionSet avx2bf16 =
      with_pairs("avx2bf16", simd::isa_avx2, simd::isa_avx2bf16);
  found.push_back({&avx2bf16, processor.avx2, false});
#endif
#endif
  found.push_back({&simd::isa_base, true, true});
  return found;
}

const simd::InstructionSet& choose() {
  const char* forced = std::getenv("NATTEN_CPU_ISA");
  std::string names;
  for (const Candidate& candidate : candidates()) {
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

namespace {

/// What the processor calls itself; empty where it cannot be asked.
std::string processor_name() {
  std::string name;
#if NATTEN_HAVE_X86_ISAS
  unsigned words[12];
  unsigned* part = words;
  for (unsigned leaf = 0x80000002; leaf <= 0x80000004; ++leaf, part += 4)
    if (!__get_cpuid(leaf, part, part + 1, part + 2, part + 3)) return name;
  const auto* text = reinterpret_cast<const char*>(words);
  for (std::size_t i = 0; i < sizeof words && text[i]; ++i)
    if (text[i] >= ' ' && !(text[i] == ' ' && (name.empty() || name.back() == ' ')))
      name += text[i];
#endif
  return name;
}

}  // namespace

std::string_view machine_name() {
  static const std::string name = [] {
    const std::string processor = processor_name();
    return std::string(instruction_set().name) + (processor.empty() ? "" : ", " + processor);
  }();
  return name;
}

std::vector<InstructionSetInfo> instruction_sets() {
  const simd::InstructionSet* chosen = nullptr;
  try {
    chosen = &instruction_set();
  } catch (const Error&) {
    // Calls say what is wrong with NATTEN_CPU_ISA.
  }
  std::vector<InstructionSetInfo> infos;
  for (const Candidate& candidate : candidates())
    infos.push_back({candidate.isa->name, candidate.runs, candidate.isa == chosen});
  return infos;
}

}  // namespace natten::detail::cpu
