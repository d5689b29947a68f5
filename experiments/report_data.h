// What a results directory holds, read leniently: a trial may be missing, half-written or running.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "experiments/memory_log.h"

namespace qlab {

struct LossPoint {
  double step, tokens, loss;
};

struct TrialResult {
  std::string name, directory, error;
  std::string status;  // as in status.json; without one "pending", "unreadable" of a damaged one
  std::string seed;
  std::string gang_name;
  std::vector<std::string> swept;  // as Results::keys
  // Of a running trial what is known so far: status.json is from its beginning.
  std::optional<double> trainable_params, steps, total_steps, trained_tokens, train_loss, eval_loss,
      eval_loss_0, best_eval_loss, tokens_per_s, peak_bytes, gang_size, gang, predicted_peak_bytes,
      moved_bytes, stalled_seconds;
  std::vector<LossPoint> train, eval;
  MemoryLines memory;
  bool resumed = false;               // the peaks above are of its last process
  std::optional<double> peak_before;  // of those before it
};
/// With how far it is, where it has not come to its end.
std::string status_text(const TrialResult& trial);

/// Trials that differ in their seed alone.
struct SeedGroup {
  std::vector<std::string> swept;
  std::vector<const TrialResult*> trials;
};

struct Results {
  std::string name, method, metric, goal;
  std::vector<std::string> keys;     // swept
  std::vector<std::string> derived;  // of these, those that follow others
  std::map<std::string, std::string> environment;
  std::vector<std::pair<std::string, std::string>> shared;  // settings that no trial changes
  std::vector<TrialResult> trials;                          // in the order of the plan
  bool several_seeds = false;
  std::vector<std::string> notes;
};

/// Error when there is no plan.yaml.
Results read_results(const std::string& dir);

/// The measured columns of the summary, in order; seed and status are texts beside them.
struct Column {
  const char* name;
  std::optional<double> TrialResult::*value;
};
const std::vector<Column>& summary_columns();
/// With the numbers of gangs behind them, where trials trained together, and those of paged
/// optimizers, where a trial has one: the bytes that a step moves over the bus, and the median of
/// the seconds that its update waits for them.
std::vector<Column> shown_columns(const Results& results);
std::optional<double> metric_of(const Results& results, const TrialResult& trial);

/// Best metric first, trials without one last.
std::vector<const TrialResult*> ranked(const Results& results);
/// By their mean metric, best first.
std::vector<SeedGroup> seed_groups(const Results& results);

/// Mean and sample deviation of what is there; deviation needs two.
struct Spread {
  int n = 0;
  std::optional<double> mean, deviation;
};
Spread spread(const SeedGroup& group, std::optional<double> TrialResult::*value);

}  // namespace qlab
