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
    if (!in_.varies_at.empty() && in_.parameters.empty() && in_.paired.empty() &&
        in_.include.empty() && sweep_.seeds.empty()) {
      fail(
          "{}: the sweep is empty: list what varies, as parameters: {{lora.r: {{values: [8, "
          "16]}}}}",
          in_.varies_at);
    }
    prepare_base();
    take_seeds();
    drop_fixed();
    check_derived();
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
    const std::string key = canonical_key(name, where);
    fixed_.insert(key);
    for (const std::string& other : excluded_by(key)) fixed_.insert(other);
  }

  bool is_fixed(const std::string& name) const {
    return fixed_.count(canonical_key(name, in_.file)) > 0;
  }

  void prepare_base() {
    for (const Setting& s : in_.overrides) set_key(in_.base, s.key, s.value, in_.file);
    for (const Parameter& p : in_.parameters) {
      if (p.constant() && !is_fixed(p.key)) {
        constants_.push_back({p.spelled, p.values[0], p.where});
      }
    }
    set_keys(in_.base, constants_, in_.file);
    apply_sets(in_.base, sets_);
  }

  /// Where seeds are listed, each point is run with each; elsewhere a point has its own, or the
  /// base's.
  void take_seeds() {
    const std::string seed = "train.seed";
    if (fixed_.count(seed)) return sweep_.seeds.clear();
    const auto refuse_both = [&](const std::string& where) {
      if (!sweep_.seeds.empty()) fail("{}: both seeds and {} are given: keep one", where, seed);
    };
    for (const Parameter& p : in_.parameters) {
      if (p.key != seed) continue;
      refuse_both(p.where);
      if (p.constant()) continue;
      for (const YAML::Node& node : p.grid()) {  // W&B has no seeds: these mean the same
        Config seeded = in_.base;
        set_keys(seeded, {{p.spelled, node, p.where}}, in_.file);
        sweep_.seeds.push_back(seeded.train.seed);
      }
    }
    for (const std::vector<Point>* points : {&in_.paired, &in_.include}) {
      for (const Point& point : *points) {
        for (const Setting& s : point) {
          if (canonical_key(s.key, s.where) == seed) refuse_both(s.where);
        }
      }
    }
    for (const Formula& formula : in_.derived) {
      if (formula.key == seed) refuse_both(formula.where);
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

  /// What a formula sets may not also be given; set_keys() sees to the other contradictions.
  void check_derived() const {
    for (const Formula& formula : in_.derived) {
      const auto check = [&](const Setting& s) {
        if (!replaces(formula, s)) return;
        fail("{}: {} is already given by {} ({}): keep one", formula.where, formula.key, s.key,
             s.where);
      };
      for (const Setting& s : constants_) check(s);
      for (const Parameter& p : in_.parameters) check({p.spelled, {}, p.where});
      for (const Point& point : in_.paired) std::for_each(point.begin(), point.end(), check);
      for (const Formula& other : in_.derived) {
        if (&other == &formula) break;
        check({other.key, {}, other.where});
      }
    }
  }

  static bool replaces(const Formula& formula, const Setting& s) {
    const std::string key = canonical_key(s.key, s.where);
    return key == formula.key || contains(excluded_by(key), formula.key);
  }

  void collect_swept_keys() {
    const auto add = [&](const std::string& name, const std::string& where, bool once) {
      const std::string key = canonical_key(name, where);
      if (key == "train.seed") return;  // a trial's name and every table have it anyway
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
    for (const Formula& f : in_.derived) add(f.key, f.where, false);
    for (const Point& point : in_.include) {
      for (const Setting& s : point) add(s.key, s.where, false);
    }
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
      Point point = constants_;
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
    const auto per_point = static_cast<int64_t>(std::max<size_t>(sweep_.seeds.size(), 1));
    if (in_.count == 0 && in_.run_cap == 0) {
      fail("{}: method random needs run_cap (trials) or count (points)", in_.file);
    }
    const int64_t wanted = in_.count > 0 ? in_.count : (in_.run_cap + per_point - 1) / per_point;
    if (wanted > static_cast<int64_t>(kMaxTrials))
      fail("{}: more than {} points", in_.file, kMaxTrials);
    const int64_t most = 100 * wanted + 1000;  // a small space is exhausted long before
    int64_t found = 0;
    for (int64_t index = 0; found < wanted && index < most; ++index) {
      Point point = constants_;
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

  /// The point's trials, one per seed; false when all are excluded or known.
  bool add_point(const Point& point, bool may_exclude) {
    if (sweep_.seeds.empty()) return add_settings(point, may_exclude);
    bool fresh = false;
    for (const int64_t seed : sweep_.seeds) {
      Point seeded = point;
      seeded.push_back({"train.seed", YAML::Node(seed), in_.file});
      fresh = add_settings(seeded, may_exclude) || fresh;
    }
    return fresh;
  }

  bool add_settings(const Point& point, bool may_exclude) {
    Trial trial{.config = in_.base, .swept = {}, .seed = 0, .variant = "", .name = ""};
    set_keys(trial.config, point, in_.file);
    for (const Formula& formula : in_.derived) {
      const bool given = std::any_of(point.begin(), point.end(),
                                     [&](const Setting& s) { return replaces(formula, s); });
      if (!given) derive(trial.config, formula);
    }
    resolve(trial.config);
    for (const Formula& rule : in_.exclude) {
      if (!may_exclude || !evaluate_condition(rule.text, trial.config, rule.where)) continue;
      ++excluded_;
      return false;
    }
    trial.seed = trial.config.train.seed;
    return add_trial(std::move(trial));
  }

  void derive(Config& config, const Formula& formula) const {
    const Field* field = find_field(formula.key);
    if (contains(field->allowed, formula.text)) {  // alpha/r is a number elsewhere
      return set_key(config, formula.key, YAML::Node(formula.text), formula.where);
    }
    Config known = config;
    resolve(known);
    const Value value = evaluate(formula.text, known, formula.where);
    std::string text;
    if (const auto* x = std::get_if<double>(&value)) {
      const FieldSlot slot = field->slot(config);
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
      sweep_.notes.push_back(
          fmt::format("{} duplicate trial{} dropped: their settings mean the same run", duplicates_,
                      duplicates_ == 1 ? "" : "s"));
    }
    if (sweep_.trials.empty()) {
      fail("{}: the sweep is empty: exclude removes all {} trials", in_.file, excluded_);
    }
    if (in_.run_cap > 0 && sweep_.trials.size() > static_cast<size_t>(in_.run_cap)) {
      sweep_.notes.push_back(fmt::format("run_cap keeps the first {} of {} trials", in_.run_cap,
                                         sweep_.trials.size()));
      sweep_.trials.erase(sweep_.trials.begin() + in_.run_cap, sweep_.trials.end());
    }
    sweep_.seeds.clear();
    for (const Trial& trial : sweep_.trials) {
      if (!contains(sweep_.seeds, trial.seed)) sweep_.seeds.push_back(trial.seed);
    }
    std::vector<std::string> derived;
    for (const Formula& formula : in_.derived) {
      derived.push_back(formula.key);
      if (contains(sweep_.swept_keys, formula.key) && !is_given(formula))
        sweep_.derived_keys.push_back(formula.key);
    }
    name_trials(sweep_, derived);
  }

  /// Points of `include` may have their own value.
  bool is_given(const Formula& formula) const {
    return std::ranges::any_of(in_.include, [&](const Point& point) {
      return std::ranges::any_of(point, [&](const Setting& s) { return replaces(formula, s); });
    });
  }

  SweepFile in_;
  const std::vector<std::string>& sets_;
  Sweep sweep_;
  Point constants_;
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
