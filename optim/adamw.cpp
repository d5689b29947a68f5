#include "optim/adamw.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

void check_flat(const char* op, const char* name, const Tensor& x, int64_t n, const Tensor& like) {
  check_shape(op, name, x, {n});
  QLAB_CHECK(x.dtype() == DType::f32, "[{}] {} must be float32, got {}", op, name, x.str());
  check_device(op, like, x);
}

}  // namespace

void grad_norm(const Tensor& norm, const Tensor& grad, const Tensor& workspace) {
  check_flat("grad_norm", "grad", grad, grad.numel(), grad);
  check_flat("grad_norm", "norm", norm, 1, grad);
  check_shape("grad_norm", "workspace", workspace, {grad_norm_partials});
  check_device("grad_norm", grad, workspace);
  const OpScope scope("grad_norm", grad.device(), {0, bytes_of_all(grad)});
  on_device(
      grad.device(), [&] { cpu::grad_norm(norm, grad, workspace); },
      [&] { cuda::grad_norm(norm, grad, workspace); });
}

void adamw(const Tensor& param, const Tensor& m, const Tensor& v, const Tensor& grad,
           const Tensor& step, const Tensor& norm) {
  const int64_t n = param.numel();
  check_flat("adamw", "param", param, n, param);
  check_flat("adamw", "m", m, n, param);
  check_flat("adamw", "v", v, n, param);
  check_flat("adamw", "grad", grad, n, param);
  check_flat("adamw", "step", step, 8, param);
  check_flat("adamw", "norm", norm, 1, param);
  if (n == 0) return;
  const OpScope scope("adamw", param.device(), {0, 7 * bytes_of_all(param)});
  on_device(
      param.device(), [&] { cpu::adamw(param, m, v, grad, step, norm); },
      [&] { cuda::adamw(param, m, v, grad, step, norm); });
}

namespace cpu {

void grad_norm(const Tensor& norm, const Tensor& grad, const Tensor& workspace) {
  const int64_t n = grad.numel(), chunk = (n + grad_norm_partials - 1) / grad_norm_partials;
  const float* g = grad.data<float>();
  double* partial = workspace.data<double>();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(chunk, 1));
  parallel_for(grad_norm_partials, grain, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      double lane[8] = {};
      const int64_t first = std::min(p * chunk, n), last = std::min(first + chunk, n);
      for (int64_t i = first; i < last; ++i) {
        const double value = g[i];
        lane[(i - first) % 8] += value * value;
      }
      partial[p] =
          ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
  });
  double sum = 0;
  for (int64_t p = 0; p < grad_norm_partials; ++p) sum += partial[p];
  *norm.data<float>() = static_cast<float>(std::sqrt(sum));
}

void adamw(const Tensor& param, const Tensor& m, const Tensor& v, const Tensor& grad,
           const Tensor& step, const Tensor& norm) {
  const float gradient_norm = *norm.data<float>();
  if (!std::isfinite(gradient_norm)) return;
  const AdamWStep s = adamw_step(step.data<float>());
  const float clip = clip_factor(s, gradient_norm);
  float *p = param.data<float>(), *first = m.data<float>(), *second = v.data<float>();
  const float* g = grad.data<float>();
  parallel_for(param.numel(), 1 << 14, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) adamw_rule(p[i], first[i], second[i], g[i], s, clip);
  });
}

}  // namespace cpu
}  // namespace qlab
