#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace natten::bindings {

#if defined(MADV_HUGEPAGE)
namespace {
constexpr std::uintptr_t kHugePage = 2 << 20;
// The same as numpy's limit for its arrays: smaller ones hold too few whole huge pages.
constexpr std::uintptr_t kLeastBytes = 4 << 20;
}  // namespace

void advise_huge_pages(const TensorView& view) {
  if (!view || view.device.type != DeviceType::cpu) return;
  const auto bytes = size_of(view.dtype) * static_cast<std::uintptr_t>(view.size());
  if (bytes < kLeastBytes) return;
  const auto at = reinterpret_cast<std::uintptr_t>(view.data);
  const std::uintptr_t begin = (at + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (at + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#else
void advise_huge_pages(const TensorView&) {}
#endif

}  // namespace natten::bindings
