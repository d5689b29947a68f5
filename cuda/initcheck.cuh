// compute-sanitizer's initcheck does not record what tensor copies (cp.async.bulk.tensor) write, up
// to its version 2026.4 at least, and reports whoever reads it. Products of the library and kernels
// of ours store their results so.
#pragma once
#include "core/memory.h"
#include "cuda/launch.cuh"

namespace qlab::cuda {

/// Fills what such copies are about to write with NaN, where every tensor is allocated by itself
/// for the sanitizer's sake (QLAB_PLAIN_ALLOC): initcheck knows it then, and what the copies leave
/// out is seen by the tests, which compare results.
inline void fill_for_initcheck(const Tensor& out) {
  if (StepMemory::planned() || out.numel() == 0) return;
  const size_t row_bytes = static_cast<size_t>(out.cols()) * size_of(out.dtype());
  const size_t pitch =
      out.rows() > 1 ? static_cast<size_t>(out.pitch()) * size_of(out.dtype()) : row_bytes;
  check(cudaMemset2DAsync(out.raw(), pitch, 0xff, row_bytes, static_cast<size_t>(out.rows()),
                          current_stream()),
        "cudaMemset2DAsync");
}

}  // namespace qlab::cuda
