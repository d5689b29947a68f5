// Names of trials, private to sweep.cpp.
#pragma once
#include <string>
#include <vector>

#include "experiments/sweep.h"

namespace qlab {

/// Names every trial after the swept values that vary, except those of `derived` keys.
void name_trials(Sweep& sweep, const std::vector<std::string>& derived);

}  // namespace qlab
