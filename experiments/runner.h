// A sweep from its file to its report: plan, trials in gangs, resume, summary.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "experiments/sweep.h"
#include "experiments/train.h"

namespace qlab {

struct RunnerOptions {
  std::string out;  // results directory; "" for runs/<sweep name>
  Device device;
  std::string shard;  // "I/N" or ""
  bool dry_run = false;
  bool force = false;          // although the prediction does not fit
  int64_t replicas = 1;        // of the base, one trial's; a dry run has only their number
  Replicas* others = nullptr;  // the run's, where there are several
};

struct RunnerResult {
  std::string dir;
  int finished = 0, failed = 0;
  int elsewhere = 0;  // which another process is running
  bool interrupted = false;
};

/// Checks everything a user can have got wrong before anything is written or trained, then runs
/// what is not finished yet. `print` takes whole lines.
RunnerResult run_sweep(const Sweep& sweep, const RunnerOptions& options,
                       const std::function<void(const std::string&)>& print,
                       TrainCallbacks callbacks);

/// On a rank above 0: its part of the trial that rank 0 trains, whose directory rank 0 tells when
/// it has taken it.
void assist(Replicas& replicas, const Config& config, Device device, bool force);

}  // namespace qlab
