// Elementwise sums: the residual stream, gradient accumulation, biases.
#pragma once
#include "core/tensor.h"

namespace qlab {

/// a + b; same shape and dtype, contiguous.
Tensor add(const Tensor& a, const Tensor& b);
/// a += b.
void add_inplace(const Tensor& a, const Tensor& b);
/// y[t, :] += bias, bias [cols] in fp32.
void add_bias(const Tensor& y, const Tensor& bias);

namespace cpu {
void add(const Tensor& y, const Tensor& a, const Tensor& b);  // y may be a
void add_bias(const Tensor& y, const Tensor& bias);
}  // namespace cpu
namespace cuda {
void add(const Tensor& y, const Tensor& a, const Tensor& b);
void add_bias(const Tensor& y, const Tensor& bias);
}  // namespace cuda
}  // namespace qlab
