// What a Config looks like from outside: config.yaml, the text that identifies a run, and the table
// of keys.
#include <fmt/ranges.h>

#include <algorithm>

#include "experiments/config_fields.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

struct ToYaml {
  const std::string& text;
  std::string operator()(const std::string*) const { return yaml_text(text); }
  std::string operator()(const MemoryBudget*) const { return yaml_text(text); }
  std::string operator()(const LayerCount*) const { return text; }
  std::string operator()(const Targets* targets) const {
    if (!targets->pattern.empty()) return yaml_text(targets->pattern);
    std::vector<std::string> names;
    for (const std::string& name : targets->names) names.push_back(yaml_text(name));
    return fmt::format("[{}]", fmt::join(names, ", "));
  }
  template <class T>
  std::string operator()(const T*) const {
    return text;
  }
};

/// Keys that cannot matter, given the others, must not tell runs apart.
bool has_effect(const Field& field, const Config& config) {
  const std::string& key = field.key;
  if (field.hidden || field.effect == Effect::none) return false;
  if (key.starts_with("lora.") && !config.lora.present) return false;
  if (key == "quant.block_size" || key == "quant.double_quant") return config.quant.type == "nf4";
  if (key == "train.dropout_seed") return config.lora.dropout > 0;
  if (key == "data.eval_seq_len") return !config.data.eval.empty();
  return true;
}

std::string block_of(const Field& field) { return field.key.substr(0, field.key.find('.')); }

std::string default_of(const Field& field) {
  if (!field.default_text.empty()) return field.default_text;
  return field_text(field, Config());
}

std::string meaning_of(const Field& field) {
  std::string text = field.meaning;
  if (!field.allowed.empty()) text += fmt::format(" ({})", fmt::join(field.allowed, ", "));
  if (const std::string range = field.range.str(); !range.empty()) {
    text += fmt::format(" ({})", range);
  }
  return text;
}

std::string meaning_of(const Alias& alias) {
  const Field* field = find_field(alias.key);
  return field->hidden ? field->meaning : fmt::format("`{}`", alias.key);
}

}  // namespace

std::string to_yaml(const Config& config) {
  std::string out, block;
  for (const Field& field : config_fields()) {
    const std::string text = field_text(field, config);
    if (field.hidden || text.empty()) continue;
    if (block_of(field) == "lora" && !config.lora.present) continue;
    if (block != block_of(field)) {
      block = block_of(field);
      out += block + ":\n";
    }
    const std::string value = std::visit(ToYaml{text}, field.slot(const_cast<Config&>(config)));
    out += fmt::format("  {}: {}\n", field.key.substr(block.size() + 1), value);
  }
  return out;
}

std::string canonical(const Config& config) {
  std::string out;
  for (const Field& field : config_fields()) {
    if (!has_effect(field, config)) continue;
    std::string text = field_text(field, config);
    if (field.key == "lora.targets" && config.lora.targets.pattern.empty()) {
      Targets sorted = config.lora.targets;
      std::sort(sorted.names.begin(), sorted.names.end());
      text = sorted.str();
    }
    // Where states wait changes no number: a run that does not fit can go on with them paged.
    if (field.key == "optim.type" && text.starts_with("paged_")) text = text.substr(6);
    out += fmt::format("{}={}\n", field.key, text);
  }
  return out;
}

std::string config_table() {
  std::string out = fmt::format("{:<24} {:<12} {}\n", "KEY", "DEFAULT", "MEANING");
  for (const Field& field : config_fields()) {
    if (field.hidden) continue;
    out += fmt::format("{:<24} {:<12} {}\n", field.key, default_of(field), meaning_of(field));
  }
  out += "\nOther spellings:\n";
  for (const Alias& alias : config_aliases()) {
    std::string meaning = meaning_of(alias);
    std::erase(meaning, '`');
    out += fmt::format("{:<28} {}\n", alias.name, meaning);
  }
  return out;
}

std::string config_markdown() {
  std::string out = "| key | default | meaning | identity |\n| --- | --- | --- | --- |\n";
  for (const Field& field : config_fields()) {
    if (field.hidden) continue;
    const std::string value = default_of(field);
    out +=
        fmt::format("| `{}` | {} | {} | {} |\n", field.key, value.empty() ? "" : "`" + value + "`",
                    meaning_of(field), field.effect == Effect::numbers ? "yes" : "no");
  }
  out += "\n| other spelling | key | values |\n| --- | --- | --- |\n";
  for (const Alias& alias : config_aliases()) {
    std::vector<std::string> values;
    for (const auto& [from, to] : alias.values) {
      values.push_back(
          fmt::format("`{}` {}", from, to == nullptr ? "is ignored" : fmt::format("is `{}`", to)));
    }
    out +=
        fmt::format("| `{}` | {} | {} |\n", alias.name, meaning_of(alias), fmt::join(values, ", "));
  }
  return out;
}

}  // namespace qlab
