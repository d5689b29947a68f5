#include "experiments/sweep.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "core/error.h"
#include "experiments/config_fields.h"
#include "experiments/expression.h"
#include "experiments/sweep_file.h"
#include "experiments/sweep_names.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxTrials = 100000;

template <class T>
bool contains(const std::vector<T>& items, const T& item) {
  return std::find(items.begin(), items.end(), item) != items.end();
}

class Expansion {
 public:
  Expansion(SweepFile file, const std::vector<std::string>& sets)
      : in_(std::move(file)), sets_(sets), sweep_(in_.head) {
    read_fixed();
  }

  Sweep expand() {
    prepare_base();
    drop_fixed();
    collect_swept_keys();
    if (sweep_.method == "grid") {
      expand_grid();
    } else {
      expand_random();
    }
    for (const Point& point : in_.include) add_point(point, false);
    finish();
    return std::move(sweep_);
  }

 private:
  /// Keys that options fix, and with them the keys they exclude.
  void read_fixed() {
    for (const std::string& set : sets_) {
      const auto [key, text] = split_option(set);
      const YAML::Node value = option_value(text);
      if (contains(config_blocks(), key) && value.IsMap()) {
        for (const auto& pair : value) fix(key + "." + pair.first.Scalar(), "--set " + set);
      } else if (!contains(config_blocks(), key) || key == "optim") {
        fix(key, "--set " + set);
      }
    }
  }

  void fix(const std::string& name, const std::string& where) {
    static const std::vector<std::pair<std::string, std::string>> exclusive{
        {"train.steps", "train.epochs"}, {"optim.warmup_steps", "optim.warmup_ratio"}};
    const std::string key = canonical_key(name, where);
    fixed_.insert(key);
    for (const auto& [a, b] : exclusive) {
      if (key == a) fixed_.insert(b);
      if (key == b) fixed_.insert(a);
    }
  }

  bool is_fixed(const std::string& name) const {
    return fixed_.count(canonical_key(name, in_.file)) > 0;
  }

  void prepare_base() {
    for (const Setting& s : in_.overrides) set_key(in_.base, s.key, s.value, in_.file);
    for (const Parameter& p : in_.parameters) {
      if (p.constant()) assign(in_.base, {p.spelled, p.values[0], p.where});
    }
    apply_sets(in_.base, sets_);
    take_seed_parameter();
    if (fixed_.count("train.seed") || sweep_.seeds.empty()) sweep_.seeds = {in_.base.train.seed};
  }

  /// W&B has no seeds: `seed: {values: [...]}` means the same.
  void take_seed_parameter() {
    for (const Parameter& p : in_.parameters) {
      if (p.key != "train.seed" || p.constant() || is_fixed(p.key)) continue;
      if (!sweep_.seeds.empty()) fail("{}: both seeds and {} are given: keep one", p.where, p.key);
      for (const YAML::Node& node : p.grid()) {
        Config seeded = in_.base;
        assign(seeded, {p.spelled, node, p.where});
        sweep_.seeds.push_back(seeded.train.seed);
      }
    }
  }

  void drop_fixed() {
    std::erase_if(in_.parameters, [&](const Parameter& p) {
      return p.constant() || p.key == "train.seed" || is_fixed(p.key);
    });
    std::erase_if(in_.derived, [&](const Formula& f) { return is_fixed(f.key); });
    for (std::vector<Point>* points : {&in_.paired, &in_.include}) {
      for (Point& point : *points) {
        Point kept;  // not erase_if: assigning a YAML::Node rewrites the node it stood for
        for (const Setting& s : point) {
          if (!is_fixed(s.key)) kept.push_back(s);
        }
        point.swap(kept);
      }
    }
  }

