// Adapters folded into the product with the frozen weight. For modules that share their input x and
// stand below each other in W [N, K], the block
//   [ W  scale B ]      [x | s] [W | scale B]^T = x W^T + scale s B^T,    s = A x
//   [ A     .    ]      [dy | ds] [W ; A]       = dy W + ds A,            ds = scale dy B
// of shape [N + R, K + R] turns y and dx into one product each (LoRA: Hu et al. 2021). Every part
// owns columns K + column .. K + column + r and rows N + column .. N + column + r; what lies
// between the parts is zero, so that tokens of several trials, each with zeros in the columns of
// the others, share the products and keep their bits where a product is one chain over K, as on
// CUDA in 16 bits: columns start at multiples of 16, a step of the tensor cores, and a step of
// zeros adds nothing.
#pragma once
#include <span>

#include "core/tensor.h"

namespace qlab {

inline constexpr int64_t fold_step = 16;
/// Parts that one block may have.
inline constexpr int64_t max_fold_parts = 512;

/// One adapter of one module.
struct FoldPart {
  Tensor a, b;  // fp32 [r, K], [out, r]
  float scale = 1;
  int64_t row = 0;     // of W where the module begins
  int64_t column = 0;  // a multiple of fold_step; the next part begins at least r columns on
};

/// What stands in a block of T for x: f16 ends at its largest number, since infinities of a trial
/// that diverges would make NaN of the others' zeros.
template <class T>
QLAB_HD inline float foldable(float x) {
  constexpr float largest = 65504;
  if constexpr (std::is_same_v<T, f16>) return x > largest ? largest : x < -largest ? -largest : x;
  return x;
}

/// Fills the last R columns of rows 0 .. N and the last R rows in columns 0 .. K of block
/// [N + R, K + R], R = width; each element rounded once from fp32. The last R x R stay as they are.
void fold_adapters(const Tensor& block, int64_t width, std::span<const FoldPart> parts);

/// Throws where the block is on a GPU that cannot fold adapters of so many columns into it. A block
/// on meta is never filled, so its owner asks.
void check_foldable(const Tensor& block, int64_t width);

namespace cpu {
void fold_adapters(const Tensor& block, int64_t width, std::span<const FoldPart> parts);
}
namespace cuda {
void fold_adapters(const Tensor& block, int64_t width, std::span<const FoldPart> parts);
}
}  // namespace qlab
