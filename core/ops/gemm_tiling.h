// Which of the kernels that a GPU's library proposes for a product is the fastest, as `make tune`
// measured it (core/ops/gemm_tilings.inc): with wide results the library's own choice takes up to a
// tenth more. Only kernels whose bits are those of that choice are admitted, so what is chosen here
// changes times alone.
#pragma once
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "core/ops/gemm.h"

namespace qlab {

/// How a kernel of the library cuts a product, by the library's own numbers: its kind of tile, of
/// cluster of tiles, and the "custom option".
struct GemmTiling {
  int tile, cluster, option;
  auto operator<=>(const GemmTiling&) const = default;
};

/// For one GPU's products of `rows` rows with a weight [n, k] in bf16: x W^T (Op::transpose) or
/// dy W (Op::none).
struct GemmLine {
  std::string_view gpu;
  Op op;
  int64_t n, k, rows;
  GemmTiling tiling;
};

std::span<const GemmLine> measured_gemm_lines();

/// Of A [m, k] op(B), C [m, n]: the tiling of the line for as many columns of C, a number of rows
/// within a factor of 1.5, and the largest K that is no longer, and no shorter than two thirds:
/// adapters beside the weight make K longer. None where there is no such line; the library's choice
/// is taken then.
std::optional<GemmTiling> gemm_tiling(std::span<const GemmLine> lines, std::string_view gpu,
                                      Op op_b, int64_t m, int64_t n, int64_t k);

namespace cuda {
/// What the library proposes for C = A op(B) without cutting K, its own choice first; nothing is
/// read. At most GemmProposal::most.
std::vector<GemmTiling> gemm_proposals(const Tensor& c, const Tensor& a, const Tensor& b, Op op_b,
                                       const Tensor& workspace);
}  // namespace cuda
}  // namespace qlab
