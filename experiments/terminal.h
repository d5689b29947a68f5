// What a person sees while something runs: one live line per run on a terminal, plain lines
// otherwise; and Ctrl-C, which asks the run to save its state and stop.
#pragma once
#include <chrono>
#include <string>

#include "experiments/train.h"

namespace qlab {

class Terminal {
 public:
  Terminal();
  /// A whole line, clear of the live one.
  void print(const std::string& line);
  void progress(const TrainProgress& progress);
  TrainCallbacks callbacks();

 private:
  bool live_;          // stdout is a terminal
  bool open_ = false;  // a live line stands unfinished
  std::string current_;
  std::chrono::steady_clock::time_point last_;
};

/// From now on Ctrl-C and SIGTERM only set a flag; a second one ends the program at once.
void catch_interrupts();
bool interrupted();

}  // namespace qlab
