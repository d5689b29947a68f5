#include "experiments/plan_search.h"

#include <algorithm>

#include "experiments/setup.h"

namespace qlab {
namespace {

constexpr int64_t unlimited = MemoryLimits::none;
/// Of a step's time: what streaming all layers has to gain at least, and what a plan has to promise
/// to be tried.
constexpr double least_gain = 1e-4, least_promise = 1e-4;
constexpr int most_trials = 12;

std::vector<int64_t> streaming_choices(const Config& config, Device target, int64_t layers) {
  if (config.model.streamed_layers.text != "auto" || !target.is_cuda() ||
      config.quant.type != "nf4")
    return {streamed_layers(config, layers)};
  std::vector<int64_t> all;
  for (int64_t n = 0; n <= layers; ++n) all.push_back(n);
  return all;
}

std::vector<bool> embedding_choices(const Config& config, Device target, const LlamaConfig& model) {
  const std::string& wish = config.model.embeddings;
  if (wish == "auto" && target.is_cuda() && !model.tie_word_embeddings) return {false, true};
  return {wish == "host"};
}

bool any_paged(std::span<const PaperTrial> gang) {
  return std::any_of(gang.begin(), gang.end(), [](const auto& t) { return is_paged(t.config); });
}

}  // namespace

void foresee(RunPlan& plan, const MemoryPrediction& prediction, std::span<const PaperTrial> gang,
             const Rates& rates) {
  plan.peak = prediction.peak();
  plan.host_peak = prediction.host_peak;
  plan.host_at_peak = prediction.host_at_peak;
  plan.paged_out = prediction.paged_out;
  plan.seconds = predicted_seconds(prediction, rates);
  plan.step_seconds = plan.seconds.of(micro_batches(gang));
}

PlanSearch::PlanSearch(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
                       const MemoryLimits& limits, const Rates& rates)
    : model_(model),
      gang_(gang),
      target_(target),
      limits_(limits),
      rates_(rates),
      layers_(model.config.num_hidden_layers),
      streamed_(streaming_choices(gang.front().config, target, layers_)),
      host_embeddings_(embedding_choices(gang.front().config, target, model.config)),
      paged_(any_paged(gang)) {}

void PlanSearch::make_estimate() {
  if (!estimate_)
    estimate_.emplace(model_, gang_, target_, rates_, most_resident() > 0, streamed_.back() > 0);
}

int64_t PlanSearch::most_resident() const {
  const std::string& wish = gang_.front().config.quant.resident.text;
  if (!target_.is_cuda()) return 0;
  return wish == "auto" ? unlimited : parse_bytes(wish).value_or(0);
}

MemoryPrediction PlanSearch::prediction(const RunPlan& plan) const {
  return predict_memory(
      model_, gang_, target_,
      paged_ && limits_.budget < unlimited ? std::optional(limits_.budget) : std::nullopt, plan);
}

/// Of equally fast plans the one that streams less is better.
double PlanSearch::score(double seconds, int64_t host, const PlanChoice& choice) const {
  if (saves_host_) return static_cast<double>(host);
  const double share =
      static_cast<double>(choice.streamed + choice.aside) / static_cast<double>(layers_) +
      (choice.host_embeddings ? 1 : 0);
  return seconds * (1 + least_gain * share);
}

void PlanSearch::consider(const PlanChoice& choice, std::optional<Candidate>& best) const {
  if (tried_.contains(choice)) return;
  const int64_t peak = estimate_->peak(choice) + peak_error_;
  const int64_t paged_out = std::max<int64_t>(peak - limits_.budget, 0);
  const int64_t host = estimate_->host_peak(choice) + host_error_ + paged_out;
  if (paged_out > estimate_->paged_bytes() || host > limits_.host) return;
  const int64_t resident = std::clamp<int64_t>(
      limits_.budget - peak, 0, std::min(most_resident(), estimate_->most_resident(choice)));
  const double own =
      score(slowness_ * estimate_->seconds(choice, resident, paged_out), host, choice);
  if (!best || own < best->score) best = {choice, own};
}

/// With each place for the weights: what fits with the least to do again, and, since what is left
/// may hold expanded weights, what does all of one kind.
std::optional<PlanSearch::Candidate> PlanSearch::best_estimate() const {
  std::optional<Candidate> best;
  const int64_t room = limits_.budget - peak_error_;
  const auto fits = [&](const PlanChoice& choice) { return estimate_->peak(choice) <= room; };
  for (const bool host_embeddings : host_embeddings_)
    for (const int64_t streamed : streamed_) {
      const auto row = [&](const auto& at) {
        const auto choice = [&](int64_t i) {
          PlanChoice own = at(i);
          own.streamed = streamed, own.host_embeddings = host_embeddings;
          return own;
        };
        for (const int64_t away : {int64_t{0}, estimate_->paged_bytes()}) {
          int64_t first = 0;
          while (first < layers_ && estimate_->peak(choice(first)) - away > room) ++first;
          consider(choice(first), best);
          if (first < layers_) consider(choice(first + 1), best);
        }
        consider(choice(layers_), best);
      };
      row([](int64_t i) { return PlanChoice{.selective = i}; });
      row([&](int64_t i) { return PlanChoice{.selective = layers_, .again = i}; });
      if (!target_.is_cuda()) continue;
      row([&](int64_t i) {
        return PlanChoice{.selective = layers_, .again = layers_, .aside = i};
      });
      // Of those computed again no more are put aside than have to be.
      row([&](int64_t i) {
        PlanChoice own{layers_, i, i, streamed, host_embeddings};
        if (!fits(own)) return own;
        int64_t fewest = i, too_few = -1;
        while (fewest - too_few > 1) {
          own.aside = (fewest + too_few) / 2;
          (fits(own) ? fewest : too_few) = own.aside;
        }
        own.aside = fewest;
        return own;
      });
    }
  return best;
}

/// What it needs, with what costs nothing kept.
RunPlan PlanSearch::exact(const PlanChoice& choice, MemoryPrediction& own) const {
  const auto predict = [&](const RunPlan& plan) { return prediction(plan); };
  const RunPlan plan = choice.plan(layers_);
  own = predict(plan);
  return gang_.front().config.lora.present ? use_spare_memory(plan, own, predict) : plan;
}

/// As much as the limit leaves room for.
void PlanSearch::hold_weights(RunPlan& plan, MemoryPrediction& own) const {
  const int64_t room = std::min(most_resident(), limits_.budget - own.peak());
  if (room <= 0 || own.paged_out > 0) return;
  RunPlan holding = plan;
  holding.resident = room;
  MemoryPrediction held = prediction(holding);
  if (held.peak() <= limits_.budget) plan = std::move(holding), own = std::move(held);
}

/// The fastest where memory has no end.
std::optional<RunPlan> PlanSearch::everything_kept() const {
  const PlanChoice all{.streamed = streamed_.front(), .host_embeddings = host_embeddings_.front()};
  MemoryPrediction own;
  RunPlan plan = exact(all, own);
  hold_weights(plan, own);
  foresee(plan, own, gang_, rates_);
  if (plan.host_peak > limits_.host) return {};
  return plan;
}

void PlanSearch::try_out(const PlanChoice& choice) {
  MemoryPrediction own;
  RunPlan plan = exact(choice, own);
  peak_error_ = own.peak() + own.paged_out - estimate_->peak(choice);
  host_error_ = own.host_peak - own.paged_out - estimate_->host_peak(choice);
  if (own.peak() > limits_.budget || own.host_peak > limits_.host) return;
  hold_weights(plan, own);
  foresee(plan, own, gang_, rates_);
  const int64_t held = std::min(plan.resident, estimate_->most_resident(choice));
  const double estimated = estimate_->seconds(choice, held, own.paged_out);
  if (estimated > 0) slowness_ = plan.step_seconds / estimated;
  const double own_score = score(plan.step_seconds, plan.host_peak, choice);
  if (!found_ || own_score < found_score_) found_ = std::move(plan), found_score_ = own_score;
}

RunPlan PlanSearch::leanest(MemoryPrediction& need) {
  make_estimate();
  const int64_t aside = target_.is_cuda() ? layers_ : 0;
  std::optional<PlanChoice> least;
  for (const bool host_embeddings : host_embeddings_)
    for (const int64_t streamed : {streamed_.front(), streamed_.back()}) {
      const PlanChoice own{layers_, layers_, aside, streamed, host_embeddings};
      if (!least || estimate_->peak(own) < estimate_->peak(*least)) least = own;
    }
  RunPlan plan = exact(*least, need);
  foresee(plan, need, gang_, rates_);
  return plan;
}

std::optional<RunPlan> PlanSearch::leanest_on_host() {
  limits_.host = unlimited, saves_host_ = true;
  tried_.clear(), found_.reset();
  peak_error_ = host_error_ = 0, slowness_ = 1;
  return fastest();
}

std::optional<RunPlan> PlanSearch::fastest() {
  if (limits_.budget == unlimited && !saves_host_)
    if (auto plan = everything_kept()) return plan;
  make_estimate();
  for (int i = 0; i < most_trials; ++i) {
    const std::optional<Candidate> next = best_estimate();
    if (!next || (found_ && next->score >= found_score_ * (1 - least_promise))) break;
    tried_.insert(next->choice);
    try_out(next->choice);
  }
  if (!found_) {
    MemoryPrediction need;
    RunPlan plan = leanest(need);
    if (plan.peak <= limits_.budget && plan.host_peak <= limits_.host) found_ = std::move(plan);
  }
  return found_;
}

}  // namespace qlab
