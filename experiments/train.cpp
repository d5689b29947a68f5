#include "experiments/train.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "core/ops/add.h"
#include "core/ops/copy.h"
#include "data/file.h"
#include "experiments/memory_text.h"
#include "experiments/reservation.h"
#include "experiments/throughput.h"
#include "nn/adapter_file.h"

namespace qlab {
namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double scalar(const Tensor& t) { return t.to_vector<float>()[0]; }

}  // namespace

TrialRun::TrialRun(const Config& config, std::string name, TrialFiles files, Library& library,
                   const Llama& model)
    : config_(config),
      name_(std::move(name)),
      files_(std::move(files)),
      memory_(library.memory()),
      train_(library.train_set(config)),
      order_(static_cast<int64_t>(train_.examples.size()),
             static_cast<uint64_t>(config.train.data_seed.value_or(config.train.seed)),
             config.data.shuffle),
      schedule_(schedule_from_name(config.optim.schedule)),
      scales_loss_(model.compute_dtype() == DType::f16) {
  config_.quant.compute_dtype = compute_dtype_word(model.compute_dtype());
  const TrainConfig& t = config_.train;
  if (!config_.data.eval.empty()) eval_ = &library.eval_set(config_);
  const int64_t window = t.batch_size * t.grad_accum;
  total_examples_ = examples_to_train(t, train_);
  total_steps_ = (total_examples_ + window - 1) / window;
  warmup_steps_ = config_.optim.warmup_steps.value_or(static_cast<int64_t>(
      std::ceil(config_.optim.warmup_ratio.value_or(0) * static_cast<double>(total_steps_))));

  const LoraSpec spec = lora_spec(config_);
  adapter_ = std::make_unique<Adapter>(spec, model.adapter_shapes(spec),
                                       static_cast<uint64_t>(t.init_seed.value_or(t.seed)),
                                       static_cast<uint64_t>(t.dropout_seed.value_or(t.seed)),
                                       model.adapter_dtype(spec), model.device());
  if (!config_.lora.adapter.empty()) load_adapter(config_.lora.adapter, *adapter_);
  optimizer_ = std::make_unique<AdamW>(adamw_config(config_), adapter_->sizes(), model.device());
  files_.write_config(to_yaml(config_));
  const auto saved = files_.load_state(*adapter_, *optimizer_);
  if (saved) {
    progress_ = *saved;
    files_.log(fmt::format("continues at step {} of {}", progress_.step, total_steps_));
  } else {
    fresh_ = config_.lora.adapter.empty();
    files_.log(fmt::format("starts: {} steps, {} trainable parameters", total_steps_,
                           adapter_->parameter_count()));
  }
  // What was measured after the saved state will be measured again.
  files_.cut_metrics_after(progress_.step);
  seconds_before_ = files_.cut_memory_after(saved ? progress_.step : -1);
  for (const Json& line : files_.read_metrics())
    if (line.contains("eval_loss")) {
      const double loss = line["eval_loss"].get<double>();
      if (evaluated_step_ < 0) first_eval_loss_ = best_eval_loss_ = loss;
      evaluated_step_ = line["step"].get<int64_t>();
      last_eval_loss_ = loss;
      best_eval_loss_ = std::min(best_eval_loss_, loss);
    }
  write_status("running");
}

std::vector<Sequence> TrialRun::micro_batch(int64_t step, int64_t micro) const {
  const int64_t batch = config_.train.batch_size;
  const int64_t first = (step * config_.train.grad_accum + micro) * batch;
  const int64_t last = std::min(first + batch, total_examples_);
  std::vector<Sequence> sequences;
  for (int64_t i = first; i < last; ++i) {
    const Example& e = train_.examples[static_cast<size_t>(order_.at(i))];
    sequences.push_back({e.input_ids, e.labels, i});
  }
  return sequences;
}

bool TrialRun::evaluation_due() const {
  if (eval_ == nullptr || evaluated_step_ == progress_.step) return false;
  const int64_t every = config_.train.eval_every;
  return progress_.step == 0 || progress_.step == total_steps_ ||
         (every > 0 && progress_.step % every == 0);
}

