// The profile of a training step as text, against what the same GPU reaches at best.
#pragma once
#include <string>

#include "core/profile.h"

namespace qlab {

/// Rates measured on the spot: a product of two bf16 (fp16 where there is no bf16) matrices of 8192
/// x 8192 (random values), and a copy of 1 GiB, bytes read and written.
struct Ceilings {
  double flops_per_s = 0, bytes_per_s = 0;
};
Ceilings measure_ceilings(Device device);

/// One line per operation: calls, time, share of the step, achieved TFLOP/s or GB/s and their share
/// of the ceiling, whichever of the two bounds the operation.
std::string profile_table(const Profile& profile, const Ceilings& ceilings);

}  // namespace qlab
