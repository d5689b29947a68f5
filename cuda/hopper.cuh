// What sm_90a adds, as thin wrappers over PTX: mbarriers, tensor copies (TMA), warpgroup products.
// Tiles in shared memory are [chunk][row][64 bf16] under the 128-byte swizzle, aligned to 1,024
// bytes: row r of a chunk starts at 128 r, and its 16-byte piece p lies at place p ^ (r % 8).
#pragma once
#include <cuda.h>

#include <span>

#include "cuda/launch.cuh"

namespace qlab::cuda::hopper {

inline constexpr int chunk_width = 64;  // bf16 columns in a swizzled row of 128 bytes
inline constexpr int row_bytes = 128;
inline constexpr int warpgroup_size = 128;

/// Whether the device has all this (compute capability 9.0) and the driver makes tensor maps.
bool device_supported();
/// A map of swizzled boxes of a bf16 array; sizes and boxes in elements, the dimension that is
/// contiguous first; strides in bytes, from the second dimension on.
CUtensorMap tensor_map(const char* op, void* base, std::span<const cuuint64_t> sizes,
                       const cuuint64_t* strides, const cuuint32_t* box,
                       CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B);

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers ----

using Barrier = uint64_t;

__device__ inline void init_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
/// After the inits, before the barrier of the block that publishes them.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
/// One arrival for a whole warp; `lane` is the thread's place in it. Reads of shared memory that
/// are still under way are not waited for: before a copy is allowed to replace what was read,
/// something must have been computed or stored from it.
__device__ inline void arrive_warp(Barrier& barrier, int lane) {
  __syncwarp();
  if (lane == 0) arrive(barrier);
}
/// One arrival, and so many bytes of copies to come before the phase ends.
__device__ inline void arrive_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void wait(Barrier& barrier, uint32_t parity) {
  const uint32_t address = shared_address(&barrier);
  uint32_t done = 0;
#ifdef QLAB_SPIN_LIMIT
  int spins = 0;
#endif
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#ifdef QLAB_SPIN_LIMIT
    if (++spins > QLAB_SPIN_LIMIT) __trap();
#endif
  }
}

/// The place of a running count in a ring of buffers, and the parity of its phase.
template <int stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  __device__ int previous() const { return (stage == 0 ? stages : stage) - 1; }
};

// ---- clusters: blocks that start together and reach into each other's shared memory ----

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// Every thread of every block arrives and waits; what was written before is then seen.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
/// Where `p`, of this block's shared memory, lies in the block `rank` of the cluster.
__device__ inline uint32_t address_in(const void* p, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
__device__ inline void arrive_in(Barrier& barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(&barrier, rank))
               : "memory");
}
/// Four floats of the block `rank`, at the place that `p` is in this one; fastest where the lanes
/// of a warp read neighbouring places.
__device__ inline float4 load_in(const float* p, uint32_t rank) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address_in(p, rank))
               : "memory");
  return v;
}

// ---- named barriers: `threads` of the block, counting arrivals and waits ----

__device__ inline void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- copies ----

/// Makes this thread's shared-memory writes visible to the copies issued after it.
__device__ inline void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ inline void load_box(void* to, const CUtensorMap& map, Barrier& barrier, int c0, int c1,
                                int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
/// To the same place of all blocks of the cluster in `blocks`, a bit each, and to their barriers.
__device__ inline void load_box(void* to, const CUtensorMap& map, Barrier& barrier, uint16_t blocks,
                                int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(c0), "r"(c1)
      : "memory");
}
__device__ inline void store_box(const CUtensorMap& map, const void* from, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(c0), "r"(c1)
      : "memory");
}
__device__ inline void store_box(const CUtensorMap& map, const void* from, int c0, int c1, int c2,
                                 int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
/// `bytes` is a multiple of 16, both addresses too.
__device__ inline void load_bytes(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
}
/// Waits until the stores of this thread have read their shared memory.
__device__ inline void commit_stores_and_wait() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- warpgroup products ----

template <int registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

/// Descriptor of a swizzled operand; `leading` bytes between the chunks of an operand that is
/// contiguous along its rows (N-major), 1,024 bytes between groups of eight rows in either case.
__device__ inline uint64_t operand(const void* p, int leading) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, stride = uint64_t{1024 >> 4} << 32;
  return swizzle_128 | stride | (static_cast<uint64_t>(leading >> 4) << 16) |
         ((shared_address(p) & 0x3ffff) >> 4);
}
__device__ inline uint64_t advanced(uint64_t operand, int bytes) {
  return operand + static_cast<uint64_t>(bytes >> 4);
}

