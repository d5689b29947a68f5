#include "optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace qlab {

Schedule schedule_from_name(const std::string& name) {
  if (name == "constant") return Schedule::constant;
  if (name == "linear") return Schedule::linear;
  if (name == "cosine") return Schedule::cosine;
  fail("unknown schedule '{}'; use constant, linear or cosine", name);
}

double schedule_factor(Schedule schedule, int64_t step, int64_t warmup_steps, int64_t total_steps) {
  const auto s = static_cast<double>(step), w = static_cast<double>(warmup_steps);
  if (step < warmup_steps) return s / std::max(1.0, w);
  const auto span = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  switch (schedule) {
    case Schedule::constant:
      return 1.0;
    case Schedule::linear:
      return std::max(0.0, (static_cast<double>(total_steps) - s) / span);
    case Schedule::cosine:
      return std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * (s - w) / span)));
  }
  return 1.0;
}

}  // namespace qlab
