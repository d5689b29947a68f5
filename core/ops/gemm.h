// Matrix products. C = alpha op(A) op(B) + beta D, D being C or another matrix; row-major, any row
// pitch; products accumulate in fp32 (fp64 for f64). A and B share a dtype; C has that dtype or
// f32.
//
// CPU: every element of C is the same sequence of fused multiply-adds over k
// (core/cpu/gemm_kernel.h), whatever M, N, the tile it falls in or the number of threads: a row's
// bits depend on that row alone, which is what lets trials train together (docs/design.md, "Same
// seed, same bits").
#pragma once
#include <span>

#include "core/tensor.h"

namespace qlab {

enum class Op : uint8_t { none, transpose };

/// On a GPU, whether the library may cut K into parts: faster where the result is small, but then a
/// row's bits depend on the number of rows.
enum class SplitK : uint8_t { no, allowed };

/// op(A) is [M, K], op(B) is [K, N], C is [M, N]; so is `addend`, D, of C's dtype: C itself unless
/// given.
void gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha = 1.0f,
          float beta = 0.0f, const Tensor& addend = {}, SplitK split_k = SplitK::no);

/// The matrices of a product.
struct Factors {
  Tensor c, a, b;
};
/// C = op(A) op(B) for each of products of equal shapes, the bits those of gemm. A GPU computes
/// those that lie at equal distances from one another in one launch.
void gemm_each(std::span<const Factors> products, Op op_a, Op op_b, SplitK split_k = SplitK::no);

/// While one lives, products of its thread on a GPU take what the library proposes as number
/// `number`, 0 being its own choice, where K is not cut; Error where it proposes fewer. For
/// comparisons: otherwise a product takes the proposal that was measured to be the fastest
/// (core/ops/gemm_tiling.h).
class GemmProposal {
 public:
  explicit GemmProposal(int number);
  ~GemmProposal();
  GemmProposal(const GemmProposal&) = delete;
  GemmProposal& operator=(const GemmProposal&) = delete;
  static constexpr int most = 8;
  /// The number of the innermost of this thread, -1 without one.
  static int current();

 private:
  int before_;
};

/// x [M, K] times w [N, K] transposed: a linear layer's forward. The result has x's dtype.
Tensor matmul_nt(const Tensor& x, const Tensor& w);
/// dy [M, N] times w [N, K]: the gradient of its input.
Tensor matmul_nn(const Tensor& dy, const Tensor& w);

/// Products issued since the start of the program, on this thread: tests count them.
int64_t gemm_count();

namespace cpu {
/// Bytes for the packed operands.
int64_t gemm_workspace(int64_t m, int64_t n, int64_t k, DType dtype);
void gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha,
          float beta, const Tensor& workspace);
}  // namespace cpu
namespace cuda {
/// Scratch for the library; the same for every product.
int64_t gemm_workspace(int64_t m, int64_t n, int64_t k, DType dtype);
void gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha,
          float beta, const Tensor& addend, SplitK split_k, const Tensor& workspace);
void gemm_each(std::span<const Factors> products, Op op_a, Op op_b, SplitK split_k,
               const Tensor& workspace);
}  // namespace cuda
}  // namespace qlab
