#include "nn/fold.h"

#include "cuda/launch.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = 256;

struct Part {
  const float* a;
  const float* b;
  float scale;
  int32_t row, rows, column, r;
};
template <int capacity>
struct Parts {
  int count;
  Part part[capacity];
};

// One thread per eight neighbouring elements: first the columns beside W, row by row, then the rows
// below it. Reads 4 and writes 2 (bf16) bytes per element of an adapter.
template <class T, int capacity>
__global__ void __launch_bounds__(threads)
    fold_kernel(T* block, int64_t pitch, int n, int k, int width,
                const __grid_constant__ Parts<capacity> parts) {
  const unsigned index = blockIdx.x * threads + threadIdx.x;
  const unsigned per_row = static_cast<unsigned>(width) / vector_width;
  const unsigned beside = static_cast<unsigned>(n) * per_row;
  float v[vector_width] = {};
  if (index < beside) {
    const int row = static_cast<int>(index / per_row);
    const int col = static_cast<int>(index - row * per_row) * vector_width;
    for (int p = 0; p < parts.count; ++p) {
      const Part& part = parts.part[p];
      const int local = row - part.row, first = col - part.column;
      if (local < 0 || local >= part.rows || first < 0 || first >= part.r) continue;
      const float* const b = part.b + static_cast<int64_t>(local) * part.r + first;
#pragma unroll
      for (int i = 0; i < vector_width; ++i)
        if (first + i < part.r) v[i] = foldable<T>(part.scale * b[i]);
    }
    store(block + row * pitch + k + col, v);
    return;
  }
  const unsigned below = index - beside, along = static_cast<unsigned>(k) / vector_width;
  const int row = static_cast<int>(below / along);
  if (row >= width) return;
  const int col = static_cast<int>(below - row * along) * vector_width;
  for (int p = 0; p < parts.count; ++p) {
    const Part& part = parts.part[p];
    const int local = row - part.column;
    if (local < 0 || local >= part.r) continue;
    const float* const a = part.a + static_cast<int64_t>(local) * k + col;
#pragma unroll
    for (int i = 0; i < vector_width; ++i)
      v[i] = foldable<T>(a[i]);  // may lie at any multiple of 4 bytes
  }
  store(block + (n + row) * pitch + col, v);
}

template <class T, int capacity>
void launch(const Tensor& block, int64_t width, std::span<const FoldPart> parts) {
  Parts<capacity> table;
  table.count = static_cast<int>(parts.size());
  for (size_t i = 0; i < parts.size(); ++i)
    table.part[i] = {.a = parts[i].a.data<float>(),
                     .b = parts[i].b.data<float>(),
                     .scale = parts[i].scale,
                     .row = static_cast<int32_t>(parts[i].row),
                     .rows = static_cast<int32_t>(parts[i].b.dim(0)),
                     .column = static_cast<int32_t>(parts[i].column),
                     .r = static_cast<int32_t>(parts[i].a.dim(0))};
  const int64_t n = block.dim(0) - width, k = block.dim(1) - width;
  const int64_t work = (n + k) * (width / vector_width);
  launch_kernel("fold_adapters", fold_kernel<T, capacity>,
                {grid_of("fold_adapters", ceil_div<int64_t>(work, threads)), threads},
                block.data<T>(), block.pitch(), static_cast<int>(n), static_cast<int>(k),
                static_cast<int>(width), table);
}

}  // namespace

void fold_adapters(const Tensor& block, int64_t width, std::span<const FoldPart> parts) {
  dispatch(CudaFloats{}, block.dtype(), "fold_adapters", [&]<class T>() {
    // Few parts, few bytes of launch parameters: 512 are 20 KB, which every launch would bring.
    if (parts.size() <= 4) return launch<T, 4>(block, width, parts);
    if (parts.size() <= 32) return launch<T, 32>(block, width, parts);
    launch<T, max_fold_parts>(block, width, parts);
  });
}

}  // namespace qlab::cuda
