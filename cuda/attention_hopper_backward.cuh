// What the two halves of the Hopper backward pass share.
#pragma once
#include "cuda/attention_hopper_tiles.cuh"

namespace qlab::cuda::hopper {

inline constexpr int query_tile = 64;  // queries that a dK/dV block takes at a time

/// A dK/dV item has 128 keys, or 64 (and one warpgroup) where there are fewer items than blocks;
/// the sums are the same.
struct KeyProblem : Problem {
  int key_tile;
};

/// Keys of one key/value head and all queries that see them; the first keys come first.
struct KeyItem {
  int sequence, kv_head, first;
  Span q, k;
  int offset, first_query, query_tiles;

  QLAB_HD static int count(const KeyProblem& p) {
    return (p.max_k + p.key_tile - 1) / p.key_tile * p.sequences * p.kv_heads;
  }
  __device__ KeyItem(const KeyProblem& p, int index)
      : sequence(index / p.kv_heads % p.sequences),
        kv_head(index % p.kv_heads),
        first(index / p.kv_heads / p.sequences * p.key_tile),
        q(p.cu_q, sequence),
        k(p.cu_k, sequence),
        offset(k.length - q.length),
        first_query(max(0, first - offset) / query_tile * query_tile),
        query_tiles(max(0, q.length - first_query + query_tile - 1) / query_tile) {}
  __device__ bool empty() const { return first >= k.length; }
};

/// lse * log2(e) and delta of each query, [heads, pitch] both. Sequences start at multiples of 16
/// bytes and are followed by room up to a multiple of query_tile, which holds inf and 0: P and dS
/// are 0 there.
struct Stats {
  float* lse;
  float* delta;
  int64_t pitch;

  __device__ int64_t at(int head, const Span& span, int sequence, int row) const {
    return head * pitch + (span.begin + 3) / 4 * 4 + sequence * (query_tile + 4) + row;
  }
};

struct BackwardArguments {
  CUtensorMap q, g, k, v;      // boxes of 64 tokens
  CUtensorMap k_tile, v_tile;  // boxes of 128
  CUtensorMap dq, dk, dv;
  KeyProblem problem;
  Stats stats;
  int key_blocks;  // the first blocks compute dK and dV, the others dQ

  __device__ bool by_key() const { return static_cast<int>(blockIdx.x) < key_blocks; }
  __device__ Share share() const {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    return by_key() ? Share{block, key_blocks} : Share{block - key_blocks, blocks - key_blocks};
  }
};

}  // namespace qlab::cuda::hopper
