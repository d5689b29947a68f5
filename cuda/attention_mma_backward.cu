#include "cuda/attention_mma_tiles.cuh"

namespace qlab::cuda {
namespace {

/// (log2(e) L, this lane's part of rowsum(dO * O)) of a query, which four lanes share.
template <int dim, class T>
__device__ float2 query_stat(const T* g, const T* o, float lse) {
  float delta = 0;
#pragma unroll
  for (int col = 0; col < dim; col += 32) {
    const int at = col + static_cast<int>(threadIdx.x) % 4 * vector_width;
    if (at >= dim) break;
    float u[vector_width], v[vector_width];
    load(u, g + at);
    load(v, o + at);
#pragma unroll
    for (int i = 0; i < vector_width; ++i) delta = fmaf(u[i], v[i], delta);
  }
  return make_float2(lse * log2_e, delta);
}

// One block per 16 m warps queries of a head, longest first: dQ = sum over key tiles, in order, of
// dS K, in registers, and stats = (log2(e) L, rowsum(dO * O)) for the next kernel. Reads q, g and o
// once, K and V of the visible keys once per block.
template <class T, int dim, int warps, int m, int keys>
__global__ void __launch_bounds__(32 * warps, 2)
    attention_dq_mma_kernel(HeadRows<T> dq, float2* stats, HeadRows<const T> g, HeadRows<const T> o,
                            const float* lse, AttentionInputs<T> in) {
  extern __shared__ uint4 memory[];
  constexpr int threads = 32 * warps, rows = 16 * m * warps, n = keys / 8;
  constexpr uint32_t tile_bytes = keys * row_bytes<dim>;
  const Place place(in, in.heads);
  const int first = (place.tiles - 1 - place.tile) * rows;
  if (first >= place.len_q) return;
  const int head = place.head, kv_head = head / (in.heads / in.kv_heads);
  const int count = min(rows, place.len_q - first), visible = first + count + place.offset;
  const int warp = static_cast<int>(threadIdx.x) / 32, warp_first = first + 16 * m * warp;
  const uint32_t q_tile = shared_address(memory), g_tile = q_tile + rows * row_bytes<dim>;
  const uint32_t stages = g_tile + rows * row_bytes<dim>;
  const auto fetch = [&](int key, uint32_t stage) {
    load_tile<keys, dim, threads>(stage, in.k.at(place.k_begin + key, kv_head, dim), in.k.pitch,
                                  visible - key);
    load_tile<keys, dim, threads>(stage + tile_bytes, in.v.at(place.k_begin + key, kv_head, dim),
                                  in.v.pitch, visible - key);
  };
  load_tile<rows, dim, threads>(q_tile, in.q.at(place.q_begin + first, head, dim), in.q.pitch,
                                count);
  load_tile<rows, dim, threads>(g_tile, g.at(place.q_begin + first, head, dim), g.pitch, count);
  if (visible > 0) fetch(0, stages);

  const uint32_t q_lane = left_lane<dim>(q_tile + 16 * m * warp * row_bytes<dim>);
  const uint32_t g_lane = q_lane + (g_tile - q_tile);
  const float scale2 = in.scale * log2_e;
  float2 stat[m][2] = {};
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int local = warp_first + 16 * i + lane_row(2 * h);
      const int64_t row = place.q_begin + local;
      const bool inside = local < place.len_q;
      if (inside)
        stat[i][h] =
            query_stat<dim>(g.at(row, head, dim), o.at(row, head, dim), lse[row * in.heads + head]);
      float& delta = stat[i][h].y;
      delta += __shfl_xor_sync(0xffffffffu, delta, 1);
      delta += __shfl_xor_sync(0xffffffffu, delta, 2);
      if (inside && threadIdx.x % 4 == 0) stats[head * in.rows + row] = stat[i][h];
    }
  float out[m][dim / 8][4] = {};
  uint32_t stage = stages;
  for (int key = 0; key < visible; key += keys) {
    wait_for_copies();
    __syncthreads();
    const uint32_t here = stage;
    stage = stages + (stages + 2 * tile_bytes - stage);
    if (key + keys < visible) fetch(key + keys, stage);
    if (key >= warp_first + 16 * m + place.offset) continue;
    float s[m][n][4] = {}, ds[m][n][4];
    for_each_element<m, n>([&](int i, int j, int e) { ds[i][j][e] = -stat[i][e / 2].y; });
    multiply_nt<T, dim>(s, q_lane, right_lane<dim>(here));
    multiply_nt<T, dim>(ds, g_lane, right_lane<dim>(here + tile_bytes));
    for_each_element<m, n>([&](int i, int j, int e) {
      ds[i][j][e] *= exp2_fast(fmaf(s[i][j][e], scale2, -stat[i][e / 2].x));
    });
    if (key + keys - 1 > warp_first + place.offset)
      for_each_element<m, n>([&](int i, int j, int e) {
        if (key + 8 * j + lane_col(e) > warp_first + 16 * i + lane_row(e) + place.offset)
          ds[i][j][e] = 0;
      });
    uint32_t left[m][n / 2][4];
    round_to_left<T>(left, ds);
    multiply_nn<T, dim>(out, left, left_lane<dim>(here));
  }

