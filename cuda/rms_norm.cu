#include "core/ops/rms_norm.h"

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int max_threads = 256;

/// The part of a row that a thread works on: every blockDim.x-th group of `width` columns, of which
/// the first `held` stay in registers.
template <int width, int held, class F>
__device__ inline void for_held(int cols, const F& f) {
#pragma unroll
  for (int k = 0; k < held; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * width;
    if (c < cols) f(k, c);
  }
}
template <int width, int held, class F>
__device__ inline void for_others(int cols, const F& f) {
  for (int c = (held * blockDim.x + threadIdx.x) * width; c < cols; c += blockDim.x * width) f(c);
}

// One block per row, which is read and written once; columns that registers cannot hold are read
// again.
template <class T, int width, int held>
__global__ void __launch_bounds__(max_threads)
    rms_norm_kernel(T* y, float* r, const T* x, const float* w, int cols, int64_t y_pitch,
                    int64_t x_pitch, float eps) {
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  x += row * x_pitch;
  y += row * y_pitch;
  float values[held][width];
  float sum = 0;
  const auto add_squares = [&](const float(&v)[width]) {
    for (int i = 0; i < width; ++i) sum = fmaf(v[i], v[i], sum);
  };
  for_held<width, held>(cols, [&](int k, int c) { load(values[k], x + c); });
  for_held<width, held>(cols, [&](int k, int) { add_squares(values[k]); });
  for_others<width, held>(cols, [&](int c) {
    float v[width];
    load(v, x + c);
    add_squares(v);
  });
  const float scale = 1.0f / sqrtf(block_sum(sum, scratch) / cols + eps);
  const auto write = [&](int c, float(&v)[width]) {
    float u[width];
    load(u, w + c);
    for (int i = 0; i < width; ++i) v[i] = v[i] * scale * u[i];
    store(y + c, v);
  };
  for_held<width, held>(cols, [&](int k, int c) { write(c, values[k]); });
  for_others<width, held>(cols, [&](int c) {
    float v[width];
    load(v, x + c);
    write(c, v);
  });
  if (threadIdx.x == 0) r[row] = scale;
}

// One block per row; g, x and the residual are read once and dx, which may be the residual, is
// written once; columns that registers cannot hold are read again.
template <class T, int width, int held>
__global__ void __launch_bounds__(max_threads)
    rms_norm_backward_kernel(T* dx, const T* g, const T* x, const float* w, const float* r,
                             const T* residual, int cols, int64_t dx_pitch, int64_t g_pitch,
                             int64_t x_pitch, int64_t residual_pitch) {
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  dx += row * dx_pitch;
  g += row * g_pitch;
  x += row * x_pitch;
  if (residual != nullptr) residual += row * residual_pitch;
  const float scale = r[row];
  float us[held][width], values[held][width], past[held][width] = {};
  float sum = 0;
  const auto weigh = [&](int c, float(&u)[width], const float(&v)[width]) {
    float weight[width];
    load(weight, w + c);
    for (int i = 0; i < width; ++i) {
      u[i] *= weight[i];
      sum = fmaf(u[i], v[i], sum);
    }
  };
  for_held<width, held>(cols, [&](int k, int c) {
    load(us[k], g + c);
    load(values[k], x + c);
    if (residual != nullptr) load(past[k], residual + c);
  });
  for_held<width, held>(cols, [&](int k, int c) { weigh(c, us[k], values[k]); });
  for_others<width, held>(cols, [&](int c) {
    float u[width], v[width];
    load(u, g + c);
    load(v, x + c);
    weigh(c, u, v);
  });
  const float shift = scale * scale * scale * (block_sum(sum, scratch) / cols);
  const auto write = [&](int c, const float(&u)[width], float(&v)[width], const float(&p)[width]) {
    for (int i = 0; i < width; ++i) v[i] = scale * u[i] - v[i] * shift + p[i];
    store(dx + c, v);
  };
  for_held<width, held>(cols, [&](int k, int c) { write(c, us[k], values[k], past[k]); });
  for_others<width, held>(cols, [&](int c) {
    float u[width], v[width], p[width] = {}, weight[width];
    load(u, g + c);
    load(v, x + c);
    load(weight, w + c);
    if (residual != nullptr) load(p, residual + c);
    for (int i = 0; i < width; ++i) u[i] *= weight[i];
    write(c, u, v, p);
  });
}

struct Geometry {
  int held;  // 1, 2 or 4 groups per thread
  unsigned threads;
};
Geometry geometry(int64_t groups) {
  const int held = groups <= max_threads ? 1 : groups <= 2 * max_threads ? 2 : 4;
  const int64_t warps = ceil_div<int64_t>(ceil_div<int64_t>(groups, held), warp_size);
  return {held, static_cast<unsigned>(std::min<int64_t>(warps * warp_size, max_threads))};
}

/// Calls f.template operator()<width, held>().
template <class F>
void with_geometry(bool vectors, int held, const F& f) {
  if (!vectors)
    f.template operator()<1, 4>();
  else if (held == 1)
    f.template operator()<vector_width, 1>();
  else if (held == 2)
    f.template operator()<vector_width, 2>();
  else
    f.template operator()<vector_width, 4>();
}

}  // namespace

void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps) {
  if (x.numel() == 0) return;
  const int cols = static_cast<int>(x.cols());
  const unsigned blocks = grid_of("rms_norm", x.rows());
  const bool vectors = vectorizable(cols, y, x, w);
  const Geometry g = geometry(vectors ? cols / vector_width : cols);
  dispatch(CudaFloats{}, x.dtype(), "rms_norm", [&]<class T>() {
    with_geometry(vectors, g.held, [&]<int width, int held>() {
      launch_kernel("rms_norm", rms_norm_kernel<T, width, held>, {blocks, g.threads}, y.data<T>(),
                    r.data<float>(), x.data<T>(), w.data<float>(), cols, y.pitch(), x.pitch(), eps);
    });
  });
}

void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r, const Tensor& residual) {
  if (x.numel() == 0) return;
  const int cols = static_cast<int>(x.cols());
  const unsigned blocks = grid_of("rms_norm_backward", x.rows());
  const bool added = residual.defined();
  const bool vectors = vectorizable(cols, dx, g, x, w) && (!added || rows_aligned16(residual));
  const Geometry geo = geometry(vectors ? cols / vector_width : cols);
  dispatch(CudaFloats{}, x.dtype(), "rms_norm_backward", [&]<class T>() {
    with_geometry(vectors, geo.held, [&]<int width, int held>() {
      launch_kernel("rms_norm_backward", rms_norm_backward_kernel<T, width, held>,
                    {blocks, geo.threads}, dx.data<T>(), g.data<T>(), x.data<T>(), w.data<float>(),
                    r.data<float>(), added ? residual.data<T>() : static_cast<T*>(nullptr), cols,
                    dx.pitch(), g.pitch(), x.pitch(), added ? residual.pitch() : 0);
    });
  });
}

}  // namespace qlab::cuda
