// Reductions in a fixed order: the same block size gives the same bits. All threads get the result.
#pragma once
#include "cuda/launch.cuh"

namespace qlab::cuda {

inline constexpr int warp_size = 32;

// Addition commutes, so in a butterfly every lane forms the same tree.
template <class A>
__device__ inline A warp_sum(A v) {
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}
__device__ inline float warp_max(float v) {
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, distance));
  return v;
}

/// `scratch` holds one value per warp; blockDim.x is a multiple of 32, at most 1024.
template <class A>
__device__ inline A block_sum(A v, A* scratch) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? scratch[lane] : A{});
  __syncthreads();
  return v;
}
__device__ inline float block_max(float v, float* scratch) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  v = warp_max(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = warp_max(scratch[lane < warps ? lane : 0]);
  __syncthreads();
  return v;
}

}  // namespace qlab::cuda
