// What to change where a run does not fit.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "experiments/planner.h"

namespace qlab {

/// Settings under which a run fits, and what it then needs.
struct Remedy {
  std::vector<std::string> sets;  // "train.recompute=full"; none can be left out
  int64_t peak = 0;
  double step_seconds = 0;  // predicted
  int64_t host_peak = 0;
};
/// "peak 22.19 GB, 39.51 GB on the host, 10.7 s a step"
std::string price_text(const Remedy& remedy);
/// Of the gang's configurations. What costs speed alone comes first: of single settings, with
/// train.recompute: auto among them, the fastest. Then smaller micro-batches and gangs, then what
/// changes numbers. Nothing when even all of them together do not fit. `limits`: what the
/// device's allocator and the host have.
std::optional<Remedy> cheapest_fit(const ModelSource& model, std::span<const PaperTrial> gang,
                                   Device target, const MemoryLimits& limits, const Rates& rates);

}  // namespace qlab
