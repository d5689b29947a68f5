#include "experiments/sweep_names.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "core/error.h"
#include "data/file.h"
#include "experiments/config_fields.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxName = 60, kMaxPart = 24;
/// 64 bits, so that no two of a user's trials ever share them. Earlier versions wrote 32.
constexpr size_t kHashDigits = 16, kEarlierHashDigits = 8;

/// Words before a value; "" where the value speaks for itself.
const std::map<std::string, std::string> kLabels{{"lora.r", "r"},
                                                 {"lora.alpha", "a"},
                                                 {"lora.dropout", "drop"},
                                                 {"lora.targets", ""},
                                                 {"lora.dtype", ""},
                                                 {"quant.type", ""},
                                                 {"optim.lr", "lr"},
                                                 {"optim.schedule", ""},
                                                 {"model.path", ""},
                                                 {"quant.block_size", "block"},
                                                 {"train.batch_size", "batch"},
                                                 {"data.seq_len", "len"},
                                                 {"train.recompute", "recompute-"},
                                                 {"train.loss_norm", ""},
                                                 {"data.train", ""}};

/// 2e-4 rather than 0.0002; everything below `least` that way.
std::string short_number(double x, double least) {
  if (x == 0 || (std::abs(x) >= least && std::abs(x) < 1e6)) return shortest(x);
  std::string text = fmt::format("{:e}", x);
  const size_t e = text.find('e');
  std::string digits = text.substr(0, e);
  while (digits.back() == '0') digits.pop_back();
  if (digits.back() == '.') digits.pop_back();
  return digits + "e" + std::to_string(std::stoi(text.substr(e + 1)));
}

/// Only letters, digits, dots, underscores and single dashes, none at the ends.
std::string file_safe(const std::string& text, size_t longest) {
  std::string out;
  for (const char c : text) {
    const bool good = std::isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_';
    if (good) {
      out += c;
    } else if (!out.empty() && out.back() != '-') {
      out += '-';
    }
  }
  if (out.size() > longest) out.resize(longest);
  while (!out.empty() && (out.back() == '-' || out.back() == '.')) out.pop_back();
  const size_t first = out.find_first_not_of(".-");
  return first == std::string::npos ? "" : out.substr(first);
}

std::string without(std::string text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
  return text;
}

std::string name_part(const std::string& key, const std::string& value) {
  const std::string leaf = key.substr(key.rfind('.') + 1);
  if (value == "true" || value == "false") return (value == "true" ? "" : "no_") + leaf;
  if (key == "lora.scaling") return value == "alpha/r" ? "lora" : "rslora";
  std::string text = value;
  // Learning rates in one notation, 1e-4 and 1e-3; elsewhere 0.05 is easier to read.
  if (const auto number = parse_number(value))
    text = short_number(*number, key.starts_with("optim.") ? 0.5 : 1e-3);
  if (find_field(key)->is_path) {
    const fs::path path(value.substr(value.find(':') + 1));
    text = (path.extension() == ".gguf" || path.extension() == ".jsonl" ? path.stem()
                                                                        : path.filename())
               .string();
  }
  if (key == "lora.targets") text = without(text, "_proj");
  const auto label = kLabels.find(key);
  return file_safe((label == kLabels.end() ? leaf : label->second) + text, kMaxPart);
}

/// What config.yaml can say of a trial's identity; the contents of its files are not in there.
std::string settings_of(Config config) {
  config.quant.compute_dtype.clear();
  for (const Field& field : config_fields()) {
    if (!field.is_path) continue;
    std::string& path = *std::get<std::string*>(field.slot(config));
    if (!path.empty()) path = "content";
  }
  return canonical(config);
}

/// Eight digits meet by chance. A file that this version does not read says nothing against it.
bool has_config_of(const Trial& trial, const fs::path& file) {
  if (!fs::exists(file)) return true;
  try {
    return settings_of(load_config(file.string(), {})) == settings_of(trial.config);
  } catch (const std::exception&) {
    return true;
  }
}

}  // namespace

