#include "core/ops/cross_entropy.h"

#include <cfloat>

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = 512;

/// The maximum of some logits and the sum of exp(z - maximum) over them.
struct Statistics {
  float maximum = -FLT_MAX;  // finite, so that the difference of two of them is never NaN
  float sum = 0;
};

template <int width, class T>
__device__ Statistics thread_statistics(const T* z, int64_t vocabulary) {
  Statistics s;
  for (int64_t c = threadIdx.x * width; c < vocabulary; c += threads * width) {
    float v[width];
    load(v, z + c);
    float maximum = s.maximum;
    for (int i = 0; i < width; ++i) maximum = fmaxf(maximum, v[i]);
    s.sum *= expf(s.maximum - maximum);
    s.maximum = maximum;
    for (int i = 0; i < width; ++i) s.sum += expf(v[i] - maximum);
  }
  return s;
}

// One block per row: one read of z for the loss; with a scale, a second read and one write.
template <class T, int width>
__global__ void __launch_bounds__(threads)
    cross_entropy_kernel(float* nll, T* z, const int32_t* labels, const float* scale,
                         int64_t vocabulary, int64_t pitch) {
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  const int32_t label = labels[row];
  z += row * pitch;
  if (label == ignore_label) {
    if (threadIdx.x == 0) nll[row] = 0;
    const float zeros[width] = {};
    if (scale != nullptr)
      for (int64_t c = threadIdx.x * width; c < vocabulary; c += threads * width)
        store(z + c, zeros);
    return;
  }
  const Statistics mine = thread_statistics<width>(z, vocabulary);
  const float maximum = block_max(mine.maximum, scratch);
  const float target = static_cast<float>(z[label]);
  const float sum = block_sum(mine.sum * expf(mine.maximum - maximum), scratch);
  if (threadIdx.x == 0) nll[row] = logf(sum) - (target - maximum);
  if (scale == nullptr) return;

  const float factor = scale[row], inverse = 1.0f / sum;
  for (int64_t c = threadIdx.x * width; c < vocabulary; c += threads * width) {
    float v[width];
    load(v, z + c);
    for (int i = 0; i < width; ++i) {
      const float p = expf(v[i] - maximum) * inverse;
      v[i] = (c + i == label ? p - 1.0f : p) * factor;
    }
    store(z + c, v);
  }
}

}  // namespace

void cross_entropy(const Tensor& nll, const Tensor& z, const Tensor& labels, const Tensor& scale) {
  if (z.numel() == 0) return;
  const unsigned blocks = grid_of("cross_entropy", z.rows());
  const bool vectors = vectorizable(z.cols(), z);
  const float* const factors = scale.defined() ? scale.data<float>() : nullptr;
  dispatch(CudaFloats{}, z.dtype(), "cross_entropy", [&]<class T>() {
    const auto kernel =
        vectors ? cross_entropy_kernel<T, vector_width> : cross_entropy_kernel<T, 1>;
    kernel<<<blocks, threads, 0, current_stream()>>>(
        nll.data<float>(), z.data<T>(), labels.data<int32_t>(), factors, z.cols(), z.pitch());
  });
  check_launch("cross_entropy");
}

}  // namespace qlab::cuda
