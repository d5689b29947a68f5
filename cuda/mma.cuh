// Tensor-core tiles for sm_80 and newer: products m16n8k16 of 16-bit elements with fp32 sums, and
// asynchronous copies into shared memory. Rows of a tile in shared memory lie at an odd number of
// 16-byte units, so that eight neighbouring rows at one column occupy all banks once.
#pragma once
#include "cuda/launch.cuh"

namespace qlab::cuda {

template <int cols>
constexpr int tile_pitch = 8 * (cols / 8 | 1);  // elements
template <int cols>
constexpr int row_bytes = 2 * tile_pitch<cols>;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Older GPUs have none of these; their code is never reached there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

template <class T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ inline void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
/// Zeros where not `inside`.
template <int bytes>
__device__ inline void copy_async(uint32_t to, const void* from, bool inside) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes),
                 "r"(inside ? bytes : 0)
                 : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
/// Copies since the last call are a group; the wait leaves so many of the youngest groups under
/// way.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ inline void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

#else

template <class T>
__device__ inline void mma(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t) {}
__device__ inline void load_matrices(uint32_t (&)[4], uint32_t) {}
__device__ inline void load_transposed(uint32_t (&)[4], uint32_t) {}
template <int bytes>
__device__ inline void copy_async(uint32_t, const void*, bool) {}
__device__ inline void wait_for_copies() {}
__device__ inline void commit_copies() {}
template <int left>
__device__ inline void wait_for_groups() {}

#endif

/// 2^x within 2 ulp; 0 for -inf.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Starts copying rows 0 .. count of [rows, cols] into a tile; the others become zeros. A thread
/// stays in its column and goes down by equal steps, so that addresses cost few registers.
template <int rows, int cols, int threads, class T>
__device__ void load_tile(uint32_t to, const T* from, int pitch, int count,
                          int thread = static_cast<int>(threadIdx.x)) {
  constexpr int units = cols / 8, step = threads / units;
  const int first = thread / units, unit = thread % units;
  if (threads % units != 0 && first >= step) return;
  from += static_cast<int64_t>(first) * pitch + 8 * unit;
  to += first * row_bytes<cols> + 16 * unit;
#pragma unroll
  for (int i = 0; i < rows; i += step) {
    if (rows % step != 0 && first + i >= rows) break;
    copy_async<16>(to + i * row_bytes<cols>, from + static_cast<int64_t>(i) * pitch,
                   first + i < count);
  }
}

// Where a lane points for ldmatrix, in a tile whose row 0 is at `tile`: 16 rows x 16 columns as the
// left operand or transposed as the right one; 16 rows as two right operands of eight columns each.
template <int cols>
__device__ inline uint32_t left_lane(uint32_t tile) {
  const uint32_t lane = threadIdx.x % 32;
  return tile + lane % 16 * row_bytes<cols> + lane / 16 * 16;
}
template <int cols>
__device__ inline uint32_t right_lane(uint32_t tile) {
  const uint32_t lane = threadIdx.x % 32;
  return tile + (lane % 8 + lane / 16 * 8) * row_bytes<cols> + lane / 8 % 2 * 16;
}

/// c [16 m, 8 n] += A B^T: A and B are tiles of `cols` columns, given by left_lane and right_lane.
template <class T, int cols, int m, int n>
__device__ void multiply_nt(float (&c)[m][n][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < cols / 16; ++k) {
    uint32_t left[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i) load_matrices(left[i], a + 16 * i * row_bytes<cols> + 32 * k);
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      uint32_t right[4];
      load_matrices(right, b + 8 * j * row_bytes<cols> + 32 * k);
#pragma unroll
      for (int i = 0; i < m; ++i) {
        mma<T>(c[i][j], left[i], right[0], right[1]);
        mma<T>(c[i][j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

/// c [16 m, cols] += A B: A in registers, B a tile of 16 k rows, given by left_lane.
template <class T, int cols, int m, int k>
__device__ void multiply_nn(float (&c)[m][cols / 8][4], const uint32_t (&a)[m][k][4], uint32_t b) {
#pragma unroll
  for (int p = 0; p < k; ++p)
#pragma unroll
    for (int j = 0; j < cols / 16; ++j) {
      uint32_t right[4];
      load_transposed(right, b + 16 * p * row_bytes<cols> + 32 * j);
#pragma unroll
      for (int i = 0; i < m; ++i) {
        mma<T>(c[i][2 * j], a[i][p], right[0], right[1]);
        mma<T>(c[i][2 * j + 1], a[i][p], right[2], right[3]);
      }
    }
}

/// A product's result, rounded, as the left operand of the next product.
template <int m, int n>
__device__ void round_to_left(uint32_t (&a)[m][n / 2][4], const float (&c)[m][n][4]) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      a[i][j / 2][0] = pack(c[i][j][0], c[i][j][1]);
      a[i][j / 2][1] = pack(c[i][j][2], c[i][j][3]);
      a[i][j / 2][2] = pack(c[i][j + 1][0], c[i][j + 1][1]);
      a[i][j / 2][3] = pack(c[i][j + 1][2], c[i][j + 1][3]);
    }
}

/// Writes the first `count` of this warp's 16 m rows to memory, through 16 m rows of a tile in
/// shared memory that only this warp uses.
template <int cols, int m, class T>
__device__ void store_warp_rows(T* to, int64_t pitch, int count, T* rows,
                                const float (&c)[m][cols / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < cols / 8; ++j) {
      T* const at = rows + (16 * i + lane / 4) * tile_pitch<cols> + 8 * j + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(at) = pack(c[i][j][0], c[i][j][1]);
      *reinterpret_cast<uint32_t*>(at + 8 * tile_pitch<cols>) = pack(c[i][j][2], c[i][j][3]);
    }
  __syncwarp();
  constexpr int units = cols / 8;
  for (int i = lane; i < 16 * m * units; i += 32) {
    const int row = i / units, unit = i % units;
    if (row >= count) break;
    *reinterpret_cast<uint4*>(to + row * pitch + 8 * unit) =
        *reinterpret_cast<const uint4*>(rows + row * tile_pitch<cols> + 8 * unit);
  }
}

}  // namespace qlab::cuda
