#include "experiments/config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cmath>

#include "core/error.h"
#include "core/memory.h"
#include "experiments/config_fields.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

const std::vector<std::string> kTargetKeywords{"attention", "mlp", "all-linear", "qk", "qv"};
/// Reads a node into the place of a key.
struct Reader {
  const Field& field;
  const YAML::Node& node;
  const std::string& where;
  const std::string& spelled;

  [[noreturn]] void refuse(const std::string& expected) const {
    fail("{}: {}: expected {}, got {}{}", where, spelled, expected, describe(node),
         field.unsupported.empty() ? "" : "; " + field.unsupported + " are not supported");
  }

  template <class T>
  void check_range(T value, const char* kind) const {
    if (!field.range.contains(static_cast<double>(value))) {
      refuse(fmt::format("{} {}", kind, field.range.str()));
    }
  }

  void check_allowed(const std::string& text) const {
    const auto& allowed = field.allowed;
    if (!allowed.empty() && std::find(allowed.begin(), allowed.end(), text) == allowed.end()) {
      refuse(allowed.size() == 1 ? allowed[0] : fmt::format("one of {}", fmt::join(allowed, ", ")));
    }
  }

  void operator()(std::string* out) const {
    if (node.IsNull() && field_text(field, Config()).empty()) return out->clear();
    if (!node.IsScalar()) refuse("text");
    std::string text = node.Scalar();
    if (!field.allowed.empty()) {
      if (text.starts_with("torch.")) text = text.substr(6);
      if (text == "bfloat16") text = "bf16";
      if (text == "float16") text = "fp16";
      if (text == "float32") text = "fp32";
    }
    for (const auto& [word, own] : field.words)
      if (text == word) text = own;
    check_allowed(text);
    *out = text;
  }

  void operator()(int64_t* out) const {
    const auto n = node.IsScalar() ? parse_whole(node.Scalar()) : std::nullopt;
    if (!n) refuse("a whole number");
    check_range(*n, "a whole number");
    check_allowed(std::to_string(*n));
    *out = *n;
  }

  void operator()(double* out) const {
    const auto x = node.IsScalar() ? parse_number(node.Scalar()) : std::nullopt;
    if (!x) refuse("a number");
    check_range(*x, "a number");
    // What the optimizer and the adapters compute with: 1e-50 would be a learning rate of 0.
    const auto narrow = static_cast<float>(*x);
    if ((*x != 0 && !std::isnormal(narrow)) || !field.range.contains(narrow)) {
      refuse(fmt::format("a number {} also as a 32-bit float (1.2e-38 to 3.4e38, 7 digits)",
                         field.range.str()));
    }
    *out = *x;
  }

  void operator()(bool* out) const {
    const auto b = node.IsScalar() ? parse_bool(node.Scalar()) : std::nullopt;
    if (!b) refuse("true or false");
    *out = *b;
  }

  template <class T>
  void operator()(std::optional<T>* out) const {
    if (node.IsNull()) return out->reset();
    T value{};
    (*this)(&value);
    *out = value;
  }

  void operator()(std::array<double, 2>* out) const {
    const char* expected = "two numbers, for example [0.9, 0.999]";
    if (!node.IsSequence() || node.size() != 2) refuse(expected);
    for (size_t i = 0; i < 2; ++i) Reader{field, node[i], where, spelled}(&(*out)[i]);
  }

  void operator()(Targets* out) const {
    const char* expected = "attention, mlp, all-linear, qk, qv, a list of module names, or a regex";
    Targets targets{.pattern = "", .names = {}};
    if (node.IsSequence()) {
      for (const auto& name : node) {
        if (!name.IsScalar() || name.Scalar().empty()) refuse(expected);
        targets.names.push_back(name.Scalar());
      }
      if (targets.names.empty()) refuse(expected);
    } else if (node.IsScalar() && !node.Scalar().empty()) {
      read_target(node.Scalar(), targets);
    } else {
      refuse(expected);
    }
    *out = targets;
  }

  void operator()(MemoryBudget* out) const {
    if (!node.IsScalar() || (node.Scalar() != "auto" && !parse_bytes(node.Scalar())))
      refuse("bytes, for example 14.3GB or 24GiB, or auto");
    if (const std::string missing = missing_unit(node.Scalar()); !missing.empty())
      refuse(fmt::format("bytes with their unit ({})", missing));
    // One trial, however nothing is spelled: 0GB, -0.
    out->text = parse_bytes(node.Scalar()) == 0 ? "0" : node.Scalar();
  }

  void operator()(LayerCount* out) const {
    const char* expected = "a number of layers, all, or auto";
    if (!node.IsScalar()) refuse(expected);
    const std::string& text = node.Scalar();
    const auto n = parse_whole(text);
    if (text != "auto" && text != "all" && !(n && *n >= 0)) refuse(expected);
    out->text = n ? std::to_string(*n) : text;
  }

