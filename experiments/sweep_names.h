// Names of trials and tables of them; private to sweep.cpp and report.cpp.
#pragma once
#include <string>
#include <vector>

#include "experiments/sweep.h"

namespace qlab {

/// Names every trial after the swept values that vary, except those of `derived` keys; a single run
/// after its file and what was set beside it.
void name_trials(Sweep& sweep, const std::vector<std::string>& derived);

/// Columns padded to equal width; the first row is the head.
std::string aligned_table(const std::vector<std::vector<std::string>>& rows);

}  // namespace qlab
