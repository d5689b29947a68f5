#include "core/ops/attention.h"

#include "autograd/functions.h"

namespace qlab {

Variable attention(Tape& tape, const Variable& qkv, const Tensor& cu_seqlens,
                   const AttentionShape& shape, int64_t tail) {
  const auto [q, k, v] = attention_columns(qkv.value, shape);
  auto [o, lse] = attention(q, k, v, cu_seqlens, cu_seqlens, shape, tail);
  return tape.record("attention", o, {qkv},
                     {{"attention.qkv", qkv.value}, {"attention.o", o}, {"attention.lse", lse}},
                     [cu_seqlens, shape, room = qkv.tail](const Tensor& g, const Node& node) {
                       const auto [q, k, v] = attention_columns(node.saved("attention.qkv"), shape);
                       return std::vector<Tensor>{attention_backward(
                           g, q, k, v, node.saved("attention.o"), node.saved("attention.lse"),
                           cu_seqlens, cu_seqlens, shape, room)};
                     });
}

}  // namespace qlab
