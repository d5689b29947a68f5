#include "core/cpu/gemm_kernel.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace qlab::cpu {
namespace {
struct Vec {
  static constexpr int width = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
constexpr int m_tile = 6, n_vectors = 2;
}  // namespace
}  // namespace qlab::cpu

#include "core/cpu/gemm_tile.h"

namespace qlab::cpu {
const GemmKernel* gemm_kernel_avx2() {
  static const GemmKernel kernel{"avx2", m_tile, n_tile, pack_a, pack_b, tile};
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernel : nullptr;
}
}  // namespace qlab::cpu
#else
namespace qlab::cpu {
const GemmKernel* gemm_kernel_avx2() { return nullptr; }
}  // namespace qlab::cpu
#endif
