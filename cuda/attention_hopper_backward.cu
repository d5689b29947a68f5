// dQ, dK and dV of attention on Hopper. dQ is computed apart, with S and dP formed again: seven
// products instead of five, but every sum stays in one block's registers, in a fixed order.
#include <algorithm>

#include "cuda/attention_hopper.cuh"
#include "cuda/attention_hopper_dkv.cuh"
#include "cuda/attention_hopper_dq.cuh"
#include "cuda/initcheck.cuh"

namespace qlab::cuda {
namespace hopper {
namespace {

// One block per 16 queries of a sequence and 4 heads, a group of D / 8 threads per query and head:
// one read of dO and O, 8 bytes written.
inline constexpr int stats_rows = 16, stats_heads = 4, stats_threads = 256;
template <int D>
__global__ void __launch_bounds__(stats_threads)
    stats_kernel(Stats stats, Rows16 g, Rows16 o, const float* lse, Problem problem, int blocks) {
  constexpr int lanes = D / vector_width, parallel = stats_threads / lanes;
  const int sequence = blockIdx.x / blocks, first = blockIdx.x % blocks * stats_rows;
  const Span span(problem.cu_q, sequence);
  if (first >= (span.length + query_tile - 1) / query_tile * query_tile) return;
  const int lane = threadIdx.x % lanes;
#pragma unroll
  for (int i = 0; i < stats_rows * stats_heads / parallel; ++i) {
    const int pair = i * parallel + threadIdx.x / lanes;
    const int row = first + pair % stats_rows;
    const int head = blockIdx.y * stats_heads + pair / stats_rows;
    const bool inside = row < span.length && head < problem.heads;
    const int64_t token = span.begin + row;
    float sum = 0;
    if (inside) {
      float u[vector_width], w[vector_width];
      const int column = head * D + lane * vector_width;
      load(u, static_cast<const bf16*>(g.data) + token * g.pitch + column);
      load(w, static_cast<const bf16*>(o.data) + token * o.pitch + column);
#pragma unroll
      for (int c = 0; c < vector_width; ++c) sum = fmaf(u[c], w[c], sum);
    }
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0 && head < problem.heads) {
      const float l = inside ? lse[token * problem.heads + head] : INFINITY;
      const int64_t at = stats.at(head, span, sequence, row);
      stats.lse[at] = l == -INFINITY ? INFINITY : l * log2_e;
      stats.delta[at] = sum;
    }
  }
}

// Persistent blocks of two warps that copy tiles in and two warpgroups that compute.
// dK, dV: items of 128 keys of a key/value head; each warpgroup walks with 64 of them over the
// heads of the group and the queries that see them, 64 at a time, and sums in that order. P and dS
// never leave the registers. K and V are read and dK and dV written once, q and dO once per 128
// keys. dQ: items of 128 queries of a head, 64 per warpgroup, summed in order of key tiles. q and
// dO are read and dQ written once, K and V of the visible keys once per item.
template <int D>
__global__ void __launch_bounds__(block_threads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  QueryShared<D>& by_query = *reinterpret_cast<QueryShared<D>*>(memory);
  KeyShared<D>& by_key = *reinterpret_cast<KeyShared<D>*>(memory);
  const int group = warpgroup(), key_groups = arguments.problem.key_tile / group_rows;
  if (threadIdx.x == 0) arguments.by_key() ? by_key.init(key_groups) : by_query.init();
  __syncthreads();
  if (group == consumers) {
    give_registers<producer_registers>();
    const int warp = threadIdx.x % warpgroup_size / 32;
    if (threadIdx.x % 32 != 0 || warp > 1) return;
    if (arguments.by_key())
      warp == 0 ? dkv_query_producer(arguments, by_key) : dkv_key_producer(arguments, by_key);
    else
      warp == 0 ? dq_key_producer(arguments, by_query) : dq_query_producer(arguments, by_query);
  } else {
    take_registers<consumer_registers>();
    if (!arguments.by_key())
      dq_consumer(arguments, by_query, group);
    else if (group < key_groups)
      dkv_consumer(arguments, by_key, group);
  }
#endif
}

Stats stats_in(void* workspace, int64_t query_rows, const Problem& problem) {
  const int64_t pitch = attention_stats_pitch(query_rows, problem.sequences);
  float* const lse = static_cast<float*>(workspace);
  return {.lse = lse, .delta = lse + problem.heads * pitch, .pitch = pitch};
}

template <int D>
void launch_stats(const char* op, const Stats& stats, const Rows16& g, const Rows16& o,
                  const float* lse, const Problem& problem) {
  const int blocks = ceil_div(problem.max_q, query_tile) * (query_tile / stats_rows);
  const dim3 grid(grid_of(op, int64_t{problem.sequences} * blocks),
                  ceil_div(problem.heads, stats_heads));
  launch_kernel(op, stats_kernel<D>, {grid, stats_threads}, stats, g, o, lse, problem, blocks);
}

struct Plan {
  int key_tile, key_blocks, query_blocks;
};
/// dK and dV have four of the seven products, at smaller tiles: three fifths of the time.
Plan plan_of(const Problem& problem, int blocks) {
  const int share = std::max(1, blocks * 3 / 5);
  KeyProblem by_key{problem, tile};
  if (KeyItem::count(by_key) < share) by_key.key_tile = group_rows;
  const int key_blocks = std::min(share, KeyItem::count(by_key));
  return {by_key.key_tile, key_blocks,
          std::min(std::max(1, blocks - key_blocks), QueryItem::count(problem))};
}

template <int D>
void launch_backward(const Rows16& dq, const Rows16& dk, const Rows16& dv, const Rows16& g,
                     const Rows16& q, const Rows16& k, const Rows16& v, const Rows16& o,
                     const float* lse, void* workspace, const Problem& problem, const Plan& plan) {
  const char* const op = "attention_backward";
  const Stats stats = stats_in(workspace, q.rows, problem);
  launch_stats<D>(op, stats, g, o, lse, problem);
  const auto loads = [&](const Rows16& x, int rows) { return load_map(op, x, D, rows); };
  const BackwardArguments arguments{.q = loads(q, group_rows),
                                    .g = loads(g, group_rows),
                                    .k = loads(k, group_rows),
                                    .v = loads(v, group_rows),
                                    .k_tile = loads(k, tile),
                                    .v_tile = loads(v, tile),
                                    .dq = store_map(op, dq, D),
                                    .dk = store_map(op, dk, D),
                                    .dv = store_map(op, dv, D),
                                    .problem = {problem, plan.key_tile},
                                    .stats = stats,
                                    .key_blocks = plan.key_blocks};
  constexpr int bytes = std::max(sizeof(QueryShared<D>), sizeof(KeyShared<D>));
  launch_tiles(op, backward_kernel<D>, plan.key_blocks + plan.query_blocks, bytes, arguments);
}

}  // namespace
}  // namespace hopper

void hopper_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                               const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& o, const Tensor& lse, const Tensor& cu_q,
                               const Tensor& cu_k, const AttentionShape& shape,
                               const Tensor& workspace) {
  const hopper::Problem problem = hopper::problem_of(cu_q, cu_k, shape);
  const auto queries = [&](const Tensor& x) { return hopper::rows_of(x, shape.heads); };
  const auto keys = [&](const Tensor& x) { return hopper::rows_of(x, shape.kv_heads); };
  const auto run =
      shape.head_dim == 64 ? hopper::launch_backward<64> : hopper::launch_backward<128>;
  for (const Tensor& gradient : {dq, dk, dv}) fill_for_initcheck(gradient);
  run(queries(dq), keys(dk), keys(dv), queries(g), queries(q), keys(k), keys(v), queries(o),
      lse.data<float>(), workspace.raw(), problem,
      hopper::plan_of(problem, multiprocessor_count()));
}

}  // namespace qlab::cuda
