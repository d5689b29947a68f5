// What the Hopper attention kernels share: which tile a block works on, and tensor maps that end
// where a sequence ends.
#pragma once
#include "core/ops/attention.h"
#include "cuda/hopper.cuh"

namespace qlab::cuda::hopper {

inline constexpr int tile = 128;       // queries or keys of a block
inline constexpr int group_rows = 64;  // of which each of its two consumer warpgroups has half
inline constexpr int consumers = 2;
inline constexpr int block_threads = (consumers + 1) * warpgroup_size;
inline constexpr int consumer_warps = consumers * warpgroup_size / 32;
// Per thread; one producer and two consumer warpgroups share 65,536.
inline constexpr int producer_registers = 24, consumer_registers = 240;
inline constexpr float log2_e = 1.4426950408889634f;

/// One of the matrices [tokens, heads * D] in rows of bf16.
struct Rows16 {
  void* data;
  int64_t pitch, rows;
  int heads;
};

struct Problem {
  const int32_t* cu_q;
  const int32_t* cu_k;
  int sequences, heads, kv_heads, max_q, max_k;
  float scale;
};

struct Span {
  int begin, length;
  __device__ Span(const int32_t* cu, int sequence)
      : begin(cu[sequence]), length(cu[sequence + 1] - cu[sequence]) {}
};

/// For loads: boxes of `box_rows` tokens of one head. They run on into the next sequence, whose
/// rows may hold anything: see zero_rows.
CUtensorMap load_map(const char* op, const Rows16& x, int head_dim, int box_rows);
/// For stores: boxes of group_rows tokens that end with their sequence. Tokens have two dimensions
/// of equal stride, the first of size group_rows, from a base moved back by as many rows: token t
/// is (r, t + group_rows - r) for every r. A box that starts at the right r leaves the first
/// dimension where it leaves the sequence, and what lies beyond is not written. (A load may touch
/// memory at the base for what it then replaces by zeros, so this cannot serve loads.)
CUtensorMap store_map(const char* op, const Rows16& x, int head_dim);

template <int D>
__device__ inline void load_rows(void* to, const CUtensorMap& map, Barrier& barrier,
                                 const Span& span, int row, int head) {
  load_box(to, map, barrier, 0, span.begin + row, head * (D / chunk_width));
}
template <int D>
__device__ inline void store_rows(const CUtensorMap& map, const void* from, const Span& span,
                                  int row, int head) {
  const int outside = max(0, group_rows - span.length + row);
  store_box(map, from, 0, outside, head * (D / chunk_width),
            span.begin + row + group_rows - outside);
}

/// Keeps a warpgroup's threads together.
__device__ inline void group_sync(int group) { named_sync(3 + group, warpgroup_size); }

/// Clears the rows of a loaded tile from `valid` on, where its sequence ended: a factor that is 0
/// there does not hide a neighbour's NaN. Each warpgroup clears all of them, for its own products.
template <int D>
__device__ inline void zero_rows(void* rows, int tile_rows, int valid, int group) {
  if (valid >= tile_rows) return;
#pragma unroll
  for (int chunk = 0; chunk < D / chunk_width; ++chunk) {
    char* const begin = static_cast<char*>(rows) + chunk * tile_rows * row_bytes;
    for (int i = valid * row_bytes + threadIdx.x % warpgroup_size * 16; i < tile_rows * row_bytes;
         i += warpgroup_size * 16)
      *reinterpret_cast<uint4*>(begin + i) = make_uint4(0, 0, 0, 0);
  }
  fence_async();
  group_sync(group);
}

/// This block among those that share a list of items.
struct Share {
  int block, blocks;
};

__device__ inline Share whole_grid() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
}

/// Calls f(item) for this block's items. They are sorted by length, and every second round is dealt
/// backwards, so that all blocks get about the same.
template <class Item, class ItemProblem, class F>
__device__ inline void for_each_item(const ItemProblem& problem, const Share& share, F&& f) {
  const int items = Item::count(problem);
  for (int round = 0; round * share.blocks < items; ++round) {
    const int place = round % 2 == 0 ? share.block : share.blocks - 1 - share.block;
    const int index = round * share.blocks + place;
    if (index >= items) continue;
    const Item item(problem, index);
    if (!item.empty()) f(item);
  }
}

/// 128 queries of one head; the longest rows come first.
struct QueryItem {
  int sequence, head, first;
  Span q, k;
  int offset, key_tiles;

  QLAB_HD static int tiles(const Problem& p) { return (p.max_q + tile - 1) / tile; }
  QLAB_HD static int count(const Problem& p) { return tiles(p) * p.sequences * p.heads; }
  __device__ QueryItem(const Problem& p, int index)
      : sequence(index / p.heads % p.sequences),
        head(index % p.heads),
        first((tiles(p) - 1 - index / p.heads / p.sequences) * tile),
        q(p.cu_q, sequence),
        k(p.cu_k, sequence),
        offset(k.length - q.length),
        key_tiles((max(0, min(k.length, first + tile + offset)) + tile - 1) / tile) {}
  __device__ bool empty() const { return first >= q.length; }
};

__device__ inline float exp2_fast(float x) {  // relative error 2^-22
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
/// First row of this thread inside its warpgroup's 64, and its first column; see product().
__device__ inline int fragment_row() {
  return threadIdx.x % warpgroup_size / 32 * 16 + threadIdx.x % 32 / 4;
}
__device__ inline int fragment_col() { return threadIdx.x % 4 * 2; }
/// Hides the keys beyond each row's own; `row` is this thread's first.
__device__ inline void mask_keys(float (&s)[tile / 2], int row, int first_key, int offset) {
  const int last = row + offset - first_key - fragment_col();
#pragma unroll
  for (int j = 0; j < tile / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (8 * j + c > last + 8 * i) s[4 * j + 2 * i + c] = -INFINITY;
}

/// The warpgroup of this thread, known to the compiler as equal in a warp.
__device__ inline int warpgroup() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / warpgroup_size, 0);
}

Problem problem_of(const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape);
Rows16 rows_of(const Tensor& x, int64_t heads);

template <class Arguments>
void launch_tiles(const char* op, void (*kernel)(Arguments), int blocks, int shared_bytes,
                  const Arguments& arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  launch_kernel(op, kernel,
                {static_cast<unsigned>(blocks), block_threads, static_cast<size_t>(shared_bytes)},
                arguments);
}

}  // namespace qlab::cuda::hopper