/// Orders this thread's register writes before the products that follow.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most `pending` committed groups are unfinished.
template <int pending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
/// Keeps reads of an accumulator behind the wait before it (and writes before the products after).
template <class T, int n>
__device__ inline void pin(T (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(d[i])::"memory");
    else
      asm volatile("" : "+r"(d[i])::"memory");
  }
}

#define QLAB_ACC8(d, i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define QLAB_ACC32(d, i) \
  QLAB_ACC8(d, i), QLAB_ACC8(d, i + 8), QLAB_ACC8(d, i + 16), QLAB_ACC8(d, i + 24)
#define QLAB_LIST32                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QLAB_LIST64                                                                    \
  QLAB_LIST32                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define QLAB_LIST128                                                                           \
  QLAB_LIST64                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "    \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, " \
  "%99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, "  \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

/// d [64, n] += A [64, 16] B [16, n], both in shared memory; d = A B for !accumulate. K is
/// contiguous in B, and in A unless `columns`: then M is.
/// Thread t of the group holds d[4 j + 2 i + c] of row 16 (t / 32) + (t % 32) / 4 + 8 i, column
/// 8 j + 2 (t % 4) + c.
template <int columns = 0>
__device__ inline void product(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" QLAB_LIST32
      "}, %32, %33, p, 1, 1, %35, 0;\n}\n"
      : QLAB_ACC32(d, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(columns));
}
template <int columns = 0>
__device__ inline void product(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" QLAB_LIST64
      "}, %64, %65, p, 1, 1, %67, 0;\n}\n"
      : QLAB_ACC32(d, 0), QLAB_ACC32(d, 32)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(columns));
}
template <int columns = 0>
__device__ inline void product(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" QLAB_LIST128
      "}, %128, %129, p, 1, 1, %131, 0;\n}\n"
      : QLAB_ACC32(d, 0), QLAB_ACC32(d, 32), QLAB_ACC32(d, 64), QLAB_ACC32(d, 96)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(columns));
}
/// d [64, n] += A [64, 16] B [16, n]; A in registers, B in shared memory with N contiguous.
__device__ inline void product(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                               uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" QLAB_LIST32
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
               : QLAB_ACC32(d, 0)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ inline void product(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                               uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" QLAB_LIST64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : QLAB_ACC32(d, 0), QLAB_ACC32(d, 32)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
#undef QLAB_ACC8
#undef QLAB_ACC32
#undef QLAB_LIST32
#undef QLAB_LIST64
#undef QLAB_LIST128

/// d [64, n] = A B^T over `depth` columns; `rows` of each operand's tile give its chunk stride.
template <int depth, int n>
__device__ inline void multiply_nt(float (&d)[n], uint64_t a, int a_rows, uint64_t b, int b_rows) {
#pragma unroll
  for (int k = 0; k < depth / 16; ++k)
    product(d, advanced(a, k / 4 * a_rows * row_bytes + k % 4 * 32),
            advanced(b, k / 4 * b_rows * row_bytes + k % 4 * 32), k != 0);
}
/// d [64, n] += A B over `depth` rows of B; A as pack_rows leaves it.
template <int depth, int n>
__device__ inline void multiply_nn(float (&d)[n], const uint32_t (&a)[depth / 4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < depth / 16; ++k)
    product(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], advanced(b, k * 16 * row_bytes));
}
/// An accumulator as the left operand of the next product.
template <int n>
__device__ inline void pack_rows(uint32_t (&a)[n / 2], const float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n / 2; ++i) a[i] = pack(d[2 * i], d[2 * i + 1]);
}

/// Stores four 8 x 8 tiles of an accumulator transposed; lane l gives the place of row l % 8 of the
/// tile l / 8 as it is then, 16 bytes.
__device__ inline void store_transposed(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

/// The reverse: four tiles of bf16 pairs as the accumulator would hold them.
__device__ inline void load_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Writes an accumulator [64, 2 n] times `factor` of each row as a bf16 tile of 64 rows.
template <int n>
__device__ inline void put_tile(void* tile, const float (&d)[n], const float (&factor)[2]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % warpgroup_size / 32 * 16 + lane / 4;
  char* const base = static_cast<char*>(tile) + row * row_bytes + lane % 4 * 4;
#pragma unroll
  for (int j = 0; j < n / 4; ++j) {
    char* const p = base + j / 8 * 64 * row_bytes + ((j % 8 ^ lane / 4) * 16);
    *reinterpret_cast<uint32_t*>(p) = pack(d[4 * j] * factor[0], d[4 * j + 1] * factor[0]);
    *reinterpret_cast<uint32_t*>(p + 8 * row_bytes) =
        pack(d[4 * j + 2] * factor[1], d[4 * j + 3] * factor[1]);
  }
}

}  // namespace qlab::cuda::hopper
