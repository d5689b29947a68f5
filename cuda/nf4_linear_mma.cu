#include "cuda/early_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/nf4_parts.cuh"

namespace qlab::cuda {
namespace {

// A block computes 128 outputs of some tokens. It walks along the contraction in chunks of 128: of
// W a tile of 128 rows and 128 columns, whichever of the two is the contraction, and 128 columns of
// x. Four warps share out the outputs, and two groups of them the halves of every chunk. The tensor
// cores' left operand is the decoded W (or its transpose), the right one x transposed. Sums over
// an index do not care for its order, so a lane takes contraction indices that lie together in
// memory: 16 neighbours per half of a chunk, four for each product of depth 16.
constexpr int threads = PairTable::threads;
constexpr int tile = 128;
constexpr int x_row = tile * 2;         // bytes
constexpr int scale_pitch = tile + 16;  // floats between the scales of two chunks of columns
constexpr int output_pitch = tile + 4;  // floats
// Clusters of eight do not fill all multiprocessors, and were slower than sums through memory.
constexpr int largest_cluster = 4;

// How many chunks before they are needed copies begin. Tiles of W come from far; those of x, out of
// a cache, less early where they are large.
constexpr int codes_ahead = 2, scales_ahead = 2;
template <int tokens>
constexpr int x_ahead = tokens == 16 || tokens == 32 ? 2 : 1;
constexpr int code_slot_bytes = tile / 2 * PairTable::pitch;  // two rows to a row of the table
constexpr int scale_bytes = 4 * scale_pitch * 4;
template <int tokens>
struct Shared {
  static constexpr int codes = PairTable::pitch / 2;  // in the free halves of the table's rows
  static constexpr int map = codes + (codes_ahead + 1) * code_slot_bytes;  // likewise
  static constexpr int scales = PairTable::bytes;
  static constexpr int x = scales + (scales_ahead + 1) * scale_bytes;
  static constexpr int bytes = x + (x_ahead<tokens> + 1) * tokens * x_row;
};
static_assert((codes_ahead + 1) * code_slot_bytes <= PairTable::bytes);

/// Where 16 of the 64 bytes of a row of codes lie: lanes that read four neighbouring rows, or rows
/// 16 apart, meet in no bank.
__device__ inline int code_place(int row, int unit) {
  const int moved = unit ^ (row >> 1 & 1) * 2 ^ (row >> 4 & 3);
  return row / 2 * PairTable::pitch + row % 2 * 64 + moved * 16;
}
/// The same for rows a multiple of 16 above a known place.
__device__ constexpr int code_offset(int rows) {
  return rows / 2 * PairTable::pitch + rows % 2 * 64;
}
__device__ inline int scale_place(int row) { return row + row / 32 * 4; }

/// threadIdx.x. Where registers are short it is read anew each time, so that what follows from it
/// is computed again rather than kept: spilled, it would come from far.
template <bool anew>
__device__ inline int thread_index() {
  if constexpr (!anew) return static_cast<int>(threadIdx.x);
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

/// What one thread brings of a chunk. W past the last output is that before it once more, which
/// nobody stores; so is W past the end of the contraction, where x is zero.
template <class T, Op op, int tokens>
struct Loader {
  static constexpr bool anew = tokens == 64;
  const Problem<T>& p;
  int first_output, first_token;

  /// Of the element of W that comes `row` rows and `column` columns into the chunk.
  __device__ uint32_t element(int chunk, int row, int column) const {
    const int r = min((op == Op::transpose ? first_output : chunk * tile) + row, p.n - 1);
    const int c =
        min((op == Op::transpose ? chunk * tile : first_output) + column, p.k - scale_chunk);
    return static_cast<uint32_t>(r) * static_cast<uint32_t>(p.k) + static_cast<uint32_t>(c);
  }
  __device__ void copy_codes(uint32_t to, int chunk) const {
    const int thread = thread_index<anew>(), row = thread / 4, unit = thread % 4;
    to += code_place(row, unit);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy_async<16>(to + i * code_offset(tile / 2),
                     p.codes + element(chunk, row + i * tile / 2, 32 * unit) / 2, true);
  }
  __device__ void copy_x(uint32_t to, int chunk) const {
    constexpr int units = x_row / 16, rows = threads / units;
    const int thread = thread_index<anew>(), token = thread / units, unit = thread % units;
    if (tokens < rows && token >= tokens) return;
    const int at = chunk * tile + unit * 8;
    const int tokens_here = at < (op == Op::transpose ? p.k : p.n) ? p.m - first_token - token : 0;
    const T* const from = p.x + (first_token + token) * p.x_pitch + at;
    to += token * x_row + (unit ^ (token & 1)) * 16;
#pragma unroll
    for (int i = 0; i < tokens; i += rows)
      copy_async<16>(to + i * x_row, from + i * p.x_pitch, i < tokens_here);
  }
  /// A scale for 64 columns, or of the first and the last 32 of them.
  __device__ void fetch_scale(AnyScale& scale, int chunk, int half = 0) const {
    const int thread = thread_index<anew>();
    const uint32_t at = element(chunk, thread / 2, thread % 2 * 64 + half * scale_chunk);
    scale.fetch(p.scales, at >> p.scales.shift);
  }
  __device__ void store_scale(float* to, AnyScale scale, int chunk, const float* map,
                              float offset) const {
    const int thread = thread_index<anew>();
    to += thread % 2 * 2 * scale_pitch + scale_place(thread / 2);
    to[0] = to[scale_pitch] = scale.value(p.scales, PairTable::Map{map}, offset);
    if (p.wide_scales) return;
    fetch_scale(scale, chunk, 1);
    to[scale_pitch] = scale.value(p.scales, PairTable::Map{map}, offset);
  }
};

/// Two values of W, rounded, side by side.
__device__ inline uint32_t weights(float first, float first_scale, float second,
                                   float second_scale) {
  return pack(__fmul_rn(first, first_scale), __fmul_rn(second, second_scale));
}

/// Decoded W: [two products of depth 16][two groups of 16 outputs].
using Left = uint32_t[2][2][4];

/// Outputs are rows of W: the lane has rows 16 i + g and 16 i + g + 8 of the warp's 32. It reads
/// its codes at once or, where registers are short, in halves at twice the cost.
template <bool halves>
struct ForwardCodes {
  const char* codes;
  const float* scales;
  int at;
  uint2 both[2][2];

  __device__ ForwardCodes(const char* codes, const float* scales, int group, int half, int g, int t)
      : codes(codes) {
    const int row = 32 * group + g;
    at = code_place(row, 2 * half + t / 2) + t % 2 * 8;
    this->scales = scales + (2 * half + t / 2) * scale_pitch + scale_place(row);
    if constexpr (!halves)
#pragma unroll
      for (int i = 0; i < 4; ++i) both[i / 2][i % 2] = *place<uint2>(i / 2, i % 2);
  }
  template <class Word>
  __device__ const Word* place(int i, int j) const {
    return reinterpret_cast<const Word*>(codes + (at ^ i * 16) + code_offset(16 * i + 8 * j));
  }
  __device__ void decode(Left& a, const PairTable& table, int pair) const {
    uint32_t word[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if constexpr (halves)
          word[i][j] = place<uint32_t>(i, j)[pair];
        else
          word[i][j] = pair == 0 ? both[i][j].x : both[i][j].y;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float scale = scales[16 * i + 8 * j];
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const float2 v = table(word[i][j], 2 * s + b);
            a[s][i][j + 2 * b] = weights(v.x, scale, v.y, scale);
          }
        }
  }
};

/// Outputs are columns of W: the lane has columns 4 g .. 4 g + 3 of the warp's 32.
struct BackwardCodes {
  const char* codes;
  const float* scales;
  int at;  // of the first of 16 rows

