// ds = dy (scale B) and dB += scale dy^T s in one pass over dy, on the tensor cores of sm_80 and
// newer. The sums over columns and over tokens are cut into parts by the segment's own size,
// written in fp32 and added by sum_kernel.
#pragma once
#include "cuda/adapter_tiles.cuh"

namespace qlab::cuda::adapter {

inline constexpr int out_rows = 16;

struct OutPart {
  const bf16* b;   // [out, R], scaled
  float* db_sums;  // [splits, out, R]
  int row, out, column, first_tile;
};
struct Out {
  const bf16* dy;
  const bf16* s;   // [T, columns of all parts]
  float* ds_sums;  // [column tiles, T, R]
  int64_t dy_pitch, s_pitch, b_pitch;
  int64_t dy_segment, s_segment, ds_sums_segment, db_sums_segment;  // elements between segments
  int rows, split_rows, parts, width;                               // of a segment
  OutPart part[max_parts];
};

/// A part has R = 16 tiles columns.
template <int tiles, int warps_, int warp_cols_, int stages_>
struct OutTile {
  static constexpr int width = 16 * tiles, warps = warps_, warp_cols = warp_cols_, stages = stages_;
  static constexpr int threads = 32 * warps, cols = warps * warp_cols;
  static constexpr int s_at = out_rows * row_bytes<cols>;
  static constexpr int stage_bytes = s_at + out_rows * row_bytes<width>;
  static constexpr int share_pitch = width + 8;         // the rows of a fragment share no bank
  static constexpr int share = out_rows * share_pitch;  // floats
  static constexpr int bytes = stages * stage_bytes + 2 * warps * share * 4;
};

/// dy is the first to leave the L2, so that the sums stay there for the kernel that adds them.
__device__ inline void copy_streamed(uint32_t to, const void* from, bool inside) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(inside ? 16 : 0), "l"(policy)
               : "memory");
#else
  copy_async<16>(to, from, inside);
#endif
}

// A block per segment, tile of columns of one module and split_rows rows; 16 rows at a time, in a
// ring. A warp keeps its columns of B and of dB in registers; the warps' shares of ds meet in
// shared memory, one step behind. Reads dy once; writes 4 bytes of ds per row and tile, and of dB
// per column and split.
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1) out_kernel(const __grid_constant__ Out p) {
  constexpr int width = Tile::width, cols = Tile::cols, stages = Tile::stages;
  constexpr int tiles = width / 16, steps = Tile::warp_cols / 16;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  float* const shares = reinterpret_cast<float*>(shared + stages * Tile::stage_bytes);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.x);
  int which = 0;
  while (which + 1 < p.parts && tile >= p.part[which + 1].first_tile) ++which;
  const OutPart& part = p.part[which];
  const int out = part.out, col0 = (tile - part.first_tile) * cols;
  const int own0 = col0 + warp * Tile::warp_cols;
  const int begin = static_cast<int>(blockIdx.y) * p.split_rows;
  const int end = min(begin + p.split_rows, p.rows),
            slabs = (end - begin + out_rows - 1) / out_rows;
  await_previous();

  // A thread stays in its columns and goes down by equal steps.
  constexpr int units = cols / 8, step = Tile::threads / units, s_units = width / 8;
  static_assert(Tile::threads % units == 0 && out_rows * s_units <= Tile::threads);
  const int first = thread / units, unit = thread % units;
  const bool inside = col0 + 8 * unit < out;
  const auto segment = static_cast<int64_t>(blockIdx.z);
  const bf16* from = p.dy + segment * p.dy_segment + part.row + (inside ? col0 + 8 * unit : 0) +
                     static_cast<int64_t>(begin + first) * p.dy_pitch;
  const int64_t down = step * p.dy_pitch;
  uint32_t to = base + first * row_bytes<cols> + 16 * unit;
  const int s_row = thread / s_units;
  const bf16* from_s = p.s + segment * p.s_segment + part.column + thread % s_units * 8 +
                       static_cast<int64_t>(begin + s_row) * p.s_pitch;
  uint32_t to_s = base + Tile::s_at + s_row * row_bytes<width> + thread % s_units * 16;
  int left = end - begin;  // rows from the next slab on
  // The place of the next slab is counted by each thread: for a uniform offset beside a cache
  // policy ptxas 13.0 makes instructions that are illegal.
  uint32_t next = 0;
  const auto load_slab = [&] {
    const bf16* row = from;
#pragma unroll
    for (int i = 0; i < out_rows / step; ++i, row += down) {
      const bool valid = inside && first + i * step < left;
      copy_streamed(to + i * step * row_bytes<cols>, valid ? row : p.dy, valid);
    }
    if (s_row < out_rows) copy_async<16>(to_s, s_row < left ? from_s : p.s, s_row < left);
    from += out_rows * p.dy_pitch, from_s += out_rows * p.s_pitch, left -= out_rows;
    const uint32_t ahead = ++next == stages ? -(stages - 1) * Tile::stage_bytes : Tile::stage_bytes;
    to += ahead, to_s += ahead;
    if (next == stages) next = 0;
  };
  for (int i = 0; i < stages - 1; ++i) {
    if (i < slabs) load_slab();
    commit_copies();
  }

  // B as the right operand: two neighbouring columns of dy per register.
  const bf16* const of_b = part.b + segment * p.width;
  uint32_t b[steps][2 * tiles][2];
