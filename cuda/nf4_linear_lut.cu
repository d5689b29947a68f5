#include <cuda_fp16.h>

#include "cuda/early_launch.cuh"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "cuda/nf4_linear.cuh"

namespace qlab::cuda {
namespace {

// A byte of codes is looked up as two fp16 values, which are the tensor cores' left operand as they
// are: the scale of a block meets the sum of its 64 products. Each warp takes tiles of W of 16 rows
// and 256 columns; codes come into registers, those of its next tile as soon as they are used.
constexpr int warps = 16, threads = 32 * warps;
constexpr int unit = 64;  // columns that have one scale in each row
constexpr int tile_units = 4, tile_columns = tile_units * unit, tile_rows = 16;
constexpr int most_rows = nf4_lut_rows;  // of x, the columns of the right operand

/// The values of all bytes, the high nibble's first, in 32 copies: each lane looks up its own, so
/// that none meet in a bank. A byte's copies are followed by 32 floats that are free for others, so
/// that an address is one byte permutation.
class HalfTable {
 public:
  static constexpr int pitch = PairTable::pitch, bytes = 256 * pitch;

  /// By a block of `threads` threads, which then synchronize.
  __device__ static void fill(char* table) {
    static_assert(warps == 16);
    const int lane = static_cast<int>(threadIdx.x) % 32, low = static_cast<int>(threadIdx.x) / 32;
    const auto value = [](int code) {
      return pack<f16>(selected_value(static_cast<uint32_t>(code)), 0.0f);
    };
    const uint32_t second = value(low) << 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a row by eight lanes
      const int high = 4 * i + lane / 8;
      const uint32_t v = value(high) | second;
      *reinterpret_cast<uint4*>(table + (16 * high + low) * pitch + lane % 8 * 16) =
          make_uint4(v, v, v, v);
    }
  }
  __device__ static float* free_floats(char* table, int row) {
    return reinterpret_cast<float*>(table + row * pitch + pitch / 2);
  }
  __device__ explicit HalfTable(const char* table)
      : table_(table), copy_(threadIdx.x % 32 * sizeof(uint32_t)) {}
  /// Of byte `i` of a word.
  __device__ uint32_t operator()(uint32_t word, int i) const {
    return *reinterpret_cast<const uint32_t*>(table_ + __byte_perm(word, copy_, 0x5504 | i << 4));
  }

 private:
  const char* table_;
  uint32_t copy_;
};

struct Shared {
  // Sums of one warp: [tokens / 2][token % 2, 16 outputs], turned by 8 floats a pair of tokens, so
  // that the lanes of half a warp meet in no bank.
  using Sums = float[most_rows / 2][2 * tile_rows];
  static constexpr int batch = 8;  // groups of outputs whose sums are added together
  alignas(128) char table[HalfTable::bytes];
  Sums sums[warps][batch];

  __device__ static float& sum(Sums& sums, int token, int output) {
    return sums[token / 2][(token % 2 * tile_rows + output + token / 2 * 8) % 32];
  }
  /// The dynamic map, at the places of PairTable, whose pitch is this table's.
  __device__ float* map() { return HalfTable::free_floats(table, 0); }
  /// For a warp: of even rows, and of odd ones.
  __device__ float* scales(int warp, int parity) {
    return HalfTable::free_floats(table, 8 + 2 * warp + parity);
  }
};

/// Two scales of a tile: of row lane / 2, for its units 2 (lane % 2) and the next. Beyond the
/// matrix those within it: they meet zeros, or what nobody stores.
struct TileScales {
  AnyScale scale[2];
  __device__ void fetch(const Problem<bf16>& p, int row, int column) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto first =
        static_cast<uint32_t>(min(row + lane / 2, p.n - 1)) * static_cast<uint32_t>(p.k);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = min(column + (2 * (lane % 2) + i) * unit, p.k - unit);
      scale[i].fetch(p.scales, (first + static_cast<uint32_t>(at)) >> p.scales.shift);
    }
  }
};