void TrialRun::record_evaluation(const Evaluation& evaluation) {
  if (!std::isfinite(evaluation.loss))
    return give_up(fmt::format("diverged: the eval loss after step {} is {}; try a lower optim.lr",
                               progress_.step, std::abs(evaluation.loss)));
  if (evaluated_step_ < 0) first_eval_loss_ = best_eval_loss_ = evaluation.loss;
  evaluated_step_ = progress_.step;
  last_eval_loss_ = evaluation.loss;
  best_eval_loss_ = std::min(best_eval_loss_, evaluation.loss);
  files_.append_metrics({{"step", progress_.step},
                         {"eval_loss", evaluation.loss},
                         {"tokens", progress_.trained_tokens}});
  write_file_atomically(files_.dir() + "/eval.json",
                        Json{{"step", progress_.step},
                             {"loss", evaluation.loss},
                             {"trained_tokens", evaluation.trained_tokens},
                             {"example_loss", evaluation.example_loss}}
                                .dump() +
                            "\n");
  files_.log(fmt::format("step {}: eval loss {:.6f} over {} tokens", progress_.step,
                         evaluation.loss, evaluation.trained_tokens));
}

AdamW::Step TrialRun::begin_update(const Tensor& gradients) {
  lr_ = config_.optim.lr * schedule_factor(schedule_, progress_.step, warmup_steps_, total_steps_);
  const float factor = loss_factor();
  if (factor != 1) scale_inplace(gradients, 1 / factor);
  return {optimizer_.get(), adapter_->parameters(), gradients, static_cast<float>(lr_)};
}

void TrialRun::end_update() {
  const float factor = loss_factor();
  const double norm = scalar(optimizer_->grad_norm());
  traffic_ = optimizer_->moments().traffic();
  note_pages();
  ++progress_.step;
  progress_.trained_tokens += window_tokens_;
  fresh_ = false;
  const int64_t first_of_last = total_steps_ - last_steps() + 1;
  if (progress_.step == first_of_last) progress_.last_losses = 0;
  if (progress_.step >= first_of_last) progress_.last_losses += loss_;
  // Where the norm is not finite the optimizer has left the adapter as it was before this step.
  const bool finite = std::isfinite(norm);
  const bool skipped = scales_loss_ && !finite && std::isfinite(loss_) && factor > 1;
  if (scales_loss_) progress_.loss_scale.update(finite);
  if (skipped) {
    optimizer_->skip();
    files_.log(fmt::format("step {}: skipped, its gradients overflow in fp16 at a loss scale of {}",
                           progress_.step, factor));
  } else if (!std::isfinite(loss_) || !finite) {
    return give_up(
        fmt::format("diverged at step {}: loss {}, gradient norm {}; try a lower "
                    "optim.lr",
                    progress_.step, std::abs(loss_), std::abs(norm)));
  }
  if (progress_.step % config_.train.log_every == 0 || progress_.step == total_steps_) {
    Json line = {{"step", progress_.step},
                 {"loss", loss_},
                 {"lr", lr_},
                 {"tokens", progress_.trained_tokens}};
    if (!skipped) line["grad_norm"] = norm;
    if (scales_loss_) line["loss_scale"] = factor;
    if (scales_loss_) line["skipped_steps"] = progress_.loss_scale.skipped;
    if (is_paged(config_)) {
      line["moved_bytes"] = traffic_.bytes;
      line["stalled_seconds"] = traffic_.stalled_seconds;
    }
    files_.append_metrics(line);
  }
}

void TrialRun::note_pages() {
  const int64_t now = optimizer_->moments().bytes_on_host();
  if (now == paged_out_) return;
  paged_out_ = now;
  files_.log(fmt::format("step {}: {} of the optimizer's {} of paged states in host memory",
                         progress_.step + 1, format_bytes(now),
                         format_bytes(optimizer_->moments().bytes())));
}

void TrialRun::give_up(const std::string& error) {
  state_ = State::failed;
  error_ = error;
  files_.log(error);
  write_status("failed", error);
}