#pragma unroll
  for (int k = 0; k < steps; ++k)
#pragma unroll
    for (int j = 0; j < 2 * tiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int col = own0 + 16 * k + 8 * h + lane % 4 * 2;
        const auto at = [&](int c) -> uint32_t {
          return c < out ? of_b[c * p.b_pitch + 8 * j + lane / 4].bits : 0;
        };
        b[k][j][h] = at(col) | at(col + 1) << 16;
      }

  float db[steps][2 * tiles][4] = {};
  const uint32_t own = base + warp * Tile::warp_cols * 2;
  const uint32_t rows_of_dy = left_lane<cols>(own), columns_of_dy = right_lane<cols>(own),
                 rows_of_s = left_lane<width>(base + Tile::s_at);
  float* ds_sums = p.ds_sums + segment * p.ds_sums_segment +
                   (static_cast<int64_t>(tile) * p.rows + begin) * width;
  const auto add_shares = [&](const float* of_warps, int count) {
#pragma unroll
    for (int j = 0; j < (out_rows * width + Tile::threads - 1) / Tile::threads; ++j) {
      const int i = thread + j * Tile::threads;
      if (i >= count * width) break;
      const float* const at = of_warps + i / width * Tile::share_pitch + i % width;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < Tile::warps; ++w) sum += at[w * Tile::share];
      ds_sums[i] = sum;
    }
    ds_sums += out_rows * width;
  };

  uint32_t stage = 0;
  for (int slab = 0; slab < slabs; ++slab) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    float ds[2 * tiles][4] = {};
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      uint32_t dy[4];
      load_matrices(dy, rows_of_dy + stage + 32 * k);
#pragma unroll
      for (int j = 0; j < 2 * tiles; ++j) mma<bf16>(ds[j], dy, b[k][j][0], b[k][j][1]);
    }
    if (slab + stages - 1 < slabs) load_slab();
    commit_copies();
    uint32_t s[tiles][4];
#pragma unroll
    for (int j = 0; j < tiles; ++j) load_transposed(s[j], rows_of_s + stage + 32 * j);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      uint32_t dy[4];
      load_transposed(dy, columns_of_dy + stage + 32 * k);
#pragma unroll
      for (int j = 0; j < tiles; ++j) {
        mma<bf16>(db[k][2 * j], dy, s[j][0], s[j][1]);
        mma<bf16>(db[k][2 * j + 1], dy, s[j][2], s[j][3]);
      }
    }
    float* const of_warps = shares + slab % 2 * Tile::warps * Tile::share;
    float* const share =
        of_warps + warp * Tile::share + lane / 4 * Tile::share_pitch + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2 * tiles; ++j) {
      *reinterpret_cast<float2*>(share + 8 * j) = make_float2(ds[j][0], ds[j][1]);
      *reinterpret_cast<float2*>(share + 8 * Tile::share_pitch + 8 * j) =
          make_float2(ds[j][2], ds[j][3]);
    }
    if (slab > 0) add_shares(shares + (slab + 1) % 2 * Tile::warps * Tile::share, out_rows);
    stage = stage + Tile::stage_bytes == stages * Tile::stage_bytes ? 0 : stage + Tile::stage_bytes;
  }
  __syncthreads();
  add_shares(shares + (slabs + 1) % 2 * Tile::warps * Tile::share,
             end - begin - (slabs - 1) * out_rows);

  float* const db_sums =
      part.db_sums + segment * p.db_sums_segment + static_cast<int64_t>(blockIdx.y) * out * width;
#pragma unroll
  for (int k = 0; k < steps; ++k)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = own0 + 16 * k + 8 * h + lane / 4;
      if (col >= out) continue;
#pragma unroll
      for (int j = 0; j < 2 * tiles; ++j)
        *reinterpret_cast<float2*>(db_sums + static_cast<int64_t>(col) * width + 8 * j +
                                   lane % 4 * 2) =
            make_float2(db[k][j][2 * h], db[k][j][2 * h + 1]);
    }
}

}  // namespace qlab::cuda::adapter
