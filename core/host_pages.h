// Large blocks of the host's memory, of which the kernel hands out pages when they are first used.
#pragma once
#include <cstddef>

namespace qlab {

/// `bytes` to be given back by std::free, for which the kernel is asked for huge pages: 512 times
/// fewer are handed out. nullptr where it has no such memory.
void* allocate_pages(size_t bytes);
/// Has every page handed out, by all threads.
void touch_pages(void* block, size_t bytes);

}  // namespace qlab
