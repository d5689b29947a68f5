// What plans of a run need, estimated from a few that were run on meta: a layer counts the same
// wherever it stands. It says which plans are worth predicting exactly.
#pragma once
#include <array>
#include <span>

#include "experiments/memory_prediction.h"

namespace qlab {

/// A plan by numbers: what the first layers do again, and where weights lie. 0 <= aside <= again
/// <= layers; `selective` of those that are not computed again.
struct PlanChoice {
  int64_t selective = 0;  // layers up to this one compute norms and SwiGLU again, at least
  int64_t again = 0;      // layers up to this one are computed again in full
  int64_t aside = 0;      // layers up to this one have their inputs put aside on the host
  int64_t streamed = 0;
  bool host_embeddings = false;
  auto operator<=>(const PlanChoice&) const = default;

  RunPlan plan(int64_t layers) const;
};

class PlanEstimate {
 public:
  /// `holds`: whether weights may be held expanded; `streams`: whether layers may be streamed.
  PlanEstimate(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
               const Rates& rates, bool holds, bool streams);

  /// At the peak, with nothing held expanded and no state paged out.
  int64_t peak(const PlanChoice& choice) const;
  int64_t host_peak(const PlanChoice& choice) const;
  /// Of a step, with so many bytes held expanded and so many of states on the host.
  double seconds(const PlanChoice& choice, int64_t resident, int64_t paged_out) const;
  /// The most that can be held expanded.
  int64_t most_resident(const PlanChoice& choice) const;
  int64_t paged_bytes() const { return paged_bytes_; }

 private:
  static constexpr int kinds = 4;  // of Recompute, each leaner than the one before
  /// Of a run whose layers are all of a kind.
  struct Corner {
    double peak = 0;                    // beyond what the base holds
    std::array<PartSeconds, 2> passes;  // forward and backward
  };
  Corner corner(const MemoryPrediction& prediction) const;
  /// Between what the corners have.
  double along(const PlanChoice& choice, const std::array<double, kinds>& at) const;
  int64_t held_by_base(const PlanChoice& choice) const;
  double pass_seconds(const PlanChoice& choice, size_t pass, double saved) const;

  const Rates& rates_;
  int64_t layers_;
  double micro_batches_;
  int64_t base_ = 0, load_ = 0, host_load_ = 0;  // held by the base; more while it is loaded
  int64_t table_ = 0, rows_ = 0;                 // embeddings; those of a micro-batch
  int64_t layer_ = 0;                            // of the weights of a layer
  int64_t held_ = 0;                             // of all layers, expanded
  int64_t paged_bytes_ = 0;                      // of states that can leave
  double rows_seconds_ = 0, copy_ = 0, loss_ = 0, update_ = 0;
  std::array<double, 2> saved_{};  // seconds of a pass per byte held expanded
  std::array<Corner, kinds> corners_;
};

}  // namespace qlab
