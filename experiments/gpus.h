// GPUs by name, for predictions on machines that have none of them.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace qlab {

struct GpuSpec {
  std::string name;           // "h100-80gb"
  int64_t memory_bytes = 0;   // in all, as the driver reports it
  bool measured = false;      // whether context_bytes was measured on this GPU
  int64_t context_bytes = 0;  // taken by driver and libraries before and beside the allocator
  int64_t usable() const { return memory_bytes - context_bytes; }
};

/// One of the known names, or bytes ("24GiB"). Error with the list for anything else.
GpuSpec find_gpu(const std::string& text);
/// "h100-80gb, h200, ..."
std::string known_gpus();

}  // namespace qlab