  __device__ BackwardCodes(const char* codes, const float* scales, int group, int half, int g,
                           int t)
      : codes(codes) {
    const int row = 64 * half + 16 * t;
    at = code_place(row, group) + 2 * g;
    this->scales = scales + group * scale_pitch + scale_place(row);
  }
  __device__ void decode(Left& a, const PairTable& table, int pair) const {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int first = 8 * pair + 4 * s;
      const float4 scale = *reinterpret_cast<const float4*>(scales + first);
      uint32_t word[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int place = (c < 2 ? at : at ^ 32) + code_offset(first + c);  // moved
        word[c] = *reinterpret_cast<const uint16_t*>(codes + place);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 v0 = table(word[0], i), v1 = table(word[1], i);
        const float2 v2 = table(word[2], i), v3 = table(word[3], i);
        a[s][i][0] = weights(v0.x, scale.x, v1.x, scale.y);
        a[s][i][1] = weights(v0.y, scale.x, v1.y, scale.y);
        a[s][i][2] = weights(v2.x, scale.z, v3.x, scale.w);
        a[s][i][3] = weights(v2.y, scale.z, v3.y, scale.w);
      }
    }
  }
};

/// c += W x^T over this warp's half of a chunk.
template <class T, Op op, int tokens>
__device__ void multiply_chunk(float (&c)[tokens / 8][2][4], const char* w, const float* scales,
                               const char* x, const PairTable& table) {
  const int thread = thread_index<tokens == 64>(), g = thread % 32 / 4, t = thread % 4;
  const int group = thread / 32 % 4, half = thread / 128;
  using Codes = std::conditional_t<op == Op::transpose, ForwardCodes<tokens == 64>, BackwardCodes>;
  const Codes codes(w, scales, group, half, g, t);
  x += g * x_row + (8 * half + 2 * t) * 16;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    Left a;
    codes.decode(a, table, pair);
    const char* const own = x + (pair ^ (g & 1)) * 16;
#pragma unroll
    for (int j = 0; j < tokens / 8; ++j) {
      const uint4 b = *reinterpret_cast<const uint4*>(own + 8 * j * x_row);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma<T>(c[j][i], a[0][i], b.x, b.y);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma<T>(c[j][i], a[1][i], b.z, b.w);
    }
  }
}

