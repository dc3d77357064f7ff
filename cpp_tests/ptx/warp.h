#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "instructions.h"
#include "memory.h"

namespace natten_tests::ptx {

using Rng = std::mt19937_64;

/// 32 lanes that run an entry, each with a place of its own in the code.
class Warp {
 public:
  Warp(const Entry& entry, int number, SharedMemory& shared, GlobalMemory& global);

  /// Starts a block. `parameters` is what the kernel is given.
  void begin(std::uint32_t block, const void* parameters);

  /// Runs one instruction of some lanes, chosen at random where these have parted (by `rng`; null:
  /// those that are furthest behind), and counts it.
  void step(Rng* rng, std::vector<std::uint64_t>& counts);

  bool is_done() const { return live_ == 0; }
  bool is_at_barrier() const { return is_at_barrier_; }
  void leave_barrier() { is_at_barrier_ = false; }
  /// The line of the instruction that runs.
  int line() const { return line_; }

  /// Some asynchronous copies arrive.
  void land_some_copies(Rng& rng);

 private:
  struct Copy {
    std::uint32_t to, group;  ///< group: how many its lane had closed before
    const char* from;
    std::uint8_t bytes, from_memory, lane;
    bool has_landed;
  };

  char* at(const Operand& operand) { return registers_.data() + operand.at; }
  std::uint32_t& predicate(const Operand& operand);
  void choose(Rng* rng, std::int32_t& place, std::uint32_t& lanes) const;
  void move_on(std::uint32_t lanes, std::int32_t to);
  void meet();

  void execute(const Instruction& in, std::uint32_t lanes, Rng* rng);
  void arithmetic(const Instruction& in, std::uint32_t lanes);
  void bits(const Instruction& in, std::uint32_t lanes);
  void predicates(const Instruction& in, std::uint32_t lanes);
  void wide_product(const Instruction& in, std::uint32_t lanes);
  void compare(const Instruction& in, std::uint32_t lanes);
  void select(const Instruction& in, std::uint32_t lanes);
  void convert(const Instruction& in, std::uint32_t lanes);
  void change_space(const Instruction& in, std::uint32_t lanes);
  void pack(const Instruction& in, std::uint32_t lanes);
  void exchange(const Instruction& in, std::uint32_t lanes);
  std::uint64_t address(Space space, const Operand& operand, std::int32_t displacement,
                        int lane) const;
  void load(const Instruction& in, std::uint32_t lanes);
  void store(const Instruction& in, std::uint32_t lanes);
  void add_atomically(const Instruction& in, std::uint32_t lanes);
  void load_matrices(const Instruction& in);
  void multiply_matrices(const Instruction& in);
  void begin_copies(const Instruction& in, std::uint32_t lanes, Rng* rng);
  void end_copies(const Instruction& in, std::uint32_t lanes);
  void land(Copy& copy);

  template <class D, class... S, class F>
  void each(const Instruction& in, std::uint32_t lanes, F&& f);

  const Entry& entry_;
  const int number_;
  SharedMemory& shared_;
  GlobalMemory& global_;
  std::vector<char> registers_;
  const char* parameters_ = nullptr;

  std::uint32_t live_ = 0;
  bool have_parted_ = false;
  std::int32_t place_ = 0;            ///< of all lanes, while they are together
  std::int32_t places_[kLanes] = {};  ///< of each, where they have parted
  bool is_at_barrier_ = false;
  int line_ = 0;

  std::vector<Copy> copies_;  ///< that have not been waited for
  std::uint32_t closed_groups_[kLanes] = {};
};

}  // namespace natten_tests::ptx
