// The table of configuration keys, private to config.cpp, sweep.cpp and expression.cpp.
#pragma once
#include <limits>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "experiments/config.h"

namespace qlab {

/// Where a key's value lives in a Config.
using FieldSlot = std::variant<std::string*, int64_t*, double*, bool*, std::optional<int64_t>*,
                               std::optional<double>*, std::array<double, 2>*, Targets*,
                               MemoryBudget*, LayerCount*>;

/// Values a number may take; an open end is excluded.
struct Range {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false, high_open = false;
  bool contains(double x) const;
  std::string str() const;  // "at least 1", "above 0", "in [0, 1)"
};

enum class Effect : uint8_t { numbers, none };  // numbers: enters the identity of a trial

struct Field {
  std::string key;
  FieldSlot (*slot)(Config&);
  std::string meaning;
  Effect effect = Effect::numbers;
  std::vector<std::string> allowed = {};  // empty: anything of the type and range
  Range range = {};
  std::string default_text = {};  // for a default that depends on other keys
  bool is_path = false;
  bool hidden = false;           // reached by aliases only
  std::string unsupported = {};  // values of other programs, for errors
  std::vector<std::pair<std::string, const char*>> words = {};  // of other programs, and ours
};

/// Another spelling; `values` translates some values, and nullptr says that the setting is void.
struct Alias {
  std::string name, key;
  std::vector<std::pair<std::string, const char*>> values = {};
};

const std::vector<Field>& config_fields();
const std::vector<Alias>& config_aliases();
const std::vector<std::string>& config_blocks();
/// Top-level keys by which a sweep file is told from a run.
const std::vector<std::string>& sweep_keys();
/// By dotted key; nullptr when there is none.
const Field* find_field(const std::string& key);
/// By name, alone or inside the block of its key (lora_alpha, lora.lora_alpha); nullptr likewise.
const Alias* find_alias(const std::string& name);
/// Keys of which one replaces the other: train.epochs for train.steps, both betas for optim.betas.
std::vector<std::string> excluded_by(const std::string& key);
/// The value as text, numbers in their shortest form; "" for an optional without a value.
std::string field_text(const Field& field, const Config& config);

/// ` did you mean "x"?` and the known keys of the block, or "".
std::string suggest_key(const std::string& name);
/// Of a key of other tools for what qlab does in one way alone: which, so that one knows whether the
/// line may go; "" of any other.
std::string only_way(const std::string& name);
/// The nearest of `names`, or "" when none is near.
std::string nearest(const std::string& name, const std::vector<std::string>& names);
std::string shortest(double x);  // 0.0002, 64, 1e-08

}  // namespace qlab
