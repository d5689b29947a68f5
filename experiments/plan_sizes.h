// Plans for data whose examples differ in length. All shapes of a run share one reservation: the
// plan is the fastest for a usual micro-batch that leaves room for the largest, and of those that
// are larger than usual each computes again as little as fits.
#pragma once
#include <functional>
#include <optional>
#include <span>

#include "experiments/plan_search.h"

namespace qlab {

/// The fastest plan for a gang in which all micro-batches have one policy, or nothing.
using FindPlan = std::function<std::optional<RunPlan>(std::span<const PaperTrial> gang)>;

/// `one`: what `find` makes of `gang`, within `limits`. The result has no time or peak yet.
RunPlan plan_by_size(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                     const MemoryLimits& limits, const RunPlan& one, const FindPlan& find);

}  // namespace qlab
