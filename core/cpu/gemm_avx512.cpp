#include "core/cpu/gemm_kernel.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace qlab::cpu {
namespace {
struct Vec {
  static constexpr int width = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
constexpr int m_tile = 12, n_vectors = 2;
}  // namespace
}  // namespace qlab::cpu

#include "core/cpu/gemm_tile.h"

namespace qlab::cpu {
const GemmKernel* gemm_kernel_avx512() {
  static const GemmKernel kernel{"avx512", m_tile, n_tile, pack_a, pack_b, tile};
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
             ? &kernel
             : nullptr;
}
}  // namespace qlab::cpu
#else
namespace qlab::cpu {
const GemmKernel* gemm_kernel_avx512() { return nullptr; }
}  // namespace qlab::cpu
#endif
