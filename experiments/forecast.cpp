#include "experiments/forecast.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <numeric>
#include <span>

#include "data/checkpoint.h"
#include "experiments/gangs.h"
#include "experiments/remedy.h"

namespace qlab {
namespace {

bool is_random(const std::string& path) { return path.empty() || path == "synthetic"; }
bool is_here(const std::string& path) { return is_random(path) || std::filesystem::exists(path); }

/// Why the lengths of a trial's examples cannot be known, or "". Random ones have data.seq_len.
std::string why_no_lengths(const Config& config, const ModelSource& model) {
  if (config.data.train.empty()) return "no data.train";
  if (!is_here(config.data.train) || !is_here(config.data.eval)) return "data is not here";
  if (model.path.starts_with("synthetic:")) {
    const auto text = [](const std::string& path) { return !is_random(path) && holds_text(path); };
    return text(config.data.train) || text(config.data.eval) ? "the model has no tokenizer" : "";
  }
  const bool tokenizes =
      (config.data.train == "synthetic" && is_random(config.data.eval)) || !model.shapes_alone ||
      std::filesystem::exists(resolve_model_path(model.path) + "/tokenizer.json");
  return tokenizes ? "" : "the tokenizer is not here";
}

/// Of random ones.
int64_t random_examples_to_train(const TrainConfig& config) {
  Dataset alike;
  alike.examples.resize(static_cast<size_t>(synthetic_train.examples));
  return examples_to_train(config, alike);
}

void append(std::string& notes, const std::string& note) {
  if (!note.empty()) notes += (notes.empty() ? "" : "; ") + note;
}

/// "r4-s0, r4-s1 and 10 others"
std::string some_of(const std::vector<std::string>& names, size_t all) {
  constexpr size_t most = 3;
  if (names.size() == all && all > 1) return fmt::format("all {} trials", all);
  const size_t shown = names.size() == most + 1 ? most + 1 : std::min(names.size(), most);
  std::string text = fmt::format("{}", fmt::join(names.begin(), names.begin() + shown, ", "));
  if (shown < names.size()) text += fmt::format(" and {} others", names.size() - shown);
  return text;
}

int64_t total(const std::vector<int64_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

/// Seconds of all steps of a trial; its micro-batches as if each had as many tokens as a usual one.
double seconds_of(const PaperTrial& trial, const ModelSource& model, Library& library,
                  const StepSeconds& step) {
  const Config& c = trial.config;
  const auto usual = static_cast<double>(std::max<int64_t>(total(trial.usual_lengths), 1));
  const int64_t window = c.train.batch_size * c.train.grad_accum;
  const bool random = c.data.train == "synthetic";
  if (random || !why_no_lengths(c, model).empty()) {
    if (!random && !c.train.steps) return 0;
    const int64_t steps = (random_examples_to_train(c.train) + window - 1) / window;
    return static_cast<double>(steps) * step.of(static_cast<double>(trial.rounds()));
  }
  const Dataset& data = library.train_set(c);
  const double per_example =
      static_cast<double>(data.tokens) / static_cast<double>(data.examples.size());
  const int64_t examples = examples_to_train(c.train, data);
  const double share =
      static_cast<double>(trial.rounds()) / static_cast<double>(c.train.grad_accum);
  return share * static_cast<double>(examples) * per_example / usual * step.micro +
         static_cast<double>((examples + window - 1) / window) * step.update;
}

/// Everything but what changes neither bytes nor time.
std::string same_work(const PaperTrial& trial) {
  Config c = trial.config;
  c.train.seed = 0;
  c.train.init_seed = c.train.data_seed = c.train.dropout_seed = 0;
  const std::string optimizer = c.optim.type;
  c.optim = {};
  c.optim.type = optimizer;
  c.lora.alpha = 1;
  c.lora.dropout = c.lora.dropout > 0 ? 0.5 : 0;
  std::string key = to_yaml(c);
  for (const int64_t n : trial.train_lengths) key += "," + std::to_string(n);
  for (const int64_t n : trial.usual_lengths) key += "." + std::to_string(n);
  for (const int64_t n : trial.eval_lengths) key += ";" + std::to_string(n);
  return key;
}

struct GangForecast {
  RunPlan plan;
  bool fits = true;
  bool limited = false;
  std::string note;
};

GangForecast forecast_gang(const ModelSource& model, std::span<const PaperTrial> gang,
                           const MemoryTarget& target) {
  GangForecast out;
  const int64_t limit = device_limit(gang.front().config, target.device, target.capacity);
  const int64_t host = target.host.value_or(MemoryLimits::none);
  out.plan = plan_or_leanest(model, gang, target.device, {limit, host}, target.rates);
  out.limited = std::min(limit, host) < MemoryLimits::none;
  if (out.note = why_not_computable(gang.front().config); !out.note.empty()) {
    out.limited = false;
    return out;
  }
  out.fits = out.plan.peak <= limit;
  const bool host_fits = out.plan.host_peak <= host;
  if (!host_fits)
    out.note = fmt::format("needs {} of host memory, of {}", format_minimum(out.plan.host_peak),
                           format_bytes(host));
  out.fits = out.fits && host_fits;
  if (out.fits || gang.size() > 1) return out;
  const int64_t capacity = target.capacity.value_or(MemoryLimits::none);
  const auto remedy = cheapest_fit(model, gang, target.device, {capacity, host}, target.rates);
  append(out.note, way_out(remedy, target, limit, out.plan.peak, out.plan.host_peak));
  return out;
}

/// Forecasts for the trials of one sweep; what was worked out once is not worked out again.
class Forecaster {
 public:
  Forecaster(const std::vector<const Config*>& configs, Library& library,
             const MemoryTarget& target, std::vector<TrialForecast>& out)
      : configs_(configs), library_(library), target_(target), out_(out) {}

  /// A gang that does not fit, or is slower than its halves, is halved, as in a run. `halved`: what
  /// larger gang these are left of, and why.
  void run(std::span<const size_t> gang, std::string halved = "") {
    const ModelSource& model = library_.model(configs_[gang[0]]->model.path);
    std::vector<PaperTrial> papers;
    for (const size_t i : gang) {
      papers.push_back(trial_on_paper(*configs_[i], library_, target_.device));
      papers.back().replicas = target_.replicas;
    }
    const GangForecast& own = forecast_of(model, papers);
    if (const std::string why = why_in_halves(model, papers, own); !why.empty()) {
      append(halved, fmt::format("a gang of {} {}: in halves", gang.size(), why));
      run(gang.first(gang.size() / 2), halved);
      return run(gang.subspan(gang.size() / 2), halved);
    }
    const size_t number = number_of(gang);
    for (size_t j = 0; j < gang.size(); ++j) {
      const bool computes = why_not_computable(papers[j].config).empty();
      const double seconds =
          computes ? seconds_of(papers[j], model, library_, own.plan.seconds) : 0;
      out_[gang[j]] = {own.plan.peak, own.limited ? std::optional(own.fits) : std::nullopt, number,
                       gang.size(),   seconds / static_cast<double>(gang.size()),           halved};
      append(out_[gang[j]].note, own.note);
      append(out_[gang[j]].note, assumptions(papers[j].config, model));
    }
  }
  /// What cannot be said of a gang, and why.
  void leave(std::span<const size_t> gang, const std::string& why) {
    const size_t number = number_of(gang);
    for (const size_t i : gang) out_[i] = {0, {}, number, gang.size(), 0, why};
  }

 private:
  const GangForecast& forecast_of(const ModelSource& model, std::span<const PaperTrial> gang) {
    std::string key;
    for (const PaperTrial& trial : gang) key += same_work(trial) + "\n";
    auto it = known_.find(key);
    if (it == known_.end())
      it = known_.emplace(std::move(key), forecast_gang(model, gang, target_)).first;
    return it->second;
  }
  /// "": it stays as it is.
  std::string why_in_halves(const ModelSource& model, const std::vector<PaperTrial>& gang,
                            const GangForecast& own) {
    if (gang.size() < 2 || !why_not_computable(gang.front().config).empty()) return "";
    if (!own.fits) return "does not fit";
    const auto halves = faster_in_halves(
        gang, own.plan, [&](std::span<const PaperTrial> half) -> std::optional<double> {
          const GangForecast& part = forecast_of(model, half);
          return part.fits ? std::optional(part.plan.step_seconds) : std::nullopt;
        });
    return halves ? "is predicted to be slower together" : "";
  }
  size_t number_of(std::span<const size_t> gang) { return gang.size() > 1 ? ++gangs_ : 0; }

  const std::vector<const Config*>& configs_;
  Library& library_;
  const MemoryTarget& target_;
  std::vector<TrialForecast>& out_;
  std::map<std::string, GangForecast> known_;
  size_t gangs_ = 0;
};

}  // namespace

std::string assumptions(const Config& config, const ModelSource& model) {
  std::string text;
  const std::string why = why_no_lengths(config, model);
  if (config.lora.present && !why.empty()) text = why + ": full batches of data.seq_len";
  if (model.shapes_alone) append(text, "the weights are not here: shapes by config.json");
  append(text, budget_without_effect(config));
  return text;
}

PaperTrial trial_on_paper(const Config& config, Library& library, Device target) {
  const ModelSource& model = library.model(config.model.path);
  const int64_t positions = most_positions(config.model.path, model.config);
  for (const int64_t length : {config.data.seq_len, config.data.eval_seq_len})
    if (config.lora.present && length > positions)
      fail("a sequence length of {} exceeds the {} positions of {}", length, positions,
           config.model.path);
  constexpr int64_t most_tokens = int64_t{1} << 30;  // of a micro-batch; indices are 32 bits wide
  if (config.train.batch_size > most_tokens / config.data.seq_len)
    fail("train.batch_size {} of data.seq_len {} are more tokens than a micro-batch can have",
         config.train.batch_size, config.data.seq_len);
  if (!why_no_lengths(config, model).empty()) return assumed_trial(config, target);
  if (config.data.train != "synthetic") return paper_trial(config, library, target);
  // Random data is as long as it may be; making it would take time and memory.
  PaperTrial trial = assumed_trial(config, target);
  const auto batch = static_cast<size_t>(
      std::min(config.train.batch_size, random_examples_to_train(config.train)));
  trial.train_lengths.resize(batch);
  trial.usual_lengths.resize(batch);
  if (!is_random(config.data.eval))
    trial.eval_lengths = largest_evaluation(library.eval_set(config), evaluation_tokens(target));
  return trial;
}

std::vector<TrialForecast> forecast(const Sweep& sweep, Library& library,
                                    const MemoryTarget& target) {
  std::vector<const Config*> configs;
  for (const Trial& t : sweep.trials) configs.push_back(&t.config);
  std::vector<TrialForecast> out(configs.size());
  Forecaster forecaster(configs, library, target, out);
  for (const std::vector<size_t>& gang : gangs_of(configs, target.device)) {
    try {
      forecaster.run(gang);
    } catch (const Error& error) {
      forecaster.leave(gang, error.what());
    }
  }
  return out;
}

bool any_known(const std::vector<TrialForecast>& forecasts) {
  return std::ranges::any_of(forecasts, [](const TrialForecast& f) { return f.peak > 0; });
}

std::string forecast_table(const Sweep& sweep, const std::vector<TrialForecast>& forecasts,
                           const MemoryTarget& target) {
  std::vector<std::vector<std::string>> columns = {{"gang"}, {"peak"}, {"time"}, {"fits"}};
  double seconds = 0;
  size_t too_large = 0, untimed = 0;
  bool limited = false, together = false;
  int64_t tightest = 0;
  const auto is_barely = [&](const TrialForecast& f) {
    return !barely_text(target, f.peak).empty();
  };
  std::vector<std::pair<std::string, std::vector<std::string>>> notes;  // and the trials' names
  for (size_t i = 0; i < forecasts.size(); ++i) {
    const TrialForecast& f = forecasts[i];
    columns[0].push_back(f.gang > 0 ? std::to_string(f.gang) : "-");
    columns[1].push_back(f.peak > 0 ? format_bytes(f.peak) : "?");
    columns[2].push_back(f.seconds > 0 ? duration_text(f.seconds) : "?");
    columns[3].push_back(!f.fits ? "?" : !*f.fits ? "no" : is_barely(f) ? "barely" : "yes");
    seconds += f.seconds;
    untimed += f.seconds == 0;
    too_large += f.fits == false;
    if (f.fits == true && is_barely(f)) tightest = std::max(tightest, f.peak);
    limited = limited || f.fits;
    together = together || f.gang_size > 1;
    if (f.note.empty()) continue;
    auto note = std::ranges::find(notes, f.note, [](const auto& n) { return n.first; });
    if (note == notes.end()) note = notes.insert(notes.end(), {f.note, {}});
    note->second.push_back(sweep.trials[i].name);
  }
  if (!limited) columns.pop_back();
  if (!together) columns.erase(columns.begin());
  const bool known = any_known(forecasts);
  if (!known) columns.clear();
  std::string text = trial_table(sweep, columns);
  if (known)
    text += fmt::format(
        "predicted for {}{}{}",
        target.replicas > 1 ? fmt::format("each of {} replicas, on ", target.replicas) : "",
        target.name,
        target.capacity ? " with " + format_bytes(std::max<int64_t>(*target.capacity, 0)) : "");
  if (seconds > 0)
    text += fmt::format(
        "; about {} in all for training steps alone{}{} ({})", duration_text(seconds),
        untimed > 0 ? fmt::format(", {} of {} trials without a time", untimed, forecasts.size())
                    : "",
        too_large > 0 ? ", had all of them room" : "", rates_origin(target).text);
  if (known) text += "\n" + (target.note.empty() ? "" : target.note + "\n");
  if (too_large > 0) text += fmt::format("{} of {} do not fit\n", too_large, forecasts.size());
  if (tightest > 0) text += barely_text(target, tightest) + "\n";
  for (const auto& [note, names] : notes)
    text += some_of(names, forecasts.size()) + ": " + note + "\n";
  text.pop_back();
  return text;
}

nlohmann::json forecast_json(const Sweep& sweep, const std::vector<TrialForecast>& forecasts,
                             const MemoryTarget& target) {
  using Json = nlohmann::json;
  Json json = {{"device", target.name},
               {"rates", rates_origin(target).word},
               {"limit_bytes", target.capacity ? Json(*target.capacity) : Json()},
               {"trials", Json::array()}};
  if (!target.note.empty()) json["device_note"] = target.note;
  for (size_t i = 0; i < forecasts.size(); ++i) {
    const Trial& trial = sweep.trials[i];
    const TrialForecast& f = forecasts[i];
    Json set = Json::object();
    for (const auto& [key, value] : trial.swept) set[key] = value;
    json["trials"].push_back({{"name", trial.name},
                              {"set", std::move(set)},
                              {"seed", trial.seed},
                              {"gang", f.gang > 0 ? Json(f.gang) : Json()},
                              {"gang_size", f.gang_size},
                              {"peak_bytes", f.peak > 0 ? Json(f.peak) : Json()},
                              {"fits", f.fits ? Json(*f.fits) : Json()},
                              {"seconds", f.seconds > 0 ? Json(f.seconds) : Json()},
                              {"note", f.note}});
  }
  return json;
}

}  // namespace qlab
