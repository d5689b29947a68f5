// What the kernels of nn/adapter_products.h share: dropout's masks on packed bf16, streaming
// copies, and sums whose parts are added in order.
#pragma once
#include "core/ops/dropout.h"
#include "cuda/early_launch.cuh"
#include "cuda/mma.cuh"
#include "nn/adapter_products.h"

namespace qlab::cuda::adapter {

inline constexpr int max_parts = 4;

/// The masks of the modules that share an input, and whose rows they are.
struct Masks {
  const int64_t* example;
  const int32_t* position;
  uint32_t threshold;  // dropout_threshold, in the upper half
  uint64_t key[max_parts];
};

/// One row's place in the masks.
struct Place {
  int64_t example;
  int32_t position;
};
__device__ inline Place place_of(const Masks& masks, int row) {
  return {masks.example[row], masks.position[row]};
}
/// What decides features 8 unit .. 8 unit + 7.
__device__ inline Philox mask_of(uint64_t key, const Place& place, int unit) {
  return dropout_bits(key, place.example, place.position, static_cast<uint32_t>(unit));
}
/// Eight neighbouring features, those that are dropped set to zero.
__device__ inline uint4 masked(uint4 x, const Philox& mask, uint32_t threshold) {
  const auto pair = [&](uint32_t word, uint32_t bits) {
    return word &
           ((bits >= threshold ? 0xffff0000u : 0u) | (bits << 16 >= threshold ? 0xffffu : 0u));
  };
  return make_uint4(pair(x.x, mask.lane[0]), pair(x.y, mask.lane[1]), pair(x.z, mask.lane[2]),
                    pair(x.w, mask.lane[3]));
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ inline void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

/// The parts of a sum, to be added in order: to [rows, cols] (+)= factor times the sum of `count`
/// planes; the same of every segment. The product is rounded before it is added, so that
/// micro-batches' gradients have one sum wherever they are added up (experiments/gradient_sum.h).
struct Sum {
  const float* planes;
  int64_t plane, segment, to_pitch;  // elements
  int rows, cols, from_pitch, count;
  void* to[max_segments];
  float factor[max_segments];
  bool rounded;  // to bf16, written; otherwise added to fp32
};
struct Sums {
  int count = 0;
  int first_block[2 * max_parts];
  Sum sum[2 * max_parts];
};
inline constexpr int sum_threads = 128;

// A thread per four neighbouring elements; reads 4 bytes per element and plane.
static __global__ void __launch_bounds__(sum_threads)
    sum_kernel(const __grid_constant__ Sums sums) {
  int which = 0;
  const int block = static_cast<int>(blockIdx.x);
  while (which + 1 < sums.count && block >= sums.first_block[which + 1]) ++which;
  const Sum& s = sums.sum[which];
  const unsigned units = static_cast<unsigned>(s.cols + 3) / 4;
  const unsigned index =
      static_cast<unsigned>(block - sums.first_block[which]) * sum_threads + threadIdx.x;
  const int segment = static_cast<int>(blockIdx.y);
  const float factor = s.factor[segment];
  const unsigned row = index / units, col = (index - row * units) * 4;
  await_previous();
  if (row >= static_cast<unsigned>(s.rows)) return;
  const float* from =
      s.planes + segment * s.segment + static_cast<int64_t>(row) * s.from_pitch + col;
  float4 sum = make_float4(0, 0, 0, 0);
  constexpr int batch = 8;
  for (int i = 0; i < s.count; i += batch, from += batch * s.plane) {
    float4 v[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j)
      v[j] = i + j < s.count ? *reinterpret_cast<const float4*>(from + j * s.plane)
                             : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < batch; ++j)
      sum.x += v[j].x, sum.y += v[j].y, sum.z += v[j].z, sum.w += v[j].w;
  }
  if (s.rounded) {
    bf16* const to = static_cast<bf16*>(s.to[segment]) + row * s.to_pitch + col;
    *reinterpret_cast<uint2*>(to) =
        make_uint2(pack(factor * sum.x, factor * sum.y), pack(factor * sum.z, factor * sum.w));
    return;
  }
  float* const to = static_cast<float*>(s.to[segment]) + row * s.to_pitch + col;
  const float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (col + i < static_cast<unsigned>(s.cols)) to[i] += factor * v[i];
}

}  // namespace qlab::cuda::adapter
