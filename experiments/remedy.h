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
  double step_seconds = 0;  // predicted, of all that train together
  size_t trials = 1;        // that do
  int64_t host_peak = 0;
  std::optional<int64_t> host_has;  // where that is less: it would fit on a larger host
  std::string caution;              // what the settings change of the experiment; "": nothing
};
/// "peak 22.19 GB, 39.51 GB on the host, 10.7 s a step", and what to know besides.
std::string price_text(const Remedy& remedy);
/// Of the gang's configurations. What leaves results as they are comes first: of single settings
/// that cost speed alone, with train.recompute: auto and smaller gangs among them, the one with the
/// shortest step for each trial; then all of them together, and smaller micro-batches, of which
/// there are more; then what makes another experiment. Nothing when even all of them together do
/// not fit. `limits`: what the device's allocator and the host have. Where nothing fits into the
/// host, or only another experiment, it is sought without the host's end.
std::optional<Remedy> cheapest_fit(const ModelSource& model, std::span<const PaperTrial> gang,
                                   Device target, const MemoryLimits& limits, const Rates& rates);
/// What a user is told of a run that does not fit: "would fit with --set ...", and its price; or
/// what to give it. `budget`: device_limit(); the peaks are the run's.
std::string way_out(const std::optional<Remedy>& remedy, const MemoryTarget& target, int64_t budget,
                    int64_t peak, int64_t host_peak);

}  // namespace qlab