  void read_target(const std::string& text, Targets& targets) const {
    std::string lower = text;
    for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    if (std::find(kTargetKeywords.begin(), kTargetKeywords.end(), lower) != kTargetKeywords.end()) {
      targets.pattern = lower;
      return;
    }
    if (text.find_first_of(".*+?()[]{}|^$\\") != std::string::npos) {
      targets.pattern = text;
      return;
    }
    const std::string keyword = nearest(lower, kTargetKeywords);
    if (!keyword.empty() && keyword.size() > 2) {
      fail("{}: {}: \"{}\" is no known set of modules; did you mean \"{}\"?", where, spelled, text,
           keyword);
    }
    targets.names.push_back(text);
  }
};

struct Entry {
  const Field* field;
  YAML::Node value;
  std::string where, spelled, text;
};

std::string unknown_key(const std::string& name, const std::string& where) {
  const std::string way = only_way(name);
  return fmt::format("{}: unknown key \"{}\"{}", where, name,
                     way.empty() ? suggest_key(name) : "; remove it: " + way);
}

/// Settings that come from one place (a file, the options, a point of a sweep) and may not
/// contradict each other; later layers replace earlier ones.
class Layer {
 public:
  /// A key, an alias, or a block of them; `where` is file:line or the option.
  void add(const std::string& name, const YAML::Node& value, const std::string& where,
           const std::string& file) {
    const auto& blocks = config_blocks();
    const bool block = std::find(blocks.begin(), blocks.end(), name) != blocks.end();
    if (block && (value.IsMap() || value.IsNull())) {
      lora_ = lora_ || name == "lora";
      if (!value.IsMap()) return;
      for (const YamlItem& item : map_items(value, file)) {
        add(name + "." + item.key, item.value, item.where, file);
      }
      return;
    }
    if (block && name != "optim") {
      fail("{}: {} is a block of keys, got {}", where, name, describe(value));
    }
    add_key(name, value, where);
  }

  void apply(Config& config) const {
    if (!unknown_.empty()) fail("{}", fmt::join(unknown_, "\n"));
    for (const Entry& e : entries_) {
      std::visit(Reader{*e.field, e.value, e.where, e.spelled}, e.field->slot(config));
      config.origins[e.field->key] = e.where;
    }
    if (lora_) config.lora.present = true;
    if (has("train.steps")) config.train.epochs.reset();
    if (has("train.epochs")) config.train.steps.reset();
    if (has("optim.warmup_steps")) config.optim.warmup_ratio.reset();
    if (has("optim.warmup_ratio")) config.optim.warmup_steps.reset();
  }

  void use_paths_beside(Config& config, const std::string& file) const {
    for (const Entry& e : entries_) {
      if (!e.field->is_path) continue;
      std::string& path = *std::get<std::string*>(e.field->slot(config));
      path = beside(path, file);
    }
  }

 private:
  bool has(const std::string& key) const { return find(key) != nullptr; }

  const Entry* find(const std::string& key) const {
    for (const Entry& e : entries_) {
      if (e.field->key == key && !e.text.empty()) return &e;
    }
    return nullptr;
  }

  void add_key(const std::string& name, const YAML::Node& value, const std::string& where) {
    const Alias* alias = find_alias(name);
    if (alias == nullptr) {
      const Field* field = find_field(name);
      if (field != nullptr && !field->hidden) return insert({field, value, where, name, ""});
      unknown_.push_back(unknown_key(name, where));
      return;
    }
    YAML::Node meant(value);
    const std::string text = value.IsScalar() ? value.Scalar() : "";
    const std::optional<bool> flag = parse_bool(text);
    const std::string given = flag ? (*flag ? "true" : "false") : text;
    for (const auto& [from, to] : alias->values) {
      if (given != from) continue;
      if (to == nullptr) return;
      meant.reset(YAML::Node(to));
    }
    insert({find_field(alias->key), meant, where, name, ""});
  }

  void insert(Entry entry) {
    Config scratch;
    std::visit(Reader{*entry.field, entry.value, entry.where, entry.spelled},
               entry.field->slot(scratch));
    entry.text = field_text(*entry.field, scratch);
    for (const Entry& e : entries_) {
      if (e.field != entry.field || e.text == entry.text) continue;
      const std::string what = e.spelled == entry.spelled ? "is given twice, with another value"
                                                          : "contradicts " + e.spelled;
      fail("{}: {} {} ({}): keep one", entry.where, entry.spelled, what, e.where);
    }
    for (const std::string& key : excluded_by(entry.field->key)) {
      const Entry* other = entry.text.empty() ? nullptr : find(key);
      if (other == nullptr) continue;
      fail("{}: {} excludes {} ({}): keep one", entry.where, entry.spelled, other->spelled,
           other->where);
    }
    if (entry.field->key.starts_with("lora.")) lora_ = true;
    entries_.push_back(std::move(entry));
  }

