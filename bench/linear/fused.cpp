// The kernels of quant/nf4_linear.h, which decode the weights inside the product.
#include <limits>

#include "bench/linear/linear.h"
#include "quant/nf4_linear.h"

namespace qlab::bench {
namespace {

// Beyond, those that cut the contraction have no use: rows of x give blocks enough.
constexpr int64_t cut_rows = 1024;

LinearKernel kernel(Nf4Kernel which, int64_t most_rows = std::numeric_limits<int64_t>::max()) {
  const auto supports = [=](const LinearShape& s, Device device) {
    Nf4Tensor w;
    w.shape = {s.n, s.k};
    return device.is_cuda() && s.m <= most_rows &&
           nf4_matmul_supported(which, w, s.forward ? Op::transpose : Op::none, s.m,
                                compute_dtype(device), device);
  };
  const auto prepare = [which](const LinearWeights& weights) {
    return LinearCalls{
        .forward = [=](const Tensor& y, const Tensor& x,
                       int i) { nf4_matmul(y, x, weights.nf4[i], Op::transpose, which); },
        .dx = [=](const Tensor& dx, const Tensor& dy,
                  int i) { nf4_matmul(dx, dy, weights.nf4[i], Op::none, which); }};
  };
  return {.name = name_of(which),
          .weight_bytes = nf4_weight_bytes,
          .supports = supports,
          .prepare = prepare};
}

const RegisterLinear simt(kernel(Nf4Kernel::simt)), mma(kernel(Nf4Kernel::mma)),
    lut(kernel(Nf4Kernel::lut)), wgmma(kernel(Nf4Kernel::wgmma)),
    wgmma2(kernel(Nf4Kernel::wgmma2, cut_rows)), wgmma3(kernel(Nf4Kernel::wgmma3, cut_rows));

}  // namespace
}  // namespace qlab::bench
