#include "core/ops/swiglu.h"

#include "autograd/functions.h"

namespace qlab {

Variable swiglu(Tape& tape, const Variable& gate_up, int64_t tail) {
  return tape.record(
      "swiglu", swiglu(gate_up.value, tail), {gate_up}, {{"swiglu.gate_up", gate_up.value}},
      [d_tail = gate_up.tail](const Tensor& g, const Node& node) {
        return std::vector<Tensor>{swiglu_backward(g, node.saved("swiglu.gate_up"), d_tail)};
      });
}

}  // namespace qlab
