// Runs forward and backward of one micro-batch in memory that was reserved before. The first time a
// shape occurs it is planned on the meta device; a shape that does not fit fails before any work.
#pragma once
#include <map>
#include <vector>

#include "core/memory.h"
#include "nn/llama.h"

namespace qlab {

class Stepper {
 public:
  Stepper(const Llama& model, bool recompute);

  /// Plans and reserves, so that the largest micro-batch of a run is refused or accepted at once.
  void reserve(const BatchBuilder& batch, bool train);
  /// nll of every trained row, on the host. With `train` the gradients of the batch's adapters grow
  /// by those of sum_r scale_r nll_r.
  std::vector<float> run(const BatchBuilder& batch, bool train);

 private:
  const StepPlan& plan(const BatchBuilder& batch, bool train);
  Tensor step(const Batch& batch, bool train) const;

  const Llama& model_;
  bool recompute_;
  StepMemory memory_;
  std::map<std::vector<int64_t>, StepPlan> plans_;
};

}  // namespace qlab
