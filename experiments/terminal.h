// What a person sees while something runs: one live line per run on a terminal (a gang has
// several), plain lines now and then otherwise; and Ctrl-C, which asks the run to save its state
// and stop.
#pragma once
#include <chrono>
#include <string>
#include <vector>

#include "experiments/train.h"

namespace qlab {

class Terminal {
 public:
  Terminal();
  /// A whole line, clear of the live one.
  void print(const std::string& line);
  void progress(const TrainProgress& progress);
  void evaluating(const EvaluationProgress& progress);
  TrainCallbacks callbacks();

 private:
  enum class Kind : uint8_t { live, lasting, gone };
  /// The run's line is now `text`, the last one where `kind` is not live: it stays on the screen or
  /// leaves it. Without a terminal a line now and then, and the lasting one.
  void show(const std::string& name, const std::string& text, Kind kind);
  void draw(const std::string& above);

  struct Line {
    std::string name, text;
    std::chrono::steady_clock::time_point printed;
  };
  bool live_;                // stdout is a terminal
  std::vector<Line> lines_;  // of the runs that go on; on a terminal below everything else
  size_t drawn_ = 0;         // rows of them on the screen
};

/// To the standard output; Error when it cannot be written.
void write_out(const std::string& text);

/// From now on Ctrl-C and SIGTERM only set a flag, and tell so where the command then saves what it
/// trained; a second one ends the program at once.
void catch_interrupts(bool saves);
bool interrupted();

}  // namespace qlab