/// The sum of both halves in shared memory, [tokens, 128 outputs], for the whole block.
template <Op op, int tokens>
__device__ void add_halves(float* sum, const float (&c)[tokens / 8][2][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, group = warp % 4, half = warp / 4;
  const auto visit = [&](auto&& element) {
#pragma unroll
    for (int j = 0; j < tokens / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int own = op == Op::transpose ? 16 * i + g + e / 2 * 8 : 4 * g + 2 * i + e / 2;
          element(sum[(8 * j + 2 * t + e % 2) * output_pitch + 32 * group + own], c[j][i][e]);
        }
  };
  __syncthreads();
  if (half == 1) visit([](float& at, float value) { at = value; });
  __syncthreads();
  if (half == 0) visit([](float& at, float value) { at = value + at; });
  __syncthreads();
}

// One block per 128 outputs, `tokens` tokens and part of the contraction. Reads W once per `tokens`
// rows of x, 0.52 bytes an element, and x once per 128 outputs.
template <class T, Op op, int tokens>
__global__ void __launch_bounds__(threads, 2) nf4_mma_kernel(Problem<T> p) {
  extern __shared__ __align__(128) char memory[];
  using Place = Shared<tokens>;
  float* const map = reinterpret_cast<float*>(memory + Place::map);
  const auto codes_at = [](int i) {
    return Place::codes + i % (codes_ahead + 1) * code_slot_bytes;
  };
  const auto x_at = [](int i) { return Place::x + i % (x_ahead<tokens> + 1) * tokens * x_row; };
  const auto scales_at = [&](int i) {
    return reinterpret_cast<float*>(memory + Place::scales + i % (scales_ahead + 1) * scale_bytes);
  };
  PairTable::fill(memory);
  const int first_output = static_cast<int>(blockIdx.x) * tile;
  const int first_token = static_cast<int>(blockIdx.z) * tokens;
  const int first_chunk = static_cast<int>(blockIdx.y) * p.steps;
  const int depth = op == Op::transpose ? p.k : p.n;
  const int end = min(p.steps, (depth + tile - 1) / tile - first_chunk);
  const uint32_t shared = shared_address(memory);
  const Loader<T, op, tokens> loader{p, first_output, first_token};
  const auto copy_codes = [&](int c) {
    if (c < end) loader.copy_codes(shared + codes_at(c), first_chunk + c);
  };
  const auto copy_x = [&](int c) {
    if (c >= 0 && c < end) loader.copy_x(shared + x_at(c), first_chunk + c);
  };
  // Groups begun after the one that brings x, and after the one that brings W, of a chunk.
  constexpr int under_way =
      x_ahead<tokens> < codes_ahead ? 2 * x_ahead<tokens> - 1 : 2 * codes_ahead - 2;

  // Those of W need not wait for the kernel before this one; they become part of the first group.
#pragma unroll
  for (int c = 0; c < codes_ahead; ++c) copy_codes(c);
  AnyScale scales[scales_ahead];
#pragma unroll
  for (int i = 0; i < scales_ahead; ++i)
    if (i < end) loader.fetch_scale(scales[i], first_chunk + i);
  const bool nested = p.scales.codes != nullptr;
  if (nested) map[PairTable::map_place(threadIdx.x)] = p.scales.map[threadIdx.x];
  const float offset = nested ? *p.scales.offset : 0.0f;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < scales_ahead; ++i)
    if (i < end) loader.store_scale(scales_at(i), scales[i], first_chunk + i, map, offset);

  await_previous();
#pragma unroll
  for (int i = -codes_ahead; i < 0; ++i) {
    copy_x(i + x_ahead<tokens>);
    commit_copies();
    commit_copies();
  }
  const PairTable table(memory);
  float c[tokens / 8][2][4] = {};
  for (int i = 0; i < end; ++i) {
    wait_for_copies<under_way>();
    __syncthreads();
    copy_x(i + x_ahead<tokens>);
    commit_copies();
    copy_codes(i + codes_ahead);
    commit_copies();
    // Fetched one chunk ago, and needed by the next.
    const int next = i + scales_ahead - 1;
    if (i > 0 && next < end)
      loader.store_scale(scales_at(next), scales[0], first_chunk + next, map, offset);
    if (next + 1 < end) loader.fetch_scale(scales[0], first_chunk + next + 1);
    multiply_chunk<T, op, tokens>(c, memory + codes_at(i), scales_at(i), memory + x_at(i), table);
  }
  wait_for_copies();
  float* const sum = reinterpret_cast<float*>(memory);
  add_halves<op, tokens>(sum, c);
  finish<tile, tokens, threads>(p, op == Op::transpose ? p.n : p.k, sum, output_pitch, first_output,
                                first_token);
}

