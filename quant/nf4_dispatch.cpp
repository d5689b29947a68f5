#include "quant/nf4_dispatch.h"

#include <algorithm>
#include <iterator>

namespace qlab {
namespace {

/// For matrices of at most so many elements and so many rows; the first line that fits is taken.
struct Choice {
  Op op;
  int64_t elements, rows;
  Nf4Kernel kernel;
};
constexpr int64_t any = INT64_MAX;
// From times on an H100 80GB HBM3 at 4096 x 4096 and 14336 x 4096.
constexpr Choice choices[] = {
    {Op::transpose, 1 << 25, 1, Nf4Kernel::simt},
    {Op::transpose, any, 64, Nf4Kernel::mma},
    {Op::none, any, 64, Nf4Kernel::mma},
    // Without tensor cores.
    {Op::transpose, any, 2, Nf4Kernel::simt},
    {Op::none, any, 2, Nf4Kernel::simt},
};

}  // namespace

std::optional<Nf4Kernel> fastest_nf4_kernel(const Nf4Tensor& w, Op op, int64_t rows, DType dtype,
                                            Device device) {
  if (device.target == DeviceType::cpu) return std::nullopt;
  const auto* const found =
      std::find_if(std::begin(choices), std::end(choices), [&](const Choice& c) {
        return c.op == op && w.shape.numel() <= c.elements && rows <= c.rows &&
               nf4_matmul_supported(c.kernel, w, op, rows, dtype, device);
      });
  if (found == std::end(choices)) return std::nullopt;
  return found->kernel;
}

}  // namespace qlab
