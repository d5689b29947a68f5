#include "core/ops/rms_norm.h"

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = 256;

// One block per row; x is read twice (the second time from cache), y written once.
template <class T, int width>
__global__ void __launch_bounds__(threads)
    rms_norm_kernel(T* y, float* r, const T* x, const float* w, int cols, int64_t y_pitch,
                    int64_t x_pitch, float eps) {
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  x += row * x_pitch;
  y += row * y_pitch;
  float sum = 0;
  for (int c = threadIdx.x * width; c < cols; c += threads * width) {
    float v[width];
    load(v, x + c);
    for (int i = 0; i < width; ++i) sum = fmaf(v[i], v[i], sum);
  }
  const float scale = 1.0f / sqrtf(block_sum(sum, scratch) / cols + eps);
  for (int c = threadIdx.x * width; c < cols; c += threads * width) {
    float v[width], u[width];
    load(v, x + c);
    load(u, w + c);
    for (int i = 0; i < width; ++i) v[i] = v[i] * scale * u[i];
    store(y + c, v);
  }
  if (threadIdx.x == 0) r[row] = scale;
}

// One block per row; g and x are read twice (the second time from cache), the residual once, dx is
// written once and may be the residual.
template <class T, int width>
__global__ void __launch_bounds__(threads)
    rms_norm_backward_kernel(T* dx, const T* g, const T* x, const float* w, const float* r,
                             const T* residual, int cols, int64_t dx_pitch, int64_t g_pitch,
                             int64_t x_pitch, int64_t residual_pitch) {
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  dx += row * dx_pitch;
  g += row * g_pitch;
  x += row * x_pitch;
  float sum = 0;
  for (int c = threadIdx.x * width; c < cols; c += threads * width) {
    float dy[width], v[width], u[width];
    load(dy, g + c);
    load(v, x + c);
    load(u, w + c);
    for (int i = 0; i < width; ++i) sum = fmaf(dy[i] * u[i], v[i], sum);
  }
  const float scale = r[row];
  const float shift = scale * scale * scale * (block_sum(sum, scratch) / cols);
  for (int c = threadIdx.x * width; c < cols; c += threads * width) {
    float dy[width], v[width], u[width], past[width] = {};
    load(dy, g + c);
    load(v, x + c);
    load(u, w + c);
    if (residual != nullptr) load(past, residual + row * residual_pitch + c);
    for (int i = 0; i < width; ++i) v[i] = scale * (dy[i] * u[i]) - v[i] * shift + past[i];
    store(dx + c, v);
  }
}

}  // namespace

void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps) {
  if (x.numel() == 0) return;
  const int cols = static_cast<int>(x.cols());
  const unsigned blocks = grid_of("rms_norm", x.rows());
  const bool vectors = vectorizable(cols, y, x, w);
  dispatch(CudaFloats{}, x.dtype(), "rms_norm", [&]<class T>() {
    const auto kernel = vectors ? rms_norm_kernel<T, vector_width> : rms_norm_kernel<T, 1>;
    kernel<<<blocks, threads, 0, current_stream()>>>(y.data<T>(), r.data<float>(), x.data<T>(),
                                                     w.data<float>(), cols, y.pitch(), x.pitch(),
                                                     eps);
  });
  check_launch("rms_norm");
}

void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r, const Tensor& residual) {
  if (x.numel() == 0) return;
  const int cols = static_cast<int>(x.cols());
  const unsigned blocks = grid_of("rms_norm_backward", x.rows());
  const bool has_residual = residual.defined();
  const bool vectors =
      vectorizable(cols, dx, g, x, w) && (!has_residual || rows_aligned16(residual));
  dispatch(CudaFloats{}, x.dtype(), "rms_norm_backward", [&]<class T>() {
    const auto kernel =
        vectors ? rms_norm_backward_kernel<T, vector_width> : rms_norm_backward_kernel<T, 1>;
    kernel<<<blocks, threads, 0, current_stream()>>>(
        dx.data<T>(), g.data<T>(), x.data<T>(), w.data<float>(), r.data<float>(),
        has_residual ? residual.data<T>() : nullptr, cols, dx.pitch(), g.pitch(), x.pitch(),
        has_residual ? residual.pitch() : 0);
  });
  check_launch("rms_norm_backward");
}

}  // namespace qlab::cuda
