// Plans for data whose examples differ in length. All shapes of a run share one reservation: the
// plan is the fastest for a usual micro-batch that leaves room for the largest, and of those that
// are larger than usual each computes again as little as fits.
#pragma once
#include <functional>
#include <optional>
#include <span>

#include "experiments/memory_prediction.h"

namespace qlab {

/// The fastest plan for a gang in which all micro-batches have one policy, or nothing.
using FindPlan = std::function<std::optional<RunPlan>(std::span<const PaperTrial> gang)>;

/// `one`: what `find` makes of `gang`, within `budget`. The result has no time or peak yet.
RunPlan plan_by_size(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                     int64_t budget, const RunPlan& one, const FindPlan& find);

/// Policies in a row, each slower and leaner than the one before: with L layers, policy i <= L
/// computes the cheap slots of its first i layers again, L + i also the whole of its first i, 2 L +
/// i puts the inputs of its first i aside on the host. What is recomputed comes first: backward,
/// which begins at the last layer, has then given back what the others kept before it fills a
/// layer's slots again.
std::vector<Recompute> policy_at(int64_t i, int64_t layers);
/// The last one's number; on a CPU the host is the device.
int64_t leanest_policy(Device target, int64_t layers);

}  // namespace qlab