void TrialRun::write_status(const char* status, const std::string& error) {
  if (!files_.writes()) return;
  const Device device = adapter_->parameters().device();
  const MemoryAccount highest = memory_.highest();
  Json json = {
      {"status", status},
      {"trainable_params", adapter_->parameter_count()},
      {"steps", progress_.step},
      {"total_steps", total_steps_},
      {"trained_tokens", progress_.trained_tokens},
      {"tokens_per_s",
       progress_.seconds > 0 ? static_cast<double>(progress_.tokens) / progress_.seconds : 0.0},
      {"seconds", progress_.seconds},
      {"peak_bytes", highest.peak},
      {"peak_bytes_by_category", category_json(highest.at_peak)},
      {"load_peak_bytes", memory_.load_peak()},
      {"gang", gang_},
      {"gang_size", gang_size_},
      {"replicas", replicas_},
      {"device", device_description(device)}};
  // Not a number where a state of an older version has no sum of them.
  if (progress_.step == total_steps_ && std::isfinite(progress_.last_losses))
    json["train_loss"] = progress_.last_losses / static_cast<double>(last_steps());
  if (scales_loss_) {
    json["loss_scale"] = progress_.loss_scale.factor;
    json["skipped_steps"] = progress_.loss_scale.skipped;
  }
  if (predicted_) {
    json["predicted_peak_bytes"] = predicted_->peak;
    json["predicted_load_peak_bytes"] = predicted_->load_peak;
    json["predicted_step_seconds"] = predicted_->step_seconds;
    json["plan"] = predicted_->plan;
  }
  if (is_paged(config_)) {
    PageTraffic all;
    std::vector<double> stalls;
    for (const Timed& t : timed_) {
      all.bytes += t.traffic.bytes;
      stalls.push_back(t.traffic.stalled_seconds);
      all.stalled_seconds += stalls.back();
    }
    json["paging"] = {{"state_bytes", optimizer_->moments().bytes()},
                      {"host_bytes", optimizer_->moments().bytes_on_host()},
                      {"step_moved_bytes", timed_.empty() ? 0 : timed_.back().traffic.bytes},
                      {"step_stalled_seconds_median", stalls.empty() ? 0.0 : median(stalls)},
                      {"moved_bytes", all.bytes},
                      {"stalled_seconds", all.stalled_seconds}};
  }
  // The first steps plan, choose algorithms and record graphs.
  constexpr size_t warming = 3;
  if (timed_.size() > warming) {
    std::vector<double> seconds, rates, flops;
    for (auto t = timed_.begin() + warming; t != timed_.end(); ++t) {
      seconds.push_back(t->seconds);
      rates.push_back(static_cast<double>(t->tokens) / t->seconds);
      flops.push_back(t->flops / t->seconds);
    }
    json["step_seconds_median"] = median(seconds);
    json["tokens_per_s_median"] = median(rates);
    json["model_flops_per_s_median"] = median(flops);
    if (device.is_cuda())
      if (const double peak = peak_flops(device_description(device)); peak > 0)
        json["mfu"] = median(flops) / peak / static_cast<double>(replicas_);
  }
  if (evaluated_step_ >= 0) {
    json["eval_loss_0"] = first_eval_loss_;
    json["eval_loss"] = last_eval_loss_;
    json["best_eval_loss"] = best_eval_loss_;
  }
  if (!error.empty()) json["error"] = error;
  files_.write_status(json);
}

void TrialRun::save_adapter_files() {
  if (files_.writes()) save_adapter(files_.dir() + "/adapter", *adapter_, config_.model.path);
}

Gang::Gang(Library& library, Llama& model, std::vector<TrialRun*> trials, TrainCallbacks callbacks,
           bool force, Replicas* replicas)
    : library_(library),
      trials_(std::move(trials)),
      callbacks_(std::move(callbacks)),
      model_(model),
      replicas_(replicas),
      sum_(replicas != nullptr ? std::optional(sum_of_replicas()) : std::nullopt),
      plan_(make_plan(force)),
      stepper_(model, RecomputePolicy(plan_.layers, plan_.expanded_once),
               trials_.at(0)->config_.train.graphs && !callbacks_.profile, plan_.leaner),
      peak_flops_(model.device().is_cuda() ? peak_flops(device_description(model.device())) : 0) {
  if (replicas_ != nullptr) peak_flops_ *= replicas_->size();
  for (TrialRun* t : trials_) {
    t->replicas_ = replicas_ != nullptr ? replicas_->size() : 1;
    t->gang_ = trials_.front()->name_;
    t->gang_size_ = static_cast<int64_t>(trials_.size());
  }
}

GradientSum Gang::sum_of_replicas() const {
  QLAB_CHECK(trials_.size() == 1, "{} trials for {} replicas, which train one", trials_.size(),
             replicas_->size());
  const TrialRun& trial = *trials_.front();
  GradientSum sum(*trial.adapter_, replicas_->size(),
                  GradientSum::rounds(trial.config_.train.grad_accum, replicas_->size()));
  // When all have come this far, NCCL takes the memory that it needs, before anything is planned.
  replicas_->gather(0.0);
  sum.add(replicas_, 0, true);
  return sum;
}

