#include "experiments/memory_check.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "data/file.h"
#include "experiments/memory_log.h"
#include "experiments/report_data.h"
#include "experiments/sweep_names.h"
#include "nn/module_tree.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::optional<int64_t> bytes_at(const Json& json, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number_integer()) return std::nullopt;
  return it->get<int64_t>();
}

TrialMemoryCheck check_trial(const std::string& name, const std::string& dir) {
  TrialMemoryCheck check{name, dir, "pending", {}, {}, {}};
  Json status;
  const auto read = [&] {
    std::ifstream in(dir + "/status.json");
    if (!in) return;
    status = Json::parse(in, nullptr, false);
    const bool told = status.is_object() && status.value("status", Json()).is_string();
    check.status = told ? status["status"].get<std::string>() : "unreadable";
  };
  read();
  // A process that was killed leaves "running" behind; one that ended just now has replaced it.
  if (check.status == "running" && !FileLock::held(dir + "/lock")) {
    read();
    if (check.status == "running") check.status = "interrupted";
  }
  if (check.status == "pending" || check.unreadable()) return check;
  check.training = {bytes_at(status, "predicted_peak_bytes"), bytes_at(status, "peak_bytes")};
  check.loading = {bytes_at(status, "predicted_load_peak_bytes"),
                   bytes_at(status, "load_peak_bytes")};
  for (const MemorySample& sample : read_memory_lines(dir + "/memory.jsonl").samples)
    if (sample.device_used)
      check.device_used = std::max(check.device_used.value_or(0), *sample.device_used);
  return check;
}

std::string bytes_text(const std::optional<int64_t>& bytes) {
  return bytes ? with_commas(*bytes) : "not recorded";
}

std::string difference_text(const PeakCheck& peak) {
  const auto difference = peak.difference();
  if (!difference) return "";
  const char* sign = *difference > 0 ? "+" : *difference < 0 ? "-" : "";
  return sign + with_commas(std::abs(*difference));
}

std::optional<double> percent(const PeakCheck& peak) {
  const auto difference = peak.difference();
  if (!difference || *peak.predicted == 0) return std::nullopt;
  return 100.0 * static_cast<double>(*difference) / static_cast<double>(*peak.predicted);
}

std::string percent_text(const PeakCheck& peak) {
  const auto share = percent(peak);
  return !share ? "" : *share == 0 ? "0" : fmt::format("{:+.4g}", *share);
}

Json or_null(const std::optional<int64_t>& bytes) { return bytes ? Json(*bytes) : Json(nullptr); }

Json peak_json(const PeakCheck& peak) {
  const auto share = percent(peak);
  return {{"predicted_bytes", or_null(peak.predicted)},
          {"measured_bytes", or_null(peak.measured)},
          {"difference_bytes", or_null(peak.difference())},
          {"difference_percent", share ? Json(*share) : Json(nullptr)}};
}

}  // namespace

std::optional<int64_t> PeakCheck::difference() const {
  return predicted && measured ? std::optional(*measured - *predicted) : std::nullopt;
}

std::vector<TrialMemoryCheck> check_memory(const std::string& dir) {
  if (!fs::is_directory(dir)) fail("{}: there is no such directory", dir);
  std::vector<TrialMemoryCheck> trials;
  if (fs::exists(dir + "/plan.yaml")) {
    for (const TrialResult& trial : read_results(dir).trials)
      trials.push_back(check_trial(trial.name, dir + "/trials/" + trial.directory));
  } else if (fs::exists(dir + "/status.json")) {
    trials.push_back(check_trial(fs::path(dir + "/").parent_path().filename().string(), dir));
  } else {
    fail(
        "{}: there is no plan.yaml or status.json: neither a results directory of qlab nor a "
        "trial's",
        dir);
  }
  if (std::none_of(trials.begin(), trials.end(),
                   [](const auto& t) { return t.finished() || t.unreadable(); }))
    fail("{}: of {} none has finished yet: nothing to compare", dir,
         trials.size() == 1 ? "1 trial" : fmt::format("{} trials", trials.size()));
  return trials;
}

bool all_equal(const std::vector<TrialMemoryCheck>& trials) {
  return std::all_of(trials.begin(), trials.end(),
                     [](const auto& t) { return t.finished() ? t.equal() : !t.unreadable(); });
}

std::string check_text(const std::vector<TrialMemoryCheck>& trials) {
  std::vector<std::vector<std::string>> rows{
      {"trial", "status", "of", "predicted", "measured", "difference", "%", "device used"}};
  const auto row = [](const TrialMemoryCheck& t, const char* what, const PeakCheck& peak,
                      const std::optional<int64_t>& used) {
    return std::vector<std::string>{t.trial,
                                    t.status,
                                    what,
                                    bytes_text(peak.predicted),
                                    bytes_text(peak.measured),
                                    difference_text(peak),
                                    percent_text(peak),
                                    used ? with_commas(*used) : ""};
  };
  int64_t finished = 0, equal = 0;
  std::string notes;
  for (const TrialMemoryCheck& t : trials) {
    if (t.unreadable())
      notes += t.directory + "/status.json does not read: nothing is known of its peaks\n";
    if (t.status == "pending" || t.unreadable()) continue;
    rows.push_back(row(t, "loading", t.loading, {}));
    rows.push_back(row(t, "training", t.training, t.device_used));
    finished += t.finished(), equal += t.finished() && t.equal();
  }
  std::string text = "peaks of the allocator, in bytes\n" + aligned_table(rows);
  text += fmt::format("{} of {} finished {} took what was predicted, to the byte\n", equal,
                      finished, finished == 1 ? "trial" : "trials");
  return text + notes;
}

Json check_json(const std::vector<TrialMemoryCheck>& trials) {
  Json json = {{"equal", all_equal(trials)}, {"trials", Json::array()}};
  for (const TrialMemoryCheck& t : trials)
    json["trials"].push_back({{"trial", t.trial},
                              {"directory", t.directory},
                              {"status", t.status},
                              {"equal", t.equal()},
                              {"training", peak_json(t.training)},
                              {"loading", peak_json(t.loading)},
                              {"device_used_bytes", or_null(t.device_used)}});
  return json;
}

}  // namespace qlab
