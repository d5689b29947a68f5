// What the kernels of a GPU take. Entries of operations ask, where a meta device counts as the GPU
// that it stands for: what a run would be refused for, its plan and its prediction are refused for.
#pragma once
#include "core/tensor.h"

namespace qlab {

inline constexpr int64_t largest_count = 2147483647;  // kernels count in 32 bits

inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}
/// Every row starts at a multiple of 16 bytes. Addresses of meta tensors do.
inline bool rows_aligned16(const Tensor& x) {
  return aligned16(x.raw()) &&
         (x.rows() <= 1 || x.pitch() * static_cast<int64_t>(size_of(x.dtype())) % 16 == 0);
}

/// Throws where x is on a GPU and there is more than `most` of `what`.
void check_gpu_count(const char* op, const Tensor& x, const char* what, int64_t count,
                     int64_t most = largest_count);
/// Throws where x is on a GPU and no floats of at most 32 bits, or has more than 2^31 - 1 rows or
/// columns.
void check_gpu_matrix(const char* op, const Tensor& x);
/// The same where an operation may take all of x as one row: 2^31 - 1 elements, or as many groups
/// of eight.
void check_gpu_elements(const char* op, const Tensor& x);
/// Throws where x is on a GPU and a row starts elsewhere than at a multiple of 16 bytes.
void check_gpu_rows(const char* op, const Tensor& x);

}  // namespace qlab
