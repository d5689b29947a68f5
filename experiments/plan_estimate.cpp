#include "experiments/plan_estimate.h"

#include <algorithm>
#include <limits>

#include "experiments/setup.h"
#include "nn/layer_stream.h"

namespace qlab {
namespace {

std::vector<ProfileLine> one_line(const char* operation, double bytes) {
  return {{operation, 1, 0, {0, bytes}, 0}};
}

}  // namespace

RunPlan PlanChoice::plan(int64_t layers) const {
  RunPlan plan;
  plan.layers.assign(static_cast<size_t>(layers), Recompute::none);
  const auto at = [&](int64_t n) { return plan.layers.begin() + n; };
  std::fill(at(0), at(selective), Recompute::selective);
  std::fill(at(0), at(again), Recompute::full);
  std::fill(at(0), at(aside), Recompute::offload);
  plan.streamed_layers = streamed;
  plan.host_embeddings = host_embeddings;
  return plan;
}

PlanEstimate::PlanEstimate(const ModelSource& model, std::span<const PaperTrial> gang,
                           Device target, const Rates& rates, bool holds, bool streams)
    : rates_(rates), layers_(model.config.num_hidden_layers), micro_batches_(micro_batches(gang)) {
  const bool trains = gang.front().config.lora.present;
  const auto exact = [&](const RunPlan& plan) {
    return predict_memory(model, gang, target, {}, plan);
  };
  const auto predict = [&](const PlanChoice& choice, int64_t resident = 0) {
    RunPlan plan = choice.plan(layers_);
    plan.resident = resident;
    MemoryPrediction own = exact(plan);
    if (trains && choice.selective > 0) use_spare_memory(plan, own, exact);
    return own;
  };
  const MemoryPrediction none = predict({});
  base_ = sum(none.phases.front().held);
  load_ = none.load_peak() - base_;
  host_load_ = none.host_peak;
  const int64_t again = target.is_cuda() ? layers_ : 0;
  corners_[0] = corner(none);
  corners_[1] = trains ? corner(predict({layers_, 0, 0})) : corners_[0];
  corners_[2] = trains ? corner(predict({layers_, layers_, 0})) : corners_[0];
  corners_[3] = trains ? corner(predict({layers_, layers_, again})) : corners_[0];
  update_ = predicted_seconds(none.update, rates);
  if (const auto parts = part_seconds(none.work, rates); parts.contains(1))
    loss_ = parts.at(1).stream;
  const auto bytes =
      static_cast<int64_t>(size_of(compute_dtype(gang.front().config, target.meta())));
  table_ = model.config.vocab_size * model.config.hidden_size * bytes;
  rows_ = (trains ? largest_tokens(gang) : 0) * model.config.hidden_size * bytes;
  rows_seconds_ = predicted_seconds(one_line("embedding rows", static_cast<double>(rows_)), rates);
  if (streams) {
    std::vector<PaperTrial> base(1, gang.front());
    base.front().config.lora.present = false;
    const PlanChoice all{0, 0, 0, layers_};
    layer_ = predict_memory(model, base, target, {}, all.plan(layers_)).streamed_bytes / layers_;
    copy_ = predicted_seconds(one_line("streamed layer", static_cast<double>(layer_)), rates);
  }
  if (holds && trains) {
    const MemoryPrediction held = predict({}, std::numeric_limits<int64_t>::max());
    held_ = held.held_expanded;
    const Corner own = corner(held);
    for (size_t p = 0; held_ > 0 && p < saved_.size(); ++p)
      saved_[p] =
          (corners_[0].passes[p].stream - own.passes[p].stream) / static_cast<double>(held_);
  }
  if (trains &&
      std::any_of(gang.begin(), gang.end(), [](const auto& t) { return is_paged(t.config); }))
    paged_bytes_ = none.phases.back().held[static_cast<size_t>(Category::optimizer)];
}

PlanEstimate::Corner PlanEstimate::corner(const MemoryPrediction& prediction) const {
  Corner corner;
  for (size_t i = 1; i < prediction.phases.size(); ++i)
    corner.peak = std::max(corner.peak, static_cast<double>(prediction.phases[i].peak - base_));
  for (const auto& [number, part] : part_seconds(prediction.work, rates_)) {
    if (number == 1) continue;  // the loss
    PartSeconds& pass = corner.passes[number == 0 ? 0 : 1];
    pass.stream += part.stream;
    pass.bus += part.bus;
  }
  return corner;
}

double PlanEstimate::along(const PlanChoice& choice, const std::array<double, kinds>& at) const {
  const int64_t counts[] = {std::max(choice.selective, choice.again), choice.again, choice.aside};
  double value = at[0];
  for (size_t kind = 1; kind < at.size(); ++kind)
    value += (at[kind] - at[kind - 1]) * static_cast<double>(counts[kind - 1]) /
             static_cast<double>(layers_);
  return value;
}

int64_t PlanEstimate::held_by_base(const PlanChoice& choice) const {
  const int64_t away = std::max<int64_t>(choice.streamed - LayerStream::most_slots, 0);
  return base_ - away * layer_ - (choice.host_embeddings ? table_ : 0);
}

int64_t PlanEstimate::peak(const PlanChoice& choice) const {
  std::array<double, kinds> peaks;
  for (size_t kind = 0; kind < peaks.size(); ++kind) peaks[kind] = corners_[kind].peak;
  const int64_t run =
      static_cast<int64_t>(along(choice, peaks)) + (choice.host_embeddings ? rows_ : 0);
  return held_by_base(choice) + std::max(load_, run);
}

int64_t PlanEstimate::host_peak(const PlanChoice& choice) const {
  const int64_t base = choice.streamed * layer_ + (choice.host_embeddings ? table_ : 0);
  return base + std::max(host_load_, choice.aside * rows_);
}

int64_t PlanEstimate::most_resident(const PlanChoice& choice) const {
  return held_ / layers_ * (layers_ - choice.streamed);
}

double PlanEstimate::pass_seconds(const PlanChoice& choice, size_t pass, double saved) const {
  const auto layers = static_cast<double>(layers_);
  std::array<PartSeconds, kinds> of_layer;
  for (size_t kind = 0; kind < of_layer.size(); ++kind) {
    const PartSeconds& all = corners_[kind].passes[pass];
    of_layer[kind] = {(all.stream - saved) / layers, all.bus / layers};
  }
  double seconds = 0;
  PartSeconds part;
  const auto end_part = [&] {
    seconds += std::max(part.stream, part.bus);
    part = {};
  };
  int64_t there = pass == 0 ? 0 : LayerStream::most_slots;  // left by the forward pass
  for (int64_t i = 0; i < layers_; ++i) {
    const int64_t l = pass == 0 ? i : layers_ - 1 - i;
    if (LayerStream::is_streamed(l, choice.streamed, layers_) && --there < 0) {
      part.bus += copy_;
      end_part();
    }
    const PartSeconds& own = of_layer[l < choice.aside       ? 3
                                      : l < choice.again     ? 2
                                      : l < choice.selective ? 1
                                                             : 0];
    part.stream += own.stream;
    part.bus += own.bus;
  }
  end_part();
  return seconds;
}

double PlanEstimate::seconds(const PlanChoice& choice, int64_t resident, int64_t paged_out) const {
  double micro = loss_ + (choice.host_embeddings ? rows_seconds_ : 0);
  for (size_t pass = 0; pass < saved_.size(); ++pass)
    micro += pass_seconds(choice, pass, saved_[pass] * static_cast<double>(resident));
  double update = update_;
  if (paged_out > 0)
    update = std::max(
        update, predicted_seconds(one_line("page", 2.0 * static_cast<double>(paged_out)), rates_));
  return StepSeconds{micro, update}.of(micro_batches_);
}

}  // namespace qlab
