// What a sweep file says, before it is expanded; private to sweep.cpp.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "experiments/config.h"
#include "experiments/sweep.h"
#include "experiments/sweep_parameters.h"

namespace qlab {

using Point = std::vector<Setting>;  // keys that are set together

/// An expression, for the key it sets (derived) or on its own (exclude).
struct Formula {
  std::string key, text, where;
};

struct SweepFile {
  std::string file;
  Sweep head;  // name, method, metric, goal, seeds, notes; no trials yet
  Config base;
  std::vector<Setting> overrides;  // of the base: a `parallel` block
  std::vector<Parameter> parameters;
  std::vector<Point> paired, include;
  std::vector<Formula> derived, exclude;
  std::string varies_at;  // where parameters, paired or include stands; "" where none does
  int64_t run_cap = 0;    // most trials in all; 0: no limit
  int64_t count = 0;      // points of a random sweep
  uint64_t random_seed = 0;
};

SweepFile read_sweep_file(const YAML::Node& document, const std::string& file);

}  // namespace qlab
