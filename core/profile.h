// Where a step's time goes. Operations mark their launches with a scope; while a profile is being
// taken, the device's clock is read on both sides. The same scopes are NVTX ranges for the vendor's
// profilers.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/device.h"

namespace qlab {

/// What one launch, or the few of one operation, has to do.
struct Work {
  double flops = 0;
  double bytes = 0;  // of device memory, each input read and each output written once
};

class OpScope {
 public:
  /// `name` must outlive the profile: a literal.
  OpScope(const char* name, Device device, Work work);
  ~OpScope();
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;

 private:
  bool cuda_ = false;
};

struct ProfileLine {
  std::string name;
  int64_t calls = 0;
  double seconds = 0;
  Work work;
  int part = 0;  // of a WorkCounter
};
struct Profile {
  std::vector<ProfileLine> lines;  // the most time first
  double seconds = 0;              // from the first operation to the end of the last
};

/// Takes a profile of what this thread issues on a GPU between its construction and finish().
class Profiler {
 public:
  Profiler();
  ~Profiler();
  Profile finish();
};

/// Adds up, by part and name, what operations that this thread issues on meta devices would have to
/// do; seconds stay 0.
class WorkCounter {
 public:
  WorkCounter();
  ~WorkCounter();
  WorkCounter(const WorkCounter&) = delete;
  WorkCounter& operator=(const WorkCounter&) = delete;
  const std::vector<ProfileLine>& lines() const { return lines_; }
  /// Where work is being counted, what follows is a part of its own: copies beside it overlap with
  /// this part alone.
  static void next_part();

 private:
  friend class OpScope;
  std::vector<ProfileLine> lines_;
  int part_ = 0;
};

namespace cuda {
/// Records a moment of the current device's stream; marks are numbered from 0 after clear_marks().
int64_t mark();
/// Seconds between two marks; waits for the second.
double seconds_between(int64_t first, int64_t second);
void clear_marks();
void push_range(const char* name);
void pop_range();
/// Between these the vendor's profilers record, where they were told to wait for it.
void start_external_profiler();
void stop_external_profiler();
}  // namespace cuda
}  // namespace qlab
