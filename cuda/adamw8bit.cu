#include "optim/adamw8bit.h"

#include <algorithm>

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = 256, warps = threads / warp_size, per_lane = 256 / warp_size;

constexpr size_t together = 16;  // trials of a launch, whose parameters are at most 4 KB

struct UpdateOf {
  float* param;
  const float* grad;
  uint8_t *m_codes, *v_codes;
  float *m_absmax, *v_absmax, *m_plain, *v_plain;
  const int64_t* table;
  int64_t tensors;
  const float* maps;
  int64_t coded, first, last;
  const float *step, *norm;
};
struct Table {
  UpdateOf of[together];
};

// One warp per block of 256 of a trial, lane l its elements l, l + 32, ...: per element 4 + 4 + 1 +
// 1 bytes read and 4 + 1 + 1 written. The maps lie in shared memory; the largest magnitude goes by
// shuffle.
__global__ void __launch_bounds__(threads) adamw8bit_kernel(const __grid_constant__ Table trials) {
  const UpdateOf& x = trials.of[blockIdx.y];
  const int64_t coded = x.coded, first = x.first;
  const float gradient_norm = *x.norm;
  if (!isfinite(gradient_norm)) return;
  __shared__ float map[512];
  for (int i = threadIdx.x; i < 512; i += threads) map[i] = x.maps[i];
  __syncthreads();
  const int64_t block = first + static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (block >= x.last) return;
  const AdamWStep s = adamw_step(x.step);
  const float clip = clip_factor(s, gradient_norm);
  const int64_t* const own = x.table + 3 * tensor_of_block(x.table, x.tensors, block);
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

void adamw8bit(std::span<const AdamW8Update> trials) {
  for (size_t begin = 0; begin < trials.size(); begin += together) {
    const auto some = trials.subspan(begin, std::min(together, trials.size() - begin));
    Table table{};
    int64_t most = 1;
    for (size_t i = 0; i < some.size(); ++i) {
      const AdamW8Update& t = some[i];
      const Moments8& s = t.moments;
      float* const absmax = s.absmax.data<float>();
      float* const plain = s.plain.data<float>();
      table.of[i] = {.param = t.param.data<float>(),
                     .grad = t.grad.data<float>(),
                     .m_codes = s.m.data<uint8_t>(),
                     .v_codes = s.v.data<uint8_t>(),
                     .m_absmax = absmax,
                     .v_absmax = absmax + s.coded,
                     .m_plain = plain,
                     .v_plain = plain + s.plain.dim(1),
                     .table = s.table.data<int64_t>(),
                     .tensors = s.table.dim(0),
                     .maps = s.maps.data<float>(),
                     .coded = s.coded,
                     .first = t.first,
                     .last = t.last,
                     .step = t.step.data<float>(),
                     .norm = t.norm.data<float>()};
      most = std::max(most, t.last - t.first);
    }
    launch_kernel("adamw8bit", adamw8bit_kernel,
                  {dim3(grid_of("adamw8bit", ceil_div<int64_t>(most, warps)),
                        static_cast<unsigned>(some.size())),
                   threads},
                  table);
  }
}

}  // namespace qlab::cuda