std::vector<TrialRun*> Gang::running() const {
  std::vector<TrialRun*> left;
  for (TrialRun* t : trials_)
    if (t->state_ == TrialRun::State::running) left.push_back(t);
  return left;
}

std::vector<PaperTrial> Gang::on_paper() const {
  std::vector<PaperTrial> gang;
  for (const TrialRun* t : running())
    gang.push_back(paper_trial(t->config_, library_, model_.device(),
                               replicas_ != nullptr ? replicas_->size() : 1));
  return gang;
}

RunPlan Gang::make_plan(bool force) const {
  if (running().empty()) return {};
  const Config& first = trials_.at(0)->config_;
  const ModelSource& source = library_.model(first.model.path);
  const Device device = model_.device();
  std::vector<PaperTrial> gang = on_paper();
  for (PaperTrial& t : gang) {  // where they lie was decided before the base was loaded
    t.config.model.embeddings = model_.host_embeddings() != nullptr ? "host" : "device";
    t.config.model.streamed_layers.text = std::to_string(model_.streamed_layers());
  }
  if (first.train.recompute != "auto") return asked_plan(source, gang, device);
  // The allocator of a run with paged states is limited to its budget already.
  const MemoryTarget target = target_here(device, gang.front().replicas);
  const std::optional<int64_t> capacity = target.capacity;
  int64_t budget = memory_budget(first, device, capacity);
  if (is_paged(first) && capacity && first.train.memory_budget.text == "auto") budget = *capacity;
  MemoryLimits limits = budget;
  if (target.host && !force) {
    limits.host =
        *target.host + model_.streamed_bytes();  // what is there already counts in the plan
    for (const TrialRun* t : running()) limits.host += t->optimizer_->moments().bytes_on_host();
  }
  RunPlan plan =
      (force ? plan_or_leanest : plan_run)(source, gang, device, limits, rates_of(device));
  for (TrialRun* t : running())
    t->files_.log(fmt::format("plan: {}; {} at the peak", describe(plan), format_bytes(plan.peak)));
  return plan;
}

void Gang::reserve() {
  const std::vector<TrialRun*> trials = running();
  const std::vector<PaperTrial> papers = on_paper();
  if (trials.empty()) return;
  std::vector<Participant> gang;
  for (size_t i = 0; i < trials.size(); ++i)
    gang.push_back({trials[i]->adapter_.get(), papers[i].train_lengths, papers[i].eval_lengths,
                    papers[i].usual_lengths});
  const Device device = model_.device();
  std::optional<int64_t> capacity;
  const int64_t free = available_memory(device), held = memory_account(device).total;
  if (free < std::numeric_limits<int64_t>::max() - held) capacity = free + held;
  const LargestStep largest = reserve_steps(model_, stepper_, gang, plan_.resident);
  eval_tokens_ = std::min(largest.eval_tokens, evaluation_tokens(device));
  RunPlan plan = plan_;
  plan.host_embeddings = model_.host_embeddings() != nullptr;
  plan.streamed_layers = model_.streamed_layers();
  const MemoryPrediction prediction =
      predict_memory(library_.model(papers[0].config.model.path), papers, device, capacity, plan);
  plan.resident = prediction.held_expanded;
  const double seconds = predicted_seconds(prediction, rates_of(device)).of(micro_batches(papers));
  for (TrialRun* t : trials) {
    // Without steps left it evaluates, and ends before the gang's first step.
    const bool steps = t->progress_.step < t->total_steps_;
    t->predicted_ = {prediction.load_peak(), prediction.training_peak(steps), seconds,
                     describe(plan)};
    t->write_status("running");
  }
}

void Gang::begin(const char* phase) {
  library_.memory().begin(phase);
  write_memory();
}

void Gang::look() {
  library_.memory().look();
  write_memory();
}

void Gang::write_memory() {
  for (MemorySample& sample : library_.memory().take())
    for (TrialRun* t : running()) {
      MemorySample own = sample;
      own.seconds += t->seconds_before_;
      const bool stepping = own.phase == "evaluate" || own.phase == "train" || own.phase == "save";
      if (stepping) own.step = t->progress_.step;
      t->files_.append_memory(own);
    }
}