  void collect_swept_keys() {
    const auto add = [&](const std::string& name, const std::string& where, bool once) {
      const std::string key = canonical_key(name, where);
      const bool known = contains(sweep_.swept_keys, key);
      if (known && once) fail("{}: {} is already swept by parameters or paired", where, key);
      if (!known) sweep_.swept_keys.push_back(key);
    };
    for (const Parameter& p : in_.parameters) add(p.key, p.where, true);
    std::vector<std::string> paired;
    for (const Point& point : in_.paired) {
      for (const Setting& s : point) {
        const std::string key = canonical_key(s.key, s.where);
        add(s.key, s.where, !contains(paired, key));
        paired.push_back(key);
      }
    }
    for (const Formula& f : in_.derived) add(f.key, f.where, true);
    for (const Point& point : in_.include) {
      for (const Setting& s : point) add(s.key, s.where, false);
    }
  }

  void assign(Config& config, const Setting& s) const {
    set_key(config, s.key, s.value, s.value.Mark().line < 0 ? s.where : in_.file);
    const Field* field = find_field(canonical_key(s.key, s.where));
    if (!field->is_path) return;
    std::string& path = *std::get<std::string*>(field->slot(config));
    path = beside(path, in_.file);
  }

  void expand_grid() {
    std::vector<std::vector<Point>> axes;
    for (const Parameter& p : in_.parameters) {
      std::vector<Point> choices;
      for (const YAML::Node& node : p.grid()) choices.push_back({{p.spelled, node, p.where}});
      axes.push_back(std::move(choices));
    }
    if (!in_.paired.empty()) axes.push_back(in_.paired);
    size_t total = 1;
    for (const auto& axis : axes) {
      total *= axis.size();
      if (total > kMaxTrials) fail("{}: the grid has more than {} points", in_.file, kMaxTrials);
    }
    for (size_t i = 0; i < total; ++i) {
      Point point;
      size_t rest = i, block = total;
      for (const auto& axis : axes) {
        block /= axis.size();
        const Point& choice = axis[rest / block];
        point.insert(point.end(), choice.begin(), choice.end());
        rest %= block;
      }
      add_point(point, true);
    }
  }

  void expand_random() {
    const auto per_point = static_cast<int64_t>(sweep_.seeds.size());
    if (in_.count == 0 && in_.run_cap == 0) {
      fail("{}: method random needs run_cap (trials) or count (points)", in_.file);
    }
    const int64_t wanted = in_.count > 0 ? in_.count : (in_.run_cap + per_point - 1) / per_point;
    if (wanted > static_cast<int64_t>(kMaxTrials))
      fail("{}: more than {} points", in_.file, kMaxTrials);
    const int64_t most = 100 * wanted + 1000;  // a small space is exhausted long before
    int64_t found = 0;
    for (int64_t index = 0; found < wanted && index < most; ++index) {
      Point point;
      for (const Parameter& p : in_.parameters) {
        point.push_back(
            {p.spelled, p.draw(in_.random_seed, static_cast<uint32_t>(index)), p.where});
      }
      if (!in_.paired.empty()) {
        const double u = uniform_draw(in_.random_seed, "paired", static_cast<uint32_t>(index));
        const Point& choice =
            in_.paired[static_cast<size_t>(u * static_cast<double>(in_.paired.size()))];
        point.insert(point.end(), choice.begin(), choice.end());
      }
      found += add_point(point, true);
    }
    duplicates_ = 0;  // drawn again until new
    if (found < wanted) {
      sweep_.notes.push_back(
          fmt::format("only {} different points exist where {} were asked for", found, wanted));
    }
  }

  /// The point's trials, one per seed; false when it is excluded or known.
  bool add_point(const Point& point, bool may_exclude) {
    Config config = in_.base;
    for (const Setting& s : point) assign(config, s);
    for (const Formula& formula : in_.derived) {
      const bool given = !may_exclude && std::any_of(point.begin(), point.end(), [&](auto& s) {
        return canonical_key(s.key, s.where) == formula.key;
      });
      if (!given) derive(config, formula);
    }
    Config probe = config;
    resolve(probe);
    for (const Formula& rule : in_.exclude) {
      if (!may_exclude || !evaluate_condition(rule.text, probe, rule.where)) continue;
      ++excluded_;
      return false;
    }
    bool fresh = false;
    for (const int64_t seed : sweep_.seeds) {
      Trial trial{.config = config, .swept = {}, .seed = seed, .variant = "", .name = ""};
      trial.config.train.seed = seed;
      resolve(trial.config);
      fresh = add_trial(std::move(trial)) || fresh;
    }
    return fresh;
  }

