// Which trials of a sweep train together.
#pragma once
#include <vector>

#include "core/device.h"
#include "experiments/config.h"

namespace qlab {

/// Indices of the trials, gang by gang: neighbours that share a base and a plan, at most
/// parallel.trials_per_gpu of them.
std::vector<std::vector<size_t>> gangs_of(const std::vector<const Config*>& trials, Device device);

}  // namespace qlab
