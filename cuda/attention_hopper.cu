#include "cuda/attention_hopper.cuh"

#include <algorithm>
#include <cmath>

#include "cuda/attention_hopper_tiles.cuh"
#include "cuda/initcheck.cuh"

namespace qlab::cuda {
namespace hopper {
CUtensorMap load_map(const char* op, const Rows16& x, int head_dim, int box_rows) {
  const auto pitch = static_cast<cuuint64_t>(x.pitch) * sizeof(bf16);
  const auto chunks = static_cast<cuuint32_t>(head_dim / chunk_width);
  const cuuint64_t sizes[] = {chunk_width, static_cast<cuuint64_t>(x.rows),
                              cuuint64_t{chunks} * x.heads};
  const cuuint64_t strides[] = {pitch, row_bytes};
  const cuuint32_t box[] = {chunk_width, static_cast<cuuint32_t>(box_rows), chunks};
  return tensor_map(op, x.data, sizes, strides, box);
}

CUtensorMap store_map(const char* op, const Rows16& x, int head_dim) {
  const auto pitch = static_cast<cuuint64_t>(x.pitch) * sizeof(bf16);
  const auto chunks = static_cast<cuuint32_t>(head_dim / chunk_width);
  const cuuint64_t sizes[] = {chunk_width, group_rows, cuuint64_t{chunks} * x.heads,
                              static_cast<cuuint64_t>(x.rows) + 1};
  const cuuint64_t strides[] = {pitch, row_bytes, pitch};
  const cuuint32_t box[] = {chunk_width, group_rows, chunks, 1};
  return tensor_map(op, static_cast<char*>(x.data) - group_rows * pitch, sizes, strides, box);
}

Problem problem_of(const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape) {
  return {.cu_q = cu_q.data<int32_t>(),
          .cu_k = cu_k.data<int32_t>(),
          .sequences = static_cast<int>(cu_q.numel() - 1),
          .heads = static_cast<int>(shape.heads),
          .kv_heads = static_cast<int>(shape.kv_heads),
          .max_q = static_cast<int>(shape.max_q),
          .max_k = static_cast<int>(shape.max_k),
          .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)))};
}

Rows16 rows_of(const Tensor& x, int64_t heads) {
  return {x.raw(), x.rows() > 1 ? x.pitch() : x.cols(), x.rows(), static_cast<int>(heads)};
}

namespace {

struct ForwardArguments {
  CUtensorMap q, k, v, o;
  Problem problem;
  float* lse;
};

template <int D>
struct ForwardShared {
  static constexpr int stages = 2;
  bf16 q[2][consumers][group_rows * D];  // the next item's queries arrive during this item's work
  bf16 k[stages][tile * D];
  bf16 v[stages][tile * D];
  Barrier q_full[2], q_empty[2];
  Barrier k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];

