#include "experiments/planner.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "experiments/plan_sizes.h"
#include "experiments/setup.h"

namespace qlab {
namespace {

constexpr int64_t unlimited = MemoryLimits::none;

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

/// What this run needs at its peak, what makes that up, and what would lessen it.
[[noreturn]] void refuse(const RunPlan& least, const MemoryPrediction& need, int64_t budget) {
  throw OutOfMemory(fmt::format(
      "{} is too little (train.memory_budget, or what the device has): the leanest plan ({}) needs "
      "{}; give that much, or set {}; --force tries it all the same",
      format_bytes(budget), describe(least), needed_text(need), advice_for(need)));
}

/// "weights 4.54 GB, activations 1.02 GB"
std::string parts_text(const CategoryBytes& bytes) {
  std::string parts;
  for (int i = 0; i < category_count; ++i)
    if (bytes[static_cast<size_t>(i)] > 0)
      parts += fmt::format("{}{} {}", parts.empty() ? "" : ", ", name_of(static_cast<Category>(i)),
                           format_bytes(bytes[static_cast<size_t>(i)]));
  return parts;
}

/// With recompute: auto, or nothing. `search` is of these trials.
std::optional<RunPlan> fastest_plan(PlanSearch& search, const ModelSource& model,
                                    std::span<const PaperTrial> gang, Device target,
                                    const MemoryLimits& limits, const Rates& rates) {
  const std::optional<RunPlan> one = search.fastest();
  if (!one || usual_tokens(gang) >= largest_tokens(gang)) return one;
  const auto find = [&](std::span<const PaperTrial> own) {
    return PlanSearch(model, own, target, limits, rates).fastest();
  };
  RunPlan plan = plan_by_size(model, gang, target, limits, *one, find);
  const std::optional<int64_t> capacity =
      plan.paged_out > 0 ? std::optional(limits.budget) : std::nullopt;
  foresee(plan, predict_memory(model, gang, target, capacity, plan), gang, rates);
  return plan.peak <= limits.budget && plan.host_peak <= limits.host ? plan : one;
}

RunPlan plan_as_asked(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                      const MemoryLimits& limits, const Rates& rates) {
  RunPlan plan = asked_plan(model, gang, target);
  const MemoryPrediction prediction = predict_memory(model, gang, target, limits.budget, plan);
  foresee(plan, prediction, gang, rates);
  return plan;
}

/// What the device has room for and the host has not.
std::optional<RunPlan> plan_for_larger_host(PlanSearch& search, const MemoryLimits& limits) {
  if (limits.host == unlimited) return {};
  return search.leanest_on_host();
}

/// Whether train.memory_budget is what a run may take.
bool has_budget(const Config& config) {
  return config.lora.present && (config.train.recompute == "auto" || is_paged(config));
}

bool plans(std::span<const PaperTrial> gang) {
  return gang.front().config.train.recompute == "auto";
}

/// What is asked for or, where it plans, what is left to do to the weights and each layer. Of
/// micro-batches as in far_too_large().
RunPlan bare_plan(const ModelSource& model, std::span<const PaperTrial> gang, Device target) {
  const Config& c = gang.front().config;
  const int64_t layers = model.config.num_hidden_layers;
  RunPlan plan;
  plan.host_embeddings = c.model.embeddings == "host";
  plan.streamed_layers = streamed_layers(c, layers);
  Recompute again = recompute_of(c);
  if (plans(gang)) {
    again = target.is_cuda() ? Recompute::offload : Recompute::full;
    if (c.model.streamed_layers.text == "auto" && target.is_cuda() && c.quant.type == "nf4")
      plan.streamed_layers = layers;
    // The table leaves the device, a micro-batch's rows come.
    if (c.model.embeddings == "auto" && target.is_cuda() && !model.config.tie_word_embeddings)
      plan.host_embeddings = largest_tokens(gang) < model.config.vocab_size;
  }
  plan.layers.assign(static_cast<size_t>(layers), again);
  return plan;
}

/// With its largest micro-batch shortened to so many tokens, and without evaluation.
std::vector<PaperTrial> shortened(std::span<const PaperTrial> gang, int64_t tokens) {
  const auto share = static_cast<double>(tokens) / static_cast<double>(largest_tokens(gang));
  std::vector<PaperTrial> out(gang.begin(), gang.end());
  for (PaperTrial& t : out) {
    for (int64_t& n : t.train_lengths)
      n = std::max<int64_t>(std::llround(static_cast<double>(n) * share), 1);
    t.usual_lengths = t.train_lengths;
    t.eval_lengths.clear();
  }
  return out;
}

/// Whether micro-batches of which each prediction would take seconds are more than any plan fits
/// into the budget: from so many tokens on a step grows in proportion to them.
bool far_too_large(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                   int64_t budget) {
  constexpr int64_t many = int64_t{1} << 17;
  const int64_t tokens = largest_tokens(gang);
  if (tokens <= many || budget == unlimited || !gang.front().config.lora.present) return false;
  const RunPlan bare = bare_plan(model, gang, target);
  const bool paged =
      std::any_of(gang.begin(), gang.end(), [](const auto& t) { return is_paged(t.config); });
  const auto need = [&](int64_t n) {
    const MemoryPrediction own = predict_memory(model, shortened(gang, n), target, {}, bare);
    const int64_t states = own.phases.back().held[static_cast<size_t>(Category::optimizer)];
    return static_cast<double>(own.peak() - (paged ? states : 0));
  };
  const double some = need(many), each = (some - need(many / 2)) / (many / 2);
  const auto in_proportion = [&](double share) {
    return some + share * each * static_cast<double>(tokens - many);
  };
  constexpr double error = 0.05;
  const auto room = static_cast<double>(budget);
  if (in_proportion(1 - error) > room) return true;
  return in_proportion(1 + error) > room && need(tokens) > room;
}

/// What such a run would take.
RunPlan least_plan(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                   const MemoryLimits& limits, const Rates& rates, MemoryPrediction& need) {
  RunPlan plan = bare_plan(model, gang, target);
  need = predict_memory(model, gang, target, limits.budget, plan);
  foresee(plan, need, gang, rates);
  return plan;
}

}  // namespace

std::string format_minimum(int64_t bytes) {
  int64_t last_digit = 1;
  for (int64_t unit = 1000; unit <= 1'000'000'000'000; unit *= 1000)
    if (bytes >= unit - unit / 2000) last_digit = unit / 100;  // format_bytes() takes this unit
  return format_bytes((bytes + last_digit - 1) / last_digit * last_digit);
}

std::string needed_text(const MemoryPrediction& need) {
  return fmt::format("{} at its peak, {} ({})", format_minimum(need.peak()), need.moment,
                     parts_text(need.highest().at_peak));
}

std::string advice_for(const MemoryPrediction& need) {
  if (need.moment.starts_with("evaluation")) return "a smaller data.eval_seq_len";
  if (need.moment.starts_with("loading")) return "quant.type: nf4, or a smaller model.path";
  return "a smaller train.batch_size (with more train.grad_accum), data.seq_len, lora.r or "
         "parallel.trials_per_gpu";
}

RunPlan plan_run(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                 const MemoryLimits& limits, const Rates& rates) {
  if (!plans(gang)) return plan_as_asked(model, gang, target, limits, rates);
  MemoryPrediction need;
  if (far_too_large(model, gang, target, limits.budget))
    refuse(least_plan(model, gang, target, limits, rates, need), need, limits.budget);
  PlanSearch search(model, gang, target, limits, rates);
  if (auto plan = fastest_plan(search, model, gang, target, limits, rates)) return *plan;
  if (const auto plan = plan_for_larger_host(search, limits)) {
    check_host_memory(*plan, limits.host);  // says what the host lacks
    return *plan;
  }
  const RunPlan least = search.leanest(need);
  refuse(least, need, limits.budget);
}

std::optional<RunPlan> fitting_plan(const ModelSource& model, std::span<const PaperTrial> gang,
                                    Device target, const MemoryLimits& limits, const Rates& rates) {
  if (far_too_large(model, gang, target, limits.budget)) return {};
  if (plans(gang)) {
    PlanSearch search(model, gang, target, limits, rates);
    if (auto plan = fastest_plan(search, model, gang, target, limits, rates)) return plan;
    auto plan = plan_for_larger_host(search, limits);
    return plan && plan->host_peak <= limits.host ? plan : std::nullopt;
  }
  RunPlan plan = plan_as_asked(model, gang, target, limits, rates);
  if (plan.peak > limits.budget || plan.host_peak > limits.host) return {};
  return plan;
}

bool some_plan_fits(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                    const MemoryLimits& limits, const Rates& rates) {
  if (plans(gang) && !far_too_large(model, gang, target, limits.budget)) {
    MemoryPrediction need;
    const RunPlan least = least_plan(model, gang, target, limits, rates, need);
    if (least.peak <= limits.budget && least.host_peak <= limits.host) return true;
  }
  return fitting_plan(model, gang, target, limits, rates).has_value();
}

RunPlan plan_or_leanest(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                        const MemoryLimits& limits, const Rates& rates) {
  if (!plans(gang)) return plan_as_asked(model, gang, target, limits, rates);
  MemoryPrediction need;
  if (far_too_large(model, gang, target, limits.budget))
    return least_plan(model, gang, target, limits, rates, need);
  PlanSearch search(model, gang, target, limits, rates);
  if (auto plan = fastest_plan(search, model, gang, target, limits, rates)) return *plan;
  if (auto plan = plan_for_larger_host(search, limits)) return *plan;
  return search.leanest(need);
}

int64_t memory_budget(const Config& config, Device target, std::optional<int64_t> capacity) {
  const int64_t all = capacity.value_or(unlimited);
  const std::string& wish = config.train.memory_budget.text;
  if (wish != "auto") return std::min(all, parse_bytes(wish).value_or(unlimited));
  return target.is_cuda() && capacity ? all - left_to_others(all) : all;
}

std::optional<int64_t> allocator_limit(const Config& config, Device target,
                                       std::optional<int64_t> capacity) {
  return is_paged(config) && capacity ? memory_budget(config, target, capacity) : capacity;
}

int64_t device_limit(const Config& config, Device target, std::optional<int64_t> capacity) {
  return has_budget(config) ? memory_budget(config, target, capacity)
                            : capacity.value_or(unlimited);
}

std::string budget_without_effect(const Config& config) {
  if (config.train.memory_budget.text == "auto" || has_budget(config)) return "";
  return fmt::format(
      "train.memory_budget: {} has no effect: {}; set train.recompute: auto or a paged optim.type, "
      "or limit the device with --device-memory",
      config.train.memory_budget.text,
      config.lora.present ? fmt::format("train.recompute: {} plans nothing, and optim.type: {} "
                                        "moves nothing",
                                        config.train.recompute, config.optim.type)
                          : "without a lora key nothing is planned");
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
      "too little host memory: loading, and what this run keeps beside the GPU, take {} ({}) and "
      "{} is available; free as much{}{}; --force tries all the same",
      format_minimum(plan.host_peak), parts_text(plan.host_at_peak), format_bytes(available),
      advice.empty() ? "" : ", or set ", fmt::join(advice, " and ")));
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
    text += fmt::format("; the weights of the first {} expanded once for second run and backward",
                        plan.expanded_once);
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
