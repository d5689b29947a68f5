#include "experiments/report_data.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "data/file.h"
#include "experiments/config.h"
#include "experiments/config_fields.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::string text_at(const YAML::Node& map, const std::string& key) {
  const YAML::Node node = map[key];
  return node && node.IsScalar() ? node.Scalar() : "";
}

std::optional<double> number_at(const Json& json, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number()) return std::nullopt;
  return it->get<double>();
}

std::string string_at(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && it->is_string() ? it->get<std::string>() : "";
}

void read_metrics(const std::string& file, TrialResult& trial) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object()) continue;  // a line that was being written
    const auto step = number_at(json, "step");
    if (!step) continue;
    const double tokens = number_at(json, "tokens").value_or(0);
    if (const auto loss = number_at(json, "loss")) trial.train.push_back({*step, tokens, *loss});
    if (const auto loss = number_at(json, "eval_loss")) {
      trial.eval.push_back({*step, tokens, *loss});
    }
  }
}

void read_status(const std::string& file, TrialResult& trial) {
  std::ifstream in(file);
  if (!in) return;
  const Json json = Json::parse(in, nullptr, false);
  trial.status = json.is_object() ? string_at(json, "status") : "";
  if (trial.status.empty()) trial.status = "unreadable";
  if (!json.is_object()) return;
  trial.error = string_at(json, "error");
  trial.trainable_params = number_at(json, "trainable_params");
  trial.steps = number_at(json, "steps");
  trial.total_steps = number_at(json, "total_steps");
  trial.trained_tokens = number_at(json, "trained_tokens");
  trial.train_loss = number_at(json, "train_loss");
  trial.gang_name = string_at(json, "gang");
  trial.gang_size = number_at(json, "gang_size");
  trial.predicted_peak_bytes = number_at(json, "predicted_peak_bytes");
  if (trial.status == "running") return;
  trial.tokens_per_s = number_at(json, "tokens_per_s");
  if (trial.tokens_per_s == 0) trial.tokens_per_s.reset();  // it ended before its first step
  trial.peak_bytes = number_at(json, "peak_bytes");
  if (const auto paging = json.find("paging"); paging != json.end() && paging->is_object()) {
    trial.moved_bytes = number_at(*paging, "step_moved_bytes");
    trial.stalled_seconds = number_at(*paging, "step_stalled_seconds_median");
  }
}

/// Mean of the loss over the last tenth of the steps so far, at least one, as far as they are
/// logged.
std::optional<double> last_tenth(const std::vector<LossPoint>& train) {
  if (train.empty()) return std::nullopt;
  const double last = train.back().step;
  const double from = last - std::max(1.0, std::floor(last / 10));
  double sum = 0, count = 0;
  for (const LossPoint& p : train) {
    if (p.step > from) sum += p.loss, count += 1;
  }
  return sum / count;
}

/// Every process that works on a trial begins with loading, its own or what it shares.
void read_memory(const std::string& file, TrialResult& trial) {
  trial.memory = read_memory_lines(file);
  std::optional<double> peak;
  std::string phase = "load";
  for (const MemorySample& sample : trial.memory.samples) {
    if (sample.phase == "load" && phase != "load") {
      trial.resumed = true;
      trial.peak_before = std::max(trial.peak_before, peak);
      peak.reset();
    }
    phase = sample.phase;
    if (phase != "load") peak = std::max(peak.value_or(0), static_cast<double>(sample.peak));
  }
  if (trial.status == "running") trial.peak_bytes = peak;
}

void read_trial(const std::string& dir, TrialResult& trial) {
  trial.status = "pending";
  if (!fs::is_directory(dir)) return;
  read_status(dir + "/status.json", trial);
  // A process that was killed leaves "running" behind; one that ended just now has replaced it.
  const bool ended = trial.status == "running" && !FileLock::held(dir + "/lock");
  if (ended) read_status(dir + "/status.json", trial);
  read_metrics(dir + "/metrics.jsonl", trial);
  read_memory(dir + "/memory.jsonl", trial);
  if (!trial.train_loss) trial.train_loss = last_tenth(trial.train);
  if (!trial.train.empty() && (!trial.steps || trial.status == "running")) {
    trial.steps = std::max(trial.steps.value_or(0), trial.train.back().step);
    trial.trained_tokens = std::max(trial.trained_tokens.value_or(0), trial.train.back().tokens);
  }
  for (const LossPoint& p : trial.eval) {
    if (p.step == 0) trial.eval_loss_0 = p.loss;
    trial.best_eval_loss = std::min(trial.best_eval_loss.value_or(p.loss), p.loss);
  }
  if (trial.status == "finished" && !trial.eval.empty()) trial.eval_loss = trial.eval.back().loss;
  if (ended && trial.status == "running") trial.status = "interrupted";
}

