// Softmax cross entropy of a block of logits, whose gradient replaces them:
//   nll_t = log sum_v exp z_tv - z_t,label      dz_tv = (softmax(z_t)_v - [v = label]) scale_t
// A label of -100 gives nll 0 and a zero gradient, as in Transformers. Statistics in fp32.
// Shapes: z [T, V] (f64, f32 or bf16); labels i32 [T]; scale fp32 [T]; nll fp32 [T] (f64 for f64).
#pragma once
#include "core/tensor.h"

namespace qlab {

inline constexpr int32_t ignore_label = -100;

/// `scale` undefined: the loss alone, z is left as it is.
void cross_entropy_inplace(const Tensor& nll, const Tensor& z, const Tensor& labels,
                           const Tensor& scale);

namespace cpu {
void cross_entropy(const Tensor& nll, const Tensor& z, const Tensor& labels, const Tensor& scale);
}
namespace cuda {
void cross_entropy(const Tensor& nll, const Tensor& z, const Tensor& labels, const Tensor& scale);
}
}  // namespace qlab
