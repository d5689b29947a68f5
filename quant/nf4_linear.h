// Products with an NF4 matrix W [N, K] whose values are decoded inside the product, so that they
// never lie in memory: for few rows, where writing and reading them again would take most of the
// time (Dettmers et al. 2023 decode first).
//   op transpose: y [M, N] = x [M, K] W^T        a linear layer's forward
//   op none:      y [M, K] = x [M, N] W          the gradient of its input
// The values are exactly those of dequantize_nf4 in x's dtype, sums are carried in fp32: a result
// differs from dequantize_nf4 and gemm in the order of its sums alone. The order depends on the
// kernel, op, N and K: a row's bits do not depend on how many others there are.
// lut differs in more: it does not round a weight to bf16 (the value is rounded to fp16, its
// product with the scale is not); of 256 neighbours in a row of x, those below 2^-30 of the largest
// lose bits; scales beyond 2^105 may overflow.
#pragma once
#include "core/ops/gemm.h"
#include "quant/quantize.h"

namespace qlab {

/// All take bf16 alone. simt: any GPU, at most 8 rows; mma: tensor cores from compute
/// capability 8.0 on; lut: those of 9.0, where alone it was measured, for op transpose and at most
/// 8 rows: a look-up gives two of the 16 values in fp16, and a block's scale meets the sum of their
/// products with x; wgmma:
/// those of 9.0, the contraction whole, or cut in two or three for few outputs. On the CPU, where
/// each is gemm on decoded values, they are the same.
enum class Nf4Kernel : uint8_t { simt, mma, lut, wgmma, wgmma2, wgmma3 };
const char* name_of(Nf4Kernel kernel);

/// Plus `addend`, of y's shape and dtype, where defined; it may be y itself.
void nf4_matmul(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op, Nf4Kernel kernel,
                const Tensor& addend = {});

/// Whether the kernel takes `rows` rows of `dtype` with this W on this device, or, where the device
/// is meta, on its target.
bool nf4_matmul_supported(Nf4Kernel kernel, const Nf4Tensor& w, Op op, int64_t rows, DType dtype,
                          Device device);

namespace cpu {
/// y = x op(W) + beta y. `weight`: scratch for the decoded values, [N, K] of x's dtype.
void nf4_matmul(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op, float beta,
                const Tensor& weight, const Tensor& workspace);
}  // namespace cpu
namespace cuda {
/// What the kernels take at most.
inline constexpr int64_t nf4_simt_rows = 8, nf4_mma_rows = 1024, nf4_mma_outputs = 65536;
/// lut: rows of x at most; what K is a multiple of, and blocks at least.
inline constexpr int64_t nf4_lut_rows = 8, nf4_lut_columns = 64;
/// What outputs and contraction of wgmma are multiples of, and its blocks at least.
inline constexpr int64_t nf4_wgmma_outputs = 256, nf4_wgmma_depth = 64;
/// Rows of x in its tiles.
inline constexpr int64_t nf4_wgmma_tiles[] = {64, 128, 256};
/// Whether this build, device and driver have it; true where there is no GPU to ask.
bool nf4_wgmma_available();
/// Parts into which simt and mma cut the contraction, by the matrix alone.
int64_t nf4_splits(Nf4Kernel kernel, Op op, int64_t n, int64_t k);
/// Rows of fp32 [rows, outputs] that a call with `m` rows of x needs as `workspace`: for every part
/// of simt and mma; for one of the two of wgmma2, up to the rows that its narrow tiles have.
int64_t nf4_workspace_rows(Nf4Kernel kernel, Op op, int64_t n, int64_t k, int64_t m);
void nf4_matmul_simt(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op,
                     const Tensor& addend, const Tensor& workspace);
void nf4_matmul_mma(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op,
                    const Tensor& addend, const Tensor& workspace);
void nf4_matmul_lut(const Tensor& y, const Tensor& x, const Nf4Tensor& w, const Tensor& addend);
void nf4_matmul_wgmma(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op, int parts,
                      const Tensor& addend, const Tensor& workspace);
}  // namespace cuda
}  // namespace qlab