/// Factors that bring the binade of `most` to that of 2^14, and back: fp16 has 30 binades with all
/// its bits from 2^15 down. 2^126 at most, whose reciprocal is no denormal; it brings the smallest
/// bf16, 2^-133, to 2^-7.
struct Range {
  float down, up;
  __device__ explicit Range(float most) {
    const int exponent = static_cast<int>(__float_as_uint(most) >> 23);
    const int biased = min(254 + 14 - exponent, 253);
    down = __uint_as_float(static_cast<uint32_t>(biased) << 23);
    up = __uint_as_float(static_cast<uint32_t>(254 - biased) << 23);
  }
};
__device__ inline float most_of(float most, uint32_t word) {
  float a, b;
  unpack(a, b, word);
  return fmaxf(most, fmaxf(fabsf(a), fabsf(b)));
}
/// Over the four lanes that share a row of x.
__device__ inline float most_of_row(float most) {
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
  return fmaxf(most, __shfl_xor_sync(~0u, most, 2));
}
/// Two of bf16 as fp16.
__device__ inline uint32_t halves(uint32_t word, float factor) {
  float a, b;
  unpack(a, b, word);
  return pack<f16>(a * factor, b * factor);
}
/// The same in all lanes, as the compiler then knows.
__device__ inline int uniform_warp() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

/// Codes are read once.
__device__ inline void load_once(uint2& v, const uint8_t* p) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
}

__device__ inline void write_element(const Problem<bf16>& p, int token, int output, float v) {
  if (p.addend != nullptr) v += static_cast<float>(p.addend[token * p.addend_pitch + output]);
  p.y[token * p.y_pitch + output] = static_cast<bf16>(v);
}

