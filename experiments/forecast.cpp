#include "experiments/forecast.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <numeric>

#include "experiments/gangs.h"
#include "experiments/planner.h"

namespace qlab {
namespace {

bool is_here(const std::string& path) {
  return path.empty() || path == "synthetic" || std::filesystem::exists(path);
}
bool data_is_here(const Config& c) { return is_here(c.data.train) && is_here(c.data.eval); }

int64_t total(const std::vector<int64_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

/// Micro-batches of a trial as if each had as many tokens as its largest.
double micro_batches(const PaperTrial& trial, Library& library) {
  const Config& c = trial.config;
  const auto largest = static_cast<double>(std::max<int64_t>(total(trial.train_lengths), 1));
  if (c.data.train == "synthetic" || !is_here(c.data.train) || c.data.train.empty())
    return c.train.steps ? static_cast<double>(*c.train.steps * c.train.grad_accum) : 0;
  const Dataset& data = library.train_set(c);
  const double per_example =
      static_cast<double>(data.tokens) / static_cast<double>(data.examples.size());
  return static_cast<double>(examples_to_train(c.train, data)) * per_example / largest;
}

/// Everything but what changes neither bytes nor time.
std::string same_work(const PaperTrial& trial) {
  Config c = trial.config;
  c.train.seed = 0;
  c.train.init_seed = c.train.data_seed = c.train.dropout_seed = 0;
  c.optim = {};
  c.lora.alpha = 1;
  c.lora.dropout = c.lora.dropout > 0 ? 0.5 : 0;
  std::string key = to_yaml(c);
  for (const int64_t n : trial.train_lengths) key += "," + std::to_string(n);
  for (const int64_t n : trial.eval_lengths) key += ";" + std::to_string(n);
  return key;
}

struct GangForecast {
  RunPlan plan;
  bool fits = true;
  std::string remedy;
};

GangForecast forecast_gang(const ModelSource& model, const std::vector<PaperTrial>& gang,
                           const MemoryTarget& target) {
  GangForecast out;
  const Config& first = gang.front().config;
  const int64_t capacity = target.capacity.value_or(std::numeric_limits<int64_t>::max());
  const int64_t wish = parse_bytes(first.train.memory_budget.text).value_or(capacity);
  try {
    out.plan = plan_run(model, gang, target.device, std::min(capacity, wish), target.rates);
  } catch (const OutOfMemory& error) {
    out.remedy = error.what();
    out.fits = false;
    return out;
  }
  out.fits = out.plan.peak <= capacity;
  if (out.fits) return out;
  out.remedy = "nothing that can be set makes it fit";
  if (const auto remedy = cheapest_fit(model, gang, target.device, capacity)) {
    out.remedy.clear();
    for (const std::string& set : remedy->sets) out.remedy += (out.remedy.empty() ? "" : " ") + set;
  }
  return out;
}

}  // namespace

PaperTrial trial_on_paper(const Config& config, Library& library, Device target) {
  // Random data is as long as it may be; making it would take time and memory.
  const bool synthetic = config.data.train == "synthetic" || config.data.train.empty();
  if (synthetic || !data_is_here(config)) return assumed_trial(config, target);
  return paper_trial(config, library, target);
}

std::vector<TrialForecast> forecast(const Sweep& sweep, Library& library,
                                    const MemoryTarget& target) {
  std::vector<const Config*> configs;
  for (const Trial& t : sweep.trials) configs.push_back(&t.config);
  std::vector<TrialForecast> out(configs.size());
  std::map<std::string, GangForecast> known;
  for (const std::vector<size_t>& gang : gangs_of(configs, target.device)) {
    try {
      const ModelSource& model = library.model(configs[gang[0]]->model.path);
      std::vector<PaperTrial> papers;
      std::string key;
      for (const size_t i : gang) {
        papers.push_back(trial_on_paper(*configs[i], library, target.device));
        key += same_work(papers.back()) + "\n";
      }
      auto it = known.find(key);
      if (it == known.end())
        it = known.emplace(std::move(key), forecast_gang(model, papers, target)).first;
      const GangForecast& own = it->second;
      for (size_t j = 0; j < gang.size(); ++j)
        out[gang[j]] = {own.plan.peak, own.fits, gang.size(),
                        micro_batches(papers[j], library) * own.plan.step_seconds / 3600 /
                            static_cast<double>(gang.size()),
                        own.remedy};
    } catch (const OutOfMemory&) {
      throw;
    } catch (const Error& error) {
      for (const size_t i : gang) out[i] = {0, true, gang.size(), 0, error.what()};
    }
  }
  return out;
}

std::string forecast_table(const Sweep& sweep, const std::vector<TrialForecast>& forecasts,
                           const MemoryTarget& target) {
  std::vector<std::vector<std::string>> columns = {{"peak"}, {"hours"}, {"fits"}};
  double hours = 0;
  size_t too_large = 0;
  std::string notes;
  for (size_t i = 0; i < forecasts.size(); ++i) {
    const TrialForecast& f = forecasts[i];
    columns[0].push_back(f.peak > 0 ? format_bytes(f.peak) : "?");
    columns[1].push_back(f.hours > 0 ? fmt::format("{:.3g}", f.hours) : "?");
    columns[2].push_back(!f.fits ? "no" : f.peak > 0 ? "yes" : "?");
    hours += f.hours;
    too_large += !f.fits;
    if (f.remedy.empty() || notes.find(f.remedy) != std::string::npos) continue;
    notes +=
        fmt::format("{}: {}{}\n", sweep.trials[i].name, f.fits ? "" : "would fit with ", f.remedy);
  }
  std::string text = trial_table(sweep, columns);
  text += fmt::format("predicted for {}{}; about {:.3g} hours in all{}\n", target.name,
                      target.capacity ? " with " + format_bytes(*target.capacity) : "", hours,
                      target.rates.measured ? "" : " (by rates of other hardware)");
  if (too_large > 0) text += fmt::format("{} of {} do not fit\n", too_large, forecasts.size());
  text += notes;
  text.pop_back();
  return text;
}

}  // namespace qlab
