#include "cuda/early_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/nf4_linear.cuh"

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

// How many chunks before they are needed copies begin. Tiles of W come from far; those of x, out of
// a cache, less early where they are large.
constexpr int codes_ahead = 3, scales_ahead = 2;
template <int tokens>
constexpr int x_ahead = tokens == 64 ? 1 : 3;
constexpr int scale_bytes = 4 * scale_pitch * 4;
template <int tokens>
struct Shared {
  static constexpr int codes = PairTable::pitch / 2;  // in the free halves of the table's rows
  static constexpr int map = PairTable::bytes;
  static constexpr int scales = map + map_size * 4;
  static constexpr int x = scales + (scales_ahead + 1) * scale_bytes;
  static constexpr int bytes = x + (x_ahead<tokens> + 1) * tokens * x_row;
};
constexpr int code_slot_bytes = tile / 2 * PairTable::pitch;  // two rows to a row of the table
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

/// What one thread brings of each chunk, one after the other. Outside of W and x are zeros.
template <class T, Op op>
class Loader {
 public:
  __device__ Loader(const Problem<T>& p, int first_output, int first_token, int first_chunk)
      : p_(p) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row0 = op == Op::transpose ? first_output : first_chunk * tile;
    const int column0 = op == Op::transpose ? first_chunk * tile : first_output;
    {
      const int row = row0 + thread / 4, column = column0 + thread % 4 * 32;
      codes_ = p.codes + (static_cast<int64_t>(row) * p.k + column) / 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) codes_left_[i] = left(row + tile / 2 * i, column);
      code_to_ = code_place(thread / 4, thread % 4);
    }
    {
      const int row = row0 + thread / 2, column = column0 + thread % 2 * 2 * scale_chunk;
      scale_ =
          static_cast<uint32_t>(row) * static_cast<uint32_t>(p.k) + static_cast<uint32_t>(column);
      scales_left_[0] = left(row, column);
      scales_left_[1] = left(row, column + scale_chunk);
      scale_to_ = thread % 2 * 2 * scale_pitch + scale_place(thread / 2);
    }
    const int token = thread / (x_row / 16), unit = thread % (x_row / 16);
    const int at = first_chunk * tile + unit * 8;
    x_ = p.x + static_cast<int64_t>(first_token + token) * p.x_pitch + at;
    x_left_ = (op == Op::transpose ? p.k : p.n) - at;
    tokens_left_ = p.m - first_token - token;
    x_to_ = token * x_row + (unit ^ (token & 1)) * 16;
  }

  __device__ void copy_codes(uint32_t to) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy_async<16>(to + code_to_ + i * code_offset(tile / 2),
                     codes_ + i * static_cast<int64_t>(p_.k) * (tile / 4), codes_left_[i] > 0);
    codes_ += op == Op::transpose ? tile / 2 : static_cast<int64_t>(p_.k) * (tile / 2);
    codes_left_[0] -= tile;
    codes_left_[1] -= tile;
  }
  template <int tokens>
  __device__ void copy_x(uint32_t to) {
    constexpr int rows = threads / (x_row / 16);
#pragma unroll
    for (int i = 0; i < tokens; i += rows)
      if (tokens >= rows || threadIdx.x < tokens * (x_row / 16))
        copy_async<16>(to + x_to_ + i * x_row, x_ + i * p_.x_pitch,
                       tokens_left_ > i && x_left_ > 0);
    x_ += tile;
    x_left_ -= tile;
  }
  using Pair = AnyScale[2];
  __device__ void fetch_scales(Pair& pair) {
    if (scales_left_[0] > 0) pair[0].fetch(p_.scales, scale_ >> p_.scales.shift);
    if (!p_.wide_scales && scales_left_[1] > 0)
      pair[1].fetch(p_.scales, (scale_ + scale_chunk) >> p_.scales.shift);
    scale_ += op == Op::transpose ? tile : static_cast<uint32_t>(p_.k) * tile;
    scales_left_[0] -= tile;
    scales_left_[1] -= tile;
  }
  /// Those fetched `later` chunks before the last.
  __device__ void store_scales(float* to, const Pair& pair, int later, const float* map,
                               float offset) const {
    const float first = pair[0].value(p_.scales, map, offset);
    const float second = p_.wide_scales ? first : pair[1].value(p_.scales, map, offset);
    const int fetched = -(later + 1) * tile;
    to[scale_to_] = scales_left_[0] > fetched ? first : 0.0f;
    to[scale_to_ + scale_pitch] = scales_left_[1] > fetched ? second : 0.0f;
  }

 private:
  /// What is left along the contraction; nothing where the place lies outside in the other
  /// direction.
  __device__ int left(int row, int column) const {
    if (op == Op::transpose) return row < p_.n ? p_.k - column : 0;
    return column < p_.k ? p_.n - row : 0;
  }
  const Problem<T>& p_;
  const uint8_t* codes_;
  const T* x_;
  uint32_t scale_;
  int codes_left_[2], scales_left_[2], x_left_, tokens_left_;
  int code_to_, scale_to_, x_to_;
};

