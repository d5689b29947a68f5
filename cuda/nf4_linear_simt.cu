#include <algorithm>

#include "cuda/early_launch.cuh"
#include "cuda/nf4_parts.cuh"
#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = PairTable::threads;
constexpr int warps = threads / warp_size;
constexpr int word_codes = 8;
constexpr int warp_codes = word_codes * warp_size;  // neighbours that a warp reads at once
constexpr int shared_bytes = PairTable::bytes;
constexpr int map_at = PairTable::pitch / 2;

/// v as dequantize_nf4 rounds it.
template <class T>
__device__ float rounded(float v);
template <>
__device__ inline float rounded<bf16>(float v) {
  return __uint_as_float(pack(0.0f, v));
}

/// The eight values of a word.
template <class T>
__device__ void decode(float (&v)[word_codes], const PairTable& table, uint32_t word, float scale) {
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const float2 pair = table(word, b);
    v[2 * b] = rounded<T>(__fmul_rn(pair.x, scale));
    v[2 * b + 1] = rounded<T>(__fmul_rn(pair.y, scale));
  }
}

/// What a warp has under way of `rows` rows of W: `words` words of each a lane, warp_codes apart,
/// and one scale a lane, of 32 columns of one row.
template <int rows, int words>
struct Piece {
  static constexpr int lanes_of_row = warp_codes * words / scale_chunk;
  static constexpr int scales = rows * lanes_of_row / warp_size;
  uint32_t word[rows][words];
  AnyScale scale[scales];
  uint32_t inside;  // bit i: scale i

  template <class T>
  __device__ void fetch(const Problem<T>& p, int row, int column, int end_row) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    inside = 0;
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int j = 0; j < words; ++j) {
        const int at = column + j * warp_codes + lane * word_codes;
        word[i][j] = 0;
        if (row + i < end_row && at < p.k)
          word[i][j] = __ldcs(reinterpret_cast<const uint32_t*>(
              p.codes + (static_cast<int64_t>(row + i) * p.k + at) / 2));
      }
#pragma unroll
    for (int s = 0; s < scales; ++s) {
      const int r = row + (s * warp_size + lane) / lanes_of_row;
      const int at = column + (s * warp_size + lane) % lanes_of_row * scale_chunk;
      if (r < end_row && at < p.k) {
        inside |= 1u << s;
        const uint32_t element = static_cast<uint32_t>(r) * static_cast<uint32_t>(p.k) + at;
        scale[s].fetch(p.scales, element >> p.scales.shift);
      }
    }
  }
  __device__ void decode_scales(float (&out)[scales], const Scales& s, const float* map,
                                float offset) const {
#pragma unroll
    for (int i = 0; i < scales; ++i)
      out[i] = (inside >> i & 1) != 0 ? scale[i].value(s, PairTable::Map{map}, offset) : 0.0f;
  }
  /// The scale of this lane's word, from the lane that has decoded it.
  __device__ static float of_word(const float (&decoded)[scales], int row, int word) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int first = row * lanes_of_row + word * (warp_codes / scale_chunk);
    return __shfl_sync(0xffffffffu, decoded[first / warp_size],
                       first % warp_size + lane * word_codes / scale_chunk);
  }
};

/// Fills the tables; returns the offset of the nested scales.
template <class T>
__device__ float prepare(char* memory, const Problem<T>& p) {
  PairTable::fill(memory);
  await_previous();
  float offset = 0;
  if (p.scales.codes != nullptr) {
    float* const map = reinterpret_cast<float*>(memory + map_at);
    map[PairTable::map_place(threadIdx.x)] = p.scales.map[threadIdx.x];
    offset = *p.scales.offset;
  }
  __syncthreads();
  return offset;
}

