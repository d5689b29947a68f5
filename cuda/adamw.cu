#include "optim/adamw.h"

#include <algorithm>

#include "cuda/reduce.cuh"

namespace qlab::cuda {
namespace {

constexpr int threads = 256;
constexpr size_t together = 32;  // trials of a launch, whose parameters are at most 4 KB

struct NormOf {
  const float* grad;
  double* partials;
  float* norm;
  int64_t n, chunk;
  bool vectors;
};
struct UpdateOf {
  float *param, *m, *v;
  const float *grad, *step, *norm;
  int64_t n;
  bool vectors;
};
template <class T>
struct Table {
  T of[together];
};

/// This thread's share of a block's elements, read `width` at a time.
template <int width>
__device__ double sum_of_squares(const NormOf& t) {
  const int64_t begin = blockIdx.x * t.chunk;
  const int64_t end = begin + t.chunk < t.n ? begin + t.chunk : t.n;
  double sum[width] = {};
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * width; i < end; i += threads * width) {
    float g[width];
    load(g, t.grad + i);
    for (int j = 0; j < width; ++j) {
      const double wide = g[j];
      sum[j] = fma(wide, wide, sum[j]);
    }
  }
  double total = 0;
  for (int j = 0; j < width; ++j) total += sum[j];
  return total;
}

// One block per partial sum and trial: block b owns elements b * chunk onwards.
__global__ void __launch_bounds__(threads)
    sum_of_squares_kernel(const __grid_constant__ Table<NormOf> trials) {
  __shared__ double scratch[warp_size];
  const NormOf& t = trials.of[blockIdx.y];
  double total = t.vectors ? sum_of_squares<vector_width>(t) : sum_of_squares<1>(t);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) t.partials[blockIdx.x] = total;
}

// One block per trial adds all its partial sums.
__global__ void __launch_bounds__(threads)
    norm_kernel(const __grid_constant__ Table<NormOf> trials) {
  __shared__ double scratch[warp_size];
  const NormOf& t = trials.of[blockIdx.x];
  double sum = 0;
  for (int i = threadIdx.x; i < grad_norm_partials; i += threads) sum += t.partials[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *t.norm = static_cast<float>(sqrt(sum));
}

template <int width>
__device__ void update(const UpdateOf& t, float gradient_norm) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) * width;
  if (i >= t.n) return;
  const AdamWStep s = adamw_step(t.step);
  const float clip = clip_factor(s, gradient_norm);
  float p[width], m[width], v[width], g[width];
  load(p, t.param + i);
  load(m, t.m + i);
  load(v, t.v + i);
  load(g, t.grad + i);
  for (int j = 0; j < width; ++j) adamw_rule(p[j], m[j], v[j], g[j], s, clip);
  store(t.param + i, p);
  store(t.m + i, m);
  store(t.v + i, v);
}

// One thread per eight elements (or one) of a trial; four reads, three writes of 4 bytes each.
__global__ void __launch_bounds__(threads)
    adamw_kernel(const __grid_constant__ Table<UpdateOf> trials) {
  const UpdateOf& t = trials.of[blockIdx.y];
  const float gradient_norm = *t.norm;
  if (!isfinite(gradient_norm)) return;
  t.vectors ? update<vector_width>(t, gradient_norm) : update<1>(t, gradient_norm);
}

}  // namespace

void grad_norm(std::span<const GradNorm> trials) {
  for (size_t begin = 0; begin < trials.size(); begin += together) {
    const auto some = trials.subspan(begin, std::min(together, trials.size() - begin));
    Table<NormOf> table{};
    for (size_t i = 0; i < some.size(); ++i) {
      const Tensor& grad = some[i].grad;
      const int64_t n = grad.numel();
      const bool vectors = vectorizable(n, grad);
      const int64_t width = vectors ? vector_width : 1;
      table.of[i] = {.grad = grad.data<float>(),
                     .partials = some[i].workspace.data<double>(),
                     .norm = some[i].norm.data<float>(),
                     .n = n,
                     .chunk = ceil_div<int64_t>(ceil_div(n, grad_norm_partials), width) * width,
                     .vectors = vectors};
    }
    const auto count = static_cast<unsigned>(some.size());
    launch_kernel("grad_norm", sum_of_squares_kernel, {dim3(grad_norm_partials, count), threads},
                  table);
    launch_kernel("grad_norm", norm_kernel, {count, threads}, table);
  }
}

void adamw(std::span<const AdamWUpdate> trials) {
  for (size_t begin = 0; begin < trials.size(); begin += together) {
    const auto some = trials.subspan(begin, std::min(together, trials.size() - begin));
    Table<UpdateOf> table{};
    int64_t blocks = 1;
    for (size_t i = 0; i < some.size(); ++i) {
      const auto& [param, m, v, grad, step, norm] = some[i];
      const int64_t n = param.numel();
      const bool vectors = vectorizable(n, param, m, v, grad);
      table.of[i] = {.param = param.data<float>(),
                     .m = m.data<float>(),
                     .v = v.data<float>(),
                     .grad = grad.data<float>(),
                     .step = step.data<float>(),
                     .norm = norm.data<float>(),
                     .n = n,
                     .vectors = vectors};
      blocks = std::max(blocks, ceil_div<int64_t>(vectors ? n / vector_width : n, threads));
    }
    launch_kernel("adamw", adamw_kernel,
                  {dim3(grid_of("adamw", blocks), static_cast<unsigned>(some.size())), threads},
                  table);
  }
}

}  // namespace qlab::cuda
