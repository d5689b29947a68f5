// Copies, casts and fills.
#pragma once
#include "core/tensor.h"

namespace qlab {

/// destination = source, same shape; converts the dtype (round to nearest even) when they live on
/// one device, and moves bytes between devices when the dtypes are equal. Row pitches are honoured.
void copy(const Tensor& destination, const Tensor& source);
/// A contiguous tensor of another dtype; the tensor itself when it already has it.
Tensor cast(const Tensor& x, DType dtype);
void fill_zero(const Tensor& x);

namespace cpu {
void cast(const Tensor& y, const Tensor& x);
}
namespace cuda {
void cast(const Tensor& y, const Tensor& x);
}
}  // namespace qlab
