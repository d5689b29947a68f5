// A prediction of memory as text and as JSON.
#pragma once
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "experiments/remedy.h"

namespace qlab {

/// What a prediction is about.
struct MemoryQuestion {
  std::string model;
  MemoryTarget target;
  int64_t footprint = 0;  // Hugging Face's get_memory_footprint
  RunPlan plan = {};
  std::optional<int64_t> budget = {};  // train.memory_budget, where it is less than the device has
  int64_t tokens = 0;                  // of a usual micro-batch
  size_t trials = 1;                   // that train together
  std::string assumed = "";            // what was assumed about the data
  std::string refused = "";            // why no run has these settings
};

std::string memory_text(const MemoryQuestion& question, const Config& config,
                        const MemoryPrediction& prediction, const std::optional<Remedy>& remedy);
nlohmann::json memory_json(const MemoryQuestion& question, const MemoryPrediction& prediction,
                           const std::optional<Remedy>& remedy);
/// {"weights": 0, ...}
nlohmann::json category_json(const CategoryBytes& bytes);

}  // namespace qlab