void Gang::evaluate_due() {
  if (replicas_ != nullptr && !replicas_->leads()) return;
  std::map<const Dataset*, Evaluation>& of_base = library_.base_evaluations();
  for (TrialRun* t : running()) {
    if (!t->evaluation_due()) continue;
    const auto known = of_base.find(t->eval_);
    if (t->fresh_ && known != of_base.end()) {
      t->record_evaluation(known->second);
      continue;
    }
    begin("evaluate");
    const auto tell = [&](size_t done) {
      if (callbacks_.evaluating)
        callbacks_.evaluating({t->name_, t->fresh_, done, t->eval_->examples.size(),
                               done == t->eval_->examples.size() &&
                                   (t->fresh_ || t->progress_.step == t->total_steps_)});
    };
    const auto stop = [&](size_t done) {
      look();
      tell(done);
      return callbacks_.stop && callbacks_.stop();
    };
    const Clock::time_point start = Clock::now();
    const Evaluation result = evaluate(stepper_, *t->eval_, t->adapter_.get(), stop, eval_tokens_);
    if (result.stopped) return;
    evaluation_seconds_per_example_ =
        seconds_since(start) / static_cast<double>(t->eval_->examples.size());
    tell(t->eval_->examples.size());
    if (t->fresh_) of_base[t->eval_] = result;
    t->record_evaluation(result);
  }
}

double Gang::evaluation_seconds_left() const {
  double examples = 0;
  for (const TrialRun* t : running())
    if (t->eval_ != nullptr)
      examples += static_cast<double>(t->eval_->examples.size()) *
                  static_cast<double>(evaluations_left(t->progress_.step, t->total_steps_,
                                                       t->config_.train.eval_every));
  return examples * evaluation_seconds_per_example_;
}

void Gang::begin_window(TrialRun& trial) {
  fill_zero(trial.adapter_->gradients());
  trial.loss_ = 0;
  trial.step_tokens_ = 0;
  trial.window_tokens_ = trial.window_batches_ = 0;
  for (int64_t m = 0; m < trial.config_.train.grad_accum; ++m) {
    const std::vector<Sequence> batch = trial.micro_batch(trial.progress_.step, m);
    for (const Sequence& s : batch) {
      trial.window_tokens_ += trained_tokens(s);
      trial.step_tokens_ += static_cast<int64_t>(s.ids.size());
      flops_ += model_flops(model_.config(), static_cast<int64_t>(s.ids.size()));
    }
    trial.window_batches_ += !batch.empty();
  }
}

void Gang::run_micro_batch(const std::vector<TrialRun*>& active, int64_t micro) {
  BatchBuilder builder;
  std::vector<std::pair<TrialRun*, double>> rows;  // whose rows follow, and their scale
  std::vector<int64_t> counts;
  for (TrialRun* t : active) {
    if (micro >= t->config_.train.grad_accum) continue;
    const std::vector<Sequence> batch = t->micro_batch(t->progress_.step, micro);
    if (batch.empty()) continue;  // the last window of a run may be shorter
    int64_t trained = 0;
    for (const Sequence& s : batch) trained += trained_tokens(s);
    // tokens: one mean over the whole window. microbatch: the mean of the micro-batches' means.
    const double scale = t->config_.train.loss_norm == "tokens"
                             ? 1.0 / static_cast<double>(t->window_tokens_)
                             : 1.0 / static_cast<double>(trained * t->window_batches_);
    builder.add(batch, t->adapter_.get(), true, static_cast<float>(scale) * t->loss_factor());
    rows.emplace_back(t, scale);
    counts.push_back(trained);
  }
  if (rows.empty()) return;
  const std::vector<float> nll = stepper_.run(builder, true);
  note_policy(builder.tokens());
  size_t row = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    double sum = 0;
    for (int64_t j = 0; j < counts[i]; ++j) sum += nll[row++];
    rows[i].first->loss_ += sum * rows[i].second;
  }
}

void Gang::share_window(TrialRun& trial) {
  double loss = 0;
  for (int64_t first = 0; first < trial.window_batches_; first += replicas_->size()) {
    fill_zero(trial.adapter_->gradients());
    trial.loss_ = 0;
    run_micro_batch({&trial}, first + replicas_->rank());
    // Here a rank sees that another has ended, not while it waits for it on the GPU.
    for (const double part : replicas_->gather(trial.loss_)) loss += part;
    sum_->add(replicas_, std::min<int64_t>(replicas_->size(), trial.window_batches_ - first),
              first == 0);
  }
  trial.loss_ = loss;
}

