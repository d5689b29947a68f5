#include "optim/adamw.h"

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = 256;

// One block per partial sum: block b owns elements b * chunk onwards, read `width` at a time.
template <int width>
__global__ void __launch_bounds__(threads)
    sum_of_squares_kernel(double* partials, const float* grad, int64_t n, int64_t chunk) {
  __shared__ double scratch[warp_size];
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < n ? begin + chunk : n;
  double sum[width] = {};
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * width; i < end; i += threads * width) {
    float g[width];
    load(g, grad + i);
    for (int j = 0; j < width; ++j) {
      const double wide = g[j];
      sum[j] = fma(wide, wide, sum[j]);
    }
  }
  double total = 0;
  for (int j = 0; j < width; ++j) total += sum[j];
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// One block adds all partial sums.
__global__ void __launch_bounds__(threads) norm_kernel(float* norm, const double* partials) {
  __shared__ double scratch[warp_size];
  double sum = 0;
  for (int i = threadIdx.x; i < grad_norm_partials; i += threads) sum += partials[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

// One thread per `width` elements; four reads, three writes of 4 bytes each.
template <int width>
__global__ void __launch_bounds__(threads)
    adamw_kernel(float* param, float* m, float* v, const float* grad, const float* step,
                 const float* norm, int64_t n) {
  const float gradient_norm = *norm;
  if (!isfinite(gradient_norm)) return;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) * width;
  if (i >= n) return;
  const AdamWStep s = adamw_step(step);
  const float clip = clip_factor(s, gradient_norm);
  float p[width], first[width], second[width], g[width];
  load(p, param + i);
  load(first, m + i);
  load(second, v + i);
  load(g, grad + i);
  for (int j = 0; j < width; ++j) adamw_rule(p[j], first[j], second[j], g[j], s, clip);
  store(param + i, p);
  store(m + i, first);
  store(v + i, second);
}

}  // namespace

void grad_norm(const Tensor& norm, const Tensor& grad, const Tensor& workspace) {
  const int64_t n = grad.numel();
  const bool vectors = vectorizable(n, grad);
  const int64_t width = vectors ? vector_width : 1;
  const int64_t chunk = ceil_div<int64_t>(ceil_div(n, grad_norm_partials), width) * width;
  double* const partials = workspace.data<double>();
  const auto kernel = vectors ? sum_of_squares_kernel<vector_width> : sum_of_squares_kernel<1>;
  launch_kernel("grad_norm", kernel, {grad_norm_partials, threads}, partials, grad.data<float>(), n,
                chunk);
  launch_kernel("grad_norm", norm_kernel, {1, threads}, norm.data<float>(), partials);
}

void adamw(const Tensor& param, const Tensor& m, const Tensor& v, const Tensor& grad,
           const Tensor& step, const Tensor& norm) {
  const int64_t n = param.numel();
  if (n == 0) return;
  const bool vectors = vectorizable(n, param, m, v, grad);
  const int64_t units = vectors ? n / vector_width : n;
  const auto kernel = vectors ? adamw_kernel<vector_width> : adamw_kernel<1>;
  launch_kernel("adamw", kernel, {grid_of("adamw", ceil_div<int64_t>(units, threads)), threads},
                param.data<float>(), m.data<float>(), v.data<float>(), grad.data<float>(),
                step.data<float>(), norm.data<float>(), n);
}

}  // namespace qlab::cuda
