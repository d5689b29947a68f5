// What the trials of a sweep will need: memory and time, without running them.
#pragma once
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "experiments/gpus.h"
#include "experiments/memory_prediction.h"
#include "experiments/setup.h"
#include "experiments/sweep.h"

namespace qlab {

struct TrialForecast {
  int64_t peak = 0;                // of its gang
  std::optional<bool> fits;        // none: there is no limit, or it cannot be said
  size_t gang = 0, gang_size = 1;  // which gang, from 1 on in the order they train; 0: alone
  double seconds = 0;  // of its steps, its share of the gang's; 0 where their number is unknown
  std::string note;    // why its gang is smaller, settings with which it would fit, what is unknown
};

/// As the trials would run on the target, in gangs. Data that is not here is taken for full batches
/// of data.seq_len; a model that is not here leaves its trials without a forecast (`note` says
/// why).
std::vector<TrialForecast> forecast(const Sweep& sweep, Library& library,
                                    const MemoryTarget& target);

/// Whether something could be predicted of one of them.
bool any_known(const std::vector<TrialForecast>& forecasts);

/// The list of --dry-run: one line per trial with its swept values, its gang where trials train
/// together, what it needs, and whether that fits where something is known of a limit. Below, the
/// sum of the times, and each note with the trials that it is about.
std::string forecast_table(const Sweep& sweep, const std::vector<TrialForecast>& forecasts,
                           const MemoryTarget& target);

/// The same for programs, in bytes and seconds; null is what is not known.
nlohmann::json forecast_json(const Sweep& sweep, const std::vector<TrialForecast>& forecasts,
                             const MemoryTarget& target);

/// What a prediction takes for granted about data and weights that are not on this machine, and a
/// budget that nothing heeds; or "".
std::string assumptions(const Config& config, const ModelSource& model);
/// The lengths of a trial's batches: of its data where that is here, otherwise assumed. Error for
/// sequences longer than the model's positions.
PaperTrial trial_on_paper(const Config& config, Library& library, Device target);

}  // namespace qlab
