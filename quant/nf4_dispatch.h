// Which kernel of quant/nf4_linear.h is the fastest, or none where decoding W first is faster, as
// `make tune` measured it (quant/nf4_dispatch_table.inc; of a GPU without lines there, as single
// measurements on an H100 were). The choice follows from W, the product and the number of rows; who
// trains several trials together asks with the rows of one, or a row's bits would depend on the
// others.
#pragma once
#include <optional>

#include "quant/nf4_linear.h"

namespace qlab {

std::optional<Nf4Kernel> fastest_nf4_kernel(const Nf4Tensor& w, Op op, int64_t rows, DType dtype,
                                            Device device);

}  // namespace qlab
