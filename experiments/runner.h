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
  bool force = false;  // although the prediction does not fit
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

}  // namespace qlab
