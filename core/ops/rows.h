// Gathering rows: the embedding lookup, and the choice of the rows that carry a label.
#pragma once
#include "core/tensor.h"

namespace qlab {

/// y[i] = table[index[i]]; table [V, C], index i32 [T]; y in `dtype`. An index of -1 gives zeros.
Tensor gather_rows(const Tensor& table, const Tensor& index, DType dtype);
/// y[index[i]] = x[i] for every index >= 0, other rows of y [T, C] zero; no index occurs twice.
Tensor scatter_rows(const Tensor& x, const Tensor& index, int64_t rows);

namespace cpu {
void gather_rows(const Tensor& y, const Tensor& table, const Tensor& index);
void scatter_rows(const Tensor& y, const Tensor& x, const Tensor& index);  // y zeroed before
}  // namespace cpu
namespace cuda {
void gather_rows(const Tensor& y, const Tensor& table, const Tensor& index);
void scatter_rows(const Tensor& y, const Tensor& x, const Tensor& index);
}  // namespace cuda
}  // namespace qlab