// A block takes every so many-th group of 16 outputs. Its warps share out the columns of W in
// panels of at most `warps` tiles, and hold a panel's columns of x in registers.
__global__ void __launch_bounds__(threads, 1)
    nf4_lut_kernel(const Problem<bf16> p, int panels, int panel_tiles) {
  constexpr int batch = Shared::batch;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warp = uniform_warp();
  const int groups = (p.n + tile_rows - 1) / tile_rows, stride = static_cast<int>(gridDim.x);

  // Where the warp is: a batch of groups, for these a panel at a time, in this group by group.
  struct Place {
    int first, panel, group;
  };
  const auto column = [&](const Place& at) {
    return (at.panel * panel_tiles + warp) * tile_columns;
  };
  const auto row = [&](const Place& at) { return (at.first + at.group * stride) * tile_rows; };
  const auto working = [&](int panel) {
    return warp < panel_tiles && (panel * panel_tiles + warp) * tile_columns < p.k;
  };
  const auto next = [&](Place at) {
    do {
      if (++at.group == batch || at.first + at.group * stride >= groups) {
        at.group = 0;
        if (++at.panel == panels) at.panel = 0, at.first += batch * stride;
      }
    } while (at.first < groups && !working(at.panel));
    return at;
  };
  // Rows 2 g and 2 g + 1 of the tile are g and g + 8 of the product.
  uint2 codes[tile_units][2] = {};
  const auto codes_of = [&](const Place& at) {
    return p.codes + static_cast<int64_t>(min(row(at) + 2 * g, p.n - 2)) * (p.k / 2) +
           column(at) / 2 + 8 * t;
  };
  const auto load_codes = [&](int u, const uint8_t* from, int columns) {
    if (u * unit >= columns) return;
    load_once(codes[u][0], from + u * unit / 2);
    load_once(codes[u][1], from + p.k / 2 + u * unit / 2);
  };
  const Place begin{working(0) ? static_cast<int>(blockIdx.x) : groups, 0, 0};
  TileScales scales;
  if (begin.first < groups) {
#pragma unroll
    for (int u = 0; u < tile_units; ++u) load_codes(u, codes_of(begin), p.k - column(begin));
    scales.fetch(p, row(begin), column(begin));
  }
  HalfTable::fill(shared.table);
  const bool nested = p.scales.codes != nullptr;
  float* const map = shared.map();
  if (nested && threadIdx.x < map_size)
    map[PairTable::map_place(threadIdx.x)] = p.scales.map[threadIdx.x];
  const float offset = nested ? *p.scales.offset : 0.0f;
  const PairTable::Map entry{map};
  __syncthreads();
  await_previous();

  const HalfTable table(shared.table);
  Place at = begin;
  for (int first = static_cast<int>(blockIdx.x); first < groups; first += batch * stride) {
    const int count = min(batch, (groups - first + stride - 1) / stride);
    for (int panel = 0; panel < panels && working(panel); ++panel) {
      uint32_t x[tile_units][8];
      float up[2];
      {
        uint4 raw[tile_units][2];
        float most = 0;
#pragma unroll
        for (int u = 0; u < tile_units; ++u) {
          const int from = column(at) + u * unit + 16 * t;
          const bool inside = g < p.m && from < p.k;
          const auto* const words = reinterpret_cast<const uint4*>(p.x + g * p.x_pitch + from);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            raw[u][i] = inside ? words[i] : make_uint4(0, 0, 0, 0);
            most = most_of(most, raw[u][i].x), most = most_of(most, raw[u][i].y);
            most = most_of(most, raw[u][i].z), most = most_of(most, raw[u][i].w);
          }
        }
        const Range range(most_of_row(most));
#pragma unroll
        for (int u = 0; u < tile_units; ++u)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            x[u][4 * i] = halves(raw[u][i].x, range.down);
            x[u][4 * i + 1] = halves(raw[u][i].y, range.down);
            x[u][4 * i + 2] = halves(raw[u][i].z, range.down);
            x[u][4 * i + 3] = halves(raw[u][i].w, range.down);
          }
#pragma unroll
        for (int i = 0; i < 2; ++i) up[i] = __shfl_sync(~0u, range.up, 4 * (2 * t + i));
      }
      for (int group = 0; group < count; ++group) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          shared.scales(warp, lane / 2 % 2)[lane / 4 * tile_units + 2 * (lane % 2) + i] =
              scales.scale[i].value(p.scales, entry, offset);
        at = next(at);
        const bool more = at.first < groups;
        if (more) scales.fetch(p, row(at), column(at));
        const uint8_t* const next_codes = codes_of(at);
        const int columns = more ? p.k - column(at) : 0;
        __syncwarp();
        const float4 even = reinterpret_cast<const float4*>(shared.scales(warp, 0))[g];
        const float4 odd = reinterpret_cast<const float4*>(shared.scales(warp, 1))[g];
        const float scale[2][tile_units] = {{even.x, even.y, even.z, even.w},
                                            {odd.x, odd.y, odd.z, odd.w}};
        float sum[2][2] = {};
#pragma unroll
        for (int u = 0; u < tile_units; ++u) {
          float d[4] = {};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const uint32_t upper = k < 2 ? codes[u][0].x : codes[u][0].y;
            const uint32_t lower = k < 2 ? codes[u][1].x : codes[u][1].y;
            const int byte = k % 2 * 2;
            const uint32_t left[4] = {table(upper, byte), table(lower, byte),
                                      table(upper, byte + 1), table(lower, byte + 1)};
            mma<f16>(d, left, x[u][2 * k], x[u][2 * k + 1]);
          }
          load_codes(u, next_codes, columns);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i / 2][i % 2] += d[i] * scale[i / 2][u];
        }
        auto& sums = shared.sums[warp][group];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          auto* const to = reinterpret_cast<float2*>(&shared.sum(sums, 2 * t + i, 2 * g));
          const float2 before = panel == 0 ? make_float2(0, 0) : *to;
          *to = make_float2(before.x + sum[0][i] * up[i], before.y + sum[1][i] * up[i]);
        }
        __syncwarp();
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count * p.m * tile_rows; i += threads) {
      const int group = i / (p.m * tile_rows), token = i / tile_rows % p.m, own = i % tile_rows;
      const int output = (first + group * stride) * tile_rows + own;
      if (output >= p.n) continue;
      float v = 0;
#pragma unroll
      for (int w = 0; w < warps; ++w)
        if (w < panel_tiles) v += shared.sum(shared.sums[w][group], token, own);
      write_element(p, token, output, v);
    }
    __syncthreads();
  }
}

}  // namespace

void nf4_matmul_lut(const Tensor& y, const Tensor& x, const Nf4Tensor& w, const Tensor& addend) {
  const Problem<bf16> p = problem_of<bf16>(y, x, w, addend, {});
  const int tiles = ceil_div(p.k, tile_columns), panels = ceil_div(tiles, warps);
  const auto groups = ceil_div<int64_t>(p.n, tile_rows);
  check(cudaFuncSetAttribute(nf4_lut_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             sizeof(Shared)),
        "cudaFuncSetAttribute");
  launch_early(
      "nf4_matmul", nf4_lut_kernel,
      LaunchShape{.grid = static_cast<unsigned>(std::min<int64_t>(groups, multiprocessor_count())),
                  .threads = threads,
                  .shared_bytes = sizeof(Shared)},
      p, panels, ceil_div(tiles, panels));
}

}  // namespace qlab::cuda
