#pragma once

// Memory of a device and of a block, which find what a GPU would let pass.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "instructions.h"

namespace natten_tests::ptx {

/// Regions of host memory, at addresses of their own for kernels. So far apart do they lie there
/// that no stray access of one reaches another; what is not in a region is a fault.
class GlobalMemory {
 public:
  /// Where shared memory lies among addresses that may be of either kind.
  static constexpr std::uint64_t kSharedWindow = std::uint64_t{1} << 62;

  /// Where kernels find `data`. It keeps its place in a page, so that it is aligned as on the host.
  std::uint64_t add(const std::string& name, void* data, std::size_t bytes, bool is_writable);
  void remove(std::uint64_t address);

  const char* read(std::uint64_t address, std::size_t bytes) const {
    return find(address, bytes, false);
  }
  char* write(std::uint64_t address, std::size_t bytes) const { return find(address, bytes, true); }

 private:
  static constexpr int kRegionBits = 40;
  static constexpr std::uint64_t kFirst = std::uint64_t{1} << (kRegionBits - 1), kPage = 4096;
  struct Region {
    std::string name;
    char* data = nullptr;
    std::size_t bytes = 0;
    std::uint64_t first = 0;  ///< address of `data`; 0: there is none
    bool is_writable = false;
  };
  char* find(std::uint64_t address, std::size_t bytes, bool writes) const {
    const std::uint64_t number = address >> kRegionBits;
    if (number < regions_.size()) {
      const Region& region = regions_[number];
      const std::uint64_t offset = address - region.first;
      if (region.first != 0 && offset <= region.bytes && bytes <= region.bytes - offset &&
          (region.is_writable || !writes))
        return region.data + offset;
    }
    refuse(address, bytes, writes);
  }
  [[noreturn]] void refuse(std::uint64_t address, std::size_t bytes, bool writes) const;

  std::vector<Region> regions_{1};  // none at address 0
};

/// A thread of a block.
struct Thread {
  int warp, lane;
};

/// Shared memory of a block, with what was done to each byte since the last barriers. Two threads
/// race where both access a byte, one of them writes, and no barrier of both lies in between:
/// `bar.sync`, or `bar.warp.sync` where they are of one warp. Writes of equal values do not count.
/// An asynchronous copy writes at any time from when it is issued to when its thread has waited.
class SharedMemory {
 public:
  SharedMemory(int bytes, int warps);

  /// All bytes start as NaN, so that what is read before it is written shows.
  void begin_block();
  void pass_barrier() { ++epoch_; }
  void pass_warp_barrier(int warp) { ++warp_epochs_[static_cast<std::size_t>(warp)]; }

  void read(Thread thread, std::uint32_t at, void* to, int bytes);
  void write(Thread thread, std::uint32_t at, const void* from, int bytes);

  /// A copy is issued. What is there may be lost from now on.
  void begin_copy(Thread thread, std::uint32_t at, int bytes, bool spoils);
  void land_copy(std::uint32_t at, const void* from, int bytes);
  /// Its thread has waited for it.
  void end_copy(Thread thread, std::uint32_t at, int bytes);

 private:
  /// Of accesses in older epochs nothing has to be known. Epochs count on from block to block.
  struct Byte {
    std::uint32_t write_epoch = 0, write_warp_epoch = 0;
    std::uint32_t read_epoch = 0, read_warp_epoch = 0;
    std::uint32_t read_warps = 0;  ///< that read it in the epoch
    std::uint32_t read_lanes = 0;  ///< of the last of them, in its epoch
    std::uint8_t write_warp = 0, write_lane = 0, last_read_warp = 0, copies = 0;
  };
  void check(std::uint32_t at, int bytes) const;
  void note_write(Thread thread, Byte& byte, std::uint32_t at, bool is_same_value);
  [[noreturn]] void race(const char* what, Thread thread, Thread other, std::uint32_t at) const;
  [[noreturn]] void in_flight(const char* what, std::uint32_t at) const;
  std::uint32_t epoch_of(int warp) const { return warp_epochs_[static_cast<std::size_t>(warp)]; }

  std::vector<unsigned char> data_;
  std::vector<Byte> bytes_;
  std::uint32_t epoch_ = 0;
  std::vector<std::uint32_t> warp_epochs_;
  std::int64_t open_copies_ = 0;
};

}  // namespace natten_tests::ptx
