// One launch for every operation that treats the elements of rows alone. A functor gives
//   template <int width> __device__ void apply(int64_t row, int64_t col) const
// for the `width` (1 or 8) elements that start at a column.
#pragma once
#include "cuda/launch.cuh"

namespace qlab::cuda {

inline constexpr int elementwise_threads = 256;

// One thread per `width` neighbouring elements; every element is read and written once.
template <int width, class F>
__global__ void __launch_bounds__(elementwise_threads)
    elementwise_kernel(F f, uint64_t units_per_row, uint64_t units) {
  const uint64_t unit = static_cast<uint64_t>(blockIdx.x) * elementwise_threads + threadIdx.x;
  if (unit >= units) return;
  const uint64_t row = unit / units_per_row;
  f.template apply<width>(static_cast<int64_t>(row),
                          static_cast<int64_t>((unit - row * units_per_row) * width));
}

template <class F>
void elementwise(const char* op, const F& f, int64_t rows, int64_t cols, bool vectors) {
  if (rows == 0 || cols == 0) return;
  const int64_t units_per_row = vectors ? cols / vector_width : cols;
  const int64_t units = rows * units_per_row;
  const unsigned blocks = grid_of(op, ceil_div<int64_t>(units, elementwise_threads));
  if (vectors)
    elementwise_kernel<vector_width>
        <<<blocks, elementwise_threads, 0, current_stream()>>>(f, units_per_row, units);
  else
    elementwise_kernel<1>
        <<<blocks, elementwise_threads, 0, current_stream()>>>(f, units_per_row, units);
  check_launch(op);
}

}  // namespace qlab::cuda
