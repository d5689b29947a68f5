// One trial's directory: config.yaml, metrics.jsonl, memory.jsonl, log.txt, status.json, state/,
// adapter/. Every file is replaced atomically or only appended to, so that a trial killed at any
// instant continues from its last state with the same numbers.
#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "core/error.h"
#include "data/file.h"
#include "experiments/memory_log.h"
#include "nn/lora.h"
#include "optim/loss_scale.h"
#include "optim/optimizer.h"

namespace qlab {

/// Where a trial stands; what is saved beside its tensors.
struct TrialProgress {
  int64_t step = 0;            // optimizer steps done
  int64_t trained_tokens = 0;  // so far
  int64_t tokens = 0;          // passed through the model in training, prompts included
  double seconds = 0;          // spent in training steps
  LossScale loss_scale;        // of a run in fp16
  double last_losses = 0;      // summed over the last tenth of the steps, as far as they are done
};

/// Another process works in the trial's directory.
class Busy : public Error {
 public:
  using Error::Error;
};

class TrialFiles {
 public:
  /// Takes the directory for this process, or throws Busy; removes what killed ones left
  /// unfinished.
  explicit TrialFiles(const std::string& dir);
  /// Of a directory that another process has taken: reads from it, and writes nothing.
  static TrialFiles reading(const std::string& dir);
  bool writes() const { return lock_.has_value(); }

  const std::string& dir() const { return dir_; }
  void write_config(const std::string& yaml);

  /// status.json's "status": finished, failed, interrupted, running; "" when there is none.
  static std::string read_status(const std::string& dir);
  void write_status(const nlohmann::json& status);

  void append_metrics(const nlohmann::json& line);
  /// Lines of metrics.jsonl; half a line that a killed process left is passed over.
  std::vector<nlohmann::json> read_metrics() const;
  void cut_metrics_after(int64_t step);

  void append_memory(const MemorySample& sample);
  /// Cuts memory.jsonl where it goes beyond the step, all of it for -1; the time of what is left.
  double cut_memory_after(int64_t step);

  void log(const std::string& text);

  void save_state(const TrialProgress& progress, const Adapter& adapter, const AdamW& optimizer);
  /// nullopt when there is none; Error with the remedy when it is damaged, or metrics.jsonl has not
  /// all that was written before it.
  std::optional<TrialProgress> load_state(const Adapter& adapter, AdamW& optimizer);

 private:
  TrialFiles() = default;
  TrialProgress read_state(const std::string& file, const Adapter& adapter, AdamW& optimizer) const;
  void check_metrics(int64_t step, int64_t saved_lines) const;
  std::string path(const char* name) const { return dir_ + "/" + name; }
  std::string dir_;
  std::optional<FileLock> lock_;
  int64_t metrics_lines_ = 0;
};

}  // namespace qlab
