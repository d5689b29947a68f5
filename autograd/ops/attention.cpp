#include "core/ops/attention.h"

#include "autograd/functions.h"

namespace qlab {

Variable attention(Tape& tape, const Variable& q, const Variable& k, const Variable& v,
                   const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape) {
  auto [o, lse] = attention(q.value, k.value, v.value, cu_q, cu_k, shape);
  return tape.record("attention", o, {q, k, v},
                     {{"attention.q", q.value},
                      {"attention.k", k.value},
                      {"attention.v", v.value},
                      {"attention.o", o},
                      {"attention.lse", lse}},
                     [cu_q, cu_k, shape](const Tensor& g, const Node& node) {
                       auto [dq, dk, dv] = attention_backward(
                           g, node.saved("attention.q"), node.saved("attention.k"),
                           node.saved("attention.v"), node.saved("attention.o"),
                           node.saved("attention.lse"), cu_q, cu_k, shape);
                       return std::vector<Tensor>{dq, dk, dv};
                     });
}

}  // namespace qlab
