#include "experiments/planner.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "experiments/plan_sizes.h"
#include "experiments/setup.h"

namespace qlab {
namespace {

constexpr int64_t unlimited = std::numeric_limits<int64_t>::max();

const char* name_of_recompute(Recompute recompute) {
  switch (recompute) {
    case Recompute::none:
      return "keeping everything";
    case Recompute::selective:
      return "norms and SwiGLU again";
    case Recompute::full:
      return "fully again";
    case Recompute::offload:
      return "fully again, put aside on the host";
  }
  return "?";
}

void foresee(RunPlan& plan, const MemoryPrediction& prediction, const Rates& rates) {
  plan.peak = prediction.peak();
  plan.host_peak = prediction.host_peak;
  plan.paged_out = prediction.paged_out;
  plan.step_seconds = predicted_seconds(prediction.work, rates);
}

class Search {
 public:
  Search(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
         const Rates& rates, std::optional<int64_t> capacity)
      : model_(model), gang_(gang), target_(target), rates_(rates), capacity_(capacity) {}

  RunPlan run(int64_t budget) {
    const ModelConfig& wish = gang_.front().config.model;
    const int64_t layers = model_.config.num_hidden_layers;
    const int64_t leanest = leanest_policy(target_, layers);
    streamed_layers_ = streamed_layers(gang_.front().config, layers);
    const std::string& embeddings = wish.embeddings;
    // Bringing embeddings along costs less than putting layers aside.
    host_embeddings_ = embeddings == "host";
    if (embeddings == "auto" && target_.is_cuda() && !model_.config.tie_word_embeddings)
      host_embeddings_ = predict(plan_at(2 * layers)).peak() > budget;
    const MemoryPrediction least = predict(kept(plan_at(leanest)));
    if (least.peak() <= budget) return row(budget, leanest);
    for (const int64_t corner : {2 * layers, layers})  // peaks fall, but for a little at corners
      if (predict(plan_at(corner)).peak() <= budget) return row(budget, corner);
    if (wish.streamed_layers.text != "auto" || !target_.is_cuda()) refuse(least, budget);
    return streaming(budget, leanest);
  }

 private:
  /// With as few layers streamed as let a corner of the row fit, whichever corner is the fastest.
  RunPlan streaming(int64_t budget, int64_t leanest) {
    const int64_t layers = model_.config.num_hidden_layers;
    RunPlan best;
    for (int64_t corner = leanest; corner >= 0; corner -= layers) {
      RunPlan plan = kept(plan_at(corner));  // the same whatever is streamed
      const auto fewest = fewest_streamed(layers, [&](int64_t n) {
        plan.streamed_layers = n;
        return predict(plan).peak() <= budget;
      });
      if (!fewest) continue;
      streamed_layers_ = *fewest;
      plan = row(budget, corner);
      if (best.layers.empty() || plan.step_seconds < best.step_seconds) best = std::move(plan);
    }
    streamed_layers_ = layers;
    if (best.layers.empty()) refuse(predict(kept(plan_at(leanest))), budget);
    return best;
  }

  /// The fastest of the row up to plan `fits`, which fits.
  RunPlan row(int64_t budget, int64_t fits) const {
    const int64_t layers = model_.config.num_hidden_layers;
    int64_t too_large = -1;
    while (fits - too_large > 1) {
      const int64_t middle = (fits + too_large) / 2;
      (predict(plan_at(middle)).peak() <= budget ? fits : too_large) = middle;
    }
    // Time per byte is the same for all layers, so that the best plan either keeps as much as it
    // can, or stops at a corner and holds expanded weights with what is left.
    RunPlan best;
    for (const int64_t i : {fits, layers, 2 * layers}) {
      if (i < fits) continue;
      RunPlan plan = filled(i, budget);
      if (best.layers.empty() || plan.step_seconds < best.step_seconds) best = std::move(plan);
    }
    return best;
  }

  MemoryPrediction predict(const RunPlan& plan) const {
    return predict_memory(model_, gang_, target_, capacity_, plan);
  }