void name_trials(Sweep& sweep, const std::vector<std::string>& derived) {
  std::map<std::string, std::set<std::string>> values;
  for (const Trial& trial : sweep.trials) {
    for (const auto& [key, value] : trial.swept) values[key].insert(value);
  }
  for (const std::string& key : derived) values.erase(key);
  std::set<std::string> taken;
  for (Trial& trial : sweep.trials) {
    std::string name = sweep.single ? file_safe(sweep.name, kMaxPart) + "-" : "";
    for (const auto& [key, value] : trial.swept) {
      if (values[key].size() < 2 && !sweep.single) continue;
      if (const std::string part = name_part(key, value); !part.empty()) name += part + "-";
    }
    if (name.empty()) name = file_safe(sweep.name, kMaxPart) + "-";
    const std::string seed = "s" + std::to_string(trial.seed);
    if (name.size() + seed.size() > kMaxName) {
      name = file_safe(name, kMaxName - seed.size() - 1) + "-";
    }
    trial.name = name + seed;
    for (int n = 2; !taken.insert(trial.name).second; ++n) {
      trial.name = fmt::format("{}{}-{}", name, seed, n);
    }
  }
}

std::string trial_hash(const Trial& trial, const Fingerprints& fingerprints,
                       const std::string& compute_dtype) {
  Config identity = trial.config;
  const auto replace = [](std::string& path, const std::string& fingerprint) {
    if (!fingerprint.empty()) path = "content:" + fingerprint;
  };
  replace(identity.model.path, fingerprints.model);
  replace(identity.data.train, fingerprints.train);
  replace(identity.data.eval, fingerprints.eval);
  replace(identity.lora.adapter, fingerprints.adapter);
  identity.quant.compute_dtype = compute_dtype;
  Fingerprint hash;
  hash.add(static_cast<uint64_t>(numerics_version)).add(canonical(identity)).add(trial.variant);
  return hash.hex().substr(0, kHashDigits);
}

std::string trial_directory(const std::string& trials_dir, const std::string& hash,
                            const Trial& trial) {
  const std::string earlier = hash.substr(0, kEarlierHashDigits) + "-";
  std::error_code ignored;
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(trials_dir, ignored)) {
    const std::string existing = entry.path().filename().string();
    if (!entry.is_directory()) continue;
    if (existing.starts_with(hash + "-") ||
        (existing.starts_with(earlier) && has_config_of(trial, entry.path() / "config.yaml")))
      found.push_back(existing);
  }
  return found.empty() ? hash + "-" + trial.name : *std::min_element(found.begin(), found.end());
}

std::vector<int> shard(const std::string& text, int trials) {
  const size_t slash = text.find('/');
  const auto part = parse_whole(text.substr(0, slash));
  const auto parts =
      slash == std::string::npos ? std::nullopt : parse_whole(text.substr(slash + 1));
  if (!part || !parts || *parts < 1 || *part < 1 || *part > *parts) {
    fail("--shard {}: expected I/N with 1 <= I <= N, for example 2/4", text);
  }
  std::vector<int> indices;
  for (int i = 0; i < trials; ++i) {
    if (i % *parts == *part - 1) indices.push_back(i);
  }
  return indices;
}

std::string trial_table(const Sweep& sweep, const std::vector<std::vector<std::string>>& columns) {
  std::vector<std::vector<std::string>> rows{{"trial"}};
  for (const std::string& key : sweep.swept_keys) rows[0].push_back(key);
  rows[0].push_back("seed");
  for (const Trial& trial : sweep.trials) {
    std::vector<std::string> row{trial.name};
    for (const auto& [key, value] : trial.swept) row.push_back(value);
    row.push_back(std::to_string(trial.seed));
    rows.push_back(std::move(row));
  }
  for (const std::vector<std::string>& column : columns)
    for (size_t i = 0; i < rows.size(); ++i) rows[i].push_back(column.at(i));
  return fmt::format("{}: {} trial{} ({})\n", sweep.name, sweep.trials.size(),
                     sweep.trials.size() == 1 ? "" : "s", sweep.method) +
         aligned_table(rows);
}

std::string aligned_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows.at(0).size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) line += fmt::format("{:<{}}  ", row[i], widths[i]);
    while (!line.empty() && line.back() == ' ') line.pop_back();
    out += line + "\n";
  }
  return out;
}

}  // namespace qlab
