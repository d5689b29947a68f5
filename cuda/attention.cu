#include "core/ops/attention.h"

#include <cmath>

#include "cuda/attention_hopper.cuh"
#include "cuda/attention_mma.cuh"
#include "cuda/attention_tiles.cuh"
#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

struct Layout {
  const int32_t* cu_q;
  const int32_t* cu_k;
  int heads, kv_heads, head_dim;
  int tiles;  // of the longest sequence; the grid is [sequences * tiles, heads]
  float scale;
};

/// The sequence of this block. Query i sees the keys up to i + offset.
struct Sequence {
  int64_t q_begin, k_begin;
  int len_q, len_k, offset;

  __device__ explicit Sequence(const Layout& layout) {
    const unsigned s = blockIdx.x / layout.tiles;
    q_begin = layout.cu_q[s];
    k_begin = layout.cu_k[s];
    len_q = layout.cu_q[s + 1] - layout.cu_q[s];
    len_k = layout.cu_k[s + 1] - layout.cu_k[s];
    offset = len_k - len_q;
  }
  __device__ bool sees(int query, int key) const {
    return query < len_q && key < len_k && key <= query + offset;
  }
};

/// Rows begin .. begin + 64, cut at `end`.
template <class T>
__device__ Rows<T> rows_of(const HeadRows<const T>& x, int64_t sequence_begin, int begin, int end,
                           int head, int head_dim) {
  const int count = end - begin < tile ? end - begin : tile;
  return {x.at(sequence_begin + begin, head, head_dim), x.pitch, count};
}

// Two blocks hide each other's barriers; the widest heads need the registers of both.
template <int groups>
constexpr int blocks_per_multiprocessor = groups <= 2 ? 2 : 1;

/// The online softmax of four rows: scores become exp(s - maximum), older outputs are rescaled.
template <int groups>
__device__ void softmax_step(Scores& s, Outputs<groups>& out, float (&maximum)[4],
                             float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float previous = maximum[i];
    const float here = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
    maximum[i] = fmaxf(previous, row_max(here));
    const float shift = maximum[i] == -INFINITY ? 0.0f : maximum[i];
    const float correction = expf(previous - shift);
    sum[i] *= correction;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[i][j] = expf(s[i][j] - shift);
      sum[i] += s[i][j];
    }
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int c = 0; c < 4; ++c) out[i][group][c] *= correction;
  }
}

// One block per 64 queries of a head, longest first; K and V of the visible keys are read once per
// block, q once per key tile (from cache), o and lse written once.
template <class T, int groups>
__global__ void __launch_bounds__(attention_threads, blocks_per_multiprocessor<groups>)
    attention_kernel(HeadRows<T> o, float* lse, HeadRows<const T> q, HeadRows<const T> k,
                     HeadRows<const T> v, Layout layout) {
  __shared__ AttentionShared shared;
  const Sequence sequence(layout);
  const int first = (layout.tiles - 1 - static_cast<int>(blockIdx.x % layout.tiles)) * tile;
  if (first >= sequence.len_q) return;
  const int head = blockIdx.y, kv_head = head / (layout.heads / layout.kv_heads);
  const int dim = layout.head_dim;
  const Rows<T> queries = rows_of(q, sequence.q_begin, first, sequence.len_q, head, dim);
  const int visible = first + queries.count + sequence.offset;

  float out[4][groups][4] = {}, sum[4] = {};
  float maximum[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  for (int key = 0; key < visible; key += tile) {
    Scores s = {};
    multiply_nt(s, queries, rows_of(k, sequence.k_begin, key, visible, kv_head, dim), dim, shared);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool seen = sequence.sees(first + 4 * thread_row() + i, key + thread_col() + 16 * j);
        s[i][j] = seen ? s[i][j] * layout.scale : -INFINITY;
      }
    softmax_step<groups>(s, out, maximum, sum);
    put_scores(shared, s);
    multiply_nn<groups>(out, rows_of(v, sequence.k_begin, key, visible, kv_head, dim), dim, shared);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * thread_row() + i;
    const float total = row_sum(sum[i]), inverse = total == 0 ? 0.0f : 1.0f / total;
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int c = 0; c < 4; ++c) out[i][group][c] *= inverse;
    if (thread_col() == 0 && row < queries.count)
      lse[(sequence.q_begin + first + row) * layout.heads + head] = maximum[i] + logf(total);
  }
  store_rows<groups>(o.at(sequence.q_begin + first, head, dim), o.pitch, queries.count, dim, out);
}

