#include "core/ops/cross_entropy.h"

#include <cuda_pipeline.h>

#include <cfloat>

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int stages = 8;  // groups of logits that a thread has in flight

/// 16 bits: ex2.approx of a rounded product, within 2^-22 (1 + |x|) of e^x.
template <class T>
__device__ inline float exponential(float x) {
  return Half<T> ? __expf(x) : expf(x);
}

/// The maximum of some logits and the sum of exp(z - maximum) over them.
template <class T>
struct Statistics {
  float maximum = -FLT_MAX;  // finite, so that the difference of two of them is never NaN
  float sum = 0;

  template <int width>
  __device__ void add(const float (&v)[width]) {
    float highest = v[0];
    for (int i = 1; i < width; ++i) highest = fmaxf(highest, v[i]);
    if (highest > maximum) {
      sum *= exponential<T>(maximum - highest);
      maximum = highest;
    }
    float part = 0;
    for (int i = 0; i < width; ++i) part += exponential<T>(v[i] - maximum);
    sum += part;
  }
};

/// Asks for 16 bytes; single elements are copied at once.
template <class T, int width>
__device__ inline void fetch(T* shared, const T* global) {
  if constexpr (width == 1) {
    *shared = *global;
  } else {
#pragma unroll
    for (int i = 0; i < width * static_cast<int>(sizeof(T)) / 16; ++i)
      __pipeline_memcpy_async(reinterpret_cast<uint4*>(shared) + i,
                              reinterpret_cast<const uint4*>(global) + i, 16);
  }
}

// One block per row: z is read once and, with a scale, written once. The first `held` logits are
// kept in shared memory, each by the thread that works on it; the others are read again.
template <class T, int width, int threads>
__global__ void __launch_bounds__(threads)
    cross_entropy_kernel(float* nll, T* z, const int32_t* labels, const float* scale,
                         int64_t vocabulary, int64_t pitch, int held) {
  extern __shared__ uint4 shared[];
  __shared__ float scratch[warp_size];
  constexpr int step = threads * width;
  const int64_t row = blockIdx.x;
  const int32_t label = labels[row];
  z += row * pitch;
  if (label == ignore_label) {
    if (threadIdx.x == 0) nll[row] = 0;
    const float zeros[width] = {};
    if (scale != nullptr)
      for (int64_t c = threadIdx.x * width; c < vocabulary; c += step) store(z + c, zeros);
    return;
  }
  T* const kept = reinterpret_cast<T*>(shared);
  const int first = threadIdx.x * width;
  const auto fetch_stage = [&](int c) {
    if (c < held) fetch<T, width>(kept + c, z + c);
    __pipeline_commit();
  };
  Statistics<T> mine;
  float v[width];
  for (int stage = 0; stage < stages; ++stage) fetch_stage(first + stage * step);
  for (int c = first; c < held; c += step) {
    __pipeline_wait_prior(stages - 1);
    load(v, kept + c);
    fetch_stage(c + stages * step);
    mine.add(v);
  }
  const int64_t others =
      first + static_cast<int64_t>(max(held - first + step - 1, 0) / step) * step;
#pragma unroll 2
  for (int64_t c = others; c < vocabulary; c += step) {
    load(v, z + c);
    mine.add(v);
  }
  const float maximum = block_max(mine.maximum, scratch);
  const float target = static_cast<float>(z[label]);
  const float sum = block_sum(mine.sum * exponential<T>(mine.maximum - maximum), scratch);
  if (threadIdx.x == 0) nll[row] = logf(sum) - (target - maximum);
  if (scale == nullptr) return;

  const float factor = scale[row], inverse = 1.0f / sum;
  const auto replace = [&](int64_t c) {
    for (int i = 0; i < width; ++i) v[i] = exponential<T>(v[i] - maximum) * inverse;
    if (label >= c && label < c + width)
      for (int i = 0; i < width; ++i) v[i] -= c + i == label ? 1.0f : 0.0f;
    for (int i = 0; i < width; ++i) v[i] *= factor;
    store(z + c, v);
  };
#pragma unroll 2
  for (int c = first; c < held; c += step) {
    load(v, kept + c);
    replace(c);
  }
#pragma unroll 2
  for (int64_t c = others; c < vocabulary; c += step) {
    load(v, z + c);
    replace(c);
  }
}

int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes - 1024;  // of which the kernel's own variables take some
}

template <class T, int width, int threads>
void launch(const Tensor& nll, const Tensor& z, const Tensor& labels, const float* factors,
            int64_t held) {
  const auto kernel = cross_entropy_kernel<T, width, threads>;
  const int64_t bytes = held * static_cast<int64_t>(sizeof(T));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  launch_kernel("cross_entropy", kernel,
                {grid_of("cross_entropy", z.rows()), threads, static_cast<size_t>(bytes)},
                nll.data<float>(), z.data<T>(), labels.data<int32_t>(), factors, z.cols(),
                z.pitch(), static_cast<int>(held));
}

}  // namespace

void cross_entropy(const Tensor& nll, const Tensor& z, const Tensor& labels, const Tensor& scale) {
  if (z.numel() == 0) return;
  const bool vectors = vectorizable(z.cols(), z);
  const float* const factors = scale.defined() ? scale.data<float>() : nullptr;
  dispatch(CudaFloats{}, z.dtype(), "cross_entropy", [&]<class T>() {
    const int64_t room = shared_memory_limit() / static_cast<int64_t>(sizeof(T));
    const int64_t held = std::min(z.cols(), room / vector_width * vector_width);
    // A row that leaves no room for a second block on its multiprocessor takes more threads.
    if (!vectors)
      launch<T, 1, 512>(nll, z, labels, factors, held);
    else if (z.cols() <= room / 2)
      launch<T, vector_width, 512>(nll, z, labels, factors, held);
    else
      launch<T, vector_width, 1024>(nll, z, labels, factors, held);
  });
}

}  // namespace qlab::cuda
