#include "core/ops/swiglu.h"

#include "autograd/functions.h"

namespace qlab {

Variable swiglu(Tape& tape, const Variable& gate, const Variable& up) {
  return tape.record("swiglu", swiglu(gate.value, up.value), {gate, up},
                     {{"swiglu.gate", gate.value}, {"swiglu.up", up.value}},
                     [](const Tensor& g, const Node& node) {
                       auto [dgate, dup] =
                           swiglu_backward(g, node.saved("swiglu.gate"), node.saved("swiglu.up"));
                       return std::vector<Tensor>{dgate, dup};
                     });
}

}  // namespace qlab