  wait_for_copies();
  __syncthreads();
  for_each_element<m, dim / 8>([&](int i, int j, int e) { out[i][j][e] *= in.scale; });
  store_warp_rows<dim, m>(dq.at(place.q_begin + warp_first, head, dim), dq.pitch,
                          place.len_q - warp_first,
                          reinterpret_cast<T*>(memory) + 16 * m * warp * tile_pitch<dim>, out);
}

constexpr int half_threads = 128;

/// Waits for the warps of one half of a block.
template <int threads>
__device__ void synchronize_half(int half) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + half), "n"(threads) : "memory");
}

template <int n>
__device__ void put(float4* box, const float (&c)[1][n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j)
    box[half_threads * j] = make_float4(c[0][j][0], c[0][j][1], c[0][j][2], c[0][j][3]);
}
template <int n>
__device__ void add(float (&c)[1][n][4], const float4* box) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float4 v = box[half_threads * j];
    c[0][j][0] += v.x, c[0][j][1] += v.y, c[0][j][2] += v.z, c[0][j][3] += v.w;
  }
}

// One block per 64 keys of a key/value head, longest first: dK and dV, in registers, summed over
// the group's heads and over query tiles; each half of the block takes every second tile, in order,
// and their two sums are added. Scores are transposed: rows are keys. Reads k and v once, q and g
// of the queries that see the keys once per block.
template <class T, int dim, int queries>
__global__ void __launch_bounds__(2 * half_threads)
    attention_dkv_mma_kernel(HeadRows<T> dk, HeadRows<T> dv, HeadRows<const T> g,
                             const float2* stats, AttentionInputs<T> in) {
  extern __shared__ uint4 memory[];
  constexpr int rows = half_threads / 2, n = queries / 8;
  constexpr uint32_t tile_bytes = queries * row_bytes<dim>;
  constexpr uint32_t stage_bytes = 2 * tile_bytes + queries * sizeof(float2);
  const Place place(in, in.kv_heads);
  const int first = place.tile * rows;
  if (first >= place.len_k) return;
  const int half = static_cast<int>(threadIdx.x) / half_threads;
  const int thread = static_cast<int>(threadIdx.x) % half_threads, warp = thread / 32;
  const int warp_first = first + 16 * warp, ratio = in.heads / in.kv_heads;
  const uint32_t k_tile = shared_address(memory), v_tile = k_tile + rows * row_bytes<dim>;
  const uint32_t stages = v_tile + rows * row_bytes<dim> + 2 * half * stage_bytes;
  const int64_t key_row = place.k_begin + first;
  load_tile<rows, dim, 2 * half_threads>(k_tile, in.k.at(key_row, place.head, dim), in.k.pitch,
                                         place.len_k - first);
  load_tile<rows, dim, 2 * half_threads>(v_tile, in.v.at(key_row, place.head, dim), in.v.pitch,
                                         place.len_k - first);

  const int begin = first > place.offset ? (first - place.offset) / queries * queries : 0;
  int head = place.head * ratio, query = begin;
  const int end = begin < place.len_q ? head + ratio : head;
  const auto advance = [&] {
    query += queries;
    if (query >= place.len_q) query = begin, ++head;
  };
  const auto fetch = [&](uint32_t stage) {
    if (head >= end) return;
    const int64_t row = place.q_begin + query;
    const int count = place.len_q - query;
    load_tile<queries, dim, half_threads>(stage, in.q.at(row, head, dim), in.q.pitch, count,
                                          thread);
    load_tile<queries, dim, half_threads>(stage + tile_bytes, g.at(row, head, dim), g.pitch, count,
                                          thread);
    if (thread < queries)
      copy_async<8>(stage + 2 * tile_bytes + 8 * thread, stats + head * in.rows + row + thread,
                    thread < count);
  };
  if (half == 1) advance();
  fetch(stages);

  const uint32_t k_lane = left_lane<dim>(k_tile + 16 * warp * row_bytes<dim>);
  const uint32_t v_lane = k_lane + (v_tile - k_tile);
  const float scale2 = in.scale * log2_e;
  float out_k[1][dim / 8][4] = {}, out_v[1][dim / 8][4] = {};
  uint32_t stage = 0;
  wait_for_copies();
  __syncthreads();
  while (head < end) {
    wait_for_copies();
    synchronize_half<half_threads>(half);
    const int here_query = query;
    const uint32_t here = stages + stage;
    advance();
    advance();
    stage = stage_bytes - stage;
    fetch(stages + stage);
    if (here_query + queries + place.offset <= warp_first) continue;
    const auto* const columns =
        reinterpret_cast<const float4*>(reinterpret_cast<const char*>(memory) +
                                        (here + 2 * tile_bytes - k_tile)) +
        thread % 4;
    float p[1][n][4] = {}, ds[1][n][4];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float4 c = columns[4 * j];
      ds[0][j][0] = ds[0][j][2] = -c.y;
      ds[0][j][1] = ds[0][j][3] = -c.w;
    }
    multiply_nt<T, dim>(p, k_lane, right_lane<dim>(here));
    multiply_nt<T, dim>(ds, v_lane, right_lane<dim>(here + tile_bytes));
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float4 c = columns[4 * j];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        p[0][j][e] = exp2_fast(fmaf(p[0][j][e], scale2, e % 2 == 0 ? -c.x : -c.z));
    }
    if (here_query + place.offset < warp_first + 15)
      for_each_element<1, n>([&](int i, int j, int e) {
        if (warp_first + lane_row(e) > here_query + 8 * j + lane_col(e) + place.offset)
          p[i][j][e] = 0;
      });
    for_each_element<1, n>([&](int i, int j, int e) { ds[i][j][e] *= p[i][j][e]; });
    uint32_t left[1][n / 2][4];
    round_to_left<T>(left, p);
    multiply_nn<T, dim>(out_v, left, left_lane<dim>(here + tile_bytes));
    round_to_left<T>(left, ds);
    multiply_nn<T, dim>(out_k, left, left_lane<dim>(here));
  }

  __syncthreads();
  float4* const box = reinterpret_cast<float4*>(memory) + thread;
  constexpr int box_size = half_threads * dim / 8;
  if (half == 0)
    put(box, out_v);
  else
    put(box + box_size, out_k);
  __syncthreads();
  if (half == 0)
    add(out_k, box + box_size);
  else
    add(out_v, box);
  __syncthreads();
  for_each_element<1, dim / 8>([&](int i, int j, int e) { out_k[i][j][e] *= in.scale; });
  T* const own = reinterpret_cast<T*>(memory) + (16 * warp + half * rows) * tile_pitch<dim>;
  const int64_t row = place.k_begin + warp_first;
  const int count = place.len_k - warp_first;
  if (half == 0)
    store_warp_rows<dim, 1>(dk.at(row, place.head, dim), dk.pitch, count, own, out_k);
  else
    store_warp_rows<dim, 1>(dv.at(row, place.head, dim), dv.pitch, count, own, out_v);
}

