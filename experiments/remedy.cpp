#include "experiments/remedy.h"

#include <algorithm>

#include "experiments/setup.h"

namespace qlab {
namespace {

/// One change: its settings, "key=value", made together.
using Change = std::vector<std::string>;

int64_t shortened(int64_t length, const std::string& value) {
  return std::min(length, static_cast<int64_t>(std::stoll(value)));
}

/// So many of them, evenly spread.
std::vector<int64_t> spread(const std::vector<int64_t>& lengths, size_t count) {
  if (count >= lengths.size()) return lengths;
  std::vector<int64_t> some;
  for (size_t i = 0; i < count; ++i)
    some.push_back(lengths[(2 * i + 1) * lengths.size() / (2 * count)]);
  return some;
}

/// The gang with changes made to every trial, on paper.
std::vector<PaperTrial> changed(std::span<const PaperTrial> gang,
                                const std::vector<Change>& changes) {
  std::vector<PaperTrial> out(gang.begin(), gang.end());
  for (const Change& change : changes)
    for (const std::string& set : change) {
      const size_t equals = set.find('=');
      const std::string key = set.substr(0, equals), value = set.substr(equals + 1);
      if (key == "parallel.trials_per_gpu")
        out.resize(std::min(out.size(), static_cast<size_t>(std::stoll(value))));
      for (PaperTrial& t : out) {
        set_key(t.config, key, YAML::Load(value), "");
        if (key == "train.batch_size") {
          const auto count = static_cast<size_t>(std::stoll(value));
          t.train_lengths.resize(std::min(t.train_lengths.size(), count));  // longest first
          t.usual_lengths = spread(t.usual_lengths, count);
        }
        if (key == "data.seq_len")
          for (std::vector<int64_t>* lengths : {&t.train_lengths, &t.usual_lengths})
            for (int64_t& n : *lengths) n = shortened(n, value);
        if (key == "data.eval_seq_len")
          for (int64_t& n : t.eval_lengths) n = shortened(n, value);
      }
    }
  return out;
}

class RemedySearch {
 public:
  RemedySearch(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
               const MemoryLimits& limits, const Rates& rates)
      : model_(model), gang_(gang), target_(target), limits_(limits), rates_(rates) {}

  std::optional<Remedy> run() {
    const std::vector<Change> slower = slower_ways();
    std::optional<Remedy> best;
    for (const Change& change : slower) {
      const std::optional<Remedy> own = fit({change});
      if (own && (!best || own->step_seconds < best->step_seconds)) best = own;
    }
    if (best) return best;
    std::vector<Change> all = together();
    if (fit(all)) return without_needless(all);
    for (const Change& change : smaller_ways()) {
      // Of several values of one key the last counts.
      std::erase_if(all, [&](const Change& c) { return key_of(c) == key_of(change); });
      all.push_back(change);
      if (fit(all)) return without_needless(all);
    }
    return {};
  }

 private:
  static std::string key_of(const Change& change) {
    return change.front().substr(0, change.front().find('='));
  }
  const Config& first() const { return gang_.front().config; }
  /// What the run was told to take, whatever else is changed.
  int64_t own_budget() const {
    const bool told = first().train.memory_budget.text != "auto";
    return told ? device_limit(first(), target_, limits_.budget) : MemoryLimits::none;
  }
  bool can_move_embeddings() const {
    return target_.is_cuda() && !model_.config.tie_word_embeddings;
  }
  bool can_stream() const { return target_.is_cuda() && first().quant.type == "nf4"; }
  bool can_page() const {
    const std::string& type = first().optim.type;
    return first().lora.present && target_.is_cuda() && !is_paged(first()) &&
           std::all_of(gang_.begin(), gang_.end(),
                       [&](const PaperTrial& t) { return t.config.optim.type == type; });
  }

  /// Single changes that cost speed alone.
  std::vector<Change> slower_ways() const {
    std::vector<Change> ways;
    if (first().quant.resident.text != "0") ways.push_back({"quant.resident=0"});
    if (first().lora.present)
      for (const char* recompute : {"auto", "selective", "full", "offload"})
        if (first().train.recompute != recompute &&
            (target_.is_cuda() || std::string_view(recompute) != "offload"))
          ways.push_back({fmt::format("train.recompute={}", recompute)});
    if (can_move_embeddings() && first().model.embeddings != "host")
      ways.push_back({"model.embeddings=host"});
    if (can_page()) ways.push_back({"optim.type=paged_" + first().optim.type});
    if (can_stream()) ways.push_back(streaming());
    return ways;
  }

  /// As few layers as fit; all of them where even those are too many.
  Change streaming() const {
    const int64_t layers = model_.config.num_hidden_layers;
    const auto with = [](int64_t n) { return Change{fmt::format("model.streamed_layers={}", n)}; };
    int64_t fewest = layers, too_few = 0;
    if (!fit({with(layers)})) return with(layers);
    while (fewest - too_few > 1) {
      const int64_t middle = (fewest + too_few) / 2;
      (fit({with(middle)}) ? fewest : too_few) = middle;
    }
    return with(fewest);
  }

