// GPUs by name, for predictions on machines that have none of them.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "core/device.h"
#include "experiments/cost_model.h"

namespace qlab {

struct GpuSpec {
  std::string name;           // "h100-80gb"
  int64_t memory_bytes = 0;   // in all, as the driver reports it
  int capability = 90;        // 75 for 7.5
  bool measured = false;      // whether context_bytes was measured on this GPU
  int64_t context_bytes = 0;  // taken by driver and libraries before and beside the allocator
  const char* context_note = "";
  int64_t usable() const { return memory_bytes - context_bytes; }
};

/// What a prediction is made for.
struct MemoryTarget {
  Device device = Device::cuda();
  std::string name;                 // "h100-80gb", "AMD EPYC (2 threads)"
  std::optional<GpuSpec> gpu;       // none: a CPU, or a GPU without an end
  std::optional<int64_t> capacity;  // of the allocator; none: no end
  Rates rates;
  std::optional<int64_t> limit = {};  // of --device-memory, in `capacity` already
  std::optional<int64_t> host = {};   // memory of the host beside a GPU; none: no end
  std::string note = {};              // why it is not the device that a run here would take
  int64_t replicas = 1;               // of a run, each on such a device; what is told is of one
};
/// A GPU by name or bytes (`gpu`), or else a device here (`device`, as --device has it); without
/// either a GPU without an end.
MemoryTarget memory_target(const std::string& gpu, const std::string& device);
/// No more of it than `bytes`, as --device-memory of a run has it.
void limit_target(MemoryTarget& target, const std::string& bytes);
/// Bytes of --device-memory; Error for anything else.
int64_t parse_device_memory(const std::string& text);
/// Bytes of --host-memory, 0 among them; Error for anything else.
int64_t parse_host_memory(const std::string& text);
/// Where the rates behind its times come from: a word for programs, and a text.
struct RatesOrigin {
  const char *word, *text;
};
RatesOrigin rates_origin(const MemoryTarget& target);
/// Of a GPU whose context is assumed, where a peak leaves less of it free than the assumption may
/// be off by: "barely: ...", otherwise "".
std::string barely_text(const MemoryTarget& target, int64_t peak);
/// A device here, with what its allocator holds and what is free; of the host's memory, which so
/// many replicas share, one's part.
MemoryTarget target_here(Device device, int64_t replicas = 1);

/// One of the known names, or bytes ("24GiB"). Error with the list for anything else.
GpuSpec find_gpu(const std::string& text);
/// "h100-80gb, h200, ..."
std::string known_gpus();

}  // namespace qlab
