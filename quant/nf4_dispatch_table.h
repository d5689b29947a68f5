// What is known of the kernels of quant/nf4_linear.h on GPUs, as lines of a table.
#pragma once
#include <optional>
#include <span>
#include <string_view>

#include "quant/nf4_linear.h"

namespace qlab {

/// For one GPU's products with matrices like [n, k] and at most so many rows.
struct Nf4Line {
  std::string_view gpu;  // "": any that has no lines
  Op op;
  int64_t n, k, rows;
  std::optional<Nf4Kernel> kernel;
};

/// The kernel of the lines for W [n, k] itself; where it was not measured, of the smallest matrix
/// that has no fewer elements, or else of the largest. Of one matrix, lines of fewer rows come
/// first; beyond the last of them no kernel is chosen.
std::optional<Nf4Kernel> kernel_of(std::span<const Nf4Line> lines, std::string_view gpu, Op op,
                                   int64_t n, int64_t k, int64_t rows);

/// fastest_nf4_kernel on the GPU so called; what its line names may not take this matrix, and then
/// the choice is that of a GPU without lines.
std::optional<Nf4Kernel> fastest_nf4_kernel(std::string_view gpu, const Nf4Tensor& w, Op op,
                                            int64_t rows, DType dtype, Device device);

}  // namespace qlab
