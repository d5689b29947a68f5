// What the tensor-core attention kernels of both passes share.
#pragma once
#include "cuda/attention_mma.cuh"
#include "cuda/mma.cuh"

namespace qlab::cuda {

inline constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

/// The tile of a sequence and head that a block works on: tile 0 of all sequences and heads first.
/// Query i sees the keys up to i + offset.
struct Place {
  int64_t q_begin, k_begin;
  int len_q, len_k, offset, tile, tiles, head;

  template <class T>
  __device__ Place(const AttentionInputs<T>& in, int heads) {
    const unsigned per_tile = in.sequences * heads, pair = blockIdx.x % per_tile;
    const unsigned s = pair / heads;
    head = static_cast<int>(pair % heads);
    tile = static_cast<int>(blockIdx.x / per_tile);
    tiles = static_cast<int>(gridDim.x / per_tile);
    q_begin = in.cu_q[s];
    k_begin = in.cu_k[s];
    len_q = in.cu_q[s + 1] - in.cu_q[s];
    len_k = in.cu_k[s + 1] - in.cu_k[s];
    offset = len_k - len_q;
  }
};

/// Row and column, inside a warp's tile, of a lane's element e of block (0, 0) of a product.
__device__ inline int lane_row(int e) { return static_cast<int>(threadIdx.x) % 32 / 4 + e / 2 * 8; }
__device__ inline int lane_col(int e) { return static_cast<int>(threadIdx.x) % 4 * 2 + e % 2; }

/// Calls f(i, j, e) for all elements of a [16 m, 8 n] product.
template <int m, int n, class F>
__device__ void for_each_element(const F& f) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(i, j, e);
}

/// Calls f.template operator()<head_dim>().
template <class F>
void dispatch_head_dim(int head_dim, const F& f) {
  if (head_dim == 64) return f.template operator()<64>();
  if (head_dim == 80) return f.template operator()<80>();
  if (head_dim == 96) return f.template operator()<96>();
  f.template operator()<128>();
}

template <class... P, class... A>
void launch_attention(void (*kernel)(P...), int64_t blocks, int threads, int shared,
                      A... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  launch_kernel(
      "attention", kernel,
      {grid_of("attention", blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared)},
      arguments...);
}

}  // namespace qlab::cuda
