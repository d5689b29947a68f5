// What the device can do at best, measured once by the same program: shares are of these.
#pragma once
#include "core/device.h"

namespace qlab::bench {

struct Ceilings {
  double copy = 0;            // bytes read and written per second, device to device
  double product = 0;         // FLOP/s of a square product: 8192, bf16; on the CPU 2048, fp32
  double host_to_device = 0;  // bytes per second from pinned memory; 0 on the CPU
  double device_to_host = 0;
};
const Ceilings& ceilings(Device device);

}  // namespace qlab::bench