// One warp per token and head: delta = rowsum(dO * O); one read of both.
template <class T>
__global__ void __launch_bounds__(attention_threads)
    delta_kernel(float* delta, HeadRows<const T> g, HeadRows<const T> o, int64_t pairs, int heads,
                 int head_dim) {
  const int64_t pair =
      (static_cast<int64_t>(blockIdx.x) * attention_threads + threadIdx.x) / warp_size;
  if (pair >= pairs) return;
  const int64_t row = pair / heads;
  const int head = static_cast<int>(pair - row * heads), lane = threadIdx.x % warp_size;
  const T* const u = g.at(row, head, head_dim);
  const T* const v = o.at(row, head, head_dim);
  float sum = 0;
  for (int d = lane; d < head_dim; d += warp_size)
    sum = fmaf(static_cast<float>(u[d]), static_cast<float>(v[d]), sum);
  sum = warp_sum(sum);
  if (lane == 0) delta[pair] = sum;
}

// One block per 64 queries of a head: dQ = sum over key tiles, in order, of dS K; written once.
template <class T, int groups>
__global__ void __launch_bounds__(attention_threads, blocks_per_multiprocessor<groups>)
    attention_dq_kernel(HeadRows<T> dq, HeadRows<const T> g, HeadRows<const T> q,
                        HeadRows<const T> k, HeadRows<const T> v, const float* lse,
                        const float* delta, Layout layout) {
  __shared__ AttentionShared shared;
  const Sequence sequence(layout);
  const int first = (layout.tiles - 1 - static_cast<int>(blockIdx.x % layout.tiles)) * tile;
  if (first >= sequence.len_q) return;
  const int head = blockIdx.y, kv_head = head / (layout.heads / layout.kv_heads);
  const int dim = layout.head_dim;
  const Rows<T> queries = rows_of(q, sequence.q_begin, first, sequence.len_q, head, dim);
  const Rows<T> gradients = rows_of(g, sequence.q_begin, first, sequence.len_q, head, dim);
  const int visible = first + queries.count + sequence.offset;

  float row_lse[4] = {}, row_delta[4] = {};
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * thread_row() + i;
    if (row >= queries.count) break;
    const int64_t pair = (sequence.q_begin + first + row) * layout.heads + head;
    row_lse[i] = lse[pair];
    row_delta[i] = delta[pair];
  }
  float out[4][groups][4] = {};
  for (int key = 0; key < visible; key += tile) {
    const Rows<T> keys = rows_of(k, sequence.k_begin, key, visible, kv_head, dim);
    Scores s = {}, dp = {};
    multiply_nt(s, queries, keys, dim, shared);
    multiply_nt(dp, gradients, rows_of(v, sequence.k_begin, key, visible, kv_head, dim), dim,
                shared);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool seen = sequence.sees(first + 4 * thread_row() + i, key + thread_col() + 16 * j);
        const float p = seen ? expf(s[i][j] * layout.scale - row_lse[i]) : 0.0f;
        s[i][j] = seen ? p * (dp[i][j] - row_delta[i]) * layout.scale : 0.0f;
      }
    put_scores(shared, s);
    multiply_nn<groups>(out, keys, dim, shared);
  }
  store_rows<groups>(dq.at(sequence.q_begin + first, head, dim), dq.pitch, queries.count, dim, out);
}

