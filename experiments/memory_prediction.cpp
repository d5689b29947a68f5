#include "experiments/memory_prediction.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>

#include "core/ops/copy.h"
#include "experiments/setup.h"
#include "nn/adapter_file.h"

namespace qlab {
namespace {

/// Accounts of a meta device from now on, whatever it held before.
class Accounts {
 public:
  explicit Accounts(Device meta) : meta_(meta), before_(memory_account(meta).current) {
    reset_peak(meta);
  }
  MemoryPhase phase(const std::string& name) const {
    const MemoryAccount account = memory_account(meta_);
    MemoryPhase phase{name, account.current, account.at_peak, 0};
    for (size_t i = 0; i < before_.size(); ++i) {
      phase.held[i] -= before_[i];
      phase.at_peak[i] -= before_[i];
    }
    phase.peak = sum(phase.at_peak);
    reset_peak(meta_);
    return phase;
  }

 private:
  Device meta_;
  CategoryBytes before_;
};

/// The limit of a meta device for as long as a prediction lasts.
class Capacity {
 public:
  Capacity(Device meta, std::optional<int64_t> bytes) : meta_(meta) {
    if (bytes) limit_memory(meta, *bytes);
  }
  ~Capacity() { limit_memory(meta_, std::numeric_limits<int64_t>::max()); }