  void derive(Config& config, const Formula& formula) const {
    Config known = config;
    resolve(known);
    const Value value = evaluate(formula.text, known, formula.where);
    const Field* field = find_field(formula.key);
    std::string text;
    if (const auto* x = std::get_if<double>(&value)) {
      const Slot slot = field->slot(config);
      const bool whole = std::holds_alternative<int64_t*>(slot) ||
                         std::holds_alternative<std::optional<int64_t>*>(slot);
      text = shortest(whole ? std::round(*x) : *x);
    } else if (const auto* b = std::get_if<bool>(&value)) {
      text = *b ? "true" : "false";
    } else {
      text = std::get<std::string>(value);
    }
    set_key(config, formula.key, YAML::Node(text), formula.where);
  }

  bool add_trial(Trial trial) {
    for (const std::string& key : sweep_.swept_keys) {
      trial.swept.emplace_back(key, get_key(trial.config, key));
      const bool paged = key == "optim.type" && trial.swept.back().second.starts_with("paged_");
      if (!changes_numbers(key) || paged)
        trial.variant += key + "=" + trial.swept.back().second + "\n";
    }
    if (!seen_.insert(canonical(trial.config) + trial.variant).second) {
      ++duplicates_;
      return false;
    }
    check_trainable(trial.config, in_.file);
    sweep_.trials.push_back(std::move(trial));
    return true;
  }

  void finish() {
    if (duplicates_ > 0) {
      sweep_.notes.push_back(fmt::format(
          "{} duplicate trials dropped: their settings mean the same run", duplicates_));
    }
    if (sweep_.trials.empty()) {
      fail("{}: the sweep is empty: exclude removes all {} points", in_.file, excluded_);
    }
    if (in_.run_cap > 0 && sweep_.trials.size() > static_cast<size_t>(in_.run_cap)) {
      sweep_.notes.push_back(fmt::format("run_cap keeps the first {} of {} trials", in_.run_cap,
                                         sweep_.trials.size()));
      sweep_.trials.erase(sweep_.trials.begin() + in_.run_cap, sweep_.trials.end());
    }
    std::vector<std::string> derived;
    for (const Formula& formula : in_.derived) derived.push_back(formula.key);
    name_trials(sweep_, derived);
  }

  SweepFile in_;
  const std::vector<std::string>& sets_;
  Sweep sweep_;
  std::set<std::string> fixed_, seen_;
  int64_t duplicates_ = 0, excluded_ = 0;
};

Sweep single_trial(const YAML::Node& document, const std::string& file,
                   const std::vector<std::string>& sets) {
  Sweep sweep;
  sweep.name = fs::path(file).stem().string();
  sweep.source_file = file;
  sweep.single = true;
  Trial trial;
  const Config plain = parse_config(document, file);
  trial.config = plain;
  apply_sets(trial.config, sets);
  for (const Field& field : config_fields()) {
    const std::string text = field_text(field, trial.config);
    if (field.hidden || !changes_numbers(field.key) || field.key == "train.seed" || text.empty() ||
        text == field_text(field, plain))
      continue;
    sweep.swept_keys.push_back(field.key);
    trial.swept.emplace_back(field.key, text);
  }
  resolve(trial.config);
  check_trainable(trial.config, file);
  trial.seed = trial.config.train.seed;
  sweep.seeds = {trial.seed};
  sweep.trials.push_back(std::move(trial));
  name_trials(sweep, {});
  return sweep;
}

}  // namespace

Sweep load_sweep(const std::string& file, const std::vector<std::string>& sets) {
  const YAML::Node document = load_yaml(file);
  const bool is_sweep = std::any_of(document.begin(), document.end(), [](const auto& pair) {
    return pair.first.IsScalar() && contains(sweep_keys(), pair.first.Scalar());
  });
  if (!is_sweep) return single_trial(document, file, sets);
  return Expansion(read_sweep_file(document, file), sets).expand();
}

}  // namespace qlab
