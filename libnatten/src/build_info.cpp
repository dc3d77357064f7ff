#include <natten/build_info.h>

#include "cpu/isa.h"

// CMake defines what a compiler does not say of itself in the same words everywhere.
#ifndef NATTEN_CUDA_COMPILER
#define NATTEN_CUDA_COMPILER ""
#define NATTEN_CUDA_ARCHITECTURES ""
#endif

namespace natten {

BuildInfo build_info() {
  BuildInfo info;
  info.compiler = NATTEN_COMPILER;
  info.build_type = NATTEN_BUILD_TYPE;
  info.system = NATTEN_SYSTEM;
  info.cuda_compiler = NATTEN_CUDA_COMPILER;
  info.cuda_architectures = NATTEN_CUDA_ARCHITECTURES;
  info.instruction_sets = detail::cpu::instruction_sets();
  for (const InstructionSetInfo& isa : info.instruction_sets)
    if (isa.chosen) info.machine = detail::cpu::machine_name();
  return info;
}

}  // namespace natten
