// The products of adapters with dropout, on the tensor cores of sm_80 and newer: masks are drawn
// where x is read, and no dropped copy of x is made. A thread meets eight neighbouring features of
// a row, which is what one draw decides. Sums over features and tokens are cut into parts by the
// segment's own size, written in fp32 and added by sum_kernel.
#pragma once
#include "cuda/adapter_tiles.cuh"

namespace qlab::cuda::adapter {

// ---- s = A dropout(x)

inline constexpr int down_threads = 128, down_rows = 128, down_cols = 64;
template <int tiles>
constexpr int down_stage_bytes = (down_rows + 16 * tiles) * down_cols * 2;
inline constexpr int down_stages = 4;
template <int tiles>
constexpr int down_bytes = down_stages* down_stage_bytes<tiles>;

struct Down {
  const bf16* x;
  const bf16* a;  // [R of all parts, K]
  float* sums;    // [parts, splits, T, R]
  int64_t x_pitch, a_pitch;
  int rows, k, split_cols, parts;
  Masks masks;
};

// A block per part, 128 rows and split_cols columns, a warp per 32 rows; tiles of 64 columns of x
// and A in a ring. Both operands number k by the eight features of a thread: two steps of 16 per
// four 16-byte pieces of a row. Halves of odd rows are swapped, so that two rows occupy all banks.
// Reads x once per part, from memory once; writes 4 bytes per row, column of R and split.
template <int tiles>
__global__ void __launch_bounds__(down_threads) down_kernel(const __grid_constant__ Down p) {
  constexpr int width = 16 * tiles, stages = down_stages, stage_bytes = down_stage_bytes<tiles>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int part = static_cast<int>(blockIdx.x) % p.parts;
  const int row0 = static_cast<int>(blockIdx.x) / p.parts * down_rows;
  const int begin = static_cast<int>(blockIdx.y) * p.split_cols;
  const int end = min(begin + p.split_cols, p.k),
            chunks = (end - begin + down_cols - 1) / down_cols;
  await_previous();

  const int unit = thread % 8, first = thread / 8;
  const bf16* const a = p.a + static_cast<int64_t>(part) * width * p.a_pitch;
  const auto load_chunk = [&](int chunk) {
    const int col = begin + chunk * down_cols + 8 * unit;
    const uint32_t to = base + chunk % stages * stage_bytes;
    const bool inside = col < end;
#pragma unroll
    for (int i = 0; i < (down_rows + width) / 16; ++i) {
      const int row = first + 16 * i;
      const bool valid = inside && (i >= down_rows / 16 || row0 + row < p.rows);
      const bf16* const from = i < down_rows / 16
                                   ? p.x + static_cast<int64_t>(row0 + row) * p.x_pitch
                                   : a + static_cast<int64_t>(row - down_rows) * p.a_pitch;
      copy_async<16>(to + row * 128 + (unit ^ (row & 1) << 2) * 16, valid ? from + col : p.x,
                     valid);
    }
  };
  for (int i = 0; i < stages - 1; ++i) {
    if (i < chunks) load_chunk(i);
    commit_copies();
  }

  Place place[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    place[i] = place_of(p.masks, min(row0 + 32 * warp + 8 * i + lane / 4, p.rows - 1));
  const uint64_t key = p.masks.key[part];
  float acc[2][2 * tiles][4] = {};
  const uint32_t from_x = base + (32 * warp + lane / 4) * 128,
                 from_a = base + (down_rows + lane / 4) * 128;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    if (chunk + stages - 1 < chunks) load_chunk(chunk + stages - 1);
    commit_copies();
    const uint32_t stage = chunk % stages * stage_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t piece = stage + ((4 * half + lane % 4) ^ (lane / 4 & 1) << 2) * 16;
      const int column_unit = (begin + chunk * down_cols) / 8 + 4 * half + lane % 4;
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = masked(load_shared(from_x + i * 8 * 128 + piece),
                      mask_of(key, place[i], column_unit), p.masks.threshold);
#pragma unroll
      for (int j = 0; j < 2 * tiles; ++j) {
        const uint4 a_piece = load_shared(from_a + j * 8 * 128 + piece);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint4 &top = x[2 * m], &bottom = x[2 * m + 1];
          mma<bf16>(acc[m][j], {top.x, bottom.x, top.y, bottom.y}, a_piece.x, a_piece.y);
          mma<bf16>(acc[m][j], {top.z, bottom.z, top.w, bottom.w}, a_piece.z, a_piece.w);
        }
      }
    }
  }
  float* const to = p.sums + (static_cast<int64_t>(part) * gridDim.y + blockIdx.y) * p.rows * width;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + 32 * warp + 8 * i + lane / 4;
    if (row >= p.rows) continue;
#pragma unroll
    for (int j = 0; j < 2 * tiles; ++j)
      *reinterpret_cast<float2*>(to + static_cast<int64_t>(row) * width + 8 * j + lane % 4 * 2) =
          make_float2(acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]);
  }
}

