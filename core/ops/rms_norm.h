// RMSNorm (Zhang and Sennrich 2019, eq. 4), over the last dimension of size C:
//   r = 1 / sqrt(mean(x^2) + eps)        y = x r w
// With u = g w:  dx = r u - x r^3 mean(u x) + residual, where the residual is the gradient that
// reaches x past the norm. The weight is frozen: it has no gradient.
// Shapes: x, y, g, dx, residual [T, C] in the compute dtype, rows may lie apart; w [C] fp32;
// r [T] fp32 (f64 for f64). Saved: x, r.
#pragma once
#include "core/tensor.h"

namespace qlab {

struct RmsNorm {
  Tensor y, r;
};
/// y has room for `tail` more columns (Tensor::with_tail).
RmsNorm rms_norm(const Tensor& x, const Tensor& w, float eps, int64_t tail = 0);
/// A residual that nobody else holds is overwritten and returned; otherwise dx is a new tensor with
/// room for `tail` more columns.
Tensor rms_norm_backward(const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& r,
                         const Tensor& residual = {}, int64_t tail = 0);

// `residual` of the ports may be undefined or dx itself.
namespace cpu {
void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps);
void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r, const Tensor& residual);
}  // namespace cpu
namespace cuda {
void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps);
void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r, const Tensor& residual);
}  // namespace cuda
}  // namespace qlab
