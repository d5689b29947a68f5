// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3"). A number is a function of what it is for, never of when it is drawn, so masks
// and initial values do not change with batching, gangs or devices.
#pragma once
#include <cstdint>
#include <string_view>

#include "core/dtype.h"

namespace qlab {

struct Philox {
  uint32_t lane[4];
};

template <int rounds = 10>
QLAB_HD inline Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < rounds; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n1 = static_cast<uint32_t>(p1);
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, n3 = static_cast<uint32_t>(p0);
    c0 = n0, c1 = n1, c2 = n2, c3 = n3;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// [0, 1) with 24 bits, exact in fp32.
QLAB_HD inline float uniform(uint32_t u) { return static_cast<float>(u >> 8) * 0x1p-24f; }

/// FNV-1a over the text, mixed with the seed: the key of a named stream.
uint64_t stream_key(uint64_t seed, std::string_view name);

/// Two standard normals from two integers (Box-Muller in double). Host only: libm differs by
/// device.
void normal_pair(uint32_t u0, uint32_t u1, double& n0, double& n1);

}  // namespace qlab
