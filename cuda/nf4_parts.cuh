// The sum of parts that blocks of the kernels behind nf4_matmul have computed, in a fixed order.
#pragma once
#include "cuda/nf4_linear.cuh"

namespace qlab::cuda {
namespace {

/// Blocks of one tile that have written their part; 0 between launches, which follow each other on
/// a device's one stream.
constexpr int max_tiles = 16384;
__device__ uint32_t finished[max_tiles];

/// y of eight neighbouring outputs of a token.
template <class T>
__device__ void write_result(const Problem<T>& p, int token, int output, float (&v)[vector_width]) {
  if (p.addend != nullptr) {
    float other[vector_width];
    load(other, p.addend + token * p.addend_pitch + output);
#pragma unroll
    for (int i = 0; i < vector_width; ++i) v[i] += other[i];
  }
  store(p.y + token * p.y_pitch + output, v);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void synchronize_cluster() {
  __syncwarp();  // `aligned` asks for whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
/// v += eight floats at a place of this block's shared memory, read in block `rank` of the cluster.
__device__ inline void add_remote(float (&v)[vector_width], const float* place, int rank) {
  const auto local = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
#pragma unroll
  for (int i = 0; i < vector_width; i += 4) {
    float a, b, c, d;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
                 : "r"(remote + i * 4)
                 : "memory");
    v[i] += a, v[i + 1] += b, v[i + 2] += c, v[i + 3] += d;
  }
}
#else
__device__ inline void synchronize_cluster() {}
__device__ inline void add_remote(float (&)[vector_width], const float*, int) {}
#endif

/// Writes the sums [tokens, tile] of a block. Where others hold further parts of them, those of a
/// cluster share out the outputs; otherwise the last block to come adds all. Always in the order of
/// the parts.
template <int tile, int tokens, int threads, class T>
__device__ void finish(const Problem<T>& p, int outputs, const float* sum, int pitch,
                       int first_output, int first_token) {
  constexpr int units = tile / vector_width;
  const int64_t part = static_cast<int64_t>(p.m) * outputs;
  const auto visit = [&](auto&& unit, int first = 0, int step = threads) {
    for (int i = first + static_cast<int>(threadIdx.x); i < tokens * units; i += step) {
      const int row = i / units, column = i % units * vector_width;
      const int token = first_token + row, output = first_output + column;
      if (token < p.m && output < outputs) unit(sum + row * pitch + column, token, output);
    }
  };
  if (p.splits == 1)
    return visit([&](const float* from, int token, int output) {
      float v[vector_width];
      load(v, from);
      write_result(p, token, output, v);
    });
  if (p.clustered) {
    synchronize_cluster();
    visit(
        [&](const float* from, int token, int output) {
          float v[vector_width] = {};
          for (int s = 0; s < p.splits; ++s) add_remote(v, from, s);
          write_result(p, token, output, v);
        },
        static_cast<int>(blockIdx.y) * threads, p.splits * threads);
    return synchronize_cluster();  // the others have read this block's sums
  }
  visit([&](const float* from, int token, int output) {
    float v[vector_width];
    load(v, from);
    store(p.partial + blockIdx.y * part + static_cast<int64_t>(token) * outputs + output, v);
  });
  __threadfence();
  __syncthreads();
  const uint32_t own = blockIdx.z * gridDim.x + blockIdx.x;
  const bool last = threadIdx.x == 0 && atomicAdd(&finished[own], 1) == gridDim.y - 1;
  if (__syncthreads_or(static_cast<int>(last)) == 0) return;
  __threadfence();
  if (threadIdx.x == 0) finished[own] = 0;
  visit([&](const float*, int token, int output) {
    const float* const from = p.partial + static_cast<int64_t>(token) * outputs + output;
    float v[vector_width] = {};
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s) {
      const auto* const words = reinterpret_cast<const float4*>(from + s * part);
      const float4 a = __ldcg(words), b = __ldcg(words + 1);
      v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w;
      v[4] += b.x, v[5] += b.y, v[6] += b.z, v[7] += b.w;
    }
    write_result(p, token, output, v);
  });
}

}  // namespace
}  // namespace qlab::cuda