  RunPlan plan_at(int64_t i) const {
    RunPlan plan;
    plan.layers = policy_at(i, model_.config.num_hidden_layers);
    plan.host_embeddings = host_embeddings_;
    plan.streamed_layers = streamed_layers_;
    return plan;
  }

  RunPlan kept(const RunPlan& plan) const {
    MemoryPrediction own = predict(plan);
    return use_spare_memory(plan, own, [&](const RunPlan& p) { return predict(p); });
  }

  RunPlan filled(int64_t i, int64_t budget) const {
    const MemoryBudget& wish = gang_.front().config.quant.resident;
    RunPlan plan = kept(plan_at(i));
    MemoryPrediction prediction = predict(plan);
    if (wish.text != "0" && target_.is_cuda()) {
      const int64_t most = wish.text == "auto" ? unlimited : parse_bytes(wish.text).value_or(0);
      RunPlan holding = plan;
      holding.resident = std::min(most, budget - prediction.peak());
      MemoryPrediction held = predict(holding);
      if (held.peak() <= budget) plan = std::move(holding), prediction = std::move(held);
    }
    foresee(plan, prediction, rates_);
    return plan;
  }

  [[noreturn]] void refuse(const MemoryPrediction& least, int64_t budget) const {
    std::string parts;
    const CategoryBytes& bytes = least.highest().at_peak;
    for (int i = 0; i < category_count; ++i)
      if (bytes[static_cast<size_t>(i)] > 0)
        parts +=
            fmt::format("{}{} {}", parts.empty() ? "" : ", ", name_of(static_cast<Category>(i)),
                        format_bytes(bytes[static_cast<size_t>(i)]));
    throw OutOfMemory(fmt::format(
        "{} is too little (train.memory_budget, or what the device has): with every layer computed "
        "again{} this run needs {} ({}); give that much, or set a smaller train.batch_size (with "
        "more train.grad_accum), "
        "data.seq_len or parallel.trials_per_gpu",
        format_bytes(budget),
        streamed_layers_ == 0
            ? ""
            : fmt::format(" and {} of them streamed from host memory", streamed_layers_),
        format_bytes(least.peak()), parts));
  }

