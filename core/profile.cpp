#include "core/profile.h"

#include <algorithm>

#include "core/error.h"

namespace qlab {
namespace {

struct Mark {
  const char* name;
  Work work;
  int64_t first, second;
};
struct Recording {
  std::vector<Mark> marks;
  std::vector<size_t> open;
};
thread_local Recording* recording = nullptr;
thread_local WorkCounter* counter = nullptr;

void add_line(std::vector<ProfileLine>& lines, const char* name, double seconds, Work work,
              int part = 0) {
  auto line = lines.rbegin();  // lines of a part stand together, those of the latest at the end
  while (line != lines.rend() && line->part == part && line->name != name) ++line;
  if (line == lines.rend() || line->part != part) {
    lines.push_back({name, 0, 0, {}, part});
    line = lines.rbegin();
  }
  ++line->calls;
  line->seconds += seconds;
  line->work.flops += work.flops;
  line->work.bytes += work.bytes;
}

}  // namespace

WorkCounter::WorkCounter() {
  QLAB_CHECK(counter == nullptr, "work is already being counted");
  counter = this;
}
WorkCounter::~WorkCounter() { counter = nullptr; }

void WorkCounter::next_part() {
  if (counter != nullptr) ++counter->part_;
}

OpScope::OpScope(const char* name, Device device, Work work) : cuda_(device.is_cuda()) {
  if (counter != nullptr && device.is_meta())
    add_line(counter->lines_, name, 0, work, counter->part_);
  if (!cuda_) return;
  cuda::push_range(name);
  if (recording == nullptr) return;
  recording->open.push_back(recording->marks.size());
  recording->marks.push_back({name, work, cuda::mark(), 0});
}

OpScope::~OpScope() {
  if (!cuda_) return;
  if (recording != nullptr && !recording->open.empty()) {
    Mark& own = recording->marks[recording->open.back()];
    recording->open.pop_back();
    try {
      own.second = cuda::mark();
    } catch (const Error&) {
      own.second = own.first;  // the same error ends the step, and is told there
    }
  }
  cuda::pop_range();
}

Profiler::Profiler() {
  QLAB_CHECK(recording == nullptr, "a profile is already being taken");
  cuda::clear_marks();
  recording = new Recording;
}

Profiler::~Profiler() {
  delete recording;
  recording = nullptr;
}

Profile Profiler::finish() {
  Profile profile;
  const std::vector<Mark>& marks = recording->marks;
  if (marks.empty()) return profile;
  profile.seconds = cuda::seconds_between(marks.front().first, marks.back().second);
  for (const Mark& mark : marks)
    add_line(profile.lines, mark.name, cuda::seconds_between(mark.first, mark.second), mark.work);
  std::sort(profile.lines.begin(), profile.lines.end(),
            [](const ProfileLine& a, const ProfileLine& b) { return a.seconds > b.seconds; });
  return profile;
}

}  // namespace qlab
