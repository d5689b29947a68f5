#include "experiments/plan_sizes.h"

#include <algorithm>
#include <cmath>

namespace qlab {
namespace {

/// Policies in a row, each slower and leaner than the one before: with L layers, policy i <= L
/// computes the cheap slots of its first i layers again, L + i also the whole of its first i, 2 L +
/// i puts the inputs of its first i aside on the host. What is recomputed comes first: backward,
/// which begins at the last layer, has then given back what the others kept before it fills a
/// layer's slots again.
std::vector<Recompute> policy_at(int64_t i, int64_t layers) {
  std::vector<Recompute> policy(static_cast<size_t>(layers), Recompute::none);
  const auto at = [&](int64_t n) { return policy.begin() + n; };
  std::fill(at(0), at(std::min(i, layers)), Recompute::selective);
  if (i > layers) std::fill(at(0), at(std::min(i - layers, layers)), Recompute::full);
  if (i > 2 * layers) std::fill(at(0), at(i - 2 * layers), Recompute::offload);
  return policy;
}

/// The last one's number; on a CPU the host is the device.
int64_t leanest_policy(Device target, int64_t layers) {
  return (target.is_cuda() ? 3 : 2) * layers;
}

class Sizes {
 public:
  Sizes(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
        const MemoryLimits& limits, const RunPlan& one)
      : model_(model),
        gang_(gang),
        target_(target),
        limits_(limits),
        one_(one),
        layers_(model.config.num_hidden_layers),
        leanest_(leanest_policy(target, layers_)),
        usual_(usual_tokens(gang)),
        largest_(largest_tokens(gang)) {}

  RunPlan run(const FindPlan& find) const {
    std::vector<PaperTrial> usual(gang_.begin(), gang_.end());
    for (PaperTrial& t : usual) t.train_lengths = t.usual_lengths;
    std::optional<RunPlan> plan = leaving_room(find(usual));
    if (!plan) {  // with weights and states where the largest micro-batch needs them
      plan = one_;
      plan->layers = fastest(*plan, usual_, -1);
    }
    return spread(std::move(*plan));
  }

 private:
  /// With fewer weights held expanded where the largest micro-batch needs that.
  std::optional<RunPlan> leaving_room(std::optional<RunPlan> plan) const {
    constexpr int attempts = 3;  // what is held comes in groups of modules
    for (int i = 0; plan && i < attempts; ++i) {
      const MemoryPrediction need = predicted(*plan, plan->layers, usual_);
      const int64_t over = excess(need, *plan);
      if (over <= 0) return plan;
      if (need.held_expanded < over) break;
      plan->resident = need.held_expanded - over;
    }
    return {};
  }

  RunPlan spread(RunPlan plan) const {
    int64_t above = fits(plan, plan.layers, largest_) ? largest_ : usual_, too_many = largest_;
    for (int i = 0; i < 6 && above < largest_; ++i) {
      const int64_t middle = between(above, too_many);
      (fits(plan, plan.layers, middle) ? above : too_many) = middle;
    }
    std::vector<LeanerPolicy> leaner;
    RunPlan larger = plan;
    larger.expanded_once = 0;
    const int64_t middle = between(above, largest_);
    int64_t too_fast = -1;
    for (const int64_t size :
         {between(above, middle), middle, between(middle, largest_), largest_}) {
      if (size <= above) continue;
      std::vector<Recompute> layers = fastest(larger, size, too_fast, &too_fast);
      const bool same = leaner.empty() ? plan.expanded_once == 0 && layers == plan.layers
                                       : layers == leaner.back().layers;
      if (!same) leaner.push_back({above, std::move(layers)});
      above = size;
    }
    plan.leaner = std::move(leaner);
    return plan;
  }

  static int64_t between(int64_t a, int64_t b) {
    return static_cast<int64_t>(std::sqrt(static_cast<double>(a) * static_cast<double>(b)));
  }

  /// Micro-batches of up to so many tokens with these layers, larger ones with everything again.
  MemoryPrediction predicted(RunPlan plan, const std::vector<Recompute>& layers,
                             int64_t tokens) const {
    const std::optional<int64_t> capacity =
        plan.paged_out > 0 ? std::optional(limits_.budget) : std::nullopt;
    plan.layers = layers;
    plan.leaner.clear();
    if (tokens < largest_) plan.leaner = {{tokens, policy_at(leanest_, layers_)}};
    return predict_memory(model_, gang_, target_, capacity, plan);
  }
  int64_t excess(const MemoryPrediction& need, const RunPlan& plan) const {
    return need.peak() + std::max<int64_t>(need.paged_out - plan.paged_out, 0) - limits_.budget;
  }
  bool fits(const RunPlan& plan, const std::vector<Recompute>& layers, int64_t tokens) const {
    const MemoryPrediction need = predicted(plan, layers, tokens);
    return excess(need, plan) <= 0 && need.host_peak <= limits_.host;
  }

  /// The first in the row of policies behind `too_fast` with which so many tokens fit.
  std::vector<Recompute> fastest(const RunPlan& plan, int64_t tokens, int64_t too_fast,
                                 int64_t* last_too_fast = nullptr) const {
    int64_t enough = leanest_;
    while (enough - too_fast > 1) {
      const int64_t middle = (enough + too_fast) / 2;
      (fits(plan, policy_at(middle, layers_), tokens) ? enough : too_fast) = middle;
    }
    if (last_too_fast != nullptr) *last_too_fast = too_fast;
    std::vector<Recompute> policy = policy_at(enough, layers_), kept = policy;
    kept.back() = Recompute::none;  // as use_spare_memory()
    return fits(plan, kept, tokens) ? kept : policy;
  }

  const ModelSource& model_;
  std::span<const PaperTrial> gang_;
  Device target_;
  MemoryLimits limits_;
  const RunPlan& one_;
  int64_t layers_, leanest_, usual_, largest_;
};

}  // namespace

RunPlan plan_by_size(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                     const MemoryLimits& limits, const RunPlan& one, const FindPlan& find) {
  if (usual_tokens(gang) >= largest_tokens(gang)) return one;
  const bool keeps_all = std::count(one.layers.begin(), one.layers.end(), Recompute::none) ==
                         static_cast<std::ptrdiff_t>(one.layers.size());
  const bool holds = target.is_cuda() && gang.front().config.quant.resident.text != "0";
  if (keeps_all && one.paged_out == 0 && !holds) return one;
  return Sizes(model, gang, target, limits, one).run(find);
}

}  // namespace qlab
