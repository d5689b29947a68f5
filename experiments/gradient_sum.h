// The gradient of a window whose micro-batches several replicas compute: the gradients of a round's
// micro-batches are gathered on all, and each adds them in the order of micro-batches. So every
// replica has the bits that one alone gives which adds them one after another.
#pragma once
#include "core/replicas.h"
#include "nn/lora.h"

namespace qlab {

class GradientSum {
 public:
  /// Of one of `replicas`, for windows of so many rounds. With one round the sum takes the place of
  /// the adapter's own gradients, with more it has a buffer.
  GradientSum(const Adapter& adapter, int64_t replicas, int64_t rounds);
  /// Adds the adapter's gradients of the first `count` replicas; the window's first round begins
  /// anew. Collective. Without `replicas` (on meta) nothing is gathered.
  void add(Replicas* replicas, int64_t count, bool first);
  /// fp32 [n], as the adapter's.
  const Tensor& total() const { return total_; }

  /// Of a window of `micro_batches`.
  static int64_t rounds(int64_t micro_batches, int64_t replicas) {
    return (micro_batches + replicas - 1) / replicas;
  }
  /// Bytes through which gradients of all replicas pass, at most.
  static constexpr int64_t staging_bytes = int64_t{64} << 20;

 private:
  Tensor own_, total_;
  Tensor staging_;  // [replicas chunk]
  int64_t replicas_, chunk_;
};

}  // namespace qlab
