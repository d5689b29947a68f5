// dQ on Hopper: items of 128 queries of a head, 64 per warpgroup.
#pragma once
#include "cuda/attention_hopper_backward.cuh"

namespace qlab::cuda::hopper {

template <int D>
struct QueryShared {
  static constexpr int stages = 2;
  bf16 q[consumers][group_rows * D];  // later dQ
  bf16 g[consumers][group_rows * D];
  bf16 k[stages][tile * D];
  bf16 v[stages][tile * D];
  Barrier q_full[consumers], q_empty[consumers];
  Barrier k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];

  __device__ void init() {
    for (int i = 0; i < consumers; ++i) {
      init_barrier(q_full[i], 1);
      init_barrier(q_empty[i], 1);
    }
    for (int i = 0; i < stages; ++i) {
      init_barrier(k_full[i], 1);
      init_barrier(v_full[i], 1);
      init_barrier(k_empty[i], consumer_warps);
      init_barrier(v_empty[i], consumer_warps);
    }
    fence_barrier_init();
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int D>
__device__ void dq_query_producer(const BackwardArguments& a, QueryShared<D>& shared) {
  constexpr uint32_t bytes = group_rows * D * sizeof(bf16);
  uint32_t parity = 1;
  for_each_item<QueryItem>(a.problem, a.share(), [&](const QueryItem& item) {
    for (int group = 0; group < consumers; ++group) {
      Barrier& full = shared.q_full[group];
      const int row = item.first + group * group_rows;
      wait(shared.q_empty[group], parity);
      arrive_expect(full, 2 * bytes);
      load_rows<D>(shared.q[group], a.q, full, item.q, row, item.head);
      load_rows<D>(shared.g[group], a.g, full, item.q, row, item.head);
    }
    parity ^= 1;
  });
}

template <int D>
__device__ void dq_key_producer(const BackwardArguments& a, QueryShared<D>& shared) {
  constexpr uint32_t bytes = tile * D * sizeof(bf16);
  Ring<QueryShared<D>::stages> keys;
  for_each_item<QueryItem>(a.problem, a.share(), [&](const QueryItem& item) {
    const int kv_head = item.head / (a.problem.heads / a.problem.kv_heads);
    for (int n = item.key_tiles - 1; n >= 0; --n) {
      const int s = keys.stage;
      wait(shared.k_empty[s], keys.parity ^ 1);
      arrive_expect(shared.k_full[s], bytes);
      load_rows<D>(shared.k[s], a.k_tile, shared.k_full[s], item.k, n * tile, kv_head);
      wait(shared.v_empty[s], keys.parity ^ 1);
      arrive_expect(shared.v_full[s], bytes);
      load_rows<D>(shared.v[s], a.v_tile, shared.v_full[s], item.k, n * tile, kv_head);
      keys.advance();
    }
  });
}

/// dQ of one warpgroup's 64 queries, without the last factor: S and dP of each key tile again, then
/// dS K, last tile first.
template <int D>
__device__ inline void sum_over_keys(float (&out)[D / 2], const BackwardArguments& a,
                                     const QueryItem& item, QueryShared<D>& shared,
                                     Ring<QueryShared<D>::stages>& keys, int group) {
  const int first = item.first + group * group_rows, row = first + fragment_row();
  const int lane = threadIdx.x % 32;
  const float scale = a.problem.scale * log2_e;
  const uint64_t q = operand(shared.q[group], 0), g = operand(shared.g[group], 0);
  float row_lse[2], row_delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = row + 8 * i < item.q.length;
    const int64_t at = a.stats.at(item.head, item.q, item.sequence, row + 8 * i);
    row_lse[i] = inside ? a.stats.lse[at] : INFINITY;
    row_delta[i] = inside ? a.stats.delta[at] : 0.0f;
  }
  float s[tile / 2], dp[tile / 2];
  uint32_t ds[tile / 4];
  for (int n = item.key_tiles - 1; n >= 0; --n) {
    const int stage = keys.stage;
    const int valid = item.k.length - n * tile;
    wait(shared.k_full[stage], keys.parity);
    zero_rows<D>(shared.k[stage], tile, valid, group);
    products_begin();
    multiply_nt<D>(s, q, group_rows, operand(shared.k[stage], 0), tile);
    products_commit();
    products_wait<1>();
    pin(out);
    pin(ds);
    if (n < item.key_tiles - 1) arrive_warp(shared.k_empty[keys.previous()], lane);
    wait(shared.v_full[stage], keys.parity);
    zero_rows<D>(shared.v[stage], tile, valid, group);
    products_begin();
    multiply_nt<D>(dp, g, group_rows, operand(shared.v[stage], 0), tile);
    products_commit();
    products_wait<1>();
    pin(s);
    if ((n + 1) * tile - 1 > first + item.offset) mask_keys(s, row, n * tile, item.offset);
#pragma unroll
    for (int x = 0; x < tile / 2; ++x) s[x] = exp2_fast(fmaf(s[x], scale, -row_lse[x / 2 % 2]));
    products_wait<0>();
    pin(dp);
    arrive_warp(shared.v_empty[stage], lane);
#pragma unroll
    for (int x = 0; x < tile / 2; ++x) s[x] *= dp[x] - row_delta[x / 2 % 2];
    pack_rows(ds, s);
    pin(ds);
    pin(out);
    products_begin();
    multiply_nn<tile>(out, ds, operand(shared.k[stage], tile * row_bytes));
    products_commit();
    keys.advance();
  }
  products_wait<0>();
  pin(out);
  if (item.key_tiles > 0) arrive_warp(shared.k_empty[keys.previous()], lane);
}

template <int D>
__device__ void dq_consumer(const BackwardArguments& a, QueryShared<D>& shared, int group) {
  Ring<QueryShared<D>::stages> keys;
  uint32_t parity = 0;
  for_each_item<QueryItem>(a.problem, a.share(), [&](const QueryItem& item) {
    float out[D / 2] = {};
    wait(shared.q_full[group], parity);
    sum_over_keys<D>(out, a, item, shared, keys, group);
    group_sync(group);  // no product of the group reads the queries any more
    put_tile(shared.q[group], out, {a.problem.scale, a.problem.scale});
    fence_async();
    group_sync(group);
    if (threadIdx.x % warpgroup_size == 0) {
      store_rows<D>(a.dq, shared.q[group], item.q, item.first + group * group_rows, item.head);
      commit_stores_and_wait();
      arrive(shared.q_empty[group]);
    }
    parity ^= 1;
  });
}

#endif

}  // namespace qlab::cuda::hopper