  std::vector<Entry> entries_;
  std::vector<std::string> unknown_;  // a line each: who moves a file here sees all at once
  bool lora_ = false;
};

}  // namespace

std::string Targets::str() const {
  return pattern.empty() ? fmt::format("[{}]", fmt::join(names, ", ")) : pattern;
}

double LoraConfig::scale() const {
  const double rank = static_cast<double>(r);
  return alpha.value_or(2 * rank) / (scaling == "alpha/r" ? rank : std::sqrt(rank));
}

Config parse_config(const YAML::Node& document, const std::string& file) {
  Layer layer;
  const std::vector<YamlItem> items = map_items(document, file);
  for (const YamlItem& item : items) {
    if (std::find(sweep_keys().begin(), sweep_keys().end(), item.key) != sweep_keys().end()) {
      fail("{}: \"{}\" belongs to a sweep, and one run is expected here: use qlab sweep {}",
           item.where, item.key, file);
    }
  }
  for (const YamlItem& item : items) layer.add(item.key, item.value, item.where, file);
  Config config;
  layer.apply(config);
  layer.use_paths_beside(config, file);
  return config;
}

void set_key(Config& config, const std::string& key, const YAML::Node& value,
             const std::string& origin) {
  Layer layer;
  layer.add(key, value, place(origin, value), origin);
  layer.apply(config);
}

void set_keys(Config& config, const std::vector<Setting>& settings, const std::string& file) {
  Layer layer;
  for (const Setting& s : settings) {
    layer.add(s.key, s.value, s.value.Mark().line < 0 ? s.where : place(file, s.value), file);
  }
  layer.apply(config);
  layer.use_paths_beside(config, file);
}

void apply_sets(Config& config, const std::vector<std::string>& sets) {
  Layer layer;
  for (const std::string& set : sets) {
    const auto [key, text] = split_option(set);
    const std::string where = "--set " + set;
    layer.add(key, option_value(text), where, where);
  }
  layer.apply(config);
}

Config load_config(const std::string& file, const std::vector<std::string>& sets) {
  Config config;
  if (!file.empty()) config = parse_config(load_yaml(file), file);
  apply_sets(config, sets);
  resolve(config);
  return config;
}

void resolve(Config& config) {
  LoraConfig& lora = config.lora;
  TrainConfig& train = config.train;
  OptimConfig& optim = config.optim;
  if (!lora.alpha) lora.alpha = 2.0 * static_cast<double>(lora.r);
  if (!train.steps && !train.epochs) train.epochs = 1;
  if (!optim.warmup_steps && !optim.warmup_ratio) optim.warmup_ratio = 0.03;
  for (std::optional<int64_t>* seed : {&train.init_seed, &train.data_seed, &train.dropout_seed}) {
    if (!*seed) *seed = train.seed;
  }
}

void check_trainable(const Config& config, const std::string& origin) {
  if (config.model.path.empty()) fail("{}: model.path is missing: what is to be trained?", origin);
  if (config.data.train.empty()) {
    fail("{}: data.train is missing: a JSONL file, or \"synthetic\"", origin);
  }
  if (!config.lora.present) {
    fail(
        "{}: there is no lora block, so nothing would be trained: add for example\n"
        "  lora: {{r: 16, targets: all-linear}}",
        origin);
  }
}

std::string missing_unit(const std::string& text) {
  constexpr int64_t least = int64_t{1} << 20;
  const auto bytes = parse_bytes(text);
  const bool bare = !text.ends_with('B') && !text.ends_with('b');  // as every unit does
  return bytes && bare && *bytes > 0 && *bytes < least ? fmt::format("did you mean {}GiB?", text)
                                                       : "";
}

std::string why_not_computable(const Config& config) {
  return config.quant.type == "int8" ? "bytes alone: no run computes with int8" : "";
}

void check_computable(const Config& config, const std::string& origin) {
  if (why_not_computable(config).empty()) return;
  const auto place = config.origins.find("quant.type");
  fail(
      "{}: quant.type: of int8 only the bytes are known, for qlab memory and inspect; nothing "
      "trains or evaluates with it: set nf4, bf16, fp16 or fp32",
      place == config.origins.end() ? origin : place->second);
}

std::string get_key(const Config& config, const std::string& key) {
  return field_text(*find_field(canonical_key(key, "configuration")), config);
}

std::string value_text(const std::string& key, const std::string& value,
                       const std::string& origin) {
  Layer layer;
  layer.add(key, option_value(value), origin, origin);
  Config config;
  layer.apply(config);
  return get_key(config, key);
}

std::string canonical_key(const std::string& key, const std::string& origin) {
  if (const Alias* alias = find_alias(key)) return alias->key;
  if (const Field* field = find_field(key)) return field->key;
  fail("{}", unknown_key(key, origin));
}

bool changes_numbers(const std::string& key) {
  return find_field(key) != nullptr && find_field(key)->effect == Effect::numbers;
}

}  // namespace qlab
