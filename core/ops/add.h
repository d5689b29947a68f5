// Elementwise sums: the residual stream, gradient accumulation, biases; and a factor.
#pragma once
#include "core/tensor.h"

namespace qlab {

/// a + b; same shape and dtype, contiguous.
Tensor add(const Tensor& a, const Tensor& b);
/// a += b.
void add_inplace(const Tensor& a, const Tensor& b);
/// a *= factor; contiguous.
void scale_inplace(const Tensor& a, float factor);
/// y[t, :] += bias, bias [cols] in fp32.
void add_bias(const Tensor& y, const Tensor& bias);

namespace cpu {
void add(const Tensor& y, const Tensor& a, const Tensor& b);  // y may be a
void scale(const Tensor& a, float factor);
void add_bias(const Tensor& y, const Tensor& bias);
}  // namespace cpu
namespace cuda {
void add(const Tensor& y, const Tensor& a, const Tensor& b);
void scale(const Tensor& a, float factor);
void add_bias(const Tensor& y, const Tensor& bias);
}  // namespace cuda
}  // namespace qlab
