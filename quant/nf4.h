// NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, appendix E), byte for byte as
// bitsandbytes stores it. The rules below are written once and looped over by both devices.
//
// A tensor is flattened row-major into blocks of `block_size` values; block i stores
// absmax_i = max |x| in fp32 and one code per value, two to a byte, the first in the HIGH nibble.
// A code is the number of thresholds that x / absmax strictly exceeds: ties go down, NaN gives 0.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace qlab::nf4 {

QLAB_HD inline float value(int code) {
  const float table[16] = {-1.0f,
                           -0.6961928009986877f,
                           -0.5250730514526367f,
                           -0.39491748809814453f,
                           -0.28444138169288635f,
                           -0.18477343022823334f,
                           -0.09105003625154495f,
                           0.0f,
                           0.07958029955625534f,
                           0.16093020141124725f,
                           0.24611230194568634f,
                           0.33791524171829224f,
                           0.44070982933044434f,
                           0.5626170039176941f,
                           0.7229568362236023f,
                           1.0f};
  return table[code];
}

/// The literals of the production kernel; four of them are one ulp off the midpoint of the values.
QLAB_HD inline float threshold(int i) {
  const float table[15] = {-0.8480964004993439f,   -0.6106329262256622f,  -0.4599952697753906f,
                           -0.33967943489551544f,  -0.23460740596055984f, -0.13791173323988914f,
                           -0.045525018125772476f, 0.03979014977812767f,  0.1202552504837513f,
                           0.2035212516784668f,    0.2920137718319893f,   0.3893125355243683f,
                           0.5016634166240692f,    0.6427869200706482f,   0.8614784181118011f};
  return table[i];
}

QLAB_HD inline int code(float x) {
  int n = 0;
  for (int i = 0; i < 15; ++i) n += x > threshold(i);
  return n;
}

}  // namespace qlab::nf4
