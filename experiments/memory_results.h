// What runs were measured to need, beside what was predicted for them: a JSON list of
//
//   {"model": "synthetic:llama-3.1-8b",
//    "set": {"lora.r": 32, "lora.targets": "attention"},  keys of `qlab config`, for all else
//    defaults "device": "NVIDIA H100 80GB HBM3", "commit": "81e3252", "date": "2025-06-30",
//    "peak_bytes": 0,          the allocator's highest total
//    "device_used_bytes": 0,   what the GPU itself reported in use then; 0 on a CPU
//    "predicted_bytes": 0,     peak of predict_memory()
//    "categories": {"weights": 0, ...}}   optional: the allocator's bytes at the peak, by purpose
#pragma once
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/memory.h"

namespace qlab {

struct MeasuredRun {
  std::string model;
  std::map<std::string, std::string> set;
  std::string device, commit, date;
  int64_t peak_bytes = 0, device_used_bytes = 0, predicted_bytes = 0;
  std::optional<CategoryBytes> categories;
};

/// Where results are kept, below the root of the sources.
inline constexpr const char* memory_results_file = "bench/results/memory.json";
/// Error naming file, entry and key when the file is missing or not of this layout.
std::vector<MeasuredRun> read_memory_results(const std::string& file);

struct MeasuredBytes {
  int64_t bytes;
  std::string device, commit;
  bool own = true;  // of a run with all of the settings that were asked for
};
/// Bytes in `counted` of a run on a GPU with the model and the settings, the last one; where there
/// is none, of the last with the settings that those bytes depend on. All categories mean the peak.
std::optional<MeasuredBytes> find_measured(std::span<const MeasuredRun> runs,
                                           const std::string& model,
                                           const std::vector<std::string>& sets,
                                           std::span<const Category> counted);

}  // namespace qlab
