// dK and dV on Hopper: items of 128 keys of a key/value head, 64 per warpgroup.
#pragma once
#include "cuda/attention_hopper_backward.cuh"

namespace qlab::cuda::hopper {

template <int D>
struct KeyShared {
  static constexpr int stages = 3;
  bf16 k[consumers][group_rows * D];  // later dK
  bf16 v[consumers][group_rows * D];  // later dV
  bf16 q[stages][query_tile * D];
  bf16 g[stages][query_tile * D];
  alignas(16) float lse[stages][query_tile];
  alignas(16) float delta[stages][query_tile];
  Barrier kv_full, kv_empty;
  Barrier q_full[stages], g_full[stages], empty[stages];

  __device__ void init(int groups) {
    init_barrier(kv_full, 1);
    init_barrier(kv_empty, groups);
    for (int i = 0; i < stages; ++i) {
      init_barrier(q_full[i], 1);
      init_barrier(g_full[i], 1);
      init_barrier(empty[i], groups * consumer_warps / consumers);
    }
    fence_barrier_init();
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int D>
__device__ void dkv_key_producer(const BackwardArguments& a, KeyShared<D>& shared) {
  constexpr uint32_t bytes = group_rows * D * sizeof(bf16);
  const int groups = a.problem.key_tile / group_rows;
  uint32_t parity = 1;
  for_each_item<KeyItem>(a.problem, a.share(), [&](const KeyItem& item) {
    wait(shared.kv_empty, parity);
    arrive_expect(shared.kv_full, 2 * groups * bytes);
    for (int group = 0; group < groups; ++group) {
      const int row = item.first + group * group_rows;
      load_rows<D>(shared.k[group], a.k, shared.kv_full, item.k, row, item.kv_head);
      load_rows<D>(shared.v[group], a.v, shared.kv_full, item.k, row, item.kv_head);
    }
    parity ^= 1;
  });
}

template <int D>
__device__ void dkv_query_producer(const BackwardArguments& a, KeyShared<D>& shared) {
  constexpr uint32_t bytes = query_tile * D * sizeof(bf16);
  constexpr uint32_t stats_bytes = query_tile * sizeof(float);
  const int ratio = a.problem.heads / a.problem.kv_heads;
  Ring<KeyShared<D>::stages> queries;
  for_each_item<KeyItem>(a.problem, a.share(), [&](const KeyItem& item) {
    for (int head = item.kv_head * ratio; head < (item.kv_head + 1) * ratio; ++head)
      for (int n = 0; n < item.query_tiles; ++n) {
        const int s = queries.stage, row = item.first_query + n * query_tile;
        wait(shared.empty[s], queries.parity ^ 1);
        const int64_t at = a.stats.at(head, item.q, item.sequence, row);
        arrive_expect(shared.q_full[s], bytes + stats_bytes);
        load_rows<D>(shared.q[s], a.q, shared.q_full[s], item.q, row, head);
        load_bytes(shared.lse[s], a.stats.lse + at, stats_bytes, shared.q_full[s]);
        arrive_expect(shared.g_full[s], bytes + stats_bytes);
        load_bytes(shared.delta[s], a.stats.delta + at, stats_bytes, shared.g_full[s]);
        load_rows<D>(shared.g[s], a.g, shared.g_full[s], item.q, row, head);
        queries.advance();
      }
  });
}

/// Transposed scores: hides each key (row) from the queries (columns) before it.
__device__ inline void mask_queries(float (&s)[query_tile / 2], int key, int first_query,
                                    int offset) {
  const int least = key - offset - first_query - fragment_col();
#pragma unroll
  for (int j = 0; j < query_tile / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (8 * j + c < least + 8 * i) s[4 * j + 2 * i + c] = -INFINITY;
}

/// dK (without the last factor) and dV of one warpgroup's 64 keys, over the heads of the group and
/// the queries that see them. Tiles are transposed: their rows are keys, their columns queries.
template <int D>
__device__ inline void sum_over_queries(float (&out_k)[D / 2], float (&out_v)[D / 2],
                                        const BackwardArguments& a, const KeyItem& item,
                                        KeyShared<D>& shared, Ring<KeyShared<D>::stages>& queries,
                                        int group) {
  const int first = item.first + group * group_rows, key = first + fragment_row();
  const int steps = a.problem.heads / a.problem.kv_heads * item.query_tiles;
  const int lane = threadIdx.x % 32;
  const float scale = a.problem.scale * log2_e;
  const uint64_t k = operand(shared.k[group], 0), v = operand(shared.v[group], 0);
  float s[query_tile / 2], dp[query_tile / 2];
  uint32_t p[query_tile / 4], ds[query_tile / 4];
  int row = item.first_query;
  for (int n = 0; n < steps; ++n) {
    const int stage = queries.stage;
    const float* const lse = shared.lse[stage] + fragment_col();
    const float* const delta = shared.delta[stage] + fragment_col();
    wait(shared.q_full[stage], queries.parity);
    zero_rows<D>(shared.q[stage], query_tile, item.q.length - row, group);
    products_begin();
    multiply_nt<D>(s, k, group_rows, operand(shared.q[stage], 0), query_tile);
    products_commit();
    products_wait<1>();
    pin(out_k);
    pin(out_v);
    pin(p);
    pin(ds);
    if (n > 0) arrive_warp(shared.empty[queries.previous()], lane);
    wait(shared.g_full[stage], queries.parity);
    zero_rows<D>(shared.g[stage], query_tile, item.q.length - row, group);
    products_begin();
    multiply_nt<D>(dp, v, group_rows, operand(shared.g[stage], 0), query_tile);
    products_commit();
    products_wait<1>();
    pin(s);
    if (row + item.offset < first + group_rows - 1) mask_queries(s, key, row, item.offset);
#pragma unroll
    for (int j = 0; j < query_tile / 8; ++j) {
      const float2 l = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
      for (int x = 4 * j; x < 4 * j + 4; ++x)
        s[x] = exp2_fast(fmaf(s[x], scale, -(x % 2 == 0 ? l.x : l.y)));
    }
    pack_rows(p, s);
    pin(p);
    pin(out_v);
    products_begin();
    multiply_nn<query_tile>(out_v, p, operand(shared.g[stage], query_tile * row_bytes));
    products_commit();
    products_wait<1>();
    pin(dp);
#pragma unroll
    for (int j = 0; j < query_tile / 8; ++j) {
      const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
      for (int x = 4 * j; x < 4 * j + 4; ++x) s[x] *= dp[x] - (x % 2 == 0 ? d.x : d.y);
    }
    pack_rows(ds, s);
    pin(ds);
    pin(out_k);
    products_begin();
    multiply_nn<query_tile>(out_k, ds, operand(shared.q[stage], query_tile * row_bytes));
    products_commit();
    queries.advance();
    row += query_tile;
    if (row >= item.q.length) row = item.first_query;
  }
  products_wait<0>();
  pin(out_k);
  pin(out_v);
  if (steps > 0) arrive_warp(shared.empty[queries.previous()], lane);
}

template <int D>
__device__ void dkv_consumer(const BackwardArguments& a, KeyShared<D>& shared, int group) {
  Ring<KeyShared<D>::stages> queries;
  uint32_t parity = 0;
  for_each_item<KeyItem>(a.problem, a.share(), [&](const KeyItem& item) {
    float out_k[D / 2] = {}, out_v[D / 2] = {};
    wait(shared.kv_full, parity);
    sum_over_queries<D>(out_k, out_v, a, item, shared, queries, group);
    group_sync(group);  // no product of the group reads keys and values any more
    put_tile(shared.k[group], out_k, {a.problem.scale, a.problem.scale});
    put_tile(shared.v[group], out_v, {1.0f, 1.0f});
    fence_async();
    group_sync(group);
    if (threadIdx.x % warpgroup_size == 0) {
      const int row = item.first + group * group_rows;
      store_rows<D>(a.dk, shared.k[group], item.k, row, item.kv_head);
      store_rows<D>(a.dv, shared.v[group], item.k, row, item.kv_head);
      commit_stores_and_wait();
      arrive(shared.kv_empty);
    }
    parity ^= 1;
  });
}

#endif

}  // namespace qlab::cuda::hopper
