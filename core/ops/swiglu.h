// SwiGLU's elementwise part (Shazeer 2020, eq. 6): y = silu(gate) up, silu(z) = z / (1 + e^-z).
//   dgate = g up (s + gate s (1 - s)),  dup = g silu(gate),  s = 1 / (1 + e^-gate)
// Shapes: gate | up side by side [T, 2I], y and g [T, I], dgate | dup [T, 2I]; one dtype, rows may
// lie apart. Saved: gate | up.
#pragma once
#include "core/tensor.h"

namespace qlab {

/// y has room for `tail` more columns (Tensor::with_tail).
Tensor swiglu(const Tensor& gate_up, int64_t tail = 0);
/// dgate | dup with room for `tail` more columns: in the place of gate | up when nobody else holds
/// that and it has the room, otherwise a new tensor.
Tensor swiglu_backward(const Tensor& g, const Tensor& gate_up, int64_t tail = 0);

// The ports' dgate | dup may be gate | up itself.
namespace cpu {
void swiglu(const Tensor& y, const Tensor& gate_up);
void swiglu_backward(const Tensor& dgate_up, const Tensor& g, const Tensor& gate_up);
}  // namespace cpu
namespace cuda {
void swiglu(const Tensor& y, const Tensor& gate_up);
void swiglu_backward(const Tensor& dgate_up, const Tensor& g, const Tensor& gate_up);
}  // namespace cuda
}  // namespace qlab
