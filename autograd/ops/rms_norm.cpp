#include "core/ops/rms_norm.h"

#include "autograd/functions.h"

namespace qlab {

Variable rms_norm(Tape& tape, const Variable& x, const Tensor& weight, float eps, int64_t tail) {
  auto [y, r] = rms_norm(x.value, weight, eps, tail);
  return tape.record(
      "rms_norm", y, {x}, {{"rms_norm.x", x.value}, {"rms_norm.r", r}},
      [weight, dx_tail = x.tail](const Tensor& g, const Node& node) {
        return std::vector<Tensor>{rms_norm_backward(g, node.saved("rms_norm.x"), weight,
                                                     node.saved("rms_norm.r"), node.collected(),
                                                     dx_tail)};
      },
      false, Sum::own);
}

}  // namespace qlab
