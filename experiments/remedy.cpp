#include "experiments/remedy.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "experiments/setup.h"
#include "nn/module_tree.h"

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

double seconds_each(const Remedy& remedy) {
  return remedy.step_seconds / static_cast<double>(remedy.trials);
}

void append(std::vector<Change>& ways, const std::vector<Change>& more) {
  ways.insert(ways.end(), more.begin(), more.end());
}

class RemedySearch {
 public:
  RemedySearch(const ModelSource& model, std::span<const PaperTrial> gang, Device target,
               const MemoryLimits& limits, const Rates& rates)
      : model_(model), gang_(gang), target_(target), limits_(limits), rates_(rates) {}

  std::optional<Remedy> run() {
    std::optional<Remedy> own = within_limits();
    if (limits_.host == MemoryLimits::none || (own && own->caution.empty())) return own;
    beyond_host_ = true;
    const std::optional<Remedy> as_it_is = fit({});
    std::optional<Remedy> roomier = as_it_is ? as_it_is : within_limits();
    if (!own) return as_it_is ? std::nullopt : roomier;
    if (!roomier || !roomier->caution.empty()) return own;
    own->caution += fmt::format("; with the same results it would fit {}{}: {}",
                                as_it_is ? "as it is, on a larger host" : "on a larger host with ",
                                fmt::join(roomier->sets, " "), price_text(*roomier));
    return own;
  }

 private:
  std::optional<Remedy> within_limits() const {
    std::optional<Remedy> best;
    const auto better = [&](const Remedy& a, const Remedy& b) {
      return beyond_host_ ? a.host_peak < b.host_peak : seconds_each(a) < seconds_each(b);
    };
    for (const Change& change : slower_ways()) {
      std::optional<Remedy> own = fit({change});
      if (own && (!best || better(*own, *best))) best = std::move(own);
    }
    if (best) return best;
    const std::vector<Change> ways = smaller_ways();
    const auto with = [&](size_t count) {
      std::vector<Change> all = together();
      for (size_t i = 0; i < count; ++i) {
        // Of several values of one key the last counts.
        std::erase_if(all, [&](const Change& c) { return key_of(c) == key_of(ways[i]); });
        all.push_back(ways[i]);
      }
      return all;
    };
    if (fits(with(0))) return without_needless(with(0));
    if (!fits(with(ways.size()))) return {};
    size_t too_few = 0, enough = ways.size();
    while (enough - too_few > 1) {
      const size_t middle = (too_few + enough) / 2;
      (fits(with(middle)) ? enough : too_few) = middle;
    }
    return without_needless(with(enough));
  }

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
    if (first().lora.present) append(ways, smaller_gangs());
    return ways;
  }
  std::vector<Change> smaller_gangs() const {
    std::vector<Change> ways;
    for (size_t n = gang_.size(); n > 1;)
      ways.push_back({fmt::format("parallel.trials_per_gpu={}", n = (n + 1) / 2)});
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

  /// In order: smaller gangs and micro-batches, of which there are more; then what changes results,
  /// as little as possible. Each adds to those before.
  std::vector<Change> smaller_ways() const {
    std::vector<Change> ways;
    if (first().lora.present) {
      append(ways, smaller_gangs());
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
    int64_t eval_seq_len = first().data.eval_seq_len, seq_len = first().data.seq_len,
            r = first().lora.r;
    const auto halve = [&](const char* key, int64_t& value, int64_t least) {
      while (value > least)
        ways.push_back({fmt::format("{}={}", key, value = std::max(value / 2, least))});
    };
    constexpr std::pair<int64_t, int64_t> floors[] = {{256, 8}, {128, 4}, {64, 2}, {32, 1}, {2, 1}};
    for (const auto& [shortest, narrowest] : floors) {
      if (!gang_.front().eval_lengths.empty()) halve("data.eval_seq_len", eval_seq_len, shortest);
      halve("data.seq_len", seq_len, shortest);
      if (same_adapters()) halve("lora.r", r, narrowest);
    }
    return ways;
  }
  /// Of one rank, which no earlier adapter has given.
  bool same_adapters() const {
    return std::all_of(gang_.begin(), gang_.end(), [&](const PaperTrial& t) {
      return t.config.lora.r == first().lora.r && t.config.lora.adapter.empty();
    });
  }
  /// So that another division of a step's examples has another loss.
  bool weighs_micro_batches() const {
    return std::any_of(gang_.begin(), gang_.end(), [](const PaperTrial& t) {
      return t.config.train.loss_norm == "microbatch";
    });
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
    const MemoryLimits within = limits_for(tried);
    if (beyond_host_ && !fits(changes)) return {};
    try {
      // Beyond the host's end that is what needs the least of it.
      const auto plan = beyond_host_
                            ? std::optional(plan_or_leanest(model_, tried, target_, within, rates_))
                            : fitting_plan(model_, tried, target_, within, rates_);
      if (!plan || plan->peak > within.budget) return {};
      Remedy remedy{{}, plan->peak,      plan->step_seconds, tried.size(), plan->host_peak,
                    {}, caution(changes)};
      if (plan->host_peak > within.host) remedy.host_has = within.host;
      for (const Change& change : changes)
        remedy.sets.insert(remedy.sets.end(), change.begin(), change.end());
      return remedy;
    } catch (const OutOfMemory&) {
      return {};
    }
  }
  bool fits(const std::vector<Change>& changes) const {
    const std::vector<PaperTrial> tried = changed(gang_, changes);
    MemoryLimits within = limits_for(tried);
    if (beyond_host_) within.host = MemoryLimits::none;
    try {
      return some_plan_fits(model_, tried, target_, within, rates_);
    } catch (const OutOfMemory&) {
      return false;
    }
  }
  /// As a run with these settings would have it.
  MemoryLimits limits_for(const std::vector<PaperTrial>& tried) const {
    const int64_t own = device_limit(tried.front().config, target_, limits_.budget);
    return {std::min(own, own_budget()), limits_.host};
  }

  /// What they change of the experiment; nothing where results stay the same.
  std::string caution(const std::vector<Change>& changes) const {
    const auto longest = [&](auto lengths) {
      int64_t most = 0;
      for (const PaperTrial& t : gang_)
        for (const int64_t n : t.*lengths) most = std::max(most, n);
      return with_commas(most);
    };
    std::vector<std::string> parts;
    for (const Change& change : changes) {
      const std::string key = key_of(change);
      const std::string what =
          key == "data.seq_len" ? fmt::format("cuts the data, examples of up to {} tokens",
                                              longest(&PaperTrial::train_lengths))
          : key == "data.eval_seq_len"
              ? fmt::format("cuts the evaluation's data, examples of up to {} tokens",
                            longest(&PaperTrial::eval_lengths))
          : key == "train.batch_size" && weighs_micro_batches()
              ? "weighs examples otherwise, as train.loss_norm: microbatch does"
          : key == "lora.r"                                    ? "trains fewer parameters"
          : key == "quant.type" || key == "quant.double_quant" ? "changes the base"
                                                               : "";
      if (!what.empty()) parts.push_back(change.front() + " " + what);
    }
    if (parts.empty()) return "";
    return fmt::format("another experiment: {}", fmt::join(parts, "; "));
  }

  /// Without each change that is not needed, those that change the most first.
  std::optional<Remedy> without_needless(std::vector<Change> changes) const {
    for (size_t i = changes.size(); i-- > 0 && changes.size() > 1;) {
      std::vector<Change> fewer = changes;
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(i));
      if (fits(fewer)) changes = std::move(fewer);
    }
    return fit(changes);
  }

  const ModelSource& model_;
  std::span<const PaperTrial> gang_;
  Device target_;
  MemoryLimits limits_;
  const Rates& rates_;
  bool beyond_host_ = false;  // search as if the host had no end
};

}  // namespace

