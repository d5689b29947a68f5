#include "experiments/sweep_parameters.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/random.h"
#include "experiments/config_fields.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

const std::vector<std::string> kRanges{"uniform", "log_uniform_values", "q_uniform", "int_uniform"};
const std::vector<std::string> kWords{"value", "values", "probabilities", "distribution", "min",
                                      "max",   "q",      "parameters"};
constexpr double kMaxGrid = 10000;

double read_number(const YamlItem& item, const std::string& key) {
  const auto x = item.value.IsScalar() ? parse_number(item.value.Scalar()) : std::nullopt;
  if (!x) {
    fail("{}: {} of {}: expected a number, got {}", item.where, item.key, key,
         describe(item.value));
  }
  return *x;
}

std::vector<YAML::Node> read_list(const YamlItem& item, const std::string& key) {
  if (!item.value.IsSequence() || item.value.size() == 0) {
    fail("{}: {} of {}: expected a list with at least one entry, got {}", item.where, item.key, key,
         item.value.IsSequence() ? "an empty one" : describe(item.value));
  }
  return {item.value.begin(), item.value.end()};
}

void check_distribution(const std::string& name, const std::string& where, const std::string& key) {
  if (std::find(kRanges.begin(), kRanges.end(), name) != kRanges.end()) return;
  if (name == "constant" || name == "categorical") return;
  if (name == "log_uniform") {
    fail("{}: {}: log_uniform takes exponents; write log_uniform_values with the values themselves",
         where, key);
  }
  fail("{}: {}: unknown distribution \"{}\" (constant, categorical, {})", where, key, name,
       fmt::join(kRanges, ", "));
}

/// Within the ends, whatever rounding did. Six digits: the last bits of log and exp differ between
/// machines, and nobody reads them.
YAML::Node number_node(double x, const Parameter& p) {
  if (x != std::trunc(x)) x = std::stod(fmt::format("{:.6g}", x));
  x = std::clamp(x, p.min, p.max);
  return YAML::Node(x == std::trunc(x) ? fmt::format("{:.0f}", x) : shortest(x));
}

/// The first and last multiple of q between min and max, in units of q.
std::pair<double, double> multiples(const Parameter& p) {
  return {std::ceil(p.min / p.q - 1e-9), std::floor(p.max / p.q + 1e-9)};
}

/// Checks that what was given fits together, and names the distribution where it was left out.
void complete(Parameter& p, bool has_min, bool has_max, bool whole) {
  const bool range = has_min || has_max;
  if (!p.values.empty() && range) fail("{}: {} has both values and min or max", p.where, p.key);
  if (p.values.empty() && !(has_min && has_max)) {
    fail("{}: {} needs value, values, or min and max", p.where, p.key);
  }
  if (range && p.max < p.min) {
    fail("{}: {}: max {} is below min {}", p.where, p.key, shortest(p.max), shortest(p.min));
  }
  if (p.distribution.empty() && range) p.distribution = whole ? "int_uniform" : "uniform";
  if (p.distribution.empty()) p.distribution = "categorical";
  const bool is_range = std::find(kRanges.begin(), kRanges.end(), p.distribution) != kRanges.end();
  if (is_range != range) {
    fail("{}: {}: distribution {} takes {}", p.where, p.key, p.distribution,
         is_range ? "min and max" : "values");
  }
  if (p.distribution == "log_uniform_values" && p.min <= 0) {
    fail("{}: {}: log_uniform_values needs min above 0", p.where, p.key);
  }
  if (p.distribution == "int_uniform" && !whole) {
    fail("{}: {}: int_uniform needs whole numbers as min and max", p.where, p.key);
  }
  if (p.q <= 0) fail("{}: {}: q must be above 0", p.where, p.key);
  if (p.distribution == "int_uniform") p.q = 1;
  if (const auto [first, last] = multiples(p); p.distribution == "q_uniform" && first > last) {
    fail("{}: {}: no multiple of q lies between min and max", p.where, p.key);
  }
  if (!p.probabilities.empty() &&
      *std::max_element(p.probabilities.begin(), p.probabilities.end()) == 0) {
    fail("{}: {}: every probability is 0", p.where, p.key);
  }
  if (!p.probabilities.empty() && p.probabilities.size() != p.values.size()) {
    fail("{}: {} has {} values and {} probabilities", p.where, p.key, p.values.size(),
         p.probabilities.size());
  }
}

