#include "memory.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace natten_tests::ptx {

std::uint64_t GlobalMemory::add(const std::string& name, void* data, std::size_t bytes,
                                bool is_writable) {
  std::size_t number = 1;
  while (number < regions_.size() && regions_[number].first != 0) ++number;
  if (number == regions_.size()) regions_.emplace_back();
  const std::uint64_t first = (std::uint64_t{number} << kRegionBits) + kFirst +
                              reinterpret_cast<std::uintptr_t>(data) % kPage;
  regions_[number] = {name, static_cast<char*>(data), bytes, first, is_writable};
  return first;
}

void GlobalMemory::remove(std::uint64_t address) { regions_.at(address >> kRegionBits) = {}; }

void GlobalMemory::refuse(std::uint64_t address, std::size_t bytes, bool writes) const {
  std::ostringstream text;
  text << (writes ? "writes " : "reads ") << bytes << " bytes at global address 0x" << std::hex
       << address << std::dec << ": ";
  const std::uint64_t number = address >> kRegionBits;
  if (number >= regions_.size() || regions_[number].first == 0) {
    text << "no memory is near it";
  } else {
    const Region& region = regions_[number];
    const auto offset = static_cast<std::int64_t>(address - region.first);
    text << "byte " << offset << " of " << region.name << ", which has " << region.bytes;
    if (writes && !region.is_writable) text << " and is only read";
  }
  throw Fault(text.str());
}

SharedMemory::SharedMemory(int bytes, int warps)
    : data_(static_cast<std::size_t>(bytes)),
      bytes_(static_cast<std::size_t>(bytes)),
      warp_epochs_(static_cast<std::size_t>(warps), 0) {}

void SharedMemory::begin_block() {
  std::fill(data_.begin(), data_.end(), static_cast<unsigned char>(0xff));
  if (open_copies_ > 0)  // that nobody has waited for
    for (Byte& byte : bytes_) byte.copies = 0;
  open_copies_ = 0;
  ++epoch_;
}

void SharedMemory::check(std::uint32_t at, int bytes) const {
  if (std::uint64_t{at} + static_cast<std::uint64_t>(bytes) > data_.size())
    throw Fault("accesses " + std::to_string(bytes) + " bytes at " + std::to_string(at) +
                " of shared memory, which has " + std::to_string(data_.size()));
}

void SharedMemory::read(Thread thread, std::uint32_t at, void* to, int bytes) {
  check(at, bytes);
  std::memcpy(to, &data_[at], static_cast<std::size_t>(bytes));
  const std::uint32_t warp_epoch = epoch_of(thread.warp);
  for (int i = 0; i < bytes; ++i) {
    Byte& byte = bytes_[at + static_cast<std::uint32_t>(i)];
    if (byte.copies > 0) in_flight("reads", at);
    if (byte.write_epoch == epoch_ &&
        (byte.write_warp != thread.warp ||
         (byte.write_lane != thread.lane && byte.write_warp_epoch == warp_epoch)))
      race("reads what was written by", thread, {byte.write_warp, byte.write_lane}, at);
    if (byte.read_epoch != epoch_) {
      byte.read_epoch = epoch_;
      byte.read_warps = 0;
      byte.last_read_warp = 0xff;
    }
    if (byte.last_read_warp != thread.warp || byte.read_warp_epoch != warp_epoch) {
      byte.last_read_warp = static_cast<std::uint8_t>(thread.warp);
      byte.read_warp_epoch = warp_epoch;
      byte.read_lanes = 0;
    }
    byte.read_warps |= 1u << thread.warp;
    byte.read_lanes |= 1u << thread.lane;
  }
}

void SharedMemory::note_write(Thread thread, Byte& byte, std::uint32_t at, bool is_same_value) {
  const std::uint32_t warp_epoch = epoch_of(thread.warp);
  if (byte.copies > 0) in_flight("writes", at);
  if (!is_same_value) {
    if (byte.write_epoch == epoch_ &&
        (byte.write_warp != thread.warp ||
         (byte.write_lane != thread.lane && byte.write_warp_epoch == warp_epoch)))
      race("writes what was written by", thread, {byte.write_warp, byte.write_lane}, at);
    if (byte.read_epoch == epoch_) {
      const std::uint32_t others = byte.read_warps & ~(1u << thread.warp);
      const auto lowest = [](std::uint32_t bits) { return __builtin_ctz(bits); };
      if (others != 0) race("writes what was read by", thread, {lowest(others), -1}, at);
      const std::uint32_t lanes = byte.read_lanes & ~(1u << thread.lane);
      if (byte.last_read_warp == thread.warp && byte.read_warp_epoch == warp_epoch && lanes != 0)
        race("writes what was read by", thread, {thread.warp, lowest(lanes)}, at);
    }
  }
  byte.write_epoch = epoch_;
  byte.write_warp_epoch = warp_epoch;
  byte.write_warp = static_cast<std::uint8_t>(thread.warp);
  byte.write_lane = static_cast<std::uint8_t>(thread.lane);
}

void SharedMemory::write(Thread thread, std::uint32_t at, const void* from, int bytes) {
  check(at, bytes);
  const auto* values = static_cast<const unsigned char*>(from);
  for (int i = 0; i < bytes; ++i) {
    const std::uint32_t here = at + static_cast<std::uint32_t>(i);
    note_write(thread, bytes_[here], here, data_[here] == values[i]);
    data_[here] = values[i];
  }
}

void SharedMemory::begin_copy(Thread thread, std::uint32_t at, int bytes, bool spoils) {
  check(at, bytes);
  ++open_copies_;
  for (int i = 0; i < bytes; ++i) {
    const std::uint32_t here = at + static_cast<std::uint32_t>(i);
    note_write(thread, bytes_[here], here, false);
    ++bytes_[here].copies;
    if (spoils) data_[here] = 0xff;
  }
}

void SharedMemory::land_copy(std::uint32_t at, const void* from, int bytes) {
  std::memcpy(&data_[at], from, static_cast<std::size_t>(bytes));
}

void SharedMemory::end_copy(Thread thread, std::uint32_t at, int bytes) {
  --open_copies_;
  for (int i = 0; i < bytes; ++i) {
    const std::uint32_t here = at + static_cast<std::uint32_t>(i);
    --bytes_[here].copies;
    note_write(thread, bytes_[here], here, false);
  }
}

void SharedMemory::race(const char* what, Thread thread, Thread other, std::uint32_t at) const {
  std::string text = "a race in shared memory at " + std::to_string(at) + ": warp " +
                     std::to_string(thread.warp) + ", lane " + std::to_string(thread.lane) + " " +
                     what + " warp " + std::to_string(other.warp);
  if (other.lane >= 0) text += ", lane " + std::to_string(other.lane);
  throw Fault(text + " without a barrier of both in between");
}

void SharedMemory::in_flight(const char* what, std::uint32_t at) const {
  throw Fault(std::string(what) + " shared memory at " + std::to_string(at) +
              ", where an asynchronous copy has not been waited for");
}

}  // namespace natten_tests::ptx