// One block per 64 keys of a key/value head: dK and dV summed over the group's heads and over query
// tiles, in order; written once. Tiles are transposed: their rows are keys, their columns queries.
template <class T, int groups>
__global__ void __launch_bounds__(attention_threads, blocks_per_multiprocessor<groups>)
    attention_dkv_kernel(HeadRows<T> dk, HeadRows<T> dv, HeadRows<const T> g, HeadRows<const T> q,
                         HeadRows<const T> k, HeadRows<const T> v, const float* lse,
                         const float* delta, Layout layout) {
  __shared__ AttentionShared shared;
  const Sequence sequence(layout);
  const int first = static_cast<int>(blockIdx.x % layout.tiles) * tile;
  if (first >= sequence.len_k) return;
  const int kv_head = blockIdx.y, ratio = layout.heads / layout.kv_heads, dim = layout.head_dim;
  const Rows<T> keys = rows_of(k, sequence.k_begin, first, sequence.len_k, kv_head, dim);
  const Rows<T> values = rows_of(v, sequence.k_begin, first, sequence.len_k, kv_head, dim);
  const int first_query = first > sequence.offset ? (first - sequence.offset) / tile * tile : 0;

  float out_k[4][groups][4] = {}, out_v[4][groups][4] = {};
  for (int head = kv_head * ratio; head < (kv_head + 1) * ratio; ++head)
    for (int query = first_query; query < sequence.len_q; query += tile) {
      const Rows<T> queries = rows_of(q, sequence.q_begin, query, sequence.len_q, head, dim);
      const Rows<T> gradients = rows_of(g, sequence.q_begin, query, sequence.len_q, head, dim);
      Scores p = {}, ds = {};
      multiply_nt(p, keys, queries, dim, shared);
      multiply_nt(ds, values, gradients, dim, shared);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = query + thread_col() + 16 * j;
        const int64_t pair = (sequence.q_begin + column) * layout.heads + head;
        const bool inside = column < sequence.len_q;
        const float column_lse = inside ? lse[pair] : 0.0f;
        const float column_delta = inside ? delta[pair] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool seen = sequence.sees(column, first + 4 * thread_row() + i);
          p[i][j] = seen ? expf(p[i][j] * layout.scale - column_lse) : 0.0f;
          ds[i][j] = seen ? p[i][j] * (ds[i][j] - column_delta) * layout.scale : 0.0f;
        }
      }
      put_scores(shared, p);
      multiply_nn<groups>(out_v, gradients, dim, shared);
      __syncthreads();
      put_scores(shared, ds);
      multiply_nn<groups>(out_k, queries, dim, shared);
    }
  const int64_t row = sequence.k_begin + first;
  store_rows<groups>(dk.at(row, kv_head, dim), dk.pitch, keys.count, dim, out_k);
  store_rows<groups>(dv.at(row, kv_head, dim), dv.pitch, keys.count, dim, out_v);
}

Layout layout_of(const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape,
                 int64_t longest) {
  return {.cu_q = cu_q.data<int32_t>(),
          .cu_k = cu_k.data<int32_t>(),
          .heads = static_cast<int>(shape.heads),
          .kv_heads = static_cast<int>(shape.kv_heads),
          .head_dim = static_cast<int>(shape.head_dim),
          .tiles = static_cast<int>(ceil_div<int64_t>(longest, tile)),
          .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)))};
}

dim3 grid_for(const char* op, const Tensor& cu, const Layout& layout, int64_t heads) {
  return {grid_of(op, (cu.numel() - 1) * layout.tiles), static_cast<unsigned>(heads)};
}

/// Calls f.template operator()<T, groups>() with 64 * groups >= head_dim, which is at most 256.
template <class F>
void dispatch_head(const char* op, DType dtype, int64_t head_dim, F&& f) {
  dispatch(CudaFloats{}, dtype, op, [&]<class T>() {
    if (head_dim <= 64)
      f.template operator()<T, 1>();
    else if (head_dim <= 128)
      f.template operator()<T, 2>();
    else
      f.template operator()<T, 4>();
  });
}

using Halves = Types<bf16, f16>;

bool on_tensor_cores(const Tensor& q, const AttentionShape& shape) {
  return q.dtype() != DType::f32 && attention_mma_supports(shape.head_dim);
}

