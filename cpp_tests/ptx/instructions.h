#pragma once

// What the parser makes of PTX, and what a warp runs.

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace natten_tests::ptx {

inline constexpr int kLanes = 32;
inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

/// What a kernel must not do, or what is not known here. Where it happened is added on its way out.
class Fault : public std::runtime_error {
  using runtime_error::runtime_error;
};

enum class Type : std::uint8_t {
  none,
  pred,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  f32,
  f64,
  f16x2,
  bf16,
  bf16x2,
  tf32,
};
/// In a register or in memory; predicates are in neither.
constexpr int bytes_of(Type type) {
  switch (type) {
    case Type::none:
    case Type::pred: return 0;
    case Type::u8:
    case Type::s8: return 1;
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16: return 2;
    case Type::u64:
    case Type::s64:
    case Type::f64: return 8;
    default: return 4;
  }
}

/// By their names in PTX; those of a warp's or a block's own are spelled out.
enum class Opcode : std::uint8_t {
  nop,
  abs,
  add,
  and_,
  atom_add,
  barrier,
  bfi,
  branch,
  convert,
  copy_async,
  copy_commit,
  copy_wait,
  div,
  ex2,
  fma,
  funnel_shift,
  load,
  load_matrices,
  mad,
  mad_wide,
  max,
  min,
  move,
  mul,
  mul_hi,
  mul_wide,
  multiply_matrices,
  neg,
  not_,
  or_,
  pack,
  rcp,
  rem,
  ret,
  select,
  set_predicate,
  shift_left,
  shift_right,
  shuffle_xor,
  shuffle,
  store,
  sub,
  to_generic,
  to_shared,
  unpack,
  vote_all,
  warp_barrier,
  xor_,
};

/// Those that need all lanes of a warp at once.
constexpr bool is_collective(Opcode opcode) {
  switch (opcode) {
    case Opcode::barrier:
    case Opcode::warp_barrier:
    case Opcode::shuffle_xor:
    case Opcode::shuffle:
    case Opcode::vote_all:
    case Opcode::load_matrices:
    case Opcode::multiply_matrices: return true;
    default: return false;
  }
}

/// Where `u`, also true if one of both is NaN.
enum class Comparison : std::uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu };
enum class Combination : std::uint8_t { none, and_, or_, xor_ };
enum class Space : std::uint8_t { generic, global, shared, parameter };

/// A register, or a constant that has one of its own. Its lanes lie side by side; a predicate is
/// one word with a bit for each lane.
struct Operand {
  std::int32_t at = 0;  ///< of its lanes in the registers of a warp, in bytes
  std::int32_t bytes = 0;
};

struct Instruction {
  static constexpr int kMostOperands = 14;

  Opcode opcode = Opcode::nop;
  Type type = Type::none;
  Type from = Type::none;  ///< of a conversion
  Comparison comparison = Comparison::eq;
  Combination combination = Combination::none;
  Space space = Space::generic;
  bool is_transposed = false;   ///< load_matrices
  bool is_saturated = false;    ///< convert
  bool is_approximate = false;  ///< rcp
  bool rounds_down = false;     ///< fma
  bool rounds_to_even = false;  ///< convert, to integers; others round to zero
  bool is_guarded = false, is_guard_negated = false;
  std::int8_t elements = 1;  ///< of a vector in memory
  std::int8_t operand_count = 0;
  std::int32_t guard = 0;         ///< its predicate
  std::int32_t target = 0;        ///< of a branch, an instruction's number
  std::int32_t displacement = 0;  ///< added to an address; the number of copy_wait
  std::int32_t line = 0;          ///< of the PTX file
  Operand operands[kMostOperands];
};

/// A kernel's code.
struct Entry {
  std::string name;  ///< of its kernel, as people read it
  std::vector<Instruction> code;
  std::int32_t register_bytes = 0;  ///< of a warp

  struct Constant {
    Operand operand;
    std::uint64_t value;
  };
  std::vector<Constant> constants;
  std::int32_t thread = -1, block = -1;  ///< registers of %tid.x and %ctaid.x, where it has them

  /// How often warps have run each instruction.
  std::vector<std::uint64_t> counts;
  std::uint64_t blocks = 0;
};

}  // namespace natten_tests::ptx
