#pragma once

#include <natten/export.h>

#include <string>
#include <vector>

namespace natten {

/// One set of vector instructions that kernels for the CPU were compiled for.
struct InstructionSetInfo {
  std::string name;
  bool available = false;  ///< this processor runs it
  bool chosen = false;     ///< calls use it
};

/// How the library that runs was built, and what of it this processor uses.
struct BuildInfo {
  std::string compiler;            ///< as "GNU 12.2.0"
  std::string build_type;          ///< as "Release"; empty where CMake was given none
  std::string system;              ///< what it was built for, as "Linux x86_64"
  std::string cuda_compiler;       ///< as "NVIDIA 12.4.131"; empty in builds without CUDA kernels
  std::string cuda_architectures;  ///< as "80, 90a-real", in the words of CMAKE_CUDA_ARCHITECTURES
  /// Best first. None is chosen where NATTEN_CPU_ISA names one that this processor lacks; calls
  /// throw Error then.
  std::vector<InstructionSetInfo> instruction_sets;
  /// As "avx2, AMD EPYC 7763": the instruction set that calls use, and the processor where it tells
  /// its name. Empty where none is chosen.
  std::string machine;
};

/// See also `version` (version.h), `backends` (backends.h) and `num_threads` (context.h).
NATTEN_EXPORT BuildInfo build_info();

}  // namespace natten