constexpr int least_shared = 99 * 1024;  // what a block may have on every GPU since sm_80

int shared_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

/// 32 rows per warp where they fit into shared memory, otherwise 16.
template <class T, int dim, int m = 2>
void launch_dq(HeadRows<T> dq, float2* stats, HeadRows<const T> g, HeadRows<const T> o,
               const float* lse, const AttentionInputs<T>& in) {
  constexpr int warps = 4, rows = 16 * m * warps, keys = 32;
  constexpr int bytes = (2 * rows + 4 * keys) * row_bytes<dim>;
  if constexpr (bytes > least_shared)
    if (bytes > shared_limit()) return launch_dq<T, dim, m / 2>(dq, stats, g, o, lse, in);
  launch_attention(attention_dq_mma_kernel<T, dim, warps, m, keys>,
                   ceil_div<int64_t>(in.max_q, rows) * in.sequences * in.heads, 32 * warps, bytes,
                   dq, stats, g, o, lse, in);
}

/// The largest tile of queries that fits into shared memory.
template <class T, int dim, int queries = dim == 64 ? 64 : 32>
void launch_dkv(HeadRows<T> dk, HeadRows<T> dv, HeadRows<const T> g, const float2* stats,
                const AttentionInputs<T>& in) {
  constexpr int rows = half_threads / 2;
  constexpr int bytes =
      (2 * rows + 8 * queries) * row_bytes<dim> + 4 * queries * int{sizeof(float2)};
  if constexpr (bytes > least_shared)
    if (bytes > shared_limit()) return launch_dkv<T, dim, queries / 2>(dk, dv, g, stats, in);
  launch_attention(attention_dkv_mma_kernel<T, dim, queries>,
                   ceil_div<int64_t>(in.max_k, rows) * in.sequences * in.kv_heads, 2 * half_threads,
                   bytes, dk, dv, g, stats, in);
}

}  // namespace

template <class T>
void attention_backward_mma(HeadRows<T> dq, HeadRows<T> dk, HeadRows<T> dv, HeadRows<const T> g,
                            HeadRows<const T> o, const float* lse, float2* stats,
                            const AttentionInputs<T>& in) {
  dispatch_head_dim(in.head_dim, [&]<int dim>() {
    launch_dq<T, dim>(dq, stats, g, o, lse, in);
    launch_dkv<T, dim>(dk, dv, g, stats, in);
  });
}
template void attention_backward_mma(HeadRows<bf16>, HeadRows<bf16>, HeadRows<bf16>,
                                     HeadRows<const bf16>, HeadRows<const bf16>, const float*,
                                     float2*, const AttentionInputs<bf16>&);
template void attention_backward_mma(HeadRows<f16>, HeadRows<f16>, HeadRows<f16>,
                                     HeadRows<const f16>, HeadRows<const f16>, const float*,
                                     float2*, const AttentionInputs<f16>&);

}  // namespace qlab::cuda
