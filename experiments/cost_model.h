// How long a step takes, from what its operations have to do and the rates at which hardware was
// seen to do it. Good enough to choose between plans; nothing here enters a result.
#pragma once
#include <string>
#include <vector>

#include "core/profile.h"

namespace qlab {

struct Rates {
  double product_flops = 0;  // per second, of large products
  double bytes = 0;          // per second, read and written together, of a plain copy
  double launch = 0;         // seconds before an operation begins to be useful
  bool measured = false;     // on this device; otherwise scaled by datasheets
};

/// By the name of --gpu or of the driver; an unknown GPU is taken for an H100.
Rates gpu_rates(const std::string& name);
Rates cpu_rates(int threads);
Rates rates_of(Device device);  // here

/// Seconds for operations counted by a WorkCounter.
double predicted_seconds(const std::vector<ProfileLine>& work, const Rates& rates);

}  // namespace qlab
