#include "optim/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/ops/copy.h"

namespace qlab {

AdamW::AdamW(const AdamWConfig& config, int64_t parameters, Device device) : config_(config) {
  const MemoryTag tag(Category::optimizer);
  const MemoryName name("AdamW");
  m_ = Tensor::zeros({parameters}, DType::f32, device);
  v_ = Tensor::zeros({parameters}, DType::f32, device);
  norm_ = Tensor::zeros({1}, DType::f32, device);
  step_ = Tensor::empty({8}, DType::f32, device);
  partials_ = Tensor::empty({grad_norm_partials}, DType::f64, device);
}

void AdamW::step(const Tensor& parameters, const Tensor& gradients, float lr) {
  ++steps_;
  const auto t = static_cast<double>(steps_);
  const AdamWStep s{
      lr,
      config_.beta1,
      config_.beta2,
      config_.eps,
      config_.weight_decay,
      static_cast<float>(1.0 - std::pow(static_cast<double>(config_.beta1), t)),
      static_cast<float>(std::sqrt(1.0 - std::pow(static_cast<double>(config_.beta2), t))),
      config_.max_grad_norm};
  const Device device = step_.device();
  const MemoryTag tag(Category::workspace);
  const Tensor host =
      Tensor::empty({8}, DType::f32, device.is_meta() ? Device::cpu().meta() : Device::cpu());
  if (!device.is_meta())
    std::copy_n(std::array{s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.correction1,
                           s.correction2_sqrt, s.max_grad_norm}
                    .data(),
                8, host.data<float>());
  copy(step_, host);
  qlab::grad_norm(norm_, gradients, partials_);
  adamw(parameters, m_, v_, gradients, step_, norm_);
}

}  // namespace qlab
