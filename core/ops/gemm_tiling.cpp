#include "core/ops/gemm_tiling.h"

#include <algorithm>

namespace qlab {

std::span<const GemmLine> measured_gemm_lines() {
  // The last one ends the list, which may be empty, and is of no GPU.
  static constexpr GemmLine lines[] = {
#include "core/ops/gemm_tilings.inc"
      {"", Op::none, 0, 0, 0, {}}};
  return {lines, std::size(lines) - 1};
}

std::optional<GemmTiling> gemm_tiling(std::span<const GemmLine> lines, std::string_view gpu,
                                      Op op_b, int64_t m, int64_t n, int64_t k) {
  const GemmLine* nearest = nullptr;
  const auto apart = [m](const GemmLine& line) {
    const auto [few, many] = std::minmax(line.rows, m);
    return static_cast<double>(many) / static_cast<double>(few);
  };
  for (const GemmLine& line : lines) {
    // Of dy W the weight's columns are those of C.
    const int64_t cols = op_b == Op::transpose ? line.n : line.k;
    const int64_t terms = op_b == Op::transpose ? line.k : line.n;
    if (line.gpu != gpu || line.op != op_b || cols != n || terms > k || 3 * terms < 2 * k ||
        m < 1 || apart(line) > 1.5)
      continue;
    const auto terms_of = [&](const GemmLine& l) { return op_b == Op::transpose ? l.k : l.n; };
    if (nearest == nullptr || terms > terms_of(*nearest) ||
        (terms == terms_of(*nearest) && apart(line) < apart(*nearest)))
      nearest = &line;
  }
  return nearest == nullptr ? std::nullopt : std::optional(nearest->tiling);
}

}  // namespace qlab
