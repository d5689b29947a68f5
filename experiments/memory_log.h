// What a device and this process hold while a base is loaded and trials train on it, moment by
// moment: the lines of memory.jsonl.
#pragma once
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/memory.h"

namespace qlab {

/// One look. The bytes are those of the device's account; the rest is what the system says, where
/// it does.
struct MemorySample {
  double seconds = 0;           // since loading began; for a base that is used again, see MemoryLog
  std::string phase;            // load, prepare, reserve, evaluate, train, save
  bool shared = false;          // loading that an earlier gang's trials went through
  std::optional<int64_t> step;  // steps done, once there can be any
  CategoryBytes bytes{};
  int64_t peak = 0;                    // the highest total of this phase so far
  std::optional<int64_t> device_used;  // of a GPU, by everybody: total - free of the driver
  std::optional<int64_t> host, host_available;  // resident bytes of this process; MemAvailable

  int64_t total() const { return sum(bytes); }
};

nlohmann::json memory_line(const MemorySample& sample);

/// The lines of a file; those that do not read are counted and left out. No file has no lines.
struct MemoryLines {
  std::vector<MemorySample> samples;
  int damaged = 0;
};
MemoryLines read_memory_lines(const std::string& file);

/// Bytes from a line "KEY: N kB" of a file like /proc/self/status; nothing where that is absent.
std::optional<int64_t> proc_bytes(const std::string& file, std::string_view key);

/// Watches the account of one device, from the loading of a base on. Phases follow one another, and
/// each begins and ends with a sample. Between them there is one when total, peak, device_used or
/// host has moved by more than 1 %, at the first three steps, and otherwise every 30 seconds; while
/// loading every 100 ms or 1 % of its time, whichever is longer. That many changes would still fill
/// a disk in a long run that evaluates or saves often: after `unrationed` samples there is at most
/// one in 30 seconds and in 2 % of the time gone by, some 1,400 in a month.
///
/// The clock starts with the loading. A gang that uses a loaded base again gets the samples of the
/// loading marked as shared, and its own times follow on them: what other gangs did in between is
/// left out.
class MemoryLog {
 public:
  static constexpr int64_t unrationed = 1000;

  /// Loading begins. `now` gives seconds from any start.
  explicit MemoryLog(Device device, std::function<double()> now = steady_seconds);
  /// The base that was loaded serves a gang from its beginning.
  void use_base();
  /// Nothing when that phase is at work already.
  void begin(const char* phase);
  /// A step, a batch, a tensor later. Costs next to nothing most of the time.
  void look();
  /// A sample in any case, as at the end of a phase.
  void look_closely();

  /// Samples that were not taken yet.
  std::vector<MemorySample> take();
  /// The account at its highest since use_base(), the peak of loading left out.
  MemoryAccount highest() const;
  int64_t load_peak() const { return load_peak_; }

 private:
  static double steady_seconds();
  bool rationed(double seconds) const;
  MemorySample sample(double seconds) const;
  void keep(MemorySample sample);
  void end_phase();

  Device device_;
  std::function<double()> now_;
  double start_ = 0, looked_ = 0;  // in seconds of now_; of this log's clock
  std::string phase_;
  int64_t looks_ = 0;  // at the training phase
  MemorySample last_;
  int64_t kept_ = 0;
  std::vector<MemorySample> loading_, pending_;
  bool used_ = false;
  MemoryAccount highest_;
  int64_t load_peak_ = 0;
};

}  // namespace qlab
