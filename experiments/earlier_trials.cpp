// Runs of one file gather in its results directory: the plan of the last one lists them all.
#include <algorithm>
#include <filesystem>
#include <set>

#include "core/error.h"
#include "experiments/config_fields.h"
#include "experiments/report.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;

struct Listed {
  Trial trial;
  std::string directory;
};

/// The trials of a plan; none when it is of another version and does not read.
std::vector<Listed> listed_trials(const std::string& dir) {
  const std::string file = dir + "/plan.yaml";
  std::vector<Listed> listed;
  if (!fs::exists(file)) return listed;
  try {
    for (const YAML::Node& node : load_yaml(file)["trials"]) {
      Trial trial;
      trial.name = node["name"].as<std::string>();
      trial.config = parse_config(node["config"], file);
      resolve(trial.config);
      trial.seed = trial.config.train.seed;
      listed.push_back({std::move(trial), node["directory"].as<std::string>()});
    }
  } catch (const std::exception&) {
    listed.clear();
  }
  return listed;
}

/// True when the value is what follows from other keys where nothing is said.
bool follows(const std::string& key, const Config& config) {
  if (key.ends_with("_seed")) return get_key(config, key) == get_key(config, "train.seed");
  return key == "lora.alpha" && config.lora.alpha == 2.0 * static_cast<double>(config.lora.r);
}

bool differs(const Field& field, const std::vector<Trial>& trials) {
  if (field.hidden || !changes_numbers(field.key) || field.key == "train.seed") return false;
  const std::string first = field_text(field, trials.front().config);
  return std::any_of(trials.begin(), trials.end(),
                     [&](const Trial& t) { return field_text(field, t.config) != first; }) &&
         !std::all_of(trials.begin(), trials.end(),
                      [&](const Trial& t) { return follows(field.key, t.config); });
}

}  // namespace

void add_earlier_trials(const std::string& dir, Sweep& sweep,
                        std::vector<std::string>& directories) {
  Trial own = std::move(sweep.trials.front());
  const std::string place = directories.front(), wanted = own.name;
  std::string known;  // its name since its first run, whatever was said of it now
  std::set<std::string> taken, keys;
  sweep.trials.clear(), directories.clear(), sweep.seeds.clear();
  for (Listed& listed : listed_trials(dir)) {
    const bool started = fs::exists(dir + "/trials/" + listed.directory);
    if (listed.directory == place) known = listed.trial.name;
    if (listed.directory == place || !started) continue;
    taken.insert(listed.trial.name);
    sweep.trials.push_back(std::move(listed.trial));
    directories.push_back(listed.directory);
  }
  for (int n = 2; taken.count(own.name) > 0; ++n) own.name = fmt::format("{}-{}", wanted, n);
  if (!known.empty()) own.name = known;
  for (const auto& [key, value] : own.swept) keys.insert(key);
  sweep.trials.push_back(std::move(own));
  directories.push_back(place);

  sweep.swept_keys.clear();
  for (const Field& field : config_fields())
    if (keys.count(field.key) > 0 || differs(field, sweep.trials))
      sweep.swept_keys.push_back(field.key);
  for (Trial& trial : sweep.trials) {
    trial.swept.clear();
    for (const std::string& key : sweep.swept_keys)
      trial.swept.emplace_back(key, get_key(trial.config, key));
    if (std::find(sweep.seeds.begin(), sweep.seeds.end(), trial.seed) == sweep.seeds.end())
      sweep.seeds.push_back(trial.seed);
  }
}

}  // namespace qlab
