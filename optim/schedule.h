// Learning-rate schedules: the factor on the base rate at step s = 0, 1, ..., as Transformers has
// it. With w warm-up steps of T: s / max(1, w) while s < w (0 at the very first step), then
//   constant: 1      linear: (T - s) / max(1, T - w)      cosine: (1 + cos(pi p)) / 2,
// p = (s - w) / max(1, T - w).
#pragma once
#include <cstdint>
#include <string>

namespace qlab {

enum class Schedule : uint8_t { constant, linear, cosine };
Schedule schedule_from_name(const std::string& name);
double schedule_factor(Schedule schedule, int64_t step, int64_t warmup_steps, int64_t total_steps);

}  // namespace qlab
