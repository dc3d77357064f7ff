#include "launcher.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <iomanip>
#include <iostream>
#include <sstream>

namespace natten_tests::ptx {
namespace {

class Counts : public testing::Environment {
 public:
  void TearDown() override {
    if (std::getenv("NATTEN_PTX_COUNTS")) print_counts(std::cout);
  }
};
[[maybe_unused]] testing::Environment* const kCounts =
    testing::AddGlobalTestEnvironment(new Counts);

}  // namespace

Module& kernels() {
  static Module module = [] {
    Module all;
    std::istringstream files(NATTEN_PTX_FILES);
    for (std::string path; std::getline(files, path, ':');) all.add_file(path);
    return all;
  }();
  return module;
}

GlobalMemory& device_memory() {
  static GlobalMemory memory;
  return memory;
}

void print_counts(std::ostream& out) {
  out << "blocks, instructions of warps per block and per product of matrices, of each kernel:\n";
  for (const auto& entry : kernels().parsed()) {
    std::uint64_t instructions = 0, products = 0;
    for (std::size_t i = 0; i < entry->code.size(); ++i) {
      instructions += entry->counts[i];
      if (entry->code[i].opcode == Opcode::multiply_matrices) products += entry->counts[i];
    }
    if (entry->blocks == 0) continue;
    out << std::setw(9) << entry->blocks << std::setw(12) << instructions / entry->blocks
        << std::setw(9) << std::fixed << std::setprecision(1);
    if (products > 0)
      out << static_cast<double>(instructions) / static_cast<double>(products);
    else
      out << "-";
    out << "  " << entry->name << "\n";
  }
}

WarpCounts warp_counts() {
  WarpCounts sum;
  for (const auto& entry : kernels().parsed())
    for (std::size_t i = 0; i < entry->code.size(); ++i) {
      sum.instructions += entry->counts[i];
      if (entry->code[i].opcode == Opcode::multiply_matrices) sum.products += entry->counts[i];
    }
  return sum;
}

std::int64_t multiply_adds() {
  std::uint64_t sum = 0;
  for (const auto& entry : kernels().parsed())
    for (std::size_t i = 0; i < entry->code.size(); ++i)
      if (entry->code[i].opcode == Opcode::multiply_matrices)
        sum += entry->counts[i] * 16 * 8 * (entry->code[i].type == Type::tf32 ? 8 : 16);
  return static_cast<std::int64_t>(sum);
}

void Launcher::clear(void* memory, std::size_t bytes) {
  if (bytes > 0)
    std::memset(device_memory().write(reinterpret_cast<std::uintptr_t>(memory), bytes), 0, bytes);
}

Entry& Launcher::entry_of(const char* type) {
  const std::string kernel = demangled(type);
  const std::string entry = "void natten::detail::cuda::entry<" + kernel;
  // Old and new ways to close a list of templates.
  for (const std::string& close : {std::string(">("), std::string(" >(")})
    if (Entry* found = kernels().find(entry + close + kernel + ")")) return *found;
  throw Fault("no PTX of " + kernel);
}

void Launcher::run(Entry& entry, int threads, std::int64_t blocks, int shared_bytes,
                   const void* kernel) {
  if (blocks == 0) return;
  if (shared_bytes > natten::detail::cuda::kMostSharedBytes) throw Fault("too much shared memory");
  Block block(entry, threads, shared_bytes, device_memory(), seed_);
  for (std::int64_t i = 0; i < blocks; ++i) block.run(static_cast<std::uint32_t>(i), kernel);
}

}  // namespace natten_tests::ptx