  __device__ void init() {
    for (int i = 0; i < 2; ++i) {
      init_barrier(q_full[i], 1);
      init_barrier(q_empty[i], consumers);
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
__device__ void forward_producer(const ForwardArguments& a, ForwardShared<D>& shared) {
  constexpr uint32_t bytes = tile * D * sizeof(bf16);
  Ring<2> queries;
  Ring<ForwardShared<D>::stages> keys, values;
  for_each_item<QueryItem>(a.problem, whole_grid(), [&](const QueryItem& item) {
    const int kv_head = item.head / (a.problem.heads / a.problem.kv_heads);
    Barrier& q_full = shared.q_full[queries.stage];
    wait(shared.q_empty[queries.stage], queries.parity ^ 1);
    arrive_expect(q_full, bytes);
    for (int group = 0; group < consumers; ++group)
      load_rows<D>(shared.q[queries.stage][group], a.q, q_full, item.q,
                   item.first + group * group_rows, item.head);
    queries.advance();
    for (int n = item.key_tiles; n >= 0; --n) {
      if (n > 0) {
        const int s = keys.stage;
        wait(shared.k_empty[s], keys.parity ^ 1);
        arrive_expect(shared.k_full[s], bytes);
        load_rows<D>(shared.k[s], a.k, shared.k_full[s], item.k, (n - 1) * tile, kv_head);
        keys.advance();
      }
      if (n < item.key_tiles) {
        const int s = values.stage;
        wait(shared.v_empty[s], values.parity ^ 1);
        arrive_expect(shared.v_full[s], bytes);
        load_rows<D>(shared.v[s], a.v, shared.v_full[s], item.k, n * tile, kv_head);
        values.advance();
      }
    }
  });
}

/// The running maximum and sum of this thread's two rows; sums are of this thread's columns alone.
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};

  /// Scores become exp(scale (s - maximum)); `correction` is what older terms shrink by.
  __device__ void step(float (&s)[tile / 2], float (&correction)[2], float scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float here = fmaxf(s[2 * i], s[2 * i + 1]);
#pragma unroll
      for (int j = 1; j < tile / 8; ++j)
        here = fmaxf(here, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
      const float previous = maximum[i];
      maximum[i] = fmaxf(previous, quad_max(here));
      const float shift = maximum[i] == -INFINITY ? 0.0f : maximum[i] * scale;
      correction[i] = exp2_fast(fmaf(previous, scale, -shift));
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < tile / 8; ++j) {
        float &a = s[4 * j + 2 * i], &b = s[4 * j + 2 * i + 1];
        a = exp2_fast(fmaf(a, scale, -shift));
        b = exp2_fast(fmaf(b, scale, -shift));
        even += a;
        odd += b;
      }
      sum[i] = fmaf(sum[i], correction[i], even + odd);
    }
  }
};

// The two warpgroups take turns at issuing products, so that one's softmax runs beside the other's.
__device__ inline void begin_turn(int group) { named_sync(1 + group, consumers * warpgroup_size); }
__device__ inline void end_turn(int group) { named_arrive(2 - group, consumers * warpgroup_size); }

/// One warpgroup's 64 queries of an item; `out` is left unnormalized.
template <int D>
__device__ inline void attend(float (&out)[D / 2], Softmax& softmax, const QueryItem& item,
                              const void* queries, ForwardShared<D>& shared,
                              Ring<ForwardShared<D>::stages>& keys,
                              Ring<ForwardShared<D>::stages>& values, int group, float scale) {
  const int first = item.first + group * group_rows, row = first + fragment_row();
  const int lane = threadIdx.x % 32;
  const uint64_t q = operand(queries, 0);
  float s[tile / 2], correction[2];
  uint32_t p[tile / 4];
  const auto issue_scores = [&] {
    products_begin();
    multiply_nt<D>(s, q, group_rows, operand(shared.k[keys.stage], 0), tile);
    products_commit();
  };
  const auto issue_outputs = [&] {
    wait(shared.v_full[values.stage], values.parity);
    multiply_nn<tile>(out, p, operand(shared.v[values.stage], tile * row_bytes));
    products_commit();
  };
  const auto take_scores = [&](int n) {
    pin(s);
    arrive_warp(shared.k_empty[keys.stage], lane);
    keys.advance();
    if ((n + 1) * tile - 1 > first + item.offset) mask_keys(s, row, n * tile, item.offset);
    softmax.step(s, correction, scale);
  };
  const auto take_outputs = [&] {
    products_wait<0>();
    pin(out);
    pin(p);
    arrive_warp(shared.v_empty[values.stage], lane);
    values.advance();
  };

  wait(shared.k_full[keys.stage], keys.parity);
  begin_turn(group);
  issue_scores();
  end_turn(group);
  products_wait<0>();
  take_scores(item.key_tiles - 1);
  pack_rows(p, s);
  wait(shared.v_full[values.stage], values.parity);
  zero_rows<D>(shared.v[values.stage], tile, item.k.length - (item.key_tiles - 1) * tile, group);
  for (int n = item.key_tiles - 2; n >= 0; --n) {
    wait(shared.k_full[keys.stage], keys.parity);
    begin_turn(group);
    pin(out);
    pin(p);
    issue_scores();
    issue_outputs();
    end_turn(group);
    products_wait<1>();
    take_scores(n);
    take_outputs();
    pack_rows(p, s);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= correction[i / 2 % 2];
  }
  pin(out);
  pin(p);
  products_begin();
  issue_outputs();
  take_outputs();
}

