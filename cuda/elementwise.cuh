// One launch for every operation that treats the elements of rows alone. A functor gives
//   template <int width> __device__ void apply(int64_t row, int64_t col) const
// for the `width` (1 or 8) elements that start at a column.
#pragma once
#include "cuda/divider.cuh"
#include "cuda/launch.cuh"

namespace qlab::cuda {

inline constexpr int elementwise_threads = 256;

// One thread per `width` neighbouring elements; every element is read and written once.
template <int width, class F>
__global__ void __launch_bounds__(elementwise_threads)
    elementwise_kernel(F f, Divider units_per_row, int64_t first_row, uint32_t units) {
  const uint32_t unit = blockIdx.x * elementwise_threads + threadIdx.x;
  if (unit >= units) return;
  const uint32_t row = units_per_row.quotient(unit);
  f.template apply<width>(first_row + row,
                          static_cast<int64_t>(unit - row * units_per_row.divisor()) * width);
}

template <class F>
void elementwise(const char* op, const F& f, int64_t rows, int64_t cols, bool vectors) {
  if (rows == 0 || cols == 0) return;
  const int64_t units_per_row = vectors ? cols / vector_width : cols;
  const Divider divider(units_per_row);
  // 2^30 units and their last block's remainder stay below 2^31.
  const int64_t rows_per_launch = std::max<int64_t>(1, (int64_t{1} << 30) / units_per_row);
  const auto kernel = vectors ? elementwise_kernel<vector_width, F> : elementwise_kernel<1, F>;
  for (int64_t row = 0; row < rows; row += rows_per_launch) {
    const int64_t units = std::min(rows_per_launch, rows - row) * units_per_row;
    const unsigned blocks = grid_of(op, ceil_div<int64_t>(units, elementwise_threads));
    launch_kernel(op, kernel, {blocks, elementwise_threads}, f, divider, row,
                  static_cast<uint32_t>(units));
  }
}

}  // namespace qlab::cuda
