// Runs forward and backward of one micro-batch in memory that was reserved before. The first time a
// shape occurs it is planned on the meta device; a shape that does not fit fails before any work.
// On a GPU a shape that occurs again is recorded as a graph, and is one launch from then on.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "core/memory.h"
#include "nn/llama.h"

namespace qlab {

/// What layers compute again in training steps of more than `above` tokens.
struct LeanerPolicy {
  int64_t above;
  std::vector<Recompute> layers;
};

class Stepper {
 public:
  /// Without `graphs` every kernel is launched by itself; the bits are the same. `leaner`: policies
  /// of larger micro-batches, by size, each needing less memory than the one before.
  Stepper(const Llama& model, const RecomputePolicy& policy, bool graphs = true,
          std::vector<LeanerPolicy> leaner = {});

  /// Plans and reserves, so that the largest micro-batch of a run is refused or accepted at once.
  /// For a model on meta only accounts are kept, and the plan has names.
  const StepPlan& reserve(const BatchBuilder& batch, bool train);
  /// Whether a step of the batch needs no more than what is reserved; with `growing` than what can
  /// be had.
  bool fits(const BatchBuilder& batch, bool train, bool growing = false);
  /// After a change of what the model holds, on which plans and graphs rest.
  void forget_plans();
  /// The reservation, which nobody uses between steps; undefined where there is none.
  Tensor idle() const;
  /// nll of every trained row, on the host. With `train` the gradients of the batch's adapters grow
  /// by those of sum_r scale_r nll_r.
  std::vector<float> run(const BatchBuilder& batch, bool train);

  const std::vector<LeanerPolicy>& leaner() const { return leaner_; }
  /// Which policy the last step ran with: 0 the first, otherwise so many steps down `leaner`.
  size_t policy_of_last() const { return last_policy_; }

 private:
  struct Shape {
    StepPlan plan;
    size_t policy = 0;
    bool seen = false;
    std::unique_ptr<cuda::Graph> graph;
    const void* memory = nullptr;  // what the graph's addresses rest on
    const void* batch = nullptr;
    int positions = 0;  // generations
    int host = 0;
  };
  /// `within`: with a leaner policy where its own needs more than what is reserved.
  Shape& shape(const BatchBuilder& batch, bool train, bool within);
  Tensor step(const Batch& batch, bool train, size_t policy);

  const Llama& model_;
  std::vector<LeanerPolicy> leaner_;
  std::vector<RecomputePolicy> policies_;  // the first, and those of leaner_
  size_t last_policy_ = 0;
  bool graphs_;
  StepMemory memory_;
  BatchBuffer buffer_;
  HostSlots host_;
  std::map<std::vector<int64_t>, Shape> shapes_;
  int graph_count_ = 0;
};

}  // namespace qlab
