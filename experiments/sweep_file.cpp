#include "experiments/sweep_file.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>

#include "core/error.h"
#include "experiments/config_fields.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kIgnored{"program", "project", "entity", "command", "description"};
const std::vector<std::string> kColumns{"eval_loss", "best_eval_loss", "train_loss", "tokens_per_s",
                                        "peak_bytes"};

bool contains(const std::vector<std::string>& items, const std::string& item) {
  return std::find(items.begin(), items.end(), item) != items.end();
}

std::string text_of(const YAML::Node& node, const std::string& where, const std::string& what) {
  if (!node.IsScalar()) fail("{}: {}: expected text, got {}", where, what, describe(node));
  return node.Scalar();
}

int64_t whole_of(const YAML::Node& node, const std::string& where, const std::string& what,
                 int64_t low) {
  const auto n = node.IsScalar() ? parse_whole(node.Scalar()) : std::nullopt;
  if (!n || *n < low) {
    fail("{}: {}: expected a whole number at least {}, got {}", where, what, low, describe(node));
  }
  return *n;
}

class SweepReader {
 public:
  explicit SweepReader(const std::string& file) {
    out_.file = file;
    out_.head.source_file = file;
    out_.head.name = fs::path(file).stem().string();
  }

  void read(const YamlItem& item) {
    const auto& [key, value, where] = item;
    if (key == "parameters" || key == "paired" || key == "include") out_.varies_at = where;
    if (key == "base") {
      read_base(value, where);
    } else if (key == "parallel") {
      out_.overrides.push_back({key, value, where});
    } else if (key == "name") {
      out_.head.name = text_of(value, where, key);
    } else if (key == "method") {
      read_method(value, where);
    } else if (key == "metric") {
      read_metric(value, where);
    } else if (key == "seeds") {
      read_seeds(value, where);
    } else if (key == "parameters") {
      if (!value.IsMap()) fail("{}: parameters is a block of keys, got {}", where, describe(value));
      out_.parameters = read_parameters(value, out_.file);
    } else if (key == "paired" || key == "include") {
      for (const YAML::Node& entry : list_of(value, where, key)) {
        (key == "paired" ? out_.paired : out_.include).push_back(read_point(entry, key));
      }
    } else if (key == "derived") {
      if (!value.IsMap()) fail("{}: derived is a block of keys, got {}", where, describe(value));
      for (const YamlItem& formula : map_items(value, out_.file)) {
        out_.derived.push_back({canonical_key(formula.key, formula.where),
                                text_of(formula.value, formula.where, formula.key), formula.where});
      }
    } else if (key == "exclude") {
      for (const YAML::Node& entry : list_of(value, where, key)) {
        out_.exclude.push_back(
            {"", text_of(entry, place(out_.file, entry), key), place(out_.file, entry)});
      }
    } else {
      read_rest(item);
    }
  }

  SweepFile take() { return std::move(out_); }

 private:
  void read_rest(const YamlItem& item) {
    const auto& [key, value, where] = item;
    if (key == "run_cap") {
      out_.run_cap = whole_of(value, where, key, 1);
    } else if (key == "count") {
      out_.count = whole_of(value, where, key, 1);
    } else if (key == "random_seed") {
      out_.random_seed = static_cast<uint64_t>(whole_of(value, where, key, 0));
    } else if (key == "early_terminate") {
      fail("{}: early_terminate is not supported: every trial runs to its end; remove it", where);
    } else if (contains(kIgnored, key)) {
      out_.head.notes.push_back(fmt::format("{}: \"{}\" is ignored", where, key));
    } else if (contains(config_blocks(), key) || find_alias(key) != nullptr ||
               find_field(key) != nullptr) {
      fail("{}: \"{}\" describes a run: move it under base, or under parameters to sweep it", where,
           key);
    } else {
      const std::string near = nearest(key, sweep_words());
      fail("{}: unknown key \"{}\"{} (keys of a sweep: {})", where, key,
           near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near),
           fmt::join(sweep_words(), ", "));
    }
  }

  static std::vector<std::string> sweep_words() {
    std::vector<std::string> words = sweep_keys();
    for (const char* word : {"name", "count", "random_seed", "parallel"}) words.push_back(word);
    return words;
  }

  std::vector<YAML::Node> list_of(const YAML::Node& value, const std::string& where,
                                  const std::string& key) const {
    if (!value.IsSequence()) fail("{}: {}: expected a list, got {}", where, key, describe(value));
    return {value.begin(), value.end()};
  }

  void read_base(const YAML::Node& value, const std::string& where) {
    if (value.IsMap()) {
      out_.base = parse_config(value, out_.file);
    } else {
      const std::string path = beside(text_of(value, where, "base"), out_.file);
      if (!fs::exists(path)) fail("{}: base: there is no file {}", where, path);
      out_.base = parse_config(load_yaml(path), path);
    }
  }

  void read_method(const YAML::Node& value, const std::string& where) {
    out_.head.method = text_of(value, where, "method");
    if (out_.head.method != "grid" && out_.head.method != "random") {
      fail(
          "{}: method: expected grid or random, got \"{}\": trials are chosen before the first one "
          "runs",
          where, out_.head.method);
    }
  }

  void read_metric(const YAML::Node& value, const std::string& where) {
    if (!value.IsMap()) fail("{}: metric: expected {{name: eval_loss, goal: minimize}}", where);
    for (const YamlItem& item : map_items(value, out_.file)) {
      std::string text = text_of(item.value, item.where, item.key);
      if (item.key == "name") {
        std::replace(text.begin(), text.end(), '/', '_');
        if (!contains(kColumns, text)) {
          fail("{}: metric: expected one of {}, got \"{}\"", item.where, fmt::join(kColumns, ", "),
               text);
        }
        out_.head.metric = text;
      } else if (item.key == "goal") {
        if (text != "minimize" && text != "maximize") {
          fail("{}: goal: expected minimize or maximize, got \"{}\"", item.where, text);
        }
        out_.head.goal = text;
      } else {
        fail("{}: unknown key \"{}\" in metric (name, goal)", item.where, item.key);
      }
    }
  }

  void read_seeds(const YAML::Node& value, const std::string& where) {
    for (const YAML::Node& seed : list_of(value, where, "seeds")) {
      out_.head.seeds.push_back(whole_of(seed, place(out_.file, seed), "seeds", 0));
    }
    if (out_.head.seeds.empty()) fail("{}: seeds: the list is empty", where);
  }

  Point read_point(const YAML::Node& node, const std::string& what) const {
    if (!node.IsMap()) {
      fail("{}: {}: expected a block of keys, got {}", place(out_.file, node), what,
           describe(node));
    }
    Point point;
    for (const YamlItem& item : map_items(node, out_.file)) {
      canonical_key(item.key, item.where);
      point.push_back({item.key, item.value, item.where});
    }
    return point;
  }

  SweepFile out_;
};

}  // namespace

SweepFile read_sweep_file(const YAML::Node& document, const std::string& file) {
  SweepReader reader(file);
  for (const YamlItem& item : map_items(document, file)) reader.read(item);
  return reader.take();
}

}  // namespace qlab
