#include "optim/adamw8bit.h"

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = 256, warps = threads / warp_size, per_lane = 256 / warp_size;

struct Buffers {
  float* param;
  const float* grad;
  uint8_t *m_codes, *v_codes;
  float *m_absmax, *v_absmax, *m_plain, *v_plain;
};

// One warp per block of 256, lane l its elements l, l + 32, ...: per element 4 + 4 + 1 + 1 bytes
// read and 4 + 1 + 1 written. The maps lie in shared memory; the largest magnitude goes by shuffle.
__global__ void __launch_bounds__(threads)
    adamw8bit_kernel(Buffers x, const int64_t* table, int64_t tensors, const float* maps,
                     int64_t coded, int64_t first, int64_t last, const float* step,
                     const float* norm) {
  const float gradient_norm = *norm;
  if (!isfinite(gradient_norm)) return;
  __shared__ float map[512];
  for (int i = threadIdx.x; i < 512; i += threads) map[i] = maps[i];
  __syncthreads();
  const int64_t block = first + static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (block >= last) return;
  const AdamWStep s = adamw_step(step);
  const float clip = clip_factor(s, gradient_norm);
  const int64_t* const own = table + 3 * tensor_of_block(table, tensors, block);
  const int64_t begin = own[1] + (block - own[0]) * adamw8bit_block;
  const int64_t left = own[2] - begin;
  const int count = static_cast<int>(left < adamw8bit_block ? left : adamw8bit_block);
  const int lane = threadIdx.x % warp_size;
  float* const param = x.param + begin;
  const float* const grad = x.grad + begin;
  if (block >= coded) {
    float* const m = x.m_plain + (block - coded) * adamw8bit_block;
    float* const v = x.v_plain + (block - coded) * adamw8bit_block;
    for (int i = lane; i < count; i += warp_size)
      adamw8bit_rule(param[i], m[i], v[i], grad[i], s, clip);
    return;
  }
  uint8_t* const m_codes = x.m_codes + (block - first) * adamw8bit_block;
  uint8_t* const v_codes = x.v_codes + (block - first) * adamw8bit_block;
  const float m_scale = x.m_absmax[block], v_scale = x.v_absmax[block];
  float p[per_lane], g[per_lane], m[per_lane], v[per_lane];
  uint8_t m_code[per_lane], v_code[per_lane];
#pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    const int i = j * warp_size + lane;
    const bool there = i < count;
    p[j] = there ? param[i] : 0;
    g[j] = there ? grad[i] : 0;
    m_code[j] = there ? m_codes[i] : 0;
    v_code[j] = there ? v_codes[i] : 0;
  }
  float m_max = 0, v_max = 0;
#pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    const int i = j * warp_size + lane;
    m[j] = map[m_code[j]] * m_scale;
    v[j] = map[256 + v_code[j]] * v_scale;
    adamw8bit_rule(p[j], m[j], v[j], g[j], s, clip);
    if (i >= count) continue;
    param[i] = p[j];
    m_max = fmaxf(m_max, fabsf(m[j]));
    v_max = fmaxf(v_max, v[j]);
  }
  m_max = warp_max(m_max), v_max = warp_max(v_max);
  if (lane == 0) x.m_absmax[block] = m_max, x.v_absmax[block] = v_max;
#pragma unroll
  for (int j = 0; j < per_lane; ++j) {
    const int i = j * warp_size + lane;
    if (i >= count) continue;
    m_codes[i] = signed_code(map, m[j], m_max);
    v_codes[i] = dynamic_code(map + 256, v[j] / v_max);
  }
}

}  // namespace

void adamw8bit(const Tensor& param, const Moments8& moments, int64_t first, int64_t last,
               const Tensor& grad, const Tensor& step, const Tensor& norm) {
  float* const absmax = moments.absmax.data<float>();
  float* const plain = moments.plain.data<float>();
  const Buffers buffers{param.data<float>(),
                        grad.data<float>(),
                        moments.m.data<uint8_t>(),
                        moments.v.data<uint8_t>(),
                        absmax,
                        absmax + moments.coded,
                        plain,
                        plain + moments.plain.dim(1)};
  launch_kernel("adamw8bit", adamw8bit_kernel,
                {grid_of("adamw8bit", ceil_div<int64_t>(last - first, warps)), threads}, buffers,
                moments.table.data<int64_t>(), moments.table.dim(0), moments.maps.data<float>(),
                moments.coded, first, last, step.data<float>(), norm.data<float>());
}

}  // namespace qlab::cuda
