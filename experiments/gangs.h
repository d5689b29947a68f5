// Which trials of a sweep train together.
#pragma once
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "core/device.h"
#include "experiments/config.h"
#include "experiments/planner.h"

namespace qlab {

/// Indices of the trials, gang by gang: neighbours that share a base and a plan, at most
/// parallel.trials_per_gpu of them.
std::vector<std::vector<size_t>> gangs_of(const std::vector<const Config*>& trials, Device device);

/// Seconds in which the halves of a gang, one after the other, are predicted to take a step each,
/// where that is less than together: the more train, the less memory each has, and the more is
/// computed again. `plan`: the gang's; `seconds_of`: of a step of some of it, none where it does
/// not fit.
std::optional<double> faster_in_halves(
    std::span<const PaperTrial> gang, const RunPlan& plan,
    const std::function<std::optional<double>(std::span<const PaperTrial>)>& seconds_of);

}  // namespace qlab
