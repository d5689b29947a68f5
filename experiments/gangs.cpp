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

}  // namespace qlab
