// What every .cu file needs: the stream, status checks, and vector access to f32, bf16 and f16.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "core/dtype.h"
#include "core/gpu_limits.h"
#include "core/tensor.h"

namespace qlab::cuda {

/// The one stream of the current device, on which everything is issued.
cudaStream_t current_stream();
int multiprocessor_count();
/// Of the code that runs on the current device: 75 where this program's PTX of compute_75 was
/// translated, whatever the device could do; at most its compute capability.
int code_architecture();

/// Throws qlab::Error naming `call` unless the status is success.
void check(cudaError_t status, const char* call);

/// Of a launch: dynamic shared memory, and blocks that form a cluster along y where there is more
/// than one (compute capability 9.0).
struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};
/// Throws, naming the kernel, when the launch just made was refused; with QLAB_SYNC_LAUNCHES also
/// when it failed.
void check_launch(const char* op, const void* kernel, const LaunchShape& shape);

/// On the current stream.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape,
                   Arguments&&... arguments) {
  kernel<<<shape.grid, shape.threads, shape.shared_bytes, current_stream()>>>(
      std::forward<Arguments>(arguments)...);
  check_launch(op, reinterpret_cast<const void*>(kernel), shape);
}

template <class I>
constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

/// A one-dimensional grid; throws where the device cannot count that far.
unsigned grid_of(const char* op, int64_t blocks);

inline constexpr int vector_width = 8;

/// Rows of `cols` elements can be read and written eight elements at a time in all tensors.
template <class... Tensors>
bool vectorizable(int64_t cols, const Tensors&... tensors) {
  return cols % vector_width == 0 && (rows_aligned16(tensors) && ...);
}
template <class... Tensors>
bool all_contiguous(const Tensors&... tensors) {
  return (tensors.contiguous() && ...);
}

template <class T>
__device__ inline void load(float (&v)[1], const T* p) {
  v[0] = static_cast<float>(*p);
}
template <class T>
__device__ inline void store(T* p, const float (&v)[1]) {
  *p = static_cast<T>(v[0]);
}
__device__ inline void load(float (&v)[vector_width], const float* p) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ inline void store(float* p, const float (&v)[vector_width]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
/// The two elements of a 32-bit word, the first in the low half.
template <Half T = bf16>
__device__ inline void unpack(float& first, float& second, uint32_t word) {
  if constexpr (std::is_same_v<T, f16>) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    first = pair.x, second = pair.y;
  } else {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
  }
}
template <Half T = bf16>
__device__ inline uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, f16>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}
template <Half T>
__device__ inline void load(float (&v)[vector_width], const T* p) {
  const uint4 words = *reinterpret_cast<const uint4*>(p);
  unpack<T>(v[0], v[1], words.x);
  unpack<T>(v[2], v[3], words.y);
  unpack<T>(v[4], v[5], words.z);
  unpack<T>(v[6], v[7], words.w);
}
template <Half T>
__device__ inline void store(T* p, const float (&v)[vector_width]) {
  *reinterpret_cast<uint4*>(p) = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]),
                                            pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

}  // namespace qlab::cuda
