// AdamW with 32-bit states (Loshchilov and Hutter 2019, algorithm 2; PyTorch's order of
// operations):
//   p = p (1 - lr wd);  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//   p = p - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps),  c1 = 1 - b1^t,  c2 = 1 - b2^t
// with g scaled by min(1, max_grad_norm / (norm + 1e-6)), as torch's clip_grad_norm_ does.
// All adapters of a trial are one flat fp32 buffer, and trials that train together share the
// launches of a step: two for the norms, one for the updates. Each has the bits that it has alone.
// A step whose gradient norm is not finite is skipped on the device: nothing is written, and the
// host, which reads the norm later, fails that trial alone.
#pragma once
#include <span>

#include "core/tensor.h"

namespace qlab {

/// What one step needs, computed on the host and kept on the device as fp32 [8], in this order.
struct AdamWStep {
  float lr = 0, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0;
  float correction1 = 1;       // 1 - beta1^t
  float correction2_sqrt = 1;  // sqrt(1 - beta2^t)
  float max_grad_norm = 0;     // 0: no clipping
};

/// The step as it lies on the device.
QLAB_HD inline AdamWStep adamw_step(const float* step) {
  return {.lr = step[0],
          .beta1 = step[1],
          .beta2 = step[2],
          .eps = step[3],
          .weight_decay = step[4],
          .correction1 = step[5],
          .correction2_sqrt = step[6],
          .max_grad_norm = step[7]};
}
/// The factor of a gradient of this norm.
QLAB_HD inline float clip_factor(const AdamWStep& s, float norm) {
  const float factor = s.max_grad_norm / (norm + 1e-6f);
  return s.max_grad_norm > 0 && factor < 1.0f ? factor : 1.0f;
}

/// One element; `clip` is the gradient's factor. Written once for both devices.
QLAB_HD inline void adamw_rule(float& p, float& m, float& v, float g, const AdamWStep& s,
                               float clip) {
  g *= clip;
  p *= 1.0f - s.lr * s.weight_decay;
  m = s.beta1 * m + (1.0f - s.beta1) * g;
  v = s.beta2 * v + (1.0f - s.beta2) * g * g;
  const float denominator = __builtin_sqrtf(v) / s.correction2_sqrt + s.eps;
  p -= s.lr / s.correction1 * m / denominator;
}

inline constexpr int64_t grad_norm_partials = 1024;

/// norm [1] fp32 = sqrt(sum g^2), in a fixed order; `workspace` takes the partial sums, fp64
/// [grad_norm_partials].
struct GradNorm {
  Tensor norm, grad, workspace;
};
/// param, grad, m, v: fp32 [n]. step: fp32 [8] on the same device. norm: fp32 [1].
struct AdamWUpdate {
  Tensor param, m, v, grad, step, norm;
};
/// Of several trials on one device.
void grad_norm(std::span<const GradNorm> trials);
void adamw(std::span<const AdamWUpdate> trials);
/// Of one.
inline void grad_norm(const Tensor& norm, const Tensor& grad, const Tensor& workspace) {
  const GradNorm one{norm, grad, workspace};
  grad_norm(std::span(&one, 1));
}
inline void adamw(const Tensor& param, const Tensor& m, const Tensor& v, const Tensor& grad,
                  const Tensor& step, const Tensor& norm) {
  const AdamWUpdate one{param, m, v, grad, step, norm};
  adamw(std::span(&one, 1));
}

namespace cpu {
void grad_norm(std::span<const GradNorm> trials);
void adamw(std::span<const AdamWUpdate> trials);
}  // namespace cpu
namespace cuda {
void grad_norm(std::span<const GradNorm> trials);
void adamw(std::span<const AdamWUpdate> trials);
}  // namespace cuda
}  // namespace qlab