// A warp per two rows of W, the lanes along them: 0.52 bytes an element and, per two rows, x.
template <class T, int tokens>
__global__ void __launch_bounds__(threads) nf4_simt_forward_kernel(Problem<T> p) {
  extern __shared__ __align__(128) char memory[];
  constexpr int rows = 2, words = 4;
  using Own = Piece<rows, words>;
  const float offset = prepare(memory, p);
  const float* const map = reinterpret_cast<const float*>(memory + map_at);
  const PairTable table(memory);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / warp_size;
  const int first_token = static_cast<int>(blockIdx.z) * tokens;
  const T* x[tokens];
#pragma unroll
  for (int t = 0; t < tokens; ++t)  // past the last row the last one, whose result is not stored
    x[t] = p.x + min(first_token + t, p.m - 1) * p.x_pitch;
  for (int row = warp * rows; row < p.n; row += static_cast<int>(gridDim.x) * warps * rows) {
    float sum[rows][tokens] = {};
    Own next;
    next.fetch(p, row, 0, p.n);
    for (int column = 0; column < p.k; column += words * warp_codes) {
      const Own piece = next;
      if (column + words * warp_codes < p.k) next.fetch(p, row, column + words * warp_codes, p.n);
      float scales[Own::scales];
      piece.decode_scales(scales, p.scales, map, offset);
#pragma unroll
      for (int j = 0; j < words; ++j) {
        const int at = column + j * warp_codes + lane * word_codes;
        float in[tokens][word_codes] = {};
        if (at < p.k)
#pragma unroll
          for (int t = 0; t < tokens; ++t) load(in[t], x[t] + at);
#pragma unroll
        for (int i = 0; i < rows; ++i) {
          float v[word_codes];
          decode<T>(v, table, piece.word[i][j], Own::of_word(scales, i, j));
#pragma unroll
          for (int e = 0; e < word_codes; ++e)
#pragma unroll
            for (int t = 0; t < tokens; ++t) sum[i][t] = fmaf(v[e], in[t][e], sum[i][t]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        float total = warp_sum(sum[i][t]);
        const int token = first_token + t;
        if (lane != 0 || row + i >= p.n || token >= p.m) continue;
        if (p.addend != nullptr)
          total += static_cast<float>(p.addend[token * p.addend_pitch + row + i]);
        p.y[token * p.y_pitch + row + i] = static_cast<T>(total);
      }
  }
}

// A block per 512 columns of W and part of its rows, of which a warp takes two at a time.
template <class T, int tokens>
__global__ void __launch_bounds__(threads) nf4_simt_backward_kernel(Problem<T> p) {
  extern __shared__ __align__(128) char memory[];
  constexpr int rows = 2, words = 2, tile = words * warp_codes;
  using Own = Piece<rows, words>;
  const float offset = prepare(memory, p);
  const float* const map = reinterpret_cast<const float*>(memory + map_at);
  const PairTable table(memory);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int first_token = static_cast<int>(blockIdx.z) * tokens;
  const int column = static_cast<int>(blockIdx.x) * tile;
  const int first = static_cast<int>(blockIdx.y) * p.steps * warps * rows + warp * rows;
  const int end = min(p.n, (static_cast<int>(blockIdx.y) + 1) * p.steps * warps * rows);
  const T* x[tokens];
#pragma unroll
  for (int t = 0; t < tokens; ++t) x[t] = p.x + min(first_token + t, p.m - 1) * p.x_pitch;
  float sum[tokens][words][word_codes] = {};
  Own next;
  next.fetch(p, first, column, end);
  for (int row = first; row < end; row += warps * rows) {
    const Own piece = next;
    next.fetch(p, row + warps * rows, column, end);
    float scales[Own::scales];
    piece.decode_scales(scales, p.scales, map, offset);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      float in[tokens];
#pragma unroll
      for (int t = 0; t < tokens; ++t)
        in[t] = row + i < end ? static_cast<float>(x[t][row + i]) : 0.0f;
#pragma unroll
      for (int j = 0; j < words; ++j) {
        float v[word_codes];
        decode<T>(v, table, piece.word[i][j], Own::of_word(scales, i, j));
#pragma unroll
        for (int e = 0; e < word_codes; ++e)
#pragma unroll
          for (int t = 0; t < tokens; ++t) sum[t][j][e] = fmaf(v[e], in[t], sum[t][j][e]);
      }
    }
  }
  // The warps' sums, added in their order.
  float* const parts = reinterpret_cast<float*>(memory);
  static_assert((warps + 1) * tokens * tile * 4 <= PairTable::bytes);
  __syncthreads();
#pragma unroll
  for (int t = 0; t < tokens; ++t)
#pragma unroll
    for (int j = 0; j < words; ++j)
      store(parts + (warp * tokens + t) * tile + j * warp_codes + lane * word_codes, sum[t][j]);
  __syncthreads();
  float* const total = parts + warps * tokens * tile;
  for (int i = threadIdx.x; i < tokens * tile; i += threads) {
    float v = parts[i];
    for (int w = 1; w < warps; ++w) v += parts[w * tokens * tile + i];
    total[i] = v;
  }
  __syncthreads();
  finish<tile, tokens, threads>(p, p.k, total, tile, column, first_token);
}

template <class T, int tokens>
void launch(Problem<T> p, Op op) {
  const auto forward = nf4_simt_forward_kernel<T, tokens>;
  const auto backward = nf4_simt_backward_kernel<T, tokens>;
  const auto kernel = op == Op::transpose ? forward : backward;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "nf4_matmul");
  // Rows are independent: as many blocks as there is room for.
  const int blocks = op == Op::transpose
                         ? std::min(ceil_div(p.n, 2 * warps), 2 * multiprocessor_count())
                         : ceil_div(p.k, 2 * warp_codes);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(ceil_div(p.m, tokens)));
  launch_early("nf4_matmul", kernel,
               LaunchShape{.grid = grid, .threads = threads, .shared_bytes = shared_bytes}, p);
}

}  // namespace

void nf4_matmul_simt(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op,
                     const Tensor& addend, const Tensor& workspace) {
  Problem<bf16> p = problem_of<bf16>(y, x, w, addend, workspace);
  p.splits = static_cast<int>(nf4_splits(Nf4Kernel::simt, op, p.n, p.k));
  p.steps = ceil_div(ceil_div(p.n, 2 * warps), p.splits);
  p.m == 1 ? launch<bf16, 1>(p, op) : launch<bf16, 2>(p, op);
}

}  // namespace qlab::cuda
