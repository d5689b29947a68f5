// The CPU's fp32 product. One tile of C is a set of accumulators in vector registers; each of them
// is a chain of fused multiply-adds over a block of K in increasing order, and the blocks' sums are
// added in that order too. The chains are the same in every instruction set that has fused
// multiply-adds, so bits do not depend on the machine either.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace qlab::cpu {

/// op(A) [M, K] and op(B) [K, N] as strided views of `in`; C row-major in `out`: f32,
/// bf16 or f16.
struct GemmArgs {
  const void* a;
  const void* b;
  void* c;
  int64_t m, n, k;
  int64_t a_row, a_col, b_row, b_col, c_row;  // strides in elements
  DType in, out;
  float alpha, beta;
};

/// One instruction set's kernel. `scratch` holds (m_tile + n_tile) * k floats for each thread plus
/// the packed A; see gemm.cpp for who fills what.
struct GemmKernel {
  const char* name;
  int64_t m_tile, n_tile;
  /// Packs rows [tile * m_tile, ...) of op(A) as [k][m_tile], zero beyond M.
  void (*pack_a)(const GemmArgs&, int64_t tile, float* packed);
  void (*pack_b)(const GemmArgs&, int64_t tile, float* packed);
  /// C tile (i, j) from the two packed panels.
  void (*tile)(const GemmArgs&, int64_t i, int64_t j, const float* a, const float* b);
};

/// The widest kernel this processor runs; always the same on one machine.
const GemmKernel& gemm_kernel();

const GemmKernel* gemm_kernel_avx512();  // nullptr when not compiled for x86-64
const GemmKernel* gemm_kernel_avx2();
const GemmKernel* gemm_kernel_generic();

}  // namespace qlab::cpu
