#include "nn/fold.h"

#include <algorithm>

#include "core/gpu_limits.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {

void check_foldable(const Tensor& block, int64_t width) {
  const int64_t n = block.dim(0) - width, k = block.dim(1) - width;
  if (block.device().target == DeviceType::cuda && k % 8 != 0)
    fail(
        "[fold_adapters] a GPU folds adapters in 16 bits into weights whose inputs are a multiple "
        "of 8, got {} in {}; quant.compute_dtype: fp32 takes any number",
        k, block.str());
  check_gpu_rows("fold_adapters", block);
  check_gpu_count("fold_adapters", block,
                  "groups of eight elements beside and below a weight (by lora.r and "
                  "parallel.trials_per_gpu)",
                  (n + k) * (width / 8));
}

void fold_adapters(const Tensor& block, int64_t width, std::span<const FoldPart> parts) {
  QLAB_CHECK(
      block.rank() == 2 && width % fold_step == 0 && block.dim(0) > width && block.dim(1) > width,
      "[fold_adapters] {} columns of adapters in {}", width, block.str());
  QLAB_CHECK(static_cast<int64_t>(parts.size()) <= max_fold_parts,
             "[fold_adapters] at most {} adapters fit one weight, got {}", max_fold_parts,
             parts.size());
  int64_t used = 0;
  for (const FoldPart& part : parts) {
    const int64_t r = part.a.dim(0);
    check_shape("fold_adapters", "a", part.a, {r, block.dim(1) - width});
    check_shape("fold_adapters", "b", part.b, {part.b.dim(0), r});
    check_device("fold_adapters", part.a, block);
    check_device("fold_adapters", part.b, block);
    QLAB_CHECK(part.column % fold_step == 0 && part.column >= used && part.column + r <= width &&
                   part.row + part.b.dim(0) <= block.dim(0) - width,
               "[fold_adapters] a part of rank {} at row {}, column {} does not fit {}", r,
               part.row, part.column, block.str());
    used = part.column + r;
  }
  if (width == 0) return;
  check_foldable(block, width);
  const OpScope scope("fold_adapters", block.device(),
                      {0, static_cast<double>(width * (block.dim(0) + block.dim(1))) *
                              static_cast<double>(size_of(block.dtype()))});
  on_device(
      block.device(), [&] { cpu::fold_adapters(block, width, parts); },
      [&] { cuda::fold_adapters(block, width, parts); });
}

namespace cpu {

void fold_adapters(const Tensor& block, int64_t width, std::span<const FoldPart> parts) {
  const int64_t n = block.dim(0) - width, k = block.dim(1) - width, pitch = block.pitch();
  dispatch(CpuFloats{}, block.dtype(), "fold_adapters", [&]<class T>() {
    T* const weight = block.data<T>();
    parallel_for(n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* const tail = weight + row * pitch + k;
        std::fill(tail, tail + width, T{});
        for (const FoldPart& part : parts) {
          const int64_t r = part.a.dim(0), local = row - part.row;
          if (local < 0 || local >= part.b.dim(0)) continue;
          const float* const b = part.b.data<float>() + local * r;
          for (int64_t i = 0; i < r; ++i)
            tail[part.column + i] = static_cast<T>(foldable<T>(part.scale * b[i]));
        }
      }
    });
    for (int64_t row = 0; row < width; ++row)
      std::fill(weight + (n + row) * pitch, weight + (n + row) * pitch + k, T{});
    for (const FoldPart& part : parts)
      for (int64_t row = 0; row < part.a.dim(0); ++row) {
        const float* const a = part.a.data<float>() + row * k;
        T* const target = weight + (n + part.column + row) * pitch;
        for (int64_t col = 0; col < k; ++col) target[col] = static_cast<T>(foldable<T>(a[col]));
      }
  });
}

}  // namespace cpu
}  // namespace qlab
