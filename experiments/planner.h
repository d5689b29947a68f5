// Which plan of a run is the fastest that fits a memory budget: what each layer keeps or computes
// again, how much of the base is held expanded, and, where nothing else fits, how many layers are
// streamed from the host. Where examples differ in length the plan is the fastest for a usual
// micro-batch that leaves room for the largest, and larger ones compute more again. Candidates are
// run on meta; the budget is met to the byte, the time is that of experiments/cost_model.h.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "experiments/cost_model.h"
#include "experiments/memory_prediction.h"

namespace qlab {

/// The plan that `train.recompute` and `quant.resident` of the gang's first trial ask for; with
/// recompute: auto the fastest whose peak stays within `budget`. Throws OutOfMemory with the least
/// that is needed, and what makes it up, when none does.
RunPlan plan_run(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                 int64_t budget, const Rates& rates);

/// plan_run() for a forecast: where nothing fits, the leanest plan, whose peak exceeds `budget`.
RunPlan plan_or_leanest(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                        int64_t budget, const Rates& rates);

/// What a run may take in all of an allocator that has `capacity` (none: no end):
/// train.memory_budget where that is less. Without one other programs are left a little of a GPU.
int64_t memory_budget(const Config& config, Device target, std::optional<int64_t> capacity);

/// Of a run with a paged optimizer, what the allocator itself may have: states leave before the
/// budget is exceeded. Otherwise all.
std::optional<int64_t> allocator_limit(const Config& config, Device target,
                                       std::optional<int64_t> capacity);

/// Throws OutOfMemory, with what to do, where a GPU's run needs more host memory than `available`:
/// for loading, embeddings, inputs of layers that are put aside, pages of optimizers.
void check_host_memory(const RunPlan& plan, int64_t available);

/// "layers 0-19 fully again, layers 20-31 norms and SwiGLU again"
std::string describe(const std::vector<Recompute>& layers);
/// The same of a whole plan: "layers 1-20 fully again, 21-32 norms and SwiGLU again; 4.30 GB of
/// weights held expanded"
std::string describe(const RunPlan& plan);

}  // namespace qlab