 private:
  Device meta_;
};

ResidentBytes parts_of(const std::vector<LiveTensor>& tensors) {
  ResidentBytes bytes;
  for (const LiveTensor& t : tensors) {
    const bool base = t.category == Category::weights || t.category == Category::constants;
    if (!base || t.name == "held expanded") continue;
    int64_t& part = t.name == "rotary_emb"                             ? bytes.tables
                    : t.category == Category::constants                ? bytes.constants
                    : t.name.find("embed_tokens") != std::string::npos ? bytes.embeddings
                    : t.name.find("lm_head") != std::string::npos      ? bytes.lm_head
                    : t.name.find("norm.weight") != std::string::npos ||
                            t.name.find("layernorm") != std::string::npos
                        ? bytes.norms
                        : bytes.linear;
    part += t.bytes;
  }
  return bytes;
}

struct PaperRun {
  std::unique_ptr<Adapter> adapter;
  std::unique_ptr<AdamW> optimizer;
  std::optional<GradientSum> sum;
};

}  // namespace

PaperTrial assumed_trial(const Config& config, Device target) {
  PaperTrial trial;
  trial.config = config;
  trial.train_lengths.assign(static_cast<size_t>(config.train.batch_size), config.data.seq_len);
  trial.usual_lengths = trial.train_lengths;
  if (!config.data.eval.empty()) {
    const int64_t length = config.data.eval_seq_len;
    int64_t count = std::max<int64_t>(evaluation_tokens(target) / length, 1);
    if (config.data.eval == "synthetic") count = std::min(count, synthetic_eval.examples);
    trial.eval_lengths.assign(static_cast<size_t>(count), length);
  }
  return trial;
}

double micro_batches(std::span<const PaperTrial> gang) {
  int64_t tokens = 0, of_a_step = 0;
  for (const PaperTrial& t : gang) {
    const int64_t own = std::accumulate(t.usual_lengths.begin(), t.usual_lengths.end(), int64_t{0});
    tokens += own;
    of_a_step += own * t.rounds();
  }
  return static_cast<double>(of_a_step) / static_cast<double>(tokens);
}

StepSeconds predicted_seconds(const MemoryPrediction& prediction, const Rates& rates) {
  return {predicted_seconds(prediction.work, rates), predicted_seconds(prediction.update, rates)};
}

RunPlan asked_plan(const ModelSource& model, std::span<const PaperTrial> gang, Device target) {
  const Config& config = gang.front().config;
  RunPlan plan;
  plan.host_embeddings = config.model.embeddings == "host";
  plan.streamed_layers = streamed_layers(config, model.config.num_hidden_layers);
  plan.layers.assign(static_cast<size_t>(model.config.num_hidden_layers), recompute_of(config));
  const std::string& resident = config.quant.resident.text;
  plan.resident =
      resident == "auto" ? std::numeric_limits<int64_t>::max() : parse_bytes(resident).value_or(0);
  if (!config.lora.present || recompute_of(config) == Recompute::none) return plan;
  const auto predict = [&](RunPlan p) {
    p.resident = 0;
    return predict_memory(model, gang, target, {}, p);
  };
  MemoryPrediction own = predict(plan);
  return use_spare_memory(std::move(plan), own, predict);
}

RunPlan use_spare_memory(RunPlan plan, MemoryPrediction& own,
                         const std::function<MemoryPrediction(const RunPlan&)>& predict) {
  const auto better = [&](const RunPlan& other) {
    MemoryPrediction prediction = predict(other);
    if (prediction.step_bytes > own.step_bytes) return false;
    plan = other, own = std::move(prediction);
    return true;
  };
  if (plan.layers.back() != Recompute::none) {
    RunPlan kept = plan;
    kept.layers.back() = Recompute::none;
    better(kept);
  }
  RunPlan once = plan;
  const auto again = [](Recompute layer) { return layer >= Recompute::full; };
  once.expanded_once =
      std::find_if_not(plan.layers.begin(), plan.layers.end(), again) - plan.layers.begin();
  if (once.expanded_once == 0) return plan;
  MemoryPrediction all = predict(once);
  const auto bytes = [](const MemoryPrediction& p) {
    return std::accumulate(p.work.begin(), p.work.end(), 0.0,
                           [](double sum, const ProfileLine& l) { return sum + l.work.bytes; });
  };
  if (bytes(all) >= bytes(own)) return plan;  // nothing is expanded
  const int64_t more = all.step_bytes - own.step_bytes;
  if (more <= 0) {
    own = std::move(all);
    return once;
  }
  // Of which each layer below the topmost finds an input's bytes more.
  once.expanded_once -=
      (more + own.layer_input_bytes - 1) / std::max<int64_t>(own.layer_input_bytes, 1);
  if (once.expanded_once > 0) better(once);
  return plan;
}

PaperTrial paper_trial(const Config& config, Library& library, Device target, int64_t replicas) {
  const Dataset& train = library.train_set(config);
  const int64_t batch = std::min(config.train.batch_size, examples_to_train(config.train, train));
  PaperTrial trial{
      config, longest_examples(train, batch), {}, usual_examples(train, batch), replicas};
  if (!config.data.eval.empty())
    trial.eval_lengths = largest_evaluation(library.eval_set(config), evaluation_tokens(target));
  return trial;
}

const MemoryPhase& MemoryPrediction::highest() const {
  return *std::max_element(phases.begin(), phases.end(),
                           [](const auto& a, const auto& b) { return a.peak < b.peak; });
}

int64_t MemoryPrediction::training_peak(bool steps) const {
  int64_t peak = 0;
  for (size_t i = 1; i < phases.size(); ++i)
    if (steps || phases[i].name != "train") peak = std::max(peak, phases[i].peak);
  return peak;
}

MemoryPrediction predict_memory(const ModelSource& model, std::span<const PaperTrial> gang,
                                Device target, std::optional<int64_t> capacity,
                                const std::optional<RunPlan>& given) {
  const RunPlan plan = given ? *given : asked_plan(model, gang, target);
  const Device meta = target.meta(), host = Device::cpu().meta();
  const Config& first = gang.front().config;
  const Capacity limit(meta, capacity);
  MemoryPrediction out;
  const Accounts host_accounts(host);  // on a CPU the same as the device's
  const Accounts accounts(meta);
  const std::unique_ptr<Llama> llama =
      load_llama(model, weight_spec(first), compute_dtype(first, meta), meta, plan.host_embeddings,
                 plan.streamed_layers);
  out.streamed_bytes = llama->streamed_bytes();
  out.phases.push_back(accounts.phase("load"));
  const auto note_host = [&](const char* name, int64_t pages) {
    CategoryBytes bytes = host_accounts.phase(name).at_peak;
    bytes[static_cast<size_t>(Category::optimizer)] += pages;
    if (sum(bytes) > out.host_peak) out.host_peak = sum(bytes), out.host_at_peak = bytes;
  };
  if (target.is_cuda()) note_host("load", 0);
  LargestStep step;
  std::vector<PaperRun> runs;
  std::unique_ptr<Stepper> stepper;
  if (first.lora.present) {
    std::vector<Participant> participants;
    for (const PaperTrial& t : gang) {
      const LoraSpec spec = lora_spec(t.config);
      PaperRun& run = runs.emplace_back();
      run.adapter = std::make_unique<Adapter>(spec, llama->adapter_shapes(spec), 0, 0,
                                              llama->adapter_dtype(spec), meta);
      const int64_t count = run.adapter->parameter_count();
      run.optimizer = std::make_unique<AdamW>(adamw_config(t.config), run.adapter->sizes(), meta);
      out.trainable_params += count;
      if (t.replicas > 1) run.sum.emplace(*run.adapter, t.replicas, t.rounds());
      participants.push_back({run.adapter.get(), t.train_lengths, t.eval_lengths, t.usual_lengths});
    }
    out.phases.push_back(accounts.phase("prepare"));
    stepper = std::make_unique<Stepper>(*llama, RecomputePolicy(plan.layers, plan.expanded_once),
                                        false, plan.leaner);
    step = reserve_steps(*llama, *stepper, participants, plan.resident);
    out.held_expanded = llama->resident_bytes();
    out.phases.push_back(accounts.phase("reserve"));
    const bool planned = out.held_expanded == 0 && usual_tokens(gang) == largest_tokens(gang);
    out.work = planned ? std::move(step.work) : count_usual_step(*stepper, participants);
    const WorkCounter counter;
    std::vector<AdamW::Step> updates;
    for (size_t i = 0; i < runs.size(); ++i) {
      PaperRun& run = runs[i];
      fill_zero(run.adapter->gradients());
      for (int64_t round = 0; run.sum && round < gang[i].rounds(); ++round)
        run.sum->add(nullptr, gang[i].replicas, round == 0);
      updates.push_back({run.optimizer.get(), run.adapter->parameters(),
                         run.sum ? run.sum->total() : run.adapter->gradients(), 0.0f});
    }
    AdamW::step(updates, stepper->idle());
    for (const PaperRun& run : runs) {
      run.adapter->refresh();
      out.paged_out += run.optimizer->moments().bytes_on_host();
    }
    out.update = counter.lines();
    out.phases.push_back(accounts.phase("train"));
    for (const PaperRun& run : runs) adapter_tensors(*run.adapter);
    out.phases.push_back(accounts.phase("save"));
    if (target.is_cuda()) note_host("run", out.paged_out);
  }
  out.step_bytes = step.plan.bytes;
  for (const PaperTrial& t : gang)
    for (const int64_t length : t.train_lengths)
      out.layer_input_bytes += length * model.config.hidden_size *
                               static_cast<int64_t>(size_of(compute_dtype(first, meta)));
  out.step = step.plan.course();
  out.at_peak = live_tensors(meta);
  out.resident = parts_of(out.at_peak);
  const bool loading = &out.highest() == &out.phases.front();
  out.moment = loading ? "loading the base"
                       : (step.train ? "training step: " : "evaluation: ") + step.plan.peak_place();
  if (!loading)
    for (LiveTensor& t : step.plan.live_at_peak()) out.at_peak.push_back(std::move(t));
  std::stable_sort(out.at_peak.begin(), out.at_peak.end(),
                   [](const LiveTensor& a, const LiveTensor& b) { return a.bytes > b.bytes; });
  return out;
}

}  // namespace qlab
