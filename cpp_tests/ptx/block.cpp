#include "block.h"

#include <string>

namespace natten_tests::ptx {

Block::Block(Entry& entry, int threads, int shared_bytes, GlobalMemory& global, std::uint64_t seed)
    : entry_(entry), seed_(seed), shared_(shared_bytes, threads / kLanes) {
  constexpr int kMostWarps = 32;
  if (threads % kLanes != 0 || threads > kMostWarps * kLanes)
    throw Fault("threads must fill at most 32 warps");
  for (int i = 0; i < threads / kLanes; ++i) warps_.emplace_back(entry, i, shared_, global);
}

void Block::run(std::uint32_t block, const void* parameters) {
  constexpr std::uint64_t kFew = 16, kMany = 500, kMost = 100'000'000;
  ++entry_.blocks;
  Rng rng(seed_ * 0x9e3779b97f4a7c15u + block);
  Rng* const random = seed_ == 0 ? nullptr : &rng;
  shared_.begin_block();
  for (Warp& warp : warps_) warp.begin(block, parameters);
  std::size_t running = 0;
  std::uint64_t taken = 0;
  try {
    for (;;) {
      std::size_t ready[32], count = 0;
      bool is_done = true;
      for (std::size_t i = 0; i < warps_.size(); ++i) {
        is_done = is_done && warps_[i].is_done();
        if (!warps_[i].is_done() && !warps_[i].is_at_barrier()) ready[count++] = i;
      }
      if (is_done) return;
      if (count == 0) {  // all have come to the barrier
        shared_.pass_barrier();
        for (Warp& warp : warps_) warp.leave_barrier();
        continue;
      }
      if (taken > kMost) throw Fault("does not come to an end");
      running = ready[random ? rng() % count : 0];
      std::uint64_t steps = kMost;
      if (random) {
        steps = 1 + rng() % (rng() % 2 == 0 ? kFew : kMany);
        for (Warp& warp : warps_) warp.land_some_copies(rng);
      }
      Warp& warp = warps_[running];
      for (; steps > 0 && !warp.is_done() && !warp.is_at_barrier(); --steps, ++taken)
        warp.step(random, entry_.counts);
    }
  } catch (const Fault& fault) {
    throw Fault(entry_.name + ", PTX line " + std::to_string(warps_[running].line()) + ", block " +
                std::to_string(block) + ", warp " + std::to_string(running) + ": " + fault.what());
  }
}

}  // namespace natten_tests::ptx