Parameter read_parameter(const std::string& key, const YamlItem& item, const std::string& file) {
  Parameter p{.key = canonical_key(key, item.where), .spelled = key, .where = item.where};
  bool has_min = false, has_max = false, whole = true;
  for (const YamlItem& entry : map_items(item.value, file)) {
    if (entry.key == "value") {
      p.values = {entry.value};
      p.distribution = "constant";
    } else if (entry.key == "values") {
      p.values = read_list(entry, key);
    } else if (entry.key == "distribution") {
      p.distribution = entry.value.IsScalar() ? entry.value.Scalar() : describe(entry.value);
      check_distribution(p.distribution, entry.where, key);
    } else if (entry.key == "probabilities") {
      for (const YAML::Node& node : read_list(entry, key)) {
        p.probabilities.push_back(read_number({entry.key, node, entry.where}, key));
        if (p.probabilities.back() < 0) fail("{}: a probability is below 0", entry.where);
      }
    } else if (entry.key == "min" || entry.key == "max") {
      (entry.key == "min" ? p.min : p.max) = read_number(entry, key);
      (entry.key == "min" ? has_min : has_max) = true;
      whole = whole && entry.value.Scalar().find_first_not_of("-0123456789") == std::string::npos;
    } else if (entry.key == "q") {
      p.q = read_number(entry, key);
    } else {
      const std::string near = nearest(entry.key, kWords);
      fail("{}: unknown word \"{}\" in parameter {}{} ({})", entry.where, entry.key, key,
           near.empty() ? "" : "; did you mean \"" + near + "\"?", fmt::join(kWords, ", "));
    }
  }
  if (item.value["value"] && item.value["values"]) {
    fail("{}: {} has both value and values", item.where, key);
  }
  complete(p, has_min, has_max, whole);
  return p;
}

void collect(const std::string& prefix, const YAML::Node& block, const std::string& file,
             std::vector<Parameter>& out) {
  for (const YamlItem& item : map_items(block, file)) {
    const std::string name = prefix + item.key;
    if (!item.value.IsMap()) {
      fail("{}: {}: write {{value: ...}} for one value or {{values: [...]}} for several, got {}",
           item.where, name, describe(item.value));
    }
    const auto& blocks = config_blocks();
    if (std::find(blocks.begin(), blocks.end(), name) != blocks.end()) {
      const YAML::Node inner = item.value["parameters"];
      if (inner && (item.value.size() != 1 || !inner.IsMap())) {
        fail("{}: {}: expected a block of parameters and nothing else", item.where, name);
      }
      collect(name + ".", inner ? inner : item.value, file, out);
      continue;
    }
    Parameter parameter = read_parameter(name, item, file);
    for (const Parameter& p : out) {
      if (p.key != parameter.key) continue;
      fail("{}: {} stands twice, first at {}", item.where, p.key, p.where);
    }
    out.push_back(std::move(parameter));
  }
}

}  // namespace

std::vector<YAML::Node> Parameter::grid() const {
  if (!values.empty()) return values;
  if (distribution != "int_uniform" && distribution != "q_uniform") {
    fail("{}: {}: a grid needs values; {} needs method: random", where, key, distribution);
  }
  const auto [first, last] = multiples(*this);
  if (last - first >= kMaxGrid) {
    fail("{}: {}: more than {:.0f} values in one grid", where, key, kMaxGrid);
  }
  std::vector<YAML::Node> nodes;
  for (int i = 0; i <= last - first; ++i) nodes.push_back(number_node((first + i) * q, *this));
  return nodes;
}

YAML::Node Parameter::draw(uint64_t seed, uint32_t index) const {
  const double u = uniform_draw(seed, key, index);
  if (!values.empty()) {
    if (probabilities.empty()) {
      return values[static_cast<size_t>(u * static_cast<double>(values.size()))];
    }
    double total = 0, reached = 0;
    for (double p : probabilities) total += p;
    for (size_t i = 0; i + 1 < values.size(); ++i) {
      reached += probabilities[i];
      if (u * total < reached) return values[i];
    }
    return values.back();
  }
  if (distribution == "int_uniform") {
    return number_node(min + std::floor(u * (max - min + 1)), *this);
  }
  if (distribution == "q_uniform") {
    const auto [first, last] = multiples(*this);
    return number_node(std::clamp(std::round((min + u * (max - min)) / q), first, last) * q, *this);
  }
  if (distribution == "uniform") return number_node(min + u * (max - min), *this);
  return number_node(std::exp(std::log(min) + u * (std::log(max) - std::log(min))), *this);
}

std::vector<Parameter> read_parameters(const YAML::Node& block, const std::string& file) {
  std::vector<Parameter> out;
  collect("", block, file, out);
  return out;
}

double uniform_draw(uint64_t seed, const std::string& name, uint32_t index) {
  const Philox bits = philox(stream_key(seed, name), index, 0, 0, 0);
  const uint64_t wide = (static_cast<uint64_t>(bits.lane[0]) << 32) | bits.lane[1];
  return static_cast<double>(wide >> 11) * 0x1p-53;
}

}  // namespace qlab
