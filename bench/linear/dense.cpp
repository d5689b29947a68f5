// What the 4-bit kernels are measured against: weights that lie in memory in the compute dtype.
// `dense` is a plain 16-bit layer with the kernel that cuBLAS chooses; `resident` is a dequantized
// one as training keeps it, its rows 64 columns apart to leave room for folded adapters, with the
// kernel that training takes (core/ops/gemm_tiling.h).
#include <optional>

#include "bench/linear/linear.h"
#include "core/ops/gemm.h"

namespace qlab::bench {
namespace {

LinearKernel kernel(const std::string& name, int64_t tail, std::optional<int> proposal) {
  const auto prepare = [=](const LinearWeights& weights) {
    const std::vector<Tensor> dense = dense_weights(weights, tail);
    const auto multiply = [=](const Tensor& c, const Tensor& a, int i, Op op) {
      std::optional<GemmProposal> chosen;
      if (proposal) chosen.emplace(*proposal);
      gemm(c, a, Op::none, dense[static_cast<size_t>(i) % dense.size()], op);
    };
    return LinearCalls{
        .forward = [=](const Tensor& y, const Tensor& x,
                       int i) { multiply(y, x, i, Op::transpose); },
        .dx = [=](const Tensor& dx, const Tensor& dy, int i) { multiply(dx, dy, i, Op::none); }};
  };
  return {.name = name,
          .weight_bytes = 2,
          .supports = [](const LinearShape&, Device) { return true; },
          .prepare = prepare};
}

const RegisterLinear dense(kernel("dense", 0, 0)), resident(kernel("resident", 64, {}));

}  // namespace
}  // namespace qlab::bench
