#include "core/ops/rope.h"

#include "autograd/functions.h"

namespace qlab {

Variable rope(Tape& tape, const Variable& x, const Tensor& positions, const RopeTables& tables,
              int64_t head_dim) {
  return tape.record("rope", rope(x.value, positions, tables, head_dim), {x}, {},
                     [positions, tables, head_dim](const Tensor& g, const Node&) {
                       return std::vector<Tensor>{rope(g, positions, tables, head_dim, true)};
                     });
}

}  // namespace qlab
