#include "core/ops/swiglu.h"

#include "autograd/functions.h"

namespace qlab {

Variable swiglu(Tape& tape, const Variable& gate_up, int64_t tail) {
  const Tensor& x = gate_up.value;
  const bool wanted = !gate_up.requires_grad() || tape.result_wanted();
  return tape.record(
      "swiglu",
      wanted ? swiglu(x, tail)
             : Tensor::with_tail(x.dim(0), x.dim(1) / 2, tail, x.dtype(), x.device()),
      {gate_up}, {{"swiglu.gate_up", x}},
      [d_tail = gate_up.tail](const Tensor& g, const Node& node) {
        return std::vector<Tensor>{swiglu_backward(g, node.saved("swiglu.gate_up"), d_tail)};
      });
}

}  // namespace qlab
