// The optimizer of one trial: states for its flat parameter buffer, and the step that reads them.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor.h"
#include "optim/adamw8bit.h"
#include "optim/moments.h"

namespace qlab {

struct AdamWConfig {
  float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0, max_grad_norm = 1.0f;
  bool eight_bit = false;  // moments in 8 bits, and bitsandbytes' order of operations
  bool paged = false;      // moments may wait on the host
};

class AdamW {
 public:
  /// `sizes`: of the tensors that lie one after another in the flat buffer.
  AdamW(const AdamWConfig& config, const std::vector<int64_t>& sizes, Device device);
  /// One update with learning rate `lr`; nothing changes when the gradient norm is not finite.
  /// `idle`: memory of the device through which pages may pass, see Moments::visit().
  void step(const Tensor& parameters, const Tensor& gradients, float lr, const Tensor& idle = {});
  /// The same for trials that train together, each with the bits that it has alone. Those whose
  /// moments are not paged share their launches.
  struct Step {
    AdamW* optimizer;
    Tensor parameters, gradients;
    float lr;
  };
  static void step(std::span<const Step> trials, const Tensor& idle = {});
  /// L2 norm of the last step's gradients, before clipping: fp32 [1] on the device.
  const Tensor& grad_norm() const { return norm_; }

  /// The last step, whose gradient norm was not finite, does not count.
  void skip() { --steps_; }
  /// What a checkpoint keeps, by name, wherever it lies: adamw.m and adamw.v, fp32 [n]; in 8 bits
  /// codes, u8 [256 blocks], adamw.absmax [2, blocks], and adamw.plain [2, m], both moments of the
  /// tensors in 32 bits. A paged optimizer keeps the same.
  std::vector<std::pair<std::string, Tensor>> state() const;
  using Saved = std::function<Tensor(const std::string& name, const Shape& shape, DType dtype)>;
  /// From tensors on the host.
  void restore(const Saved& saved, int64_t steps);
  int64_t steps() const { return steps_; }

  const Moments& moments() const { return *moments_; }

 private:
  int64_t moment_size() const;
  /// Counts a step and brings what it needs to the device.
  void begin(float lr);

  AdamWConfig config_;
  int64_t parameters_;
  Blocks8 blocks_;
  std::unique_ptr<Moments> moments_;
  Tensor table_, maps_, absmax_, plain_;  // in 8 bits: see Moments8
  Tensor norm_, step_, partials_;
  int64_t steps_ = 0;
};

}  // namespace qlab
