#include "core/random.h"

#include <cmath>
#include <numbers>

namespace qlab {

uint64_t stream_key(uint64_t seed, std::string_view name) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  // splitmix64's finalizer, so that nearby seeds give unrelated keys.
  uint64_t z = h + (seed + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

void normal_pair(uint32_t u0, uint32_t u1, double& n0, double& n1) {
  const double radius = std::sqrt(-2.0 * std::log((u0 + 1.0) * 0x1p-32));
  const double angle = 2.0 * std::numbers::pi * (u1 * 0x1p-32);
  n0 = radius * std::cos(angle);
  n1 = radius * std::sin(angle);
}

}  // namespace qlab