int largest_shared_memory() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

template <class T, Op op, int tokens>
void launch(const Problem<T>& p, int outputs) {
  constexpr int bytes = Shared<tokens>::bytes;
  static_assert(tokens * output_pitch * 4 <= bytes);
  const auto kernel = nf4_mma_kernel<T, op, tokens>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "nf4_matmul");
  const dim3 grid(static_cast<unsigned>(ceil_div(outputs, tile)), static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(ceil_div(p.m, tokens)));
  launch_early("nf4_matmul", kernel,
               LaunchShape{.grid = grid,
                           .threads = threads,
                           .shared_bytes = bytes,
                           .cluster = p.clustered ? grid.y : 1},
               p);
}

/// A row's bits are the same whatever its block takes besides.
template <Op op, class T>
void multiply(const Problem<T>& p, int outputs) {
  if (p.m <= 8) return launch<T, op, 8>(p, outputs);
  if (p.m <= 16) return launch<T, op, 16>(p, outputs);
  if (p.m <= 32 || largest_shared_memory() < Shared<64>::bytes)
    return launch<T, op, 32>(p, outputs);
  launch<T, op, 64>(p, outputs);
}

}  // namespace

void nf4_matmul_mma(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op,
                    const Tensor& addend, const Tensor& workspace) {
  Problem<bf16> p = problem_of<bf16>(y, x, w, addend, workspace);
  p.splits = static_cast<int>(nf4_splits(Nf4Kernel::mma, op, p.n, p.k));
  p.clustered = p.splits > 1 && p.splits <= largest_cluster && launches_early();
  p.steps = ceil_div(ceil_div(op == Op::transpose ? p.k : p.n, tile), p.splits);
  op == Op::transpose ? multiply<Op::transpose>(p, p.n) : multiply<Op::none>(p, p.k);
}

}  // namespace qlab::cuda
