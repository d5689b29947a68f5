#include <algorithm>
#include <iterator>

#include "cuda/early_launch.cuh"
#include "cuda/hopper.cuh"
#include "cuda/nf4_decode.cuh"
#include "quant/nf4_linear.h"

namespace qlab::cuda {
namespace hopper {

// Tiles are those of the transposed product, y^T = W x^T or dx^T = W^T dy^T: 64 outputs for each
// warpgroup that multiplies, by `tokens` rows of x, in steps of 64 along the sum.
template <bool forward_, int tokens_, int consumers_, int decoders_>
struct Nf4Plan {
  static constexpr bool forward = forward_;
  static constexpr int tokens = tokens_;
  static constexpr int consumers = consumers_, decoders = decoders_;  // warpgroups
  static constexpr int group_outputs = 64;
  static constexpr int outputs = consumers * group_outputs;
  static constexpr int threads = (consumers + decoders) * warpgroup_size;
  static constexpr int box_rows = tokens == 64 ? 32 : 64;  // of a copy of x
  static constexpr int boxes = tokens / box_rows;
};

namespace {

constexpr int depth = chunk_width;
constexpr int ring_bytes = 192 * 1024;
constexpr int pair = 2;  // blocks of a cluster

struct Nf4Arguments {
  CUtensorMap x, y, addend;
  const uint8_t* codes;
  Scales scales;
  uint32_t runs_per_row;  // of 64 weights
  int steps;              // of 64 terms of a sum
  int rows;               // of x
  int token_tiles;
  bool add;
};

template <class P>
struct Nf4Shared {
  struct Stage {
    bf16 x[P::tokens * depth];
    bf16 w[P::outputs * depth];
  };
  static constexpr int stages = ring_bytes / sizeof(Stage) < 8 ? ring_bytes / sizeof(Stage) : 8;
  Stage ring[stages];
  float map[map_size];
  Barrier full[stages], empty[stages], addend[P::consumers];

