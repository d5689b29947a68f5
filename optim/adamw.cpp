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

void grad_norm(std::span<const GradNorm> trials) {
  if (trials.empty()) return;
  double bytes = 0;
  for (const GradNorm& t : trials) {
    check_flat("grad_norm", "grad", t.grad, t.grad.numel(), trials[0].grad);
    check_flat("grad_norm", "norm", t.norm, 1, t.grad);
    check_shape("grad_norm", "workspace", t.workspace, {grad_norm_partials});
    check_device("grad_norm", t.grad, t.workspace);
    bytes += bytes_of_all(t.grad);
  }
  const Device device = trials[0].grad.device();
  const OpScope scope("grad_norm", device, {0, bytes});
  on_device(
      device, [&] { cpu::grad_norm(trials); }, [&] { cuda::grad_norm(trials); });
}

void adamw(std::span<const AdamWUpdate> trials) {
  double bytes = 0;
  for (const AdamWUpdate& t : trials) {
    const int64_t n = t.param.numel();
    check_flat("adamw", "param", t.param, n, trials[0].param);
    check_flat("adamw", "m", t.m, n, t.param);
    check_flat("adamw", "v", t.v, n, t.param);
    check_flat("adamw", "grad", t.grad, n, t.param);
    check_flat("adamw", "step", t.step, 8, t.param);
    check_flat("adamw", "norm", t.norm, 1, t.param);
    bytes += 7 * bytes_of_all(t.param);
  }
  if (bytes == 0) return;
  const Device device = trials[0].param.device();
  const OpScope scope("adamw", device, {0, bytes});
  on_device(
      device, [&] { cpu::adamw(trials); }, [&] { cuda::adamw(trials); });
}

namespace cpu {
namespace {

void norm_of(const Tensor& norm, const Tensor& grad, const Tensor& workspace) {
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

void update(const AdamWUpdate& t) {
  const float gradient_norm = *t.norm.data<float>();
  if (!std::isfinite(gradient_norm)) return;
  const AdamWStep s = adamw_step(t.step.data<float>());
  const float clip = clip_factor(s, gradient_norm);
  float *p = t.param.data<float>(), *m = t.m.data<float>(), *v = t.v.data<float>();
  const float* g = t.grad.data<float>();
  parallel_for(t.param.numel(), 1 << 14, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) adamw_rule(p[i], m[i], v[i], g[i], s, clip);
  });
}

}  // namespace

void grad_norm(std::span<const GradNorm> trials) {
  for (const GradNorm& t : trials) norm_of(t.norm, t.grad, t.workspace);
}

void adamw(std::span<const AdamWUpdate> trials) {
  for (const AdamWUpdate& t : trials) update(t);
}

}  // namespace cpu
}  // namespace qlab
