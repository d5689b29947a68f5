// qlab memory --check: the peaks that were predicted for trials, and those that were measured.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace qlab {

/// Highest totals of the allocator, in bytes. Absent: not recorded.
struct PeakCheck {
  std::optional<int64_t> predicted, measured;
  bool equal() const { return predicted && predicted == measured; }
  std::optional<int64_t> difference() const;  // measured - predicted
};

struct TrialMemoryCheck {
  std::string trial, directory;
  std::string status;                  // as in status.json; "pending", "unreadable" as in reports
  PeakCheck training, loading;         // of the gang; of the base
  std::optional<int64_t> device_used;  // the most that the driver said, by everybody
  bool finished() const { return status == "finished"; }
  bool unreadable() const { return status == "unreadable"; }
  bool equal() const { return training.equal() && loading.equal(); }
};

/// `dir`: a results directory, or that of one trial. Error when it is neither, or none has
/// finished.
std::vector<TrialMemoryCheck> check_memory(const std::string& dir);

/// Whether every trial that has finished took what was predicted, to the byte, and all can be read.
bool all_equal(const std::vector<TrialMemoryCheck>& trials);
std::string check_text(const std::vector<TrialMemoryCheck>& trials);
nlohmann::json check_json(const std::vector<TrialMemoryCheck>& trials);

}  // namespace qlab