  __device__ void init() {
    constexpr int warps = warpgroup_size / 32;
    for (int i = 0; i < stages; ++i) {
      init_barrier(full[i], 1 + warps);
      init_barrier(empty[i], pair * P::consumers * warps);
    }
    for (int i = 0; i < P::consumers; ++i) init_barrier(addend[i], 1);
    fence_barrier_init();
  }
};

/// What a block works on. The two of a cluster have neighbouring outputs and the same rows of x.
struct Nf4Tile {
  int rank, output, token;
  __device__ Nf4Tile(const Nf4Arguments& a, int outputs, int tokens) {
    const int cluster = static_cast<int>(blockIdx.x) / pair;
    rank = static_cast<int>(cluster_rank());
    output = (cluster / a.token_tiles * pair + rank) * outputs;
    token = cluster % a.token_tiles * tokens;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// __byte_perm would mask the selector first.
__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

/// The 16 values of a block in bf16, their low and high bytes apart: 16 entries are four registers
/// of either, and a permutation looks four codes up in two of them.
struct ValueTable {
  uint32_t low[4], high[4];

  __device__ explicit ValueTable(float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a =
          pack(__fmul_rn(nf4::value(4 * i), scale), __fmul_rn(nf4::value(4 * i + 1), scale));
      const uint32_t b =
          pack(__fmul_rn(nf4::value(4 * i + 2), scale), __fmul_rn(nf4::value(4 * i + 3), scale));
      low[i] = permute(a, b, 0x6420);
      high[i] = permute(a, b, 0x7531);
    }
  }
  /// Four codes: their three low bits in `three`; in `half` their own number, plus 4 for entries
  /// from the eighth on. The first of two codes is the high nibble of a byte.
  __device__ void look_up(uint32_t& first, uint32_t& second, uint32_t three, uint32_t half) const {
    const uint32_t l =
        permute(permute(low[0], low[1], three), permute(low[2], low[3], three), half);
    const uint32_t h =
        permute(permute(high[0], high[1], three), permute(high[2], high[3], three), half);
    first = permute(l, h, 0x4051);
    second = permute(l, h, 0x6273);
  }
  __device__ uint4 look_up(uint32_t word) const {
    const uint32_t three = word & 0x77777777u;
    const uint32_t half = (word >> 1 & 0x44444444u) | 0x32103210u;
    uint4 v;
    look_up(v.x, v.y, three, half);
    look_up(v.z, v.w, three >> 16, half >> 16);
    return v;
  }
};

/// 16 bytes; those around them, for the next steps, come into the second-level cache.
__device__ inline uint4 load_codes(const uint8_t* from) {
  uint4 v;
  asm volatile("ld.global.nc.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

/// n neighbouring weights, on their way.
template <int n>
struct Weights {
  uint4 words[n / 32];
  AnyScale scale;
  __device__ void fetch(const uint8_t* codes, const Scales& scales, uint32_t run) {
    const uint8_t* const from = codes + size_t{run} * (depth / 2);
#pragma unroll
    for (int i = 0; i < n / 32; ++i) words[i] = load_codes(from + 16 * i);
    scale.fetch(scales, run >> (scales.shift - 6));
  }
};

/// Into row `row` of a swizzled tile, from piece `first` of 16 bytes on.
template <int n>
__device__ inline void put_weights(bf16* tile, int row, int first, const Weights<n>& weights,
                                   float scale) {
  const ValueTable table(scale);
  char* const base = reinterpret_cast<char*>(tile) + row * row_bytes;
  const auto put = [&](int p, uint32_t word) {
    *reinterpret_cast<uint4*>(base + (((first + p) ^ row % 8) * 16)) = table.look_up(word);
  };
#pragma unroll
  for (int i = 0; i < n / 32; ++i) {
    put(4 * i, weights.words[i].x);
    put(4 * i + 1, weights.words[i].y);
    put(4 * i + 2, weights.words[i].z);
    put(4 * i + 3, weights.words[i].w);
  }
}

/// Brings this block's half of the rows of x to both blocks of its pair; rows beyond the last one
/// are left as they are, since nothing of them is stored.
template <class P>
__device__ void copy_rows(const Nf4Arguments& a, bf16* x, Barrier& full, const Nf4Tile& tile,
                          int present, int step) {
  constexpr uint16_t both_blocks = 3;
  arrive_expect(full, present * P::box_rows * row_bytes);
#pragma unroll
  for (int j = 0; j < P::boxes / pair; ++j)
    if (const int i = tile.rank * (P::boxes / pair) + j; i < present)
      load_box(x + i * P::box_rows * depth, a.x, full, both_blocks, step * depth,
               tile.token + i * P::box_rows);
}

/// One of the warpgroups that decode, which take steps in turn: two threads for 64 weights where
/// the block has 64 outputs, otherwise one.
template <class P>
__device__ void decode(const Nf4Arguments& a, Nf4Shared<P>& shared, const Nf4Tile& tile,
                       int decoder) {
  constexpr int ahead = 4;  // steps of its own for which loads are under way
  constexpr int own_weights = depth * P::outputs / warpgroup_size;
  const int thread = threadIdx.x % warpgroup_size;
  const int tile_row = thread % P::outputs, first_piece = thread / P::outputs * (own_weights / 8);
  const uint8_t* const codes = a.codes + first_piece * 4;
  const float offset = a.scales.offset != nullptr ? *a.scales.offset : 0.0f;
  const uint32_t row = P::forward ? tile.output + tile_row : tile_row % depth;
  const uint32_t column = P::forward ? 0 : tile.output / depth + tile_row / depth;
  const uint32_t first = row * a.runs_per_row + column;
  const uint32_t stride = P::forward ? 1 : depth * a.runs_per_row;
  const int boxes = min(P::boxes, (a.rows - tile.token + P::box_rows - 1) / P::box_rows);

  const auto entry = [&](int code) { return shared.map[code]; };

  Weights<own_weights> weights[ahead];
  const auto fetch = [&](int u, int step) {
    weights[u].fetch(codes, a.scales, first + min(step, a.steps - 1) * stride);
  };
#pragma unroll
  for (int u = 0; u < ahead; ++u) fetch(u, decoder + u * P::decoders);
  Ring<Nf4Shared<P>::stages> ring;
  if (decoder == 1) ring.advance();
  for (int base = decoder; base < a.steps; base += ahead * P::decoders)
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      const int step = base + u * P::decoders;
      if (step >= a.steps) break;
      auto& stage = shared.ring[ring.stage];
      Barrier& full = shared.full[ring.stage];
      wait(shared.empty[ring.stage], ring.parity ^ 1);
      if (thread == 0) copy_rows<P>(a, stage.x, full, tile, boxes, step);
      put_weights(stage.w, tile_row, first_piece, weights[u],
                  weights[u].scale.value(a.scales, entry, offset));
      arrive_warp(full, threadIdx.x % 32);
      fetch(u, step + ahead * P::decoders);
#pragma unroll
      for (int i = 0; i < P::decoders; ++i) ring.advance();
    }
}

/// d [64, tokens] of one warpgroup. The fence between the decoders' writes and the products that
/// read them stands on this side of the barrier, where no loads are under way: 3 to 5 % faster.
template <class P>
__device__ void multiply(float (&d)[P::tokens / 2], const Nf4Arguments& a, Nf4Shared<P>& shared,
                         int group) {
  const auto release = [&](int stage) {
    __syncwarp();
    if (const uint32_t lane = threadIdx.x % 32; lane < pair) arrive_in(shared.empty[stage], lane);
  };
  Ring<Nf4Shared<P>::stages> ring;
  for (int step = 0; step < a.steps; ++step) {
    wait(shared.full[ring.stage], ring.parity);
    fence_async();
    const auto& stage = shared.ring[ring.stage];
    const uint64_t w = operand(stage.w + group * P::group_outputs * depth, 0);
    const uint64_t x = operand(stage.x, 0);
    products_begin();
#pragma unroll
    for (int k = 0; k < depth / 16; ++k)
      product<P::forward ? 0 : 1>(d, advanced(w, k * (P::forward ? 32 : 16 * row_bytes)),
                                  advanced(x, k * 32), step != 0 || k != 0);
    products_commit();
    if (step != 0) {
      products_wait<1>();
      release(ring.previous());
    }
    ring.advance();
  }
  products_wait<0>();
  pin(d);
}

/// Writes the tile [64, tokens] of a warpgroup to y, turned around in `rows`, which may first
/// receive what is to be added.
template <class P>
__device__ void put_rows(const Nf4Arguments& a, float (&d)[P::tokens / 2], char* rows,
                         Barrier& addend, const Nf4Tile& tile, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
  const int output = tile.output + group * P::group_outputs;
  const bool leader = threadIdx.x % warpgroup_size == 0;
  char* const place =
      rows + (matrix / 2 * 8 + lane % 8) * row_bytes + ((2 * warp + matrix % 2) ^ lane % 8) * 16;
  if (a.add) {
    if (leader) {
      arrive_expect(addend, P::tokens * row_bytes);
      load_box(rows, a.addend, addend, static_cast<uint16_t>(1 << tile.rank), output, tile.token);
    }
    wait(addend, 0);
  }
#pragma unroll
  for (int i = 0; i < P::tokens / 2; i += 8) {
    char* const tiles = place + i / 4 * 8 * row_bytes;
    if (a.add) {
      uint32_t more[4];
      load_transposed(more, tiles);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float first, second;
        unpack(first, second, more[j]);
        d[i + 2 * j] += first, d[i + 2 * j + 1] += second;
      }
    }
    store_transposed(tiles, pack(d[i], d[i + 1]), pack(d[i + 2], d[i + 3]),
                     pack(d[i + 4], d[i + 5]), pack(d[i + 6], d[i + 7]));
  }
  fence_async();
  named_sync(1 + group, warpgroup_size);
  if (leader) {
    store_box(a.y, rows, output, tile.token);
    commit_stores_and_wait();
  }
}

#endif

// One block per 64 or 128 outputs and `tokens` rows of x: the first warpgroups multiply, the others
// decode W into shared memory in bf16. W is read (0.52 bytes a weight) and decoded once per
// `tokens` rows, x once per two blocks.
template <class P>
__global__ void __launch_bounds__(P::threads, 1)
    nf4_linear_kernel(const __grid_constant__ Nf4Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Nf4Shared<P>*>(memory);
  const Nf4Tile tile(arguments, P::outputs, P::tokens);
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / warpgroup_size, 0);
  if (threadIdx.x == 0) shared.init();
  await_previous();
  if (arguments.scales.map != nullptr && threadIdx.x < map_size)
    shared.map[threadIdx.x] = arguments.scales.map[threadIdx.x];
  cluster_sync();
  if (group < P::consumers) {
    if constexpr (P::consumers == 2) take_registers<P::decoders == 1 ? 192 : 168>();
    float d[P::tokens / 2];
    multiply<P>(d, arguments, shared, group);
    cluster_arrive();
    named_sync(1 + P::consumers, P::consumers * warpgroup_size);
    put_rows<P>(arguments, d, reinterpret_cast<char*>(shared.ring) + group * P::tokens * row_bytes,
                shared.addend[group], tile, group);
  } else {
    if constexpr (P::consumers == 2) give_registers<P::decoders == 1 ? 112 : 88>();
    decode<P>(arguments, shared, tile, group - P::consumers);
    __syncwarp();
    cluster_arrive();
  }
  __syncwarp();
  cluster_wait();
#endif
}

struct Matrix16 {
  void* data;
  int64_t rows, cols, pitch;
};

/// Boxes of 64 columns.
CUtensorMap box_map(const Matrix16& x, int rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(x.cols), static_cast<cuuint64_t>(x.rows)};
  const cuuint64_t pitch = static_cast<cuuint64_t>(x.pitch) * sizeof(bf16);
  const cuuint32_t box[] = {chunk_width, static_cast<cuuint32_t>(rows)};
  return tensor_map("nf4_matmul", x.data, sizes, &pitch, box);
}

struct Nf4Matrix {
  const uint8_t* codes;
  Scales scales;
  int64_t cols;
};

template <class P>
void launch_nf4(const Matrix16& y, const Matrix16& x, const Nf4Matrix& w, const Matrix16& addend) {
  const auto token_tiles = static_cast<int>(ceil_div<int64_t>(y.rows, P::tokens));
  const bool add = addend.data != nullptr;
  const Nf4Arguments arguments{.x = box_map(x, P::box_rows),
                               .y = box_map(y, P::tokens),
                               .addend = box_map(add ? addend : y, P::tokens),
                               .codes = w.codes,
                               .scales = w.scales,
                               .runs_per_row = static_cast<uint32_t>(w.cols / depth),
                               .steps = static_cast<int>(x.cols / depth),
                               .rows = static_cast<int>(x.rows),
                               .token_tiles = token_tiles,
                               .add = add};
  const auto kernel = nf4_linear_kernel<P>;
  constexpr int shared_bytes = sizeof(Nf4Shared<P>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {pair, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid_of("nf4_matmul", y.cols / P::outputs * token_tiles);
  config.blockDim = P::threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream();
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel, arguments);
  check_launch("nf4_matmul", reinterpret_cast<const void*>(kernel),
               {config.gridDim, config.blockDim.x, config.dynamicSmemBytes});
}

/// The plan that should be fastest: rounds of blocks times what a step of 64 terms took on an H100,
/// in nanoseconds. All give the same bits.
template <bool forward>
void multiply_nf4(const Matrix16& y, const Matrix16& x, const Nf4Matrix& w,
                  const Matrix16& addend) {
  const auto time = [&](int outputs, int tokens, int64_t step) {
    return ceil_div<int64_t>(y.cols / outputs * ceil_div<int64_t>(y.rows, tokens),
                             multiprocessor_count()) *
           step;
  };
  const int64_t times[] = {time(64, 128, 415), time(128, 64, 450), time(128, 128, 525),
                           time(128, 256, 780)};
  switch (std::min_element(std::begin(times), std::end(times)) - times) {
    case 0:
      return launch_nf4<Nf4Plan<forward, 128, 1, 2>>(y, x, w, addend);
    case 1:
      return launch_nf4<Nf4Plan<forward, 64, 2, 2>>(y, x, w, addend);
    case 2:
      return launch_nf4<Nf4Plan<forward, 128, 2, 2>>(y, x, w, addend);
    default:
      return launch_nf4<Nf4Plan<forward, 256, 2, 1>>(y, x, w, addend);
  }
}

Matrix16 matrix_of(const Tensor& x) {
  return {x.raw(), x.rows(), x.cols(), x.rows() > 1 ? x.pitch() : x.cols()};
}

/// False where this file was compiled for other architectures alone: then the body is empty.
bool nf4_kernels_present() {
  static const bool present = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, nf4_linear_kernel<Nf4Plan<true, 256, 2, 1>>),
          "cudaFuncGetAttributes");
    return attributes.numRegs > 128;
  }();
  return present;
}

}  // namespace
}  // namespace hopper

bool nf4_wgmma_available() {
  return device_count() == 0 || (hopper::device_supported() && hopper::nf4_kernels_present());
}

void nf4_matmul_wgmma(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op,
                      const Tensor& addend) {
  const auto multiply =
      op == Op::transpose ? hopper::multiply_nf4<true> : hopper::multiply_nf4<false>;
  multiply(hopper::matrix_of(y), hopper::matrix_of(x),
           {w.codes.data<uint8_t>(), scales_of(w), w.shape[1]},
           addend.defined() ? hopper::matrix_of(addend) : hopper::Matrix16{});
}

}  // namespace qlab::cuda
