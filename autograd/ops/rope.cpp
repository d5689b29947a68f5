#include "core/ops/rope.h"

#include "autograd/functions.h"
#include "core/ops/copy.h"

namespace qlab {

Variable rope(Tape& tape, const Variable& qkv, int64_t columns, const Tensor& positions,
              const RopeTables& tables, int64_t head_dim) {
  rope_inplace(qkv.value.slice_cols(0, columns), positions, tables, head_dim);
  Variable rotated = tape.record(
      "rope", qkv.value, {qkv}, {},
      [columns, positions, tables, head_dim, tail = qkv.tail](const Tensor& g, const Node&) {
        Tensor dx = g;
        if (!g.unique()) {
          dx = Tensor::with_tail(g.dim(0), g.dim(1), tail, g.dtype(), g.device());
          copy(dx, g);
        }
        rope_inplace(dx.slice_cols(0, columns), positions, tables, head_dim, true);
        return std::vector<Tensor>{dx};
      });
  rotated.tail = qkv.tail;
  return rotated;
}

}  // namespace qlab