template <int D>
__device__ void forward_consumer(const ForwardArguments& a, ForwardShared<D>& shared, int group) {
  const Problem& problem = a.problem;
  Ring<2> queries;
  Ring<ForwardShared<D>::stages> keys, values;
  if (group == 1) end_turn(group);
  for_each_item<QueryItem>(problem, whole_grid(), [&](const QueryItem& item) {
    bf16* const tile_q = shared.q[queries.stage][group];
    const int first = item.first + group * group_rows;
    Softmax softmax;
    float out[D / 2] = {}, inverse[2];
    wait(shared.q_full[queries.stage], queries.parity);
    if (item.key_tiles > 0)
      attend<D>(out, softmax, item, tile_q, shared, keys, values, group, problem.scale * log2_e);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = quad_sum(softmax.sum[i]);
      inverse[i] = total == 0 ? 0.0f : 1.0f / total;
      const int row = first + fragment_row() + 8 * i;
      if (threadIdx.x % 4 == 0 && row < item.q.length)
        a.lse[static_cast<int64_t>(item.q.begin + row) * problem.heads + item.head] =
            fmaf(softmax.maximum[i], problem.scale, logf(total));
    }
    group_sync(group);  // no product of the group reads the queries any more
    put_tile(tile_q, out, inverse);
    fence_async();
    group_sync(group);
    if (threadIdx.x % warpgroup_size == 0) {
      store_rows<D>(a.o, tile_q, item.q, first, item.head);
      commit_stores_and_wait();
      arrive(shared.q_empty[queries.stage]);
    }
    queries.advance();
  });
}

#endif

// One persistent block per multiprocessor, items of 128 queries of a head: one warp copies tiles
// in, two warpgroups of 64 queries take turns at products and softmax. q is read and o written
// once, K and V of the visible keys once per item.
template <int D>
__global__ void __launch_bounds__(block_threads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  ForwardShared<D>& shared = *reinterpret_cast<ForwardShared<D>*>(memory);
  const int group = warpgroup();
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (group == consumers) {
    give_registers<producer_registers>();
    if (threadIdx.x == consumers * warpgroup_size) forward_producer(arguments, shared);
  } else {
    take_registers<consumer_registers>();
    forward_consumer(arguments, shared, group);
  }
#endif
}

template <int D>
void launch_forward(const Rows16& o, float* lse, const Rows16& q, const Rows16& k, const Rows16& v,
                    const Problem& problem) {
  const char* const op = "attention";
  const ForwardArguments arguments{.q = load_map(op, q, D, group_rows),
                                   .k = load_map(op, k, D, tile),
                                   .v = load_map(op, v, D, tile),
                                   .o = store_map(op, o, D),
                                   .problem = problem,
                                   .lse = lse};
  const int blocks = std::min(QueryItem::count(problem), multiprocessor_count());
  launch_tiles(op, forward_kernel<D>, blocks, sizeof(ForwardShared<D>), arguments);
}

/// False where this file was compiled for other architectures alone: then the body is empty.
bool kernels_present() {
  static const bool present = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, forward_kernel<128>), "cudaFuncGetAttributes");
    return attributes.numRegs > 128;
  }();
  return present;
}

}  // namespace
}  // namespace hopper

bool hopper_attention_supported(const AttentionShape& shape, const Tensor& q) {
  if (q.dtype() != DType::bf16 || (shape.head_dim != 64 && shape.head_dim != 128)) return false;
  return hopper::device_supported() && hopper::kernels_present();
}

void hopper_attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
                      const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                      const AttentionShape& shape) {
  const auto run = shape.head_dim == 64 ? hopper::launch_forward<64> : hopper::launch_forward<128>;
  fill_for_initcheck(o);
  run(hopper::rows_of(o, shape.heads), lse.data<float>(), hopper::rows_of(q, shape.heads),
      hopper::rows_of(k, shape.kv_heads), hopper::rows_of(v, shape.kv_heads),
      hopper::problem_of(cu_q, cu_k, shape));
}

}  // namespace qlab::cuda