/// What a trial was last run with; of one that was not, what the plan has. They differ where a
/// finished trial was asked for again with another setting that leaves its numbers as they are.
Config config_of(const YAML::Node& trial, const std::string& dir) {
  const std::string file = dir + "/trials/" + text_at(trial, "directory") + "/config.yaml";
  try {
    if (fs::exists(file)) return parse_config(load_yaml(file), "plan.yaml");
  } catch (const std::exception&) {  // of another version, which the plan need not be
  }
  return parse_config(trial["config"], "plan.yaml");
}

/// Settings that are equal in every trial; none when a plan of another version does not read.
void read_shared(const YAML::Node& trials, const std::string& dir, Results& results) {
  std::map<std::string, std::set<std::string>> values;
  try {
    for (const auto& trial : trials) {
      const Config config = config_of(trial, dir);
      for (const Field& field : config_fields()) {
        if (!field.hidden) values[field.key].insert(field_text(field, config));
      }
    }
  } catch (const std::exception&) {
    return;
  }
  for (const Field& field : config_fields()) {
    const auto& seen = values[field.key];
    if (seen.size() == 1 && !seen.begin()->empty()) {
      results.shared.emplace_back(field.key, *seen.begin());
    }
  }
}

void number_gangs(Results& results) {
  std::map<std::string, double> numbers;
  for (TrialResult& trial : results.trials)
    if (trial.gang_size > 1 && !trial.gang_name.empty())
      trial.gang = numbers.emplace(trial.gang_name, numbers.size() + 1).first->second;
}

void note_strangers(const std::string& dir, Results& results) {
  std::set<std::string> known;
  for (const TrialResult& trial : results.trials) known.insert(trial.directory);
  int strangers = 0;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(dir + "/trials", ignored)) {
    strangers += entry.is_directory() && known.count(entry.path().filename().string()) == 0;
  }
  if (strangers == 0) return;
  results.notes.push_back(
      fmt::format("{} in {}/trials {} made with other settings and {} not reported",
                  strangers == 1 ? "1 other directory" : fmt::format("{} others", strangers), dir,
                  strangers == 1 ? "was" : "were", strangers == 1 ? "is" : "are"));
}

std::string damaged_lines(int count) {
  return count == 1 ? "1 line does not read and is left out"
                    : fmt::format("{} lines do not read and are left out", count);
}

Results read_plan(const YAML::Node& plan, const std::string& dir) {
  Results results;
  const YAML::Node sweep = plan["sweep"], trials = plan["trials"];
  if (!sweep || !sweep.IsMap() || !trials || !trials.IsSequence()) {
    fail("{}/plan.yaml: sweep or trials is missing: not a plan of qlab", dir);
  }
  results.name = text_at(sweep, "name");
  results.method = text_at(sweep, "method");
  results.metric = text_at(sweep, "metric");
  results.goal = text_at(sweep, "goal");
  for (const auto& key : sweep["swept_keys"]) results.keys.push_back(key.as<std::string>(""));
  for (const auto& key : sweep["derived_keys"]) results.derived.push_back(key.as<std::string>(""));
  for (const auto& pair : plan["environment"]) {
    results.environment[pair.first.as<std::string>("")] = pair.second.as<std::string>("");
  }
  results.environment["sweep"] = text_at(sweep, "source");
  std::set<std::string> seeds;
  for (const auto& node : trials) {
    TrialResult trial;
    trial.name = text_at(node, "name");
    trial.directory = text_at(node, "directory");
    trial.seed = text_at(node, "seed");
    for (const std::string& key : results.keys) {
      trial.swept.push_back(node["swept"] ? text_at(node["swept"], key) : "");
    }
    read_trial(dir + "/trials/" + trial.directory, trial);
    if (trial.status == "unreadable")
      results.notes.push_back(
          fmt::format("{}/trials/{}/status.json does not read: whether the trial has finished is "
                      "not known, and the sweep's command trains it again",
                      dir, trial.directory));
    if (trial.memory.damaged > 0)
      results.notes.push_back(fmt::format("{}/trials/{}/memory.jsonl: {}", dir, trial.directory,
                                          damaged_lines(trial.memory.damaged)));
    seeds.insert(trial.seed);
    results.trials.push_back(std::move(trial));
  }
  results.several_seeds = seeds.size() > 1;
  number_gangs(results);
  read_shared(trials, dir, results);
  note_strangers(dir, results);
  return results;
}

}  // namespace

