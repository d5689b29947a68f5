#include "experiments/gangs.h"

#include "experiments/setup.h"

namespace qlab {

std::vector<std::vector<size_t>> gangs_of(const std::vector<const Config*>& trials, Device device) {
  std::vector<std::string> keys;
  for (const Config* c : trials)
    keys.push_back(base_key(*c, compute_dtype(*c, device.meta()), device) + "|" +
                   c->train.recompute + "|" + c->train.memory_budget.text + "|" +
                   c->quant.resident.text + (c->train.graphs ? "|graphs|" : "|") +
                   (is_paged(*c) ? "paged|" : "") + std::to_string(c->parallel.trials_per_gpu));
  std::vector<std::vector<size_t>> gangs;
  std::vector<bool> taken(trials.size());
  for (size_t i = 0; i < trials.size(); ++i) {
    if (taken[i]) continue;
    std::vector<size_t> gang;
    const auto size = static_cast<size_t>(trials[i]->parallel.trials_per_gpu);
    for (size_t j = i; j < trials.size() && gang.size() < size; ++j) {
      if (taken[j] || keys[j] != keys[i]) continue;
      taken[j] = true;
      gang.push_back(j);
    }
    gangs.push_back(std::move(gang));
  }
  return gangs;
}

std::optional<double> faster_in_halves(
    std::span<const PaperTrial> gang, const RunPlan& plan,
    const std::function<std::optional<double>(std::span<const PaperTrial>)>& seconds_of) {
  const Config& first = gang.front().config;
  const bool by_memory =
      first.train.recompute == "auto" || first.quant.resident.text != "0" || plan.paged_out > 0;
  if (gang.size() < 2 || !by_memory) return {};
  constexpr double least_gain = 0.01;
  double seconds = 0;
  const size_t half = gang.size() / 2;
  for (const auto& part : {gang.first(half), gang.subspan(half)}) {
    const std::optional<double> own = seconds_of(part);
    if (!own) return {};
    seconds += *own;
  }
  if (seconds >= plan.step_seconds * (1 - least_gain)) return {};
  return seconds;
}

}  // namespace qlab
