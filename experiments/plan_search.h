// The fastest plan of a run that fits into a device and its host: what each layer keeps, computes
// again or puts aside, where embeddings and layers lie, and how much of the base is held expanded.
// Estimates say what is worth trying; what is chosen was run on meta, and fits to the byte.
#pragma once
#include <limits>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "experiments/plan_estimate.h"

namespace qlab {

/// What a run may take of the device's allocator, and of host memory beside a GPU.
struct MemoryLimits {
  static constexpr int64_t none = std::numeric_limits<int64_t>::max();
  MemoryLimits(int64_t device, int64_t host_memory = none) : budget(device), host(host_memory) {}
  int64_t budget, host;
};

/// Writes into a plan what was predicted of it.
void foresee(RunPlan& plan, const MemoryPrediction& prediction, std::span<const PaperTrial> gang,
             const Rates& rates);

class PlanSearch {
 public:
  PlanSearch(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
             const MemoryLimits& limits, const Rates& rates);

  /// Nothing where no plan fits.
  std::optional<RunPlan> fastest();
  /// Of those that fit into the device the one that needs the least of the host, whatever that has;
  /// to be called last.
  std::optional<RunPlan> leanest_on_host();
  /// The plan that needs the least of the device, and what that is.
  RunPlan leanest(MemoryPrediction& need);

 private:
  struct Candidate {
    PlanChoice choice;
    double score;
  };
  MemoryPrediction prediction(const RunPlan& plan) const;
  RunPlan exact(const PlanChoice& choice, MemoryPrediction& own) const;
  void hold_weights(RunPlan& plan, MemoryPrediction& own) const;
  void make_estimate();
  std::optional<RunPlan> everything_kept() const;
  std::optional<Candidate> best_estimate() const;
  void consider(const PlanChoice& choice, std::optional<Candidate>& best) const;
  void try_out(const PlanChoice& choice);
  double score(double seconds, int64_t host, const PlanChoice& choice) const;
  int64_t most_resident() const;

  const ModelSource& model_;
  std::span<const PaperTrial> gang_;
  Device target_;
  MemoryLimits limits_;
  const Rates& rates_;
  int64_t layers_;
  std::vector<int64_t> streamed_;  // choices
  std::vector<bool> host_embeddings_;
  bool paged_, saves_host_ = false;
  std::optional<PlanEstimate> estimate_;
  std::set<PlanChoice> tried_;
  // How the last exact prediction differed from its estimate.
  int64_t peak_error_ = 0, host_error_ = 0;
  double slowness_ = 1;
  std::optional<RunPlan> found_;
  double found_score_ = 0;
};

}  // namespace qlab