Results read_results(const std::string& dir) {
  const std::string file = dir + "/plan.yaml";
  if (!fs::is_directory(dir)) fail("{}: there is no such directory", dir);
  if (!fs::exists(file)) fail("{}: there is no plan.yaml: not a results directory of qlab", dir);
  try {
    return read_plan(load_yaml(file), dir);
  } catch (const YAML::Exception& e) {
    fail("{}:{}: not a plan of qlab: {}", file, e.mark.line + 1, e.msg);
  }
}

std::string status_text(const TrialResult& trial) {
  const bool unfinished = trial.status == "running" || trial.status == "interrupted";
  if (!unfinished || !trial.steps || !trial.total_steps) return trial.status;
  return fmt::format("{}, step {:.0f} of {:.0f}", trial.status, *trial.steps, *trial.total_steps);
}

const std::vector<Column>& summary_columns() {
  static const std::vector<Column> columns{{"trainable_params", &TrialResult::trainable_params},
                                           {"steps", &TrialResult::steps},
                                           {"trained_tokens", &TrialResult::trained_tokens},
                                           {"train_loss", &TrialResult::train_loss},
                                           {"eval_loss", &TrialResult::eval_loss},
                                           {"eval_loss_0", &TrialResult::eval_loss_0},
                                           {"best_eval_loss", &TrialResult::best_eval_loss},
                                           {"tokens_per_s", &TrialResult::tokens_per_s},
                                           {"peak_bytes", &TrialResult::peak_bytes},
                                           {"gang_size", &TrialResult::gang_size}};
  return columns;
}

std::vector<Column> shown_columns(const Results& results) {
  std::vector<Column> columns = summary_columns();
  const auto any = [&](std::optional<double> TrialResult::*value) {
    return std::any_of(results.trials.begin(), results.trials.end(),
                       [&](const TrialResult& t) { return (t.*value).has_value(); });
  };
  if (any(&TrialResult::gang)) columns.push_back({"gang", &TrialResult::gang});
  if (any(&TrialResult::moved_bytes)) {
    columns.push_back({"moved_bytes", &TrialResult::moved_bytes});
    columns.push_back({"stalled_seconds", &TrialResult::stalled_seconds});
  }
  return columns;
}

std::optional<double> metric_of(const Results& results, const TrialResult& trial) {
  for (const Column& column : summary_columns()) {
    if (results.metric == column.name) return trial.*column.value;
  }
  return trial.eval_loss;
}

std::vector<const TrialResult*> ranked(const Results& results) {
  std::vector<const TrialResult*> order;
  for (const TrialResult& trial : results.trials) order.push_back(&trial);
  const double sign = results.goal == "maximize" ? -1 : 1;
  std::stable_sort(order.begin(), order.end(), [&](const TrialResult* a, const TrialResult* b) {
    const auto x = metric_of(results, *a), y = metric_of(results, *b);
    return x && (!y || sign * *x < sign * *y);
  });
  return order;
}

std::vector<SeedGroup> seed_groups(const Results& results) {
  std::vector<SeedGroup> groups;
  std::map<std::vector<std::string>, size_t> index;
  for (const TrialResult& trial : results.trials) {
    const auto [it, fresh] = index.emplace(trial.swept, groups.size());
    if (fresh) groups.push_back({trial.swept, {}});
    groups[it->second].trials.push_back(&trial);
  }
  std::optional<double> TrialResult::*metric = &TrialResult::eval_loss;
  for (const Column& column : summary_columns()) {
    if (results.metric == column.name) metric = column.value;
  }
  const double sign = results.goal == "maximize" ? -1 : 1;
  std::stable_sort(groups.begin(), groups.end(), [&](const SeedGroup& a, const SeedGroup& b) {
    const auto x = spread(a, metric).mean, y = spread(b, metric).mean;
    return x && (!y || sign * *x < sign * *y);
  });
  return groups;
}

Spread spread(const SeedGroup& group, std::optional<double> TrialResult::*value) {
  Spread result;
  double sum = 0, squares = 0;
  for (const TrialResult* trial : group.trials) {
    if (trial->*value) sum += *(trial->*value), ++result.n;
  }
  if (result.n == 0) return result;
  result.mean = sum / result.n;
  for (const TrialResult* trial : group.trials) {
    if (trial->*value) squares += std::pow(*(trial->*value) - *result.mean, 2);
  }
  if (result.n > 1) result.deviation = std::sqrt(squares / (result.n - 1));
  return result;
}

}  // namespace qlab
