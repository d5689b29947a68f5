// The one training loop. It runs a gang: trials that share a base, their micro-batches concatenated
// along tokens, each with its own adapter, optimizer, schedule and data. A single run is a gang of
// one, and a trial's numbers are the same whatever its company. One trial can be trained by several
// replicas of the base, which share out the micro-batches of each window (docs/design.md).
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/profile.h"
#include "core/replicas.h"
#include "data/order.h"
#include "experiments/evaluate.h"
#include "experiments/gradient_sum.h"
#include "experiments/planner.h"
#include "experiments/setup.h"
#include "experiments/trial_files.h"
#include "optim/schedule.h"

namespace qlab {

/// A trial in training.
class TrialRun {
 public:
  /// Builds adapter and optimizer, and continues from the directory's state when it has one.
  TrialRun(const Config& config, std::string name, TrialFiles files, Library& library,
           const Llama& model);

  enum class State : uint8_t { running, finished, failed, interrupted };

  const std::string& name() const { return name_; }
  const Config& config() const { return config_; }
  const Adapter& adapter() const { return *adapter_; }
  State state() const { return state_; }
  const std::string& error() const { return error_; }
  int64_t step() const { return progress_.step; }
  int64_t total_steps() const { return total_steps_; }

 private:
  friend class Gang;

  std::vector<Sequence> micro_batch(int64_t step, int64_t micro) const;
  bool evaluation_due() const;
  /// The last tenth, of which the summary gives the mean loss.
  int64_t last_steps() const { return std::max<int64_t>(1, total_steps_ / 10); }
  void record_evaluation(const Evaluation& evaluation);
  /// The optimizer's part of a step, to be taken with that of the gang's others; then the rest.
  AdamW::Step begin_update(const Tensor& gradients);
  void end_update();
  /// Of the step's loss: 1 unless the run computes in fp16.
  float loss_factor() const { return scales_loss_ ? progress_.loss_scale.factor : 1.0f; }
  void note_pages();
  void give_up(const std::string& error);
  void write_status(const char* status, const std::string& error = "");
  void save_adapter_files();

  Config config_;
  std::string name_;
  TrialFiles files_;
  const MemoryLog& memory_;
  const Dataset& train_;
  const Dataset* eval_ = nullptr;
  ExampleOrder order_;
  std::unique_ptr<Adapter> adapter_;
  std::unique_ptr<AdamW> optimizer_;
  Schedule schedule_;
  int64_t total_examples_ = 0, total_steps_ = 0, warmup_steps_ = 0;
  TrialProgress progress_;
  State state_ = State::running;
  std::string error_;
  int64_t evaluated_step_ = -1, gang_size_ = 1, replicas_ = 1;
  std::string gang_;           // the name of its first trial
  double seconds_before_ = 0;  // of memory.jsonl, in earlier processes
  /// Of the gang.
  struct Predicted {
    int64_t load_peak, peak;
    double step_seconds;
    std::string plan;
  };
  std::optional<Predicted> predicted_;
  double first_eval_loss_ = 0, last_eval_loss_ = 0, best_eval_loss_ = 0;
  bool fresh_ = false;  // the adapter is still the identity: B is zero
  bool scales_loss_;

  /// A step of this process: how long it took, this trial's tokens, the gang's model_flops().
  struct Timed {
    double seconds;
    int64_t tokens;
    double flops;
    PageTraffic traffic;
  };
  std::vector<Timed> timed_;

  // Of the step being taken.
  int64_t step_tokens_ = 0;
  double loss_ = 0, lr_ = 0;
  PageTraffic traffic_;
  int64_t paged_out_ = 0;
  int64_t window_tokens_ = 0, window_batches_ = 0;  // the last window of a run may be shorter
};

/// What a run tells while it goes on.
struct TrainProgress {
  std::string name;
  int64_t step, total_steps;
  double loss, tokens_per_s, seconds_left;
  double mfu;  // model FLOP utilization of the last step; 0 where the peak is unknown
  bool last;
  PageTraffic traffic;  // of the last update
};
struct EvaluationProgress {
  std::string name;
  bool base;  // without an adapter: shared by all trials
  size_t done, examples;
  bool last;  // nothing more will be told under this name
};
struct TrainCallbacks {
  std::function<void(const TrainProgress&)> progress;
  std::function<void(const EvaluationProgress&)> evaluating;  // before each batch
  std::function<bool()> stop;  // asked between steps; true saves the state and ends the run
  /// Where set, one step on a GPU is profiled and told of; no graphs are used then.
  std::function<void(const Profile&)> profile;
};

class Gang {
 public:
  /// Trials of one base (equal base_key) and one plan. Throws OutOfMemory when no plan fits
  /// train.memory_budget and the host; with `force` the leanest is taken.
  /// `replicas`: of one trial alone, which all of them train. In round j of a window of
  /// train.grad_accum micro-batches replica r of N takes number j N + r. Rank 0 alone evaluates.
  ///
  /// All have the bits of one that trains alone wherever that one adds a micro-batch's gradient to
  /// an element of the total in one sum, of the rounded gradient: with at most row_unit tokens in a
  /// micro-batch, or 1,024 where a GPU multiplies in fp32; and where the library multiplies by the
  /// adapter's scale (on a GPU in fp16 or fp32, or with lora.r above 32), of a scale that is a
  /// power of two. Otherwise sums are rounded in another order, which is the same for every N
  /// above 1.
  Gang(Library& library, Llama& model, std::vector<TrialRun*> trials, TrainCallbacks callbacks,
       bool force = false, Replicas* replicas = nullptr);
  /// Until every trial has finished, failed or was interrupted. Throws OutOfMemory before the first
  /// step when the gang does not fit.
  void run();

 private:
  std::vector<PaperTrial> on_paper() const;
  GradientSum sum_of_replicas() const;
  RunPlan make_plan(bool force) const;
  void reserve();
  void evaluate_due();
  /// Of all trials, by the speed of the last evaluation.
  double evaluation_seconds_left() const;
  void train_step();
  void begin_window(TrialRun& trial);
  /// Adds to the losses and to the adapters' gradients.
  void run_micro_batch(const std::vector<TrialRun*>& active, int64_t micro);
  void share_window(TrialRun& trial);
  void profile_step();
  void note_policy(int64_t tokens);
  // Of memory.jsonl.
  void begin(const char* phase);
  void look();
  void write_memory();
  std::vector<TrialRun*> running() const;

  Library& library_;
  std::vector<TrialRun*> trials_;
  TrainCallbacks callbacks_;
  Llama& model_;
  Replicas* replicas_;
  std::optional<GradientSum> sum_;  // of replicas
  RunPlan plan_;
  Stepper stepper_;
  int64_t steps_taken_ = 0;
  double evaluation_seconds_per_example_ = 0;
  double flops_ = 0;                // of the step being taken
  int64_t eval_tokens_ = 0;         // of a batch
  std::set<size_t> policies_told_;  // leaner ones, each when it first occurs
  double peak_flops_;               // of the devices, 0 where unknown
};

}  // namespace qlab
