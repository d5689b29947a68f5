// The optimizer of one trial: states for its flat parameter buffer, and the step that reads them.
#pragma once
#include "core/tensor.h"
#include "optim/adamw.h"

namespace qlab {

struct AdamWConfig {
  float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0, max_grad_norm = 1.0f;
};

class AdamW {
 public:
  AdamW(const AdamWConfig& config, int64_t parameters, Device device);
  /// One update with learning rate `lr`; nothing changes when the gradient norm is not finite.
  void step(const Tensor& parameters, const Tensor& gradients, float lr);
  /// L2 norm of the last step's gradients, before clipping: fp32 [1] on the device.
  const Tensor& grad_norm() const { return norm_; }

  const Tensor& m() const { return m_; }
  const Tensor& v() const { return v_; }
  /// The last step, whose gradient norm was not finite, does not count.
  void skip() { --steps_; }
  int64_t steps() const { return steps_; }
  void set_steps(int64_t steps) { steps_ = steps; }  // after m() and v() were restored

 private:
  AdamWConfig config_;
  Tensor m_, v_, norm_, step_, partials_;
  int64_t steps_ = 0;
};

}  // namespace qlab