template <class T>
AttentionInputs<T> inputs_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                             const Tensor& cu_k, const AttentionShape& shape) {
  const Layout layout = layout_of(cu_q, cu_k, shape, shape.max_q);
  return {.q = head_rows<const T>(q),
          .k = head_rows<const T>(k),
          .v = head_rows<const T>(v),
          .cu_q = layout.cu_q,
          .cu_k = layout.cu_k,
          .sequences = static_cast<int>(cu_q.numel() - 1),
          .heads = layout.heads,
          .kv_heads = layout.kv_heads,
          .head_dim = layout.head_dim,
          .max_q = static_cast<int>(shape.max_q),
          .max_k = static_cast<int>(shape.max_k),
          .rows = q.rows(),
          .scale = layout.scale};
}

}  // namespace

void attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape,
               const Tensor&) {
  if (q.numel() == 0) return;
  if (hopper_attention_supported(shape, q))
    return hopper_attention(o, lse, q, k, v, cu_q, cu_k, shape);
  if (on_tensor_cores(q, shape))
    return dispatch(Halves{}, q.dtype(), "attention", [&]<class T>() {
      attention_mma(head_rows<T>(o), lse.data<float>(), inputs_of<T>(q, k, v, cu_q, cu_k, shape));
    });
  const Layout layout = layout_of(cu_q, cu_k, shape, shape.max_q);
  const dim3 grid = grid_for("attention", cu_q, layout, shape.heads);
  dispatch_head("attention", q.dtype(), shape.head_dim, [&]<class T, int groups>() {
    launch_kernel("attention", attention_kernel<T, groups>, {grid, attention_threads},
                  head_rows<T>(o), lse.data<float>(), head_rows<const T>(q), head_rows<const T>(k),
                  head_rows<const T>(v), layout);
  });
}

void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& g,
                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                        const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                        const AttentionShape& shape, const Tensor& workspace) {
  if (q.numel() == 0) return;
  const char* const op = "attention_backward";
  if (hopper_attention_supported(shape, q))
    return hopper_attention_backward(dq, dk, dv, g, q, k, v, o, lse, cu_q, cu_k, shape, workspace);
  if (on_tensor_cores(q, shape))
    return dispatch(Halves{}, q.dtype(), op, [&]<class T>() {
      attention_backward_mma(head_rows<T>(dq), head_rows<T>(dk), head_rows<T>(dv),
                             head_rows<const T>(g), head_rows<const T>(o), lse.data<float>(),
                             static_cast<float2*>(workspace.raw()),
                             inputs_of<T>(q, k, v, cu_q, cu_k, shape));
    });
  const int64_t pairs = q.rows() * shape.heads;
  const unsigned delta_blocks =
      grid_of(op, ceil_div<int64_t>(pairs, attention_threads / warp_size));
  const Layout by_query = layout_of(cu_q, cu_k, shape, shape.max_q);
  const Layout by_key = layout_of(cu_q, cu_k, shape, shape.max_k);
  const dim3 query_grid = grid_for(op, cu_q, by_query, shape.heads);
  const dim3 key_grid = grid_for(op, cu_q, by_key, shape.kv_heads);
  float* const delta = static_cast<float*>(workspace.raw());
  dispatch_head(op, q.dtype(), shape.head_dim, [&]<class T, int groups>() {
    const auto mg = head_rows<const T>(g), mq = head_rows<const T>(q);
    const auto mk = head_rows<const T>(k), mv = head_rows<const T>(v);
    launch_kernel(op, delta_kernel<T>, {delta_blocks, attention_threads}, delta, mg,
                  head_rows<const T>(o), pairs, by_query.heads, by_query.head_dim);
    launch_kernel(op, attention_dq_kernel<T, groups>, {query_grid, attention_threads},
                  head_rows<T>(dq), mg, mq, mk, mv, lse.data<float>(), delta, by_query);
    launch_kernel(op, attention_dkv_kernel<T, groups>, {key_grid, attention_threads},
                  head_rows<T>(dk), head_rows<T>(dv), mg, mq, mk, mv, lse.data<float>(), delta,
                  by_key);
  });
}

}  // namespace qlab::cuda
