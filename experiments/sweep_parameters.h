// The `parameters` of a sweep file, private to sweep.cpp.
#pragma once
#include <string>
#include <vector>

#include "experiments/config.h"

namespace qlab {

/// What a parameter may be: one value, a list, or a distribution.
struct Parameter {
  std::string key, spelled, where;  // spelled: as in the file, perhaps an alias
  std::vector<YAML::Node> values = {};
  std::vector<double> probabilities = {};  // of the values; empty: equal
  std::string distribution = {};           // constant, categorical, or one with min and max
  double min = 0, max = 0, q = 1;

  bool constant() const { return distribution == "constant"; }
  /// Every value, for a grid; Error for a continuous distribution.
  std::vector<YAML::Node> grid() const;
  /// Value number `index` of the stream named by the key: no other parameter changes it.
  YAML::Node draw(uint64_t seed, uint32_t index) const;
};

/// In the order of the file; nested `parameters:` blocks are flattened to dotted keys.
std::vector<Parameter> read_parameters(const YAML::Node& block, const std::string& file);

/// A number in [0, 1) from the stream `name`.
double uniform_draw(uint64_t seed, const std::string& name, uint32_t index);

}  // namespace qlab