  /// All that costs speed alone, left to the planner where it plans.
  std::vector<Change> together() const {
    std::vector<Change> all;
    const bool plans = first().lora.present;
    if (plans && first().train.recompute != "auto") all.push_back({"train.recompute=auto"});
    if (first().quant.resident.text != "0") all.push_back({"quant.resident=0"});
    if (can_move_embeddings() && first().model.embeddings != "host" &&
        (!plans || first().model.embeddings != "auto"))
      all.push_back({"model.embeddings=host"});
    if (can_stream() && (!plans || first().model.streamed_layers.text != "auto"))
      all.push_back({plans ? "model.streamed_layers=auto" : "model.streamed_layers=all"});
    if (can_page()) all.push_back({"optim.type=paged_" + first().optim.type});
    return all;
  }

  /// In order: smaller gangs and micro-batches, of which there are more; then what changes numbers.
  std::vector<Change> smaller_ways() const {
    std::vector<Change> ways;
    if (first().lora.present) {
      for (size_t n = gang_.size(); n > 1;)
        ways.push_back({fmt::format("parallel.trials_per_gpu={}", n = (n + 1) / 2)});
      if (same_batches())
        for (int64_t batch = first().train.batch_size, accum = first().train.grad_accum;
             batch > 1;) {
          int64_t factor = 2;
          while (batch % factor != 0) ++factor;
          batch /= factor, accum *= factor;
          ways.push_back({fmt::format("train.batch_size={}", batch),
                          fmt::format("train.grad_accum={}", accum)});
        }
    }
    if (first().quant.type != "nf4") ways.push_back({"quant.type=nf4"});
    if (!first().quant.double_quant) ways.push_back({"quant.double_quant=true"});
    if (target_.is_cuda() && first().quant.type != "nf4")
      ways.push_back(
          {first().lora.present ? "model.streamed_layers=auto" : "model.streamed_layers=all"});
    if (!first().lora.present) return ways;
    constexpr int64_t shortest = 256;
    if (!gang_.front().eval_lengths.empty())
      for (int64_t n = first().data.eval_seq_len; n > shortest;)
        ways.push_back({fmt::format("data.eval_seq_len={}", n /= 2)});
    for (int64_t n = first().data.seq_len; n > shortest;)
      ways.push_back({fmt::format("data.seq_len={}", n /= 2)});
    return ways;
  }
  /// No one setting describes a division of different batches.
  bool same_batches() const {
    const TrainConfig& own = first().train;
    return std::all_of(gang_.begin(), gang_.end(), [&](const PaperTrial& t) {
      return t.config.train.batch_size == own.batch_size &&
             t.config.train.grad_accum == own.grad_accum;
    });
  }

  std::optional<Remedy> fit(const std::vector<Change>& changes) const {
    const std::vector<PaperTrial> tried = changed(gang_, changes);
    const Config& c = tried.front().config;
    // As a run with these settings would have it.
    const int64_t budget = std::min(device_limit(c, target_, limits_.budget), own_budget());
    try {
      const auto plan = fitting_plan(model_, tried, target_, {budget, limits_.host}, rates_);
      if (!plan) return {};
      Remedy remedy{{}, plan->peak, plan->step_seconds, plan->host_peak};
      for (const Change& change : changes)
        remedy.sets.insert(remedy.sets.end(), change.begin(), change.end());
      return remedy;
    } catch (const OutOfMemory&) {
      return {};
    }
  }

  /// Without each change that is not needed, those that change the most first.
  std::optional<Remedy> without_needless(std::vector<Change> changes) const {
    for (size_t i = changes.size(); i-- > 0 && changes.size() > 1;) {
      std::vector<Change> fewer = changes;
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(i));
      if (fit(fewer)) changes = std::move(fewer);
    }
    return fit(changes);
  }

  const ModelSource& model_;
  std::span<const PaperTrial> gang_;
  Device target_;
  MemoryLimits limits_;
  const Rates& rates_;
};

}  // namespace

std::string price_text(const Remedy& remedy) {
  std::string text = "peak " + format_bytes(remedy.peak);
  if (remedy.host_peak > 0) text += fmt::format(", {} on the host", format_bytes(remedy.host_peak));
  if (remedy.step_seconds > 0)
    text += fmt::format(", {} a step", duration_text(remedy.step_seconds));
  return text;
}

std::optional<Remedy> cheapest_fit(const ModelSource& model, std::span<const PaperTrial> gang,
                                   Device target, const MemoryLimits& limits, const Rates& rates) {
  return RemedySearch(model, gang, target, limits, rates).run();
}

}  // namespace qlab
