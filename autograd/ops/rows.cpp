#include "core/ops/rows.h"

#include "autograd/functions.h"

namespace qlab {

Variable gather_rows(Tape& tape, const Variable& x, const Tensor& index) {
  const int64_t rows = x.value.dim(0);
  return tape.record("gather_rows", gather_rows(x.value, index, x.value.dtype()), {x}, {},
                     [index, rows](const Tensor& g, const Node&) {
                       return std::vector<Tensor>{scatter_rows(g, index, rows)};
                     });
}

}  // namespace qlab
