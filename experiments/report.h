// Results directory: plan.yaml, trials/<hash>-<name>/{config.yaml, metrics.jsonl, status.json,
// ...}. Reads whatever is there, half-written trials too, and writes summary.csv, summary.md,
// report.html.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "data/file.h"
#include "experiments/sweep.h"

namespace qlab {

/// For reading and writing plan, summary and report in one go; waits for other processes.
FileLock lock_results(const std::string& dir);

/// plan.yaml: the sweep, one entry per trial with its directory name (under trials/), and the
/// environment: the report shows version, commit, date, device, model and data where given.
void write_plan(const std::string& dir, const Sweep& sweep,
                const std::vector<std::string>& directories,
                const std::map<std::string, std::string>& environment);

/// Puts the trials of DIR's plan that have a directory, so were started, before the one of a single
/// run, with their directories. What differs between them is then swept, and the new trial's name
/// is its own; one that is in the plan already keeps its name.
void add_earlier_trials(const std::string& dir, Sweep& sweep,
                        std::vector<std::string>& directories);

struct ReportResult {
  std::vector<std::string> files;  // written
  std::vector<std::string> notes;  // to be printed
};
ReportResult write_report(const std::string& dir);

/// The summary for a terminal, sorted by the metric.
std::string summary_table(const std::string& dir);

}  // namespace qlab
