// What the 4-bit kernels are measured against: weights that lie in memory in the compute dtype.
// `dense` is a plain 16-bit layer; `resident` is a dequantized one as training keeps it, its rows
// 64 columns apart to leave room for folded adapters.
#include "bench/linear/linear.h"
#include "core/ops/gemm.h"

namespace qlab::bench {
namespace {

LinearKernel kernel(const std::string& name, int64_t tail) {
  const auto prepare = [tail](const LinearWeights& weights) {
    const std::vector<Tensor> dense = dense_weights(weights, tail);
    const auto weight = [dense](int i) { return dense[static_cast<size_t>(i) % dense.size()]; };
    return LinearCalls{
        .forward = [weight](const Tensor& y, const Tensor& x,
                            int i) { gemm(y, x, Op::none, weight(i), Op::transpose); },
        .dx = [weight](const Tensor& dx, const Tensor& dy,
                       int i) { gemm(dx, dy, Op::none, weight(i), Op::none); }};
  };
  return {.name = name,
          .weight_bytes = 2,
          .supports = [](const LinearShape&, Device) { return true; },
          .prepare = prepare};
}

const RegisterLinear dense(kernel("dense", 0)), resident(kernel("resident", 64));

}  // namespace
}  // namespace qlab::bench