std::string price_text(const Remedy& remedy) {
  std::string text = "peak " + format_bytes(remedy.peak);
  if (remedy.host_peak > 0)
    text += fmt::format(", {} on the host", remedy.host_has ? format_minimum(remedy.host_peak)
                                                            : format_bytes(remedy.host_peak));
  if (remedy.host_has)
    text += fmt::format(" ({} more than the {} it has)",
                        format_minimum(remedy.host_peak - *remedy.host_has),
                        format_bytes(*remedy.host_has));
  if (remedy.step_seconds > 0)
    text += fmt::format(", {} a step", duration_text(remedy.step_seconds));
  if (remedy.step_seconds > 0 && remedy.trials > 1)
    text += fmt::format(" of {} trials, {} for each", remedy.trials,
                        duration_text(seconds_each(remedy)));
  return text + (remedy.caution.empty() ? "" : "; " + remedy.caution);
}

std::optional<Remedy> cheapest_fit(const ModelSource& model, std::span<const PaperTrial> gang,
                                   Device target, const MemoryLimits& limits, const Rates& rates) {
  return RemedySearch(model, gang, target, limits, rates).run();
}

std::string way_out(const std::optional<Remedy>& remedy, const MemoryTarget& target, int64_t budget,
                    int64_t peak, int64_t host_peak) {
  if (remedy) {
    std::string sets;
    for (const std::string& s : remedy->sets) sets += " --set " + s;
    const std::string barely = barely_text(target, remedy->peak);
    return fmt::format("would fit with{}: {}{}{}", sets, price_text(*remedy),
                       barely.empty() ? "" : "; ", barely);
  }
  const bool small = peak > target.capacity.value_or(MemoryLimits::none);
  std::string way = !small ? ""
                    : target.device.is_cuda()
                        ? "take a larger GPU or a smaller model"
                        : "take a machine with more memory or a smaller model";
  if (!small && peak > budget)
    way = fmt::format("set train.memory_budget to {} or more", format_minimum(peak));
  if (host_peak > target.host.value_or(MemoryLimits::none))
    way +=
        fmt::format("{}give the host {}", way.empty() ? "" : ", and ", format_minimum(host_peak));
  return "nothing else that qlab can change makes it fit: " + way;
}

}  // namespace qlab
