#include "cuda/attention_mma.cuh"

#include "cuda/attention_mma_tiles.cuh"

namespace qlab::cuda {
namespace {

/// The online softmax: scores become exp2(scale2 s - shift), older sums and outputs are rescaled.
template <int m, int n, int width>
__device__ void softmax_step(float (&s)[m][n][4], float (&out)[m][width][4], float (&maximum)[m][2],
                             float (&sum)[m][2], float scale2) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = maximum[i][h];
#pragma unroll
      for (int j = 0; j < n; ++j)
        highest = fmaxf(highest, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float shift = highest == -INFINITY ? 0.0f : highest * scale2;
      const float correction = exp2_fast(fmaf(maximum[i][h], scale2, -shift));
      maximum[i][h] = highest;
      float total = sum[i][h] * correction;
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale2, -shift));
          total += s[i][j][e];
        }
      sum[i][h] = total;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        out[i][j][2 * h] *= correction;
        out[i][j][2 * h + 1] *= correction;
      }
    }
}

// One block per 16 m warps queries of a head, longest first, its outputs in registers; K and V of
// the visible keys are read once per block, q once, o and lse written once.
template <class T, int dim, int warps, int m, int keys, int blocks>
__global__ void __launch_bounds__(32 * warps, blocks)
    attention_mma_kernel(HeadRows<T> o, float* lse, AttentionInputs<T> in) {
  extern __shared__ uint4 memory[];
  constexpr int threads = 32 * warps, rows = 16 * m * warps, n = keys / 8;
  const Place place(in, in.heads);
  const int first = (place.tiles - 1 - place.tile) * rows;
  if (first >= place.len_q) return;
  const int head = place.head, kv_head = head / (in.heads / in.kv_heads);
  const int count = min(rows, place.len_q - first), visible = first + count + place.offset;
  const int warp = static_cast<int>(threadIdx.x) / 32, warp_first = first + 16 * m * warp;
  const uint32_t q_tile = shared_address(memory), k_tile = q_tile + rows * row_bytes<dim>;
  const uint32_t v_tile = k_tile + keys * row_bytes<dim>;
  const T* k = in.k.at(place.k_begin, kv_head, dim);
  const T* v = in.v.at(place.k_begin, kv_head, dim);
  load_tile<rows, dim, threads>(q_tile, in.q.at(place.q_begin + first, head, dim), in.q.pitch,
                                count);
  load_tile<keys, dim, threads>(k_tile, k, in.k.pitch, visible);

  const uint32_t q_lane = left_lane<dim>(q_tile + 16 * m * warp * row_bytes<dim>);
  const uint32_t k_lane = right_lane<dim>(k_tile), v_lane = left_lane<dim>(v_tile);
  const float scale2 = in.scale * log2_e;
  float out[m][dim / 8][4] = {}, sum[m][2] = {}, maximum[m][2];
#pragma unroll
  for (int i = 0; i < m; ++i) maximum[i][0] = maximum[i][1] = -INFINITY;
  for (int key = 0; key < visible; key += keys) {
    wait_for_copies();
    __syncthreads();
    load_tile<keys, dim, threads>(v_tile, v, in.v.pitch, visible - key);
    v += static_cast<int64_t>(keys) * in.v.pitch;
    const bool seen = key < warp_first + 16 * m + place.offset;
    float s[m][n][4] = {};
    if (seen) multiply_nt<T, dim>(s, q_lane, k_lane);
    wait_for_copies();
    __syncthreads();
    const int next = key + keys;
    k += static_cast<int64_t>(keys) * in.k.pitch;
    if (next < visible) load_tile<keys, dim, threads>(k_tile, k, in.k.pitch, visible - next);
    if (!seen) continue;
    if (next - 1 > warp_first + place.offset)
      for_each_element<m, n>([&](int i, int j, int e) {
        if (key + 8 * j + lane_col(e) > warp_first + 16 * i + lane_row(e) + place.offset)
          s[i][j][e] = -INFINITY;
      });
    softmax_step(s, out, maximum, sum, scale2);
    uint32_t p[m][n / 2][4];
    round_to_left<T>(p, s);
    multiply_nn<T, dim>(out, p, v_lane);
  }

  wait_for_copies();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[i][h];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = total == 0 ? 0.0f : 1.0f / total;
#pragma unroll
      for (int j = 0; j < dim / 8; ++j) {
        out[i][j][2 * h] *= inverse;
        out[i][j][2 * h + 1] *= inverse;
      }
      const int row = warp_first + 16 * i + lane_row(2 * h);
      if (threadIdx.x % 4 == 0 && row < place.len_q)
        lse[(place.q_begin + row) * in.heads + head] =
            fmaf(maximum[i][h] * scale2, ln_2, logf(total));
    }
  store_warp_rows<dim, m>(o.at(place.q_begin + warp_first, head, dim), o.pitch,
                          place.len_q - warp_first,
                          reinterpret_cast<T*>(memory) + 16 * m * warp * tile_pitch<dim>, out);
}

template <class T, int dim, int warps, int m, int keys, int blocks>
void launch_forward(HeadRows<T> o, float* lse, const AttentionInputs<T>& in) {
  constexpr int rows = 16 * m * warps;
  launch_attention(attention_mma_kernel<T, dim, warps, m, keys, blocks>,
                   ceil_div<int64_t>(in.max_q, rows) * in.sequences * in.heads, 32 * warps,
                   (rows + 2 * keys) * row_bytes<dim>, o, lse, in);
}

}  // namespace

bool attention_mma_supports(int64_t head_dim) {
  return code_architecture() >= 80 &&
         (head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128);
}

template <class T>
void attention_mma(HeadRows<T> o, float* lse, const AttentionInputs<T>& in) {
  dispatch_head_dim(in.head_dim, [&]<int dim>() {
    launch_forward<T, dim, 4, 2, 64, dim == 64 ? 3 : 2>(o, lse, in);
  });
}
template void attention_mma(HeadRows<bf16>, float*, const AttentionInputs<bf16>&);
template void attention_mma(HeadRows<f16>, float*, const AttentionInputs<f16>&);

}  // namespace qlab::cuda
