// Every call dequantizes into a scratch of the step and multiplies with that.
#include "bench/linear/linear.h"
#include "core/ops/gemm.h"

namespace qlab::bench {
namespace {

Tensor expanded(const LinearWeights& weights, int i, Device device) {
  const MemoryTag tag(Category::workspace);
  const Tensor w = Tensor::empty(weights.nf4[i].shape, weights.compute, device);
  dequantize_nf4(w, weights.nf4[i]);
  return w;
}

LinearCalls prepare(const LinearWeights& weights) {
  return {.forward =
              [weights](const Tensor& y, const Tensor& x, int i) {
                gemm(y, x, Op::none, expanded(weights, i, y.device()), Op::transpose);
              },
          .dx =
              [weights](const Tensor& dx, const Tensor& dy, int i) {
                gemm(dx, dy, Op::none, expanded(weights, i, dx.device()), Op::none);
              }};
}

const RegisterLinear registered({.name = "scratch",
                                 .weight_bytes = nf4_weight_bytes,
                                 .supports = [](const LinearShape&, Device) { return true; },
                                 .prepare = prepare});

}  // namespace
}  // namespace qlab::bench
