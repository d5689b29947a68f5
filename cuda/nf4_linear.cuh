// What the kernels behind nf4_matmul share: their arguments.
#pragma once
#include "cuda/nf4_decode.cuh"
#include "quant/nf4_linear.h"

namespace qlab::cuda {
namespace {

inline constexpr int scale_chunk = 32;  // every block size is a multiple of it

template <class T>
struct Problem {
  const uint8_t* codes;
  Scales scales;
  const T* x;
  T* y;
  const T* addend;  // or null
  float* partial;   // [splits, m, outputs] where splits > 1
  int64_t x_pitch, y_pitch, addend_pitch;
  int n, k, m;
  int steps = 0;           // along the contraction that a block takes
  int splits = 1;          // blocks that share out the contraction: gridDim.y
  bool clustered = false;  // those blocks are a cluster
  bool wide_scales;        // two chunks of 32 columns always have one scale
};

template <class T>
Problem<T> problem_of(const Tensor& y, const Tensor& x, const Nf4Tensor& w, const Tensor& addend,
                      const Tensor& workspace) {
  return {.codes = w.codes.data<uint8_t>(),
          .scales = scales_of(w),
          .x = x.data<T>(),
          .y = y.data<T>(),
          .addend = addend.defined() ? addend.data<T>() : nullptr,
          .partial = workspace.defined() ? workspace.data<float>() : nullptr,
          .x_pitch = x.pitch(),
          .y_pitch = y.pitch(),
          .addend_pitch = addend.defined() ? addend.pitch() : 0,
          .n = static_cast<int>(w.shape[0]),
          .k = static_cast<int>(w.shape[1]),
          .m = static_cast<int>(x.rows()),
          .wide_scales = w.block_size >= 64 && w.shape[1] % 64 == 0};
}

}  // namespace
}  // namespace qlab::cuda