// ---- dA += ds^T dropout(x)

inline constexpr int in_threads = 256, in_rows = 32, in_cols = 256, in_warp_cols = 32;

struct In {
  const bf16* x;
  const bf16* ds;  // [T, R of all parts]
  float* sums;     // [parts, splits, R, K]
  int64_t x_pitch, ds_pitch;
  int rows, k, split_rows, parts;
  Masks masks;
};

template <int tiles>
struct InTile {
  static constexpr int width = 16 * tiles;
  static constexpr int ds_at = in_rows * row_bytes<in_cols>;
  static constexpr int stage_bytes = ds_at + in_rows * row_bytes<width>;
  static constexpr int stages = tiles <= 2 ? 4 : 3;                     // 99 KB at most
  static constexpr int kept_bytes = in_rows * row_bytes<in_warp_cols>;  // of a warp
  static constexpr int bytes = stages * stage_bytes + in_threads / 32 * kept_bytes;
};

// A block per part, 256 columns and split_rows rows, a warp per 32 columns, whose sums stay in
// registers; 32 rows at a time, in a ring. Each warp puts its columns of x down as the module sees
// them. Reads x once per part, from memory once; writes 4 bytes per element of dA and split.
template <int tiles>
__global__ void __launch_bounds__(in_threads, 2) in_kernel(const __grid_constant__ In p) {
  using Tile = InTile<tiles>;
  constexpr int width = Tile::width, stages = Tile::stages;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int part = static_cast<int>(blockIdx.x) % p.parts;
  const int col0 = static_cast<int>(blockIdx.x) / p.parts * in_cols;
  const int own0 = col0 + warp * in_warp_cols;
  const int begin = static_cast<int>(blockIdx.y) * p.split_rows;
  const int end = min(begin + p.split_rows, p.rows), slabs = (end - begin + in_rows - 1) / in_rows;
  await_previous();

  constexpr int units = in_cols / 8, step = in_threads / units, ds_units = width / 8;
  const int first = thread / units, unit = thread % units, ds_row = thread / ds_units;
  const bool inside = col0 + 8 * unit < p.k;
  const bf16* const ds = p.ds + part * width + thread % ds_units * 8;
  const auto load_slab = [&](int slab) {
    const int row0 = begin + slab * in_rows;
    const uint32_t to = base + slab % stages * Tile::stage_bytes;
#pragma unroll
    for (int i = 0; i < in_rows; i += step) {
      const int row = row0 + first + i;
      const bool valid = inside && row < end;
      copy_async<16>(to + (first + i) * row_bytes<in_cols> + 16 * unit,
                     valid ? p.x + row * p.x_pitch + col0 + 8 * unit : p.x, valid);
    }
    if (ds_row < in_rows) {
      const bool valid = row0 + ds_row < end;
      copy_async<16>(to + Tile::ds_at + ds_row * row_bytes<width> + thread % ds_units * 16,
                     valid ? ds + (row0 + ds_row) * p.ds_pitch : p.ds, valid);
    }
  };
  static_assert(in_rows * ds_units <= in_threads);
  for (int i = 0; i < stages - 1; ++i) {
    if (i < slabs) load_slab(i);
    commit_copies();
  }

  float acc[tiles][in_warp_cols / 8][4] = {};
  const uint64_t key = p.masks.key[part];
  const uint32_t own =
      base + (lane / 4) * row_bytes<in_cols> + warp * in_warp_cols * 2 + lane % 4 * 16;
  const uint32_t from_ds = right_lane<width>(base + Tile::ds_at);
  const uint32_t kept = base + stages * Tile::stage_bytes + warp * Tile::kept_bytes;
  const uint32_t put = kept + lane / 4 * row_bytes<in_warp_cols> + lane % 4 * 16;
  for (int slab = 0; slab < slabs; ++slab) {
    Philox mask[in_rows / 8];
#pragma unroll
    for (int i = 0; i < in_rows / 8; ++i)
      mask[i] = mask_of(
          key, place_of(p.masks, min(begin + slab * in_rows + 8 * i + lane / 4, p.rows - 1)),
          own0 / 8 + lane % 4);
    wait_for_copies<stages - 2>();
    __syncthreads();
    if (slab + stages - 1 < slabs) load_slab(slab + stages - 1);
    commit_copies();
    const uint32_t stage = slab % stages * Tile::stage_bytes;
#pragma unroll
    for (int i = 0; i < in_rows / 8; ++i)
      store_shared(put + i * 8 * row_bytes<in_warp_cols>,
                   masked(load_shared(own + stage + i * 8 * row_bytes<in_cols>), mask[i],
                          p.masks.threshold));
    __syncwarp();
#pragma unroll
    for (int k = 0; k < in_rows / 16; ++k) {
      uint32_t x[in_warp_cols / 16][4];
#pragma unroll
      for (int n = 0; n < in_warp_cols / 16; ++n)
        load_transposed(x[n],
                        left_lane<in_warp_cols>(kept) + 16 * k * row_bytes<in_warp_cols> + 32 * n);
#pragma unroll
      for (int j = 0; j < tiles; ++j) {
        uint32_t left[4];
        load_transposed(left, from_ds + stage + 16 * k * row_bytes<width> + 32 * j);
#pragma unroll
        for (int n = 0; n < in_warp_cols / 16; ++n) {
          mma<bf16>(acc[j][2 * n], left, x[n][0], x[n][1]);
          mma<bf16>(acc[j][2 * n + 1], left, x[n][2], x[n][3]);
        }
      }
    }
  }
  float* const to = p.sums + (static_cast<int64_t>(part) * gridDim.y + blockIdx.y) * width * p.k;
#pragma unroll
  for (int n = 0; n < in_warp_cols / 8; ++n) {
    const int col = own0 + 8 * n + lane % 4 * 2;
    if (col >= p.k) continue;
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(to + static_cast<int64_t>(16 * j + 8 * h + lane / 4) * p.k +
                                   col) = make_float2(acc[j][n][2 * h], acc[j][n][2 * h + 1]);
  }
}

