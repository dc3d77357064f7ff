#pragma once

#include <natten/build_info.h>
#include <natten/types.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "simd/kernels.h"

namespace natten::detail::cpu {

/// The kernels for this processor: the best that it can run, or the one that the environment
/// variable NATTEN_CPU_ISA names (base, avx2, avx512, avx512wide, avx512bf16, and avx2wide and
/// avx2bf16, which are for tests). Throws Error where that cannot run.
const simd::InstructionSet& instruction_set();
/// The instruction set that calls use and the processor, in words.
std::string_view machine_name();

/// All that kernels were compiled for, best first. None is chosen where `instruction_set` throws.
std::vector<InstructionSetInfo> instruction_sets();

/// The kernels of a type of sums. `in_pairs`: for operands that are pairs of bfloat16.
template <class T>
const simd::Kernels<T>& kernels_for(const simd::InstructionSet& isa, bool in_pairs = false);
template <>
inline const simd::Kernels<float>& kernels_for(const simd::InstructionSet& isa, bool in_pairs) {
  return in_pairs ? isa.pairs : isa.f32;
}
template <>
inline const simd::Kernels<double>& kernels_for(const simd::InstructionSet& isa, bool) {
  return isa.f64;
}

/// Packs tokens of an element type, converted or in pairs, and writes sums as elements.
inline void pack(const simd::InstructionSet& isa, DType, const simd::Packing<double>& p,
                 bool /*in_pairs*/ = false) {
  isa.convert.pack_f64(p);
}
inline void pack(const simd::InstructionSet& isa, DType dtype, const simd::Packing<float>& p,
                 bool in_pairs = false) {
  (in_pairs ? isa.convert.pack_pairs : isa.convert.pack[static_cast<int>(dtype)])(p);
}
inline void unpack(const simd::InstructionSet& isa, DType, const simd::Unpacking<double>& u) {
  isa.convert.unpack_f64(u);
}
inline void unpack(const simd::InstructionSet& isa, DType dtype, const simd::Unpacking<float>& u) {
  isa.convert.unpack[static_cast<int>(dtype)](u);
}

}  // namespace natten::detail::cpu