void Gang::train_step() {
  const auto start = Clock::now();
  const std::vector<TrialRun*> active = running();
  flops_ = 0;
  int64_t micro_batches = 0;
  for (TrialRun* t : active) {
    begin_window(*t);
    micro_batches = std::max(micro_batches, t->config_.train.grad_accum);
  }
  if (replicas_ != nullptr)
    share_window(*active.front());
  else
    for (int64_t m = 0; m < micro_batches; ++m) run_micro_batch(active, m);
  std::vector<AdamW::Step> updates;
  for (TrialRun* t : active) {
    t->progress_.tokens += t->step_tokens_;
    updates.push_back(t->begin_update(sum_ ? sum_->total() : t->adapter_->gradients()));
  }
  AdamW::step(updates, stepper_.idle());
  for (TrialRun* t : active) t->adapter_->refresh();
  for (TrialRun* t : active) t->end_update();
  const double seconds = seconds_since(start);
  for (TrialRun* t : active) {
    t->progress_.seconds += seconds;
    t->timed_.push_back({seconds, t->step_tokens_, flops_, t->traffic_});
  }
}

void Gang::note_policy(int64_t tokens) {
  const size_t policy = stepper_.policy_of_last();
  if (policy == 0 || !policies_told_.insert(policy).second) return;
  for (TrialRun* t : running())
    t->files_.log(fmt::format("step {}: a micro-batch of {} tokens: {}", t->progress_.step + 1,
                              tokens, describe(plan_.leaner[policy - 1].layers)));
}

void Gang::profile_step() {
  cuda::start_external_profiler();
  Profiler profiler;
  train_step();
  const Profile profile = profiler.finish();
  cuda::stop_external_profiler();
  callbacks_.profile(profile);
}

void Gang::run() {
  begin("reserve");
  reserve();
  while (true) {
    evaluate_due();
    const bool stop = callbacks_.stop && callbacks_.stop();
    const auto done = [](const TrialRun* t) {
      return t->progress_.step >= t->total_steps_ && !t->evaluation_due();
    };
    for (TrialRun* t : running()) {
      const int64_t every = t->config_.train.save_every;
      const bool saves =
          done(t) || stop || (every > 0 && t->progress_.step % every == 0 && t->progress_.step > 0);
      if (saves) {
        begin("save");
        t->files_.save_state(t->progress_, *t->adapter_, *t->optimizer_);
      }
      if (done(t)) t->save_adapter_files();
    }
    // The peak of each has what saving the others took, as predicted.
    if (stop || std::ranges::any_of(running(), done)) {
      library_.memory().look_closely();
      write_memory();
    }
    for (TrialRun* t : running()) {
      if (done(t)) {
        t->state_ = TrialRun::State::finished;
        t->files_.log("finished");
        t->write_status("finished");
      } else if (stop) {
        t->state_ = TrialRun::State::interrupted;
        t->files_.log(fmt::format("interrupted at step {}; state saved", t->progress_.step));
        t->write_status("interrupted");
      }
    }
    // Rank 0 has evaluated and been told to stop, and knows alone.
    const bool goes_on = !running().empty();
    if (!(replicas_ != nullptr ? replicas_->gather(goes_on)[0] > 0 : goes_on)) return;
    begin("train");
    constexpr int64_t profiled = 3;  // after planning and the choice of algorithms
    const bool last = std::ranges::all_of(
        running(), [](const TrialRun* t) { return t->progress_.step + 1 >= t->total_steps_; });
    if (callbacks_.profile && model_.device().is_cuda() &&
        (steps_taken_ == profiled || (steps_taken_ < profiled && last)))
      profile_step();
    else
      train_step();
    ++steps_taken_;
    look();
    for (TrialRun* t : trials_) {
      if (t->state_ != TrialRun::State::running || !callbacks_.progress) continue;
      const double per_step = t->progress_.seconds / static_cast<double>(t->progress_.step);
      callbacks_.progress({t->name_, t->progress_.step, t->total_steps_, t->loss_,
                           static_cast<double>(t->progress_.tokens) / t->progress_.seconds,
                           per_step * static_cast<double>(t->total_steps_ - t->progress_.step) +
                               evaluation_seconds_left(),
                           peak_flops_ > 0 && !t->timed_.empty()
                               ? t->timed_.back().flops / t->timed_.back().seconds / peak_flops_
                               : 0,
                           t->progress_.step == t->total_steps_, t->traffic_});
    }
  }
}

}  // namespace qlab
