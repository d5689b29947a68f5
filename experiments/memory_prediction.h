// What a run will need: its own code, from loading to the optimizer, on a meta device, where
// nothing is computed and the allocator keeps accounts. No formula beside the program.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/profile.h"
#include "experiments/config.h"
#include "experiments/cost_model.h"
#include "experiments/gpus.h"
#include "experiments/gradient_sum.h"
#include "experiments/reservation.h"
#include "nn/load.h"

namespace qlab {

class Library;

/// A trial on paper: its configuration, and the lengths of its largest batches and of a usual
/// micro-batch.
struct PaperTrial {
  Config config;
  std::vector<int64_t> train_lengths, eval_lengths, usual_lengths;
  int64_t replicas = 1;  // that train it together; what is predicted is of one
  /// Micro-batches of an optimizer step that one replica computes one after another.
  int64_t rounds() const { return GradientSum::rounds(config.train.grad_accum, replicas); }
};
/// Full batches of data.seq_len, as synthetic data has them.
PaperTrial assumed_trial(const Config& config, Device target);
/// The longest examples of its own data, which is read.
PaperTrial paper_trial(const Config& config, Library& library, Device target, int64_t replicas = 1);

/// The bytes of one stage: load (the base), prepare (adapters and optimizers), reserve (steps and
/// weights held expanded), train, save.
struct MemoryPhase {
  std::string name;
  CategoryBytes held{};     // when it ends
  CategoryBytes at_peak{};  // when it holds the most
  int64_t peak = 0;
};

/// The base by its parts, quantization constants apart.
struct ResidentBytes {
  int64_t linear = 0, constants = 0, embeddings = 0, lm_head = 0, norms = 0, tables = 0;
  int64_t total() const { return linear + constants + embeddings + lm_head + norms + tables; }
};

/// How a run uses memory; no result depends on it.
struct RunPlan {
  /// Of training steps larger than usual.
  std::vector<LeanerPolicy> leaner;
  std::vector<Recompute> layers;  // what each of them computes again
  int64_t expanded_once = 0;      // RecomputePolicy
  int64_t resident = 0;           // bytes for weights held expanded
  bool host_embeddings = false;   // model.embeddings
  int64_t streamed_layers = 0;    // model.streamed_layers
  int64_t paged_out = 0;          // bytes of optimizer states in host memory, predicted
  int64_t peak = 0;               // of the allocator, predicted
  int64_t host_peak = 0;          // of host memory beside a GPU, predicted
  CategoryBytes host_at_peak{};   // what makes it up
  StepSeconds seconds;            // of usual micro-batches, predicted by experiments/cost_model.h
  double step_seconds = 0;        // of a whole optimizer step
};
/// Micro-batches of an optimizer step, counted as if the whole gang took part in each: a trial
/// takes part in its own train.grad_accum alone, and a replica in its rounds.
double micro_batches(std::span<const PaperTrial> gang);
/// What train.recompute (not auto), quant.resident and the model's placement of the first trial ask
/// for, and use_spare_memory().
RunPlan asked_plan(const ModelSource& model, std::span<const PaperTrial> gang, Device target);

struct MemoryPrediction {
  std::vector<MemoryPhase> phases;
  ResidentBytes resident;
  int64_t trainable_params = 0;
  int64_t step_bytes = 0;              // the reservation of a step
  int64_t layer_input_bytes = 0;       // in it, of each layer that is computed again
  std::vector<StepPlan::Moment> step;  // what is live inside of the largest step, in order
  std::string moment;                  // of the peak
  std::vector<LiveTensor> at_peak;     // what lives then, the largest first
  int64_t held_expanded = 0;           // of the base, in the compute dtype (quant.resident)
  std::vector<ProfileLine> work;       // of a usual training micro-batch
  std::vector<ProfileLine> update;     // of the optimizers, after a step's micro-batches
  int64_t streamed_bytes = 0;          // of the base, in host memory
  int64_t host_peak = 0;               // of the host, for a GPU's run: what loading stages
  CategoryBytes host_at_peak{};        // what makes it up
  int64_t paged_out = 0;               // of the optimizers' states, in host memory

  const MemoryPhase& highest() const;
  int64_t peak() const { return highest().peak; }
  int64_t load_peak() const { return phases.front().peak; }
  /// Of what follows on loading: a trial's peak_bytes. A run that continues may have no `steps`
  /// left, an evaluation alone.
  int64_t training_peak(bool steps = true) const;
};

/// What costs time and saves nothing in the largest step is left out of `plan`: the last layer's
/// second run, which begins as soon as its first has ended; and, in as many of the first layers as
/// find room in what backward has given back above them, expanding weights for the second run and
/// for backward. `own`: the prediction of `plan`, afterwards of the result.
RunPlan use_spare_memory(RunPlan plan, MemoryPrediction& own,
                         const std::function<MemoryPrediction(const RunPlan&)>& predict);

/// `gang`: trials that train together on one base. Without lora keys in the first the base alone.
/// `target`: cpu or cuda; `capacity`: what the allocator can have there, which quant.resident: auto
/// fills; without it there is no end. `plan`: what the first trial asks for unless given.
MemoryPrediction predict_memory(const ModelSource& model, std::span<const PaperTrial> gang,
                                Device target, std::optional<int64_t> capacity = {},
                                const std::optional<RunPlan>& plan = {});

StepSeconds predicted_seconds(const MemoryPrediction& prediction, const Rates& rates);

}  // namespace qlab
