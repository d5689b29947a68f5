// The plan of a run: what its configuration asks for or, with train.recompute: auto, the fastest
// that fits a memory budget (experiments/plan_search.h), for micro-batches of each size
// (experiments/plan_sizes.h).
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "experiments/plan_search.h"

namespace qlab {

/// The plan that `train.recompute` and `quant.resident` of the gang's first trial ask for; with
/// recompute: auto the fastest within `limits`. Throws OutOfMemory with the least that is needed,
/// and what makes it up, when none is; what the device has room for and the host has not is said as
/// by check_host_memory().
RunPlan plan_run(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                 const MemoryLimits& limits, const Rates& rates);

/// plan_run() where it fits; nothing, and no word of what is lacking, where it does not.
std::optional<RunPlan> fitting_plan(const ModelSource& model, std::span<const PaperTrial> gang,
                                    Device target, const MemoryLimits& limits, const Rates& rates);

/// Whether fitting_plan() has one, without a search for the fastest where the leanest fits.
bool some_plan_fits(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                    const MemoryLimits& limits, const Rates& rates);

/// plan_run() where it is not refused. Otherwise, for a forecast or a run that is forced: what fits
/// into the device and needs the least of the host, or else the leanest.
RunPlan plan_or_leanest(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                        const MemoryLimits& limits, const Rates& rates);

/// As format_bytes() has it, rounded up: who gives that much gives enough.
std::string format_minimum(int64_t bytes);
/// "8.91 GB at its peak, training step: backward model.layers.31 (weights 4.54 GB, ...)"
std::string needed_text(const MemoryPrediction& need);
/// Settings that would lessen it, by what the peak is.
std::string advice_for(const MemoryPrediction& need);

/// What a run may take in all of an allocator that has `capacity` (none: no end):
/// train.memory_budget where that is less. Without one other programs are left a little of a GPU.
int64_t memory_budget(const Config& config, Device target, std::optional<int64_t> capacity);

/// Of a run with a paged optimizer, what the allocator itself may have: states leave before the
/// budget is exceeded. Otherwise all.
std::optional<int64_t> allocator_limit(const Config& config, Device target,
                                       std::optional<int64_t> capacity);

/// What a run's prediction is held against: its budget where it plans or has paged states,
/// otherwise all.
int64_t device_limit(const Config& config, Device target, std::optional<int64_t> capacity);

/// Where train.memory_budget is given and device_limit() does not look at it: that, and what would;
/// otherwise "".
std::string budget_without_effect(const Config& config);

/// Throws OutOfMemory, with what to do, where a GPU's run needs more host memory than `available`:
/// for loading, embeddings, inputs of layers that are put aside, pages of optimizers.
void check_host_memory(const RunPlan& plan, int64_t available);

/// "layers 0-19 fully again, layers 20-31 norms and SwiGLU again"
std::string describe(const std::vector<Recompute>& layers);
/// The same of a whole plan: "layers 1-20 fully again, 21-32 norms and SwiGLU again; 4.30 GB of
/// weights held expanded"
std::string describe(const RunPlan& plan);

}  // namespace qlab
