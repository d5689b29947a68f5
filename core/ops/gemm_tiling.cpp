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
  // Of dy W the weight's columns are those of C.
  const auto cols = [](const GemmLine& l) { return l.op == Op::transpose ? l.n : l.k; };
  const auto terms = [](const GemmLine& l) { return l.op == Op::transpose ? l.k : l.n; };
  const auto apart = [m](const GemmLine& l) {
    const auto [few, many] = std::minmax(l.rows, m);
    return static_cast<double>(many) / static_cast<double>(few);
  };
  const GemmLine* nearest = nullptr;
  for (const GemmLine& line : lines) {
    if (line.gpu != gpu || line.op != op_b || cols(line) != n || terms(line) > k ||
        3 * terms(line) < 2 * k || m < 1 || apart(line) > 1.5)
      continue;
    if (nearest == nullptr || terms(line) > terms(*nearest) ||
        (terms(line) == terms(*nearest) && apart(line) < apart(*nearest)))
      nearest = &line;
  }
  return nearest == nullptr ? std::nullopt : std::optional(nearest->tiling);
}

}  // namespace qlab