/// Two values of W, rounded, side by side.
__device__ inline uint32_t weights(float first, float first_scale, float second,
                                   float second_scale) {
  return pack(__fmul_rn(first, first_scale), __fmul_rn(second, second_scale));
}

/// Decoded W: [two products of depth 16][two groups of 16 outputs].
using Left = uint32_t[2][2][4];

/// Outputs are rows of W: the lane has rows 16 i + g and 16 i + g + 8 of the warp's 32.
struct ForwardCodes {
  uint2 word[2][2];
  float scale[2][2];

  __device__ ForwardCodes(const char* codes, const float* scales, int group, int half) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 32 * group + 16 * i + 8 * j + g;
        word[i][j] =
            *reinterpret_cast<const uint2*>(codes + code_place(row, 2 * half + t / 2) + t % 2 * 8);
        scale[i][j] = scales[(2 * half + t / 2) * scale_pitch + scale_place(row)];
      }
  }
  __device__ void decode(Left& a, const PairTable& table, int pair) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const float2 v = table(pair == 0 ? word[i][j].x : word[i][j].y, b);
          a[b / 2][i][j + b % 2 * 2] = weights(v.x, scale[i][j], v.y, scale[i][j]);
        }
  }
};

/// Outputs are columns of W: the lane has columns 4 g .. 4 g + 3 of the warp's 32.
struct BackwardCodes {
  const char* codes;
  const float* scales;
  int at;  // of the first of 16 rows

  __device__ BackwardCodes(const char* codes, const float* scales, int group, int half)
      : codes(codes) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
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
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, group = warp % 4, half = warp / 4;
  using Codes = std::conditional_t<op == Op::transpose, ForwardCodes, BackwardCodes>;
  const Codes codes(w, scales, group, half);
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
  await_previous();
  const int first_output = static_cast<int>(blockIdx.x) * tile;
  const int first_token = static_cast<int>(blockIdx.z) * tokens;
  const int first_chunk = static_cast<int>(blockIdx.y) * p.steps;
  const int depth = op == Op::transpose ? p.k : p.n;
  const int end = min(p.steps, (depth + tile - 1) / tile - first_chunk);
  const uint32_t shared = shared_address(memory);
  Loader<T, op> loader(p, first_output, first_token, first_chunk);
  const auto copy = [&](int i) {  // those of x first, then those of W
    if (const int c = i + x_ahead<tokens>; c >= 0 && c < end)
      loader.template copy_x<tokens>(shared + x_at(c));
    commit_copies();
    if (i + codes_ahead < end) loader.copy_codes(shared + codes_at(i + codes_ahead));
    commit_copies();
  };
  // Groups begun after the one that brings x, and after the one that brings W, of a chunk.
  constexpr int under_way =
      x_ahead<tokens> < codes_ahead ? 2 * x_ahead<tokens> - 1 : 2 * codes_ahead - 2;

#pragma unroll
  for (int i = -codes_ahead; i < 0; ++i) copy(i);
  typename Loader<T, op>::Pair pairs[scales_ahead];
#pragma unroll
  for (int i = 0; i < scales_ahead; ++i) loader.fetch_scales(pairs[i]);
  const bool nested = p.scales.codes != nullptr;
  if (nested) map[threadIdx.x] = p.scales.map[threadIdx.x];
  const float offset = nested ? *p.scales.offset : 0.0f;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < scales_ahead; ++i)
    loader.store_scales(scales_at(i), pairs[i], scales_ahead - 1 - i, map, offset);

  const PairTable table(memory);
  float c[tokens / 8][2][4] = {};
  for (int i = 0; i < end; ++i) {
    wait_for_groups<under_way>();
    __syncthreads();
    copy(i);
    const bool more = i + scales_ahead < end;
    if (more) loader.fetch_scales(pairs[0]);
    multiply_chunk<T, op, tokens>(c, memory + codes_at(i), scales_at(i), memory + x_at(i), table);
    if (more) loader.store_scales(scales_at(i + scales_ahead), pairs[0], 0, map, offset);
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
  launch_early_shared("nf4_matmul", kernel, grid, threads, bytes, p);
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
  p.steps = ceil_div(ceil_div(op == Op::transpose ? p.k : p.n, tile), p.splits);
  op == Op::transpose ? multiply<Op::transpose>(p, p.n) : multiply<Op::none>(p, p.k);
}

}  // namespace qlab::cuda
