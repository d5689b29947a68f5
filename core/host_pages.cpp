#include "core/host_pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "core/parallel.h"

namespace qlab {
namespace {

constexpr size_t page = 4096, huge_page = size_t{2} << 20;

}  // namespace

void* allocate_pages(size_t bytes) {
  const size_t whole = (bytes + huge_page - 1) / huge_page * huge_page;
  void* const block = std::aligned_alloc(huge_page, whole);
  // Advice: without it, or where the kernel has none left, pages are small.
  if (block != nullptr) ::madvise(block, whole, MADV_HUGEPAGE);
  return block;
}

void touch_pages(void* block, size_t bytes) {
  auto* const first = static_cast<volatile char*>(block);
  const auto pages = static_cast<int64_t>((bytes + page - 1) / page);
  parallel_for(pages, huge_page / page, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) first[static_cast<size_t>(i) * page] = 0;
  });
}

}  // namespace qlab
