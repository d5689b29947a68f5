// How long a step takes, from what its operations have to do and the rates at which hardware was
// seen to do it. Good enough to choose between plans; nothing here enters a result.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "core/profile.h"

namespace qlab {

struct Rates {
  double product_flops = 0;   // per second, of large products
  double bytes = 0;           // per second, read and written together, of a plain copy
  double launch = 0;          // seconds before an operation begins to be useful
  bool measured = false;      // on this device
  double bus = 54.8e9;        // bytes per second from page-locked host memory, or to it
  bool by_datasheet = false;  // an H100's, scaled; neither: another device's as they are
};

/// By the name of --gpu or of the driver; an unknown GPU is taken for an H100.
Rates gpu_rates(const std::string& name);
Rates cpu_rates(int threads);
Rates rates_of(Device device);  // here

/// Of one part of a WorkCounter: what the step's own stream takes, and what the bus does.
struct PartSeconds {
  double stream = 0, bus = 0;
};
std::map<int, PartSeconds> part_seconds(const std::vector<ProfileLine>& work, const Rates& rates);
/// Seconds for operations counted by a WorkCounter. In each of its parts copies that run beside the
/// step overlap with it; whatever crosses the bus shares it.
double predicted_seconds(const std::vector<ProfileLine>& work, const Rates& rates);

/// "1.58 ms", "21 s", "3.5 min", "1.2 h"
std::string duration_text(double seconds);

/// Of an optimizer step.
struct StepSeconds {
  double micro = 0;   // each of its micro-batches
  double update = 0;  // what follows on them: the optimizer, and the pages of its states
  double of(double micro_batches) const { return micro_batches * micro + update; }
};

}  // namespace qlab