  const ModelSource& model_;
  std::span<const PaperTrial> gang_;
  Device target_;
  const Rates& rates_;
  std::optional<int64_t> capacity_;  // within which states are paged
  bool host_embeddings_ = false;
  int64_t streamed_layers_ = 0;
};

/// With states on the device, or moving where that is faster or the only way.
RunPlan search(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
               int64_t budget, const Rates& rates) {
  const auto run = [&](std::optional<int64_t> capacity) {
    return Search(model, gang, target, rates, capacity).run(budget);
  };
  if (std::none_of(gang.begin(), gang.end(), [](const auto& t) { return is_paged(t.config); }))
    return run({});
  RunPlan paged = run(budget);
  if (paged.paged_out == 0) return paged;
  try {
    RunPlan kept = run({});
    return kept.step_seconds <= paged.step_seconds ? kept : paged;
  } catch (const OutOfMemory&) {
    return paged;
  }
}

}  // namespace

RunPlan plan_run(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                 int64_t budget, const Rates& rates) {
  const Config& first = gang.front().config;
  if (first.train.recompute == "auto") {
    const RunPlan one = search(model, gang, target, budget, rates);
    const auto find = [&](std::span<const PaperTrial> own) -> std::optional<RunPlan> {
      try {
        return search(model, own, target, budget, rates);
      } catch (const OutOfMemory&) {
        return {};
      }
    };
    RunPlan plan = plan_by_size(model, gang, target, budget, one, find);
    const std::optional<int64_t> capacity =
        plan.paged_out > 0 ? std::optional(budget) : std::nullopt;
    foresee(plan, predict_memory(model, gang, target, capacity, plan), rates);
    return plan.peak <= budget ? plan : one;
  }
  RunPlan plan = asked_plan(model, gang, target);
  const MemoryPrediction prediction = predict_memory(model, gang, target, budget, plan);
  foresee(plan, prediction, rates);
  return plan;
}

RunPlan plan_or_leanest(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                        int64_t budget, const Rates& rates) {
  try {
    return plan_run(model, gang, target, budget, rates);
  } catch (const OutOfMemory&) {
    std::vector<PaperTrial> leanest(gang.begin(), gang.end());
    for (PaperTrial& t : leanest) {
      t.config.train.recompute = target.is_cuda() ? "offload" : "full";
      if (target.is_cuda() && !model.config.tie_word_embeddings) t.config.model.embeddings = "host";
      if (target.is_cuda() && t.config.model.streamed_layers.text == "auto")
        t.config.model.streamed_layers.text = "all";
    }
    return plan_run(model, leanest, target, budget, rates);
  }
}

int64_t memory_budget(const Config& config, Device target, std::optional<int64_t> capacity) {
  const int64_t all = capacity.value_or(unlimited);
  const std::string& wish = config.train.memory_budget.text;
  constexpr int64_t spared = int64_t{1} << 30;
  if (wish != "auto") return std::min(all, parse_bytes(wish).value_or(unlimited));
  return target.is_cuda() && capacity ? all - std::min(spared, all / 8) : all;
}

std::optional<int64_t> allocator_limit(const Config& config, Device target,
                                       std::optional<int64_t> capacity) {
  return is_paged(config) && capacity ? memory_budget(config, target, capacity) : capacity;
}

void check_host_memory(const RunPlan& plan, int64_t available) {
  if (plan.host_peak <= available) return;
  std::vector<std::string> advice;
  const auto puts_aside = [](const std::vector<Recompute>& layers) {
    return std::count(layers.begin(), layers.end(), Recompute::offload) > 0;
  };
  bool aside = puts_aside(plan.layers);
  for (const LeanerPolicy& leaner : plan.leaner) aside |= puts_aside(leaner.layers);
  if (plan.paged_out > 0) advice.emplace_back("an optim.type that is not paged");
  if (aside) advice.emplace_back("train.recompute: full");
  if (plan.host_embeddings) advice.emplace_back("model.embeddings: device");
  if (plan.streamed_layers > 0)
    advice.emplace_back(fmt::format("model.streamed_layers below {}", plan.streamed_layers));
  throw OutOfMemory(fmt::format(
      "too little host memory: loading, and what this run keeps beside the GPU, take {} and {} is "
      "available; free as much{}{}; --force tries all the same",
      format_bytes(plan.host_peak), format_bytes(available), advice.empty() ? "" : ", or set ",
      fmt::join(advice, " and ")));
}

std::string describe(const std::vector<Recompute>& layers) {
  std::string text;
  for (size_t first = 0; first < layers.size();) {
    size_t last = first;
    while (last + 1 < layers.size() && layers[last + 1] == layers[first]) ++last;
    text += fmt::format("{}layer{} {}", text.empty() ? "" : ", ", first == last ? "" : "s", first);
    if (last > first) text += fmt::format("-{}", last);
    text += fmt::format(" {}", name_of_recompute(layers[first]));
    first = last + 1;
  }
  return text;
}

std::string describe(const RunPlan& plan) {
  std::string text = describe(plan.layers);
  if (plan.expanded_once > 0)
    text += fmt::format("; layers 0-{} expand weights once for both", plan.expanded_once - 1);
  for (size_t i = 0; i < plan.leaner.size(); ++i)
    text +=
        fmt::format("; {} more than {}{} {}", i == 0 ? "in micro-batches of" : "of",
                    plan.leaner[i].above, i == 0 ? " tokens" : "", describe(plan.leaner[i].layers));
  if (plan.host_embeddings) text += "; embeddings in host memory";
  if (plan.streamed_layers > 0)
    text += fmt::format("; the weights of {} of {} layers streamed from host memory",
                        plan.streamed_layers, plan.layers.size());
  if (plan.paged_out > 0)
    text += fmt::format("; {} of optimizer states in host memory", format_bytes(plan.paged_out));
  if (plan.resident > 0)
    text += fmt::format("; at most {} of weights held expanded", format_bytes(plan.resident));
  return text;
}

}  // namespace qlab