// ---- dx += mask (ds A) / (1 - p)

inline constexpr int dx_threads = 256, dx_cols = 256, dx_warp_cols = 32;

struct Dx {
  bf16* dx;
  const bf16* ds;  // [T, R of all parts]
  const bf16* a;   // [R of all parts, K]
  int64_t dx_pitch, ds_pitch, a_pitch;
  int rows, k, block_rows;
  float factor;
  Masks masks;
};

// A block per 256 columns and block_rows rows, a warp per 32 columns, whose part of A stays in
// registers; 16 rows at a time. A thread owns eight neighbouring columns of two rows. Reads and
// writes dx once.
template <int tiles, int parts>
__global__ void __launch_bounds__(dx_threads, 2) dx_kernel(const __grid_constant__ Dx p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int own0 = static_cast<int>(blockIdx.x) * dx_cols + warp * dx_warp_cols;
  const int begin = static_cast<int>(blockIdx.y) * p.block_rows;
  const int end = min(begin + p.block_rows, p.rows);
  await_previous();
  if (own0 >= p.k) return;

  // Column n of tile j is feature 8 (n / 2) + 2 j + n % 2 of the warp's, k of a step of 16 is
  // column 4 (k % 8 / 2) + 2 (k / 8) + k % 2 of its sixteen of ds.
  uint32_t a[parts][tiles][4][2];
#pragma unroll
  for (int part = 0; part < parts; ++part)
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int col = own0 + lane / 8 * 8 + 2 * j + lane / 4 % 2;
          const int row = 16 * (part * tiles + i) + lane % 4 * 4 + 2 * h;
          const auto at = [&](int r) -> uint32_t {
            return col < p.k ? p.a[r * p.a_pitch + col].bits : 0;
          };
          a[part][i][j][h] = at(row) | at(row + 1) << 16;
        }

  const int col = own0 + lane % 4 * 8;
  const auto row_of = [&](int row0, int h) { return row0 + 8 * h + lane / 4; };
  const auto load_dx = [&](uint4(&v)[2], int row0) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      v[h] = row_of(row0, h) < end && col < p.k
                 ? *reinterpret_cast<const uint4*>(p.dx + row_of(row0, h) * p.dx_pitch + col)
                 : make_uint4(0, 0, 0, 0);
  };
  uint4 next[2];
  load_dx(next, begin);
  for (int row0 = begin; row0 < end; row0 += 16) {
    const uint4 now[2] = {next[0], next[1]};
    load_dx(next, row0 + 16);
    const bf16* ds[2];
    Place place[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(row_of(row0, h), end - 1);
      place[h] = place_of(p.masks, row);
      ds[h] = p.ds + row * p.ds_pitch + lane % 4 * 4;
    }
    float sum[2][8] = {};
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      float acc[4][4] = {};
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        const int at = 16 * (part * tiles + i);
        const uint2 top = *reinterpret_cast<const uint2*>(ds[0] + at),
                    bottom = *reinterpret_cast<const uint2*>(ds[1] + at);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma<bf16>(acc[j], {top.x, bottom.x, top.y, bottom.y}, a[part][i][j][0], a[part][i][j][1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Philox mask = mask_of(p.masks.key[part], place[h], col / 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (mask.lane[j] << 16 >= p.masks.threshold) sum[h][2 * j] += acc[j][2 * h];
          if (mask.lane[j] >= p.masks.threshold) sum[h][2 * j + 1] += acc[j][2 * h + 1];
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row_of(row0, h) >= end || col >= p.k) continue;
      const uint32_t words[4] = {now[h].x, now[h].y, now[h].z, now[h].w};
      float v[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) unpack(v[2 * j], v[2 * j + 1], words[j]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = fmaf(p.factor, sum[h][j], v[j]);
      store(p.dx + row_of(row0, h) * p.dx_pitch + col, v);
    }
  }
}

}  // namespace qlab::cuda::adapter
