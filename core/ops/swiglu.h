// SwiGLU's elementwise part (Shazeer 2020, eq. 6): y = silu(gate) up, silu(z) = z / (1 + e^-z).
//   dgate = g up (s + gate s (1 - s)),  dup = g silu(gate),  s = 1 / (1 + e^-gate)
// Shapes: all [T, C], one dtype, contiguous. Saved: gate, up.
#pragma once
#include "core/tensor.h"

namespace qlab {

Tensor swiglu(const Tensor& gate, const Tensor& up);
struct SwigluGradient {
  Tensor dgate, dup;
};
SwigluGradient swiglu_backward(const Tensor& g, const Tensor& gate, const Tensor& up);

namespace cpu {
void swiglu(const Tensor& y, const Tensor& gate, const Tensor& up);
void swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& g, const Tensor& gate,
                     const Tensor& up);
}  // namespace cpu
namespace cuda {
void swiglu(const Tensor& y, const Tensor& gate, const Tensor& up);
void swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& g, const Tensor& gate,
                     const Tensor& up);
}  // namespace cuda
}  // namespace qlab
