#include "experiments/memory_results.h"

#include <algorithm>
#include <array>
#include <set>

#include "core/error.h"
#include "data/json.h"
#include "experiments/config.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

class Entry {
 public:
  Entry(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json.is_object()) fail("{}: expected an object, got {}", where_, json.type_name());
  }
  std::string text(const char* key) const {
    if (!at(key).is_string()) fail("{}: {} must be text", where_, key);
    return at(key).get<std::string>();
  }
  int64_t bytes(const char* key) const { return bytes(at(key), key); }
  std::map<std::string, std::string> set() const {
    std::map<std::string, std::string> values;
    if (!at("set").is_object()) fail("{}: set must be an object", where_);
    for (const auto& [key, value] : at("set").items()) {
      if (value.is_structured()) fail("{}: set: {} must be one value, as text", where_, key);
      values[key] = value.is_string() ? value.get<std::string>() : value.dump();
    }
    return values;
  }
  std::optional<CategoryBytes> categories() const {
    if (!json_.contains("categories")) return {};
    CategoryBytes out{};
    if (!at("categories").is_object()) fail("{}: categories must be an object", where_);
    for (int i = 0; i < category_count; ++i) {
      const char* name = name_of(static_cast<Category>(i));
      if (!at("categories").contains(name)) fail("{}: categories: no {}", where_, name);
      out[static_cast<size_t>(i)] = bytes(at("categories")[name], name);
    }
    return out;
  }

 private:
  const Json& at(const char* key) const {
    if (!json_.contains(key)) fail("{}: no {}", where_, key);
    return json_[key];
  }
  int64_t bytes(const Json& value, const char* key) const {
    if (!value.is_number_integer() || value.get<int64_t>() < 0)
      fail("{}: {} must be a number of bytes", where_, key);
    return value.get<int64_t>();
  }

  const Json& json_;
  std::string where_;
};

// Keys that leave a run's memory as it is, or whose part in it stands in other keys.
const std::set<std::string>& indifferent_keys() {
  static const std::set<std::string> keys = {
      "model.path",      "data.train",         "data.shuffle",       "train.steps",
      "train.epochs",    "train.grad_accum",   "train.seed",         "train.data_seed",
      "train.init_seed", "train.dropout_seed", "train.log_every",    "train.save_every",
      "lora.alpha",      "lora.scaling",       "optim.lr",           "optim.schedule",
      "optim.betas",     "optim.eps",          "optim.max_grad_norm"};
  return keys;
}

bool is_base(Category category) {
  return category == Category::weights || category == Category::constants;
}

/// Whether bytes of the category depend on the key. A key that nothing is said of matters.
bool matters(const std::string& key, Category category) {
  if (indifferent_keys().contains(key)) return false;
  if (is_base(category))
    return key.starts_with("quant.") || key == "model.embeddings" || key == "model.streamed_layers";
  if (category == Category::activations || category == Category::workspace) return true;
  return key.starts_with("quant.") || key.starts_with("lora.") || key.starts_with("optim.") ||
         key.starts_with("parallel.");
}

std::vector<std::string> as_options(const std::map<std::string, std::string>& set) {
  std::vector<std::string> options;
  for (const auto& [key, value] : set) options.push_back(key + "=" + value);
  return options;
}

/// Whether two runs have the same bytes in `counted`, as far as settings decide it: every key that
/// one of them sets has the same value in both, or does not matter.
bool agree(const std::vector<std::string>& a, const std::vector<std::string>& b,
           std::span<const Category> counted) {
  const Config left = load_config("", a), right = load_config("", b);
  if (left.lora.present != right.lora.present &&
      !std::all_of(counted.begin(), counted.end(), is_base))
    return false;
  const auto same = [&](const std::string& option) {
    const std::string key = canonical_key(option.substr(0, option.find('=')), "set");
    return get_key(left, key) == get_key(right, key) ||
           std::none_of(counted.begin(), counted.end(),
                        [&](Category c) { return matters(key, c); });
  };
  return std::all_of(a.begin(), a.end(), same) && std::all_of(b.begin(), b.end(), same);
}

/// A commit's first 7 digits, with what stands behind them, as "-dirty".
std::string shortened(const std::string& commit) {
  constexpr size_t digits = 7;
  const size_t end = std::min(commit.find_first_not_of("0123456789abcdef"), commit.size());
  return commit.substr(0, std::min(end, digits)) + commit.substr(end);
}

/// Bytes of the run in `counted`; nothing where it does not tell.
std::optional<int64_t> counted_bytes(const MeasuredRun& run, std::span<const Category> counted) {
  if (counted.size() == category_count) return run.peak_bytes;
  // Without adapters the peak is a moment of loading, when the base is not complete.
  if (!run.categories || (*run.categories)[static_cast<size_t>(Category::adapters)] == 0) return {};
  int64_t bytes = 0;
  for (const Category c : counted) bytes += (*run.categories)[static_cast<size_t>(c)];
  return bytes;
}

}  // namespace

std::vector<MeasuredRun> read_memory_results(const std::string& file) {
  const Json json = read_json_file(file);
  if (!json.is_array()) fail("{}: expected a list of runs, got {}", file, json.type_name());
  std::vector<MeasuredRun> runs;
  for (size_t i = 0; i < json.size(); ++i) {
    const std::string where = fmt::format("{}: entry {}", file, i + 1);
    const Entry entry(json[i], where);
    MeasuredRun run{entry.text("model"),
                    entry.set(),
                    entry.text("device"),
                    entry.text("commit"),
                    entry.text("date"),
                    entry.bytes("peak_bytes"),
                    entry.bytes("device_used_bytes"),
                    entry.bytes("predicted_bytes"),
                    entry.categories()};
    try {
      load_config("", as_options(run.set));
    } catch (const Error& error) {
      fail("{}: {}", where, error.what());
    }
    runs.push_back(std::move(run));
  }
  return runs;
}

std::optional<MeasuredBytes> find_measured(std::span<const MeasuredRun> runs,
                                           const std::string& model,
                                           const std::vector<std::string>& sets,
                                           std::span<const Category> counted) {
  std::array<Category, category_count> all{};
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<Category>(i);
  std::optional<MeasuredBytes> found;
  bool found_own = false;
  for (const MeasuredRun& run : runs) {
    if (run.model != model || run.device_used_bytes == 0) continue;
    const std::optional<int64_t> bytes = counted_bytes(run, counted);
    if (!bytes || !agree(as_options(run.set), sets, counted)) continue;
    const bool own = agree(as_options(run.set), sets, all);
    if (found_own && !own) continue;
    found = {*bytes, run.device, shortened(run.commit), own};
    found_own = own;
  }
  return found;
}

}  // namespace qlab
