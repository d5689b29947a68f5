// RMSNorm (Zhang and Sennrich 2019, eq. 4), over the last dimension of size C:
//   r = 1 / sqrt(mean(x^2) + eps)        y = x r w
// With u = g w:  dx = r u - x r^3 mean(u x). The weight is frozen: it has no gradient.
// Shapes: x, y, g, dx [T, C] in the compute dtype; w [C] fp32; r [T] fp32 (f64 for f64). Saved: x,
// r.
#pragma once
#include "core/tensor.h"

namespace qlab {

struct RmsNorm {
  Tensor y, r;
};
RmsNorm rms_norm(const Tensor& x, const Tensor& w, float eps);
Tensor rms_norm_backward(const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& r);

namespace cpu {
void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps);
void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r);
}  // namespace cpu
namespace cuda {
void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps);
void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r);
}  // namespace cuda
}  // namespace qlab
