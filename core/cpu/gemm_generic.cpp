// For processors without a kernel of their own. Where the compiler's target has fused multiply-adds
// (64-bit Arm) this vectorizes; elsewhere it is correct and slow.
#include <cmath>

#include "core/cpu/gemm_kernel.h"

namespace qlab::cpu {
namespace {
struct Vec {
  static constexpr int width = 4;
  float v[4];
  static Vec zero() { return {{0, 0, 0, 0}}; }
  static Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Vec broadcast(float x) { return {{x, x, x, x}}; }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < width; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
    return c;
  }
  void store(float* p) const {
    for (int i = 0; i < width; ++i) p[i] = v[i];
  }
};
constexpr int m_tile = 4, n_vectors = 2;
}  // namespace
}  // namespace qlab::cpu

#include "core/cpu/gemm_tile.h"

namespace qlab::cpu {
const GemmKernel* gemm_kernel_generic() {
  static const GemmKernel kernel{"generic", m_tile, n_tile, pack_a, pack_b, tile};
  return &kernel;
}
}  // namespace qlab::cpu
