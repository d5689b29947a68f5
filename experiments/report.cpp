#include "experiments/report.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "core/error.h"
#include "core/memory.h"
#include "data/file.h"
#include "experiments/config_fields.h"
#include "experiments/report_data.h"
#include "experiments/report_page.h"
#include "experiments/sweep_names.h"
#include "experiments/yaml_input.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;
using Rows = std::vector<std::vector<std::string>>;

std::string indented(const std::string& text, const std::string& by) {
  std::string out;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    out += by + text.substr(begin, end - begin) + "\n";
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return out;
}

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}

std::string csv(const Results& results) {
  std::vector<std::string> cells{"trial"};
  for (const std::string& key : results.keys) cells.push_back(csv_cell(key));
  cells.push_back("seed");
  const std::vector<Column> columns = shown_columns(results);
  for (const Column& column : columns) cells.push_back(column.name);
  cells.push_back("status");
  const bool failed =
      std::ranges::any_of(results.trials, [](const TrialResult& t) { return !t.error.empty(); });
  if (failed) cells.push_back("error");
  std::string out = fmt::format("{}\n", fmt::join(cells, ","));
  for (const TrialResult& trial : results.trials) {
    cells = {csv_cell(trial.name)};
    for (const std::string& value : trial.swept) cells.push_back(csv_cell(value));
    cells.push_back(trial.seed);
    for (const Column& column : columns) {
      const auto& value = trial.*column.value;
      cells.push_back(value ? shortest(*value) : "");
    }
    cells.push_back(csv_cell(trial.status));
    if (failed) cells.push_back(csv_cell(trial.error));
    out += fmt::format("{}\n", fmt::join(cells, ","));
  }
  return out;
}

std::string thousands(double x) {
  std::string digits = fmt::format("{:.0f}", x);
  for (auto at = static_cast<int>(digits.size()) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<size_t>(at), ",");
  }
  return digits;
}

/// A measured value for people.
std::string readable(const std::string& column, std::optional<double> value) {
  if (!value) return "";
  if (column == "stalled_seconds") return fmt::format("{:.4f}", *value);
  if (column == "peak_bytes" || column == "moved_bytes")
    return format_bytes(static_cast<int64_t>(*value));
  if (column.ends_with("loss") || column == "eval_loss_0") return fmt::format("{:.4f}", *value);
  return thousands(*value);
}

std::string readable(const std::string& column, const Spread& s) {
  if (!s.deviation) return readable(column, s.mean);
  return readable(column, s.mean) + " ± " + readable(column, s.deviation);
}

std::string markdown_cell(std::string text) {
  for (size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 2) {
    text.replace(at, 1, "\\|");
  }
  return text;
}

std::string markdown_table(const Rows& rows) {
  std::string out;
  for (size_t i = 0; i < rows.size(); ++i) {
    std::vector<std::string> cells;
    for (const std::string& cell : rows[i]) cells.push_back(markdown_cell(cell));
    out += fmt::format("| {} |\n", fmt::join(cells, " | "));
    if (i > 0) continue;
    out += "|";
    for (size_t j = 0; j < cells.size(); ++j) out += " --- |";
    out += "\n";
  }
  return out;
}

std::string markdown(const Results& results) {
  std::string out = fmt::format("# {}\n\n", results.name);
  for (const auto& [key, value] : results.environment) {
    if (!value.empty()) out += fmt::format("- {}: {}\n", key, value);
  }
  out += fmt::format("\nSorted by {} ({}).\n\n", results.metric, results.goal);
  Rows rows{{"trial"}};
  for (const std::string& key : results.keys) rows[0].push_back(key);
  rows[0].push_back("seed");
  const std::vector<Column> columns = shown_columns(results);
  for (const Column& column : columns) rows[0].push_back(column.name);
  rows[0].push_back("status");
  for (const TrialResult* trial : ranked(results)) {
    std::vector<std::string> row{trial->name};
    row.insert(row.end(), trial->swept.begin(), trial->swept.end());
    row.push_back(trial->seed);
    for (const Column& column : columns) {
      row.push_back(readable(column.name, trial->*column.value));
    }
    row.push_back(status_text(*trial));
    rows.push_back(std::move(row));
  }
  out += markdown_table(rows);
  if (results.several_seeds) {
    out += "\n## Over seeds\n\nMean ± sample standard deviation.\n\n";
    rows = {results.keys};
    for (const char* name : {"n", "train_loss", "eval_loss", "best_eval_loss"}) {
      rows[0].push_back(name);
    }
    for (const SeedGroup& group : seed_groups(results)) {
      std::vector<std::string> row = group.swept;
      const Spread eval = spread(group, &TrialResult::eval_loss);
      const Spread train = spread(group, &TrialResult::train_loss);
      row.push_back(std::to_string(std::max(eval.n, train.n)));
      row.push_back(readable("train_loss", train));
      row.push_back(readable("eval_loss", eval));
      row.push_back(readable("eval_loss", spread(group, &TrialResult::best_eval_loss)));
      rows.push_back(std::move(row));
    }
    out += markdown_table(rows);
  }
  std::string failures;
  for (const TrialResult& trial : results.trials) {
    if (trial.status == "failed") failures += fmt::format("- {}: {}\n", trial.name, trial.error);
  }
  if (!failures.empty()) out += "\n## Failed\n\n" + failures;
  return out;
}

/// Chart.js as the distribution's package has it, or "".
std::string find_chart_js() {
  std::vector<std::string> places{
      "/usr/share/javascript/chart.js/chart.min.js", "/usr/share/javascript/chart.js/Chart.min.js",
      "/usr/share/javascript/chart.js/chart.umd.js", "/usr/share/nodejs/chart.js/dist/chart.min.js",
      "/usr/share/nodejs/chart.js/dist/chart.umd.js"};
  if (const char* chosen = std::getenv("QLAB_CHARTJS")) places = {chosen};
  for (const std::string& place : places) {
    if (fs::is_regular_file(place)) return read_text_file(place);
  }
  return "";
}

}  // namespace

FileLock lock_results(const std::string& dir) {
  return std::move(*FileLock::take(dir + "/lock", true));
}

void write_plan(const std::string& dir, const Sweep& sweep,
                const std::vector<std::string>& directories,
                const std::map<std::string, std::string>& environment) {
  QLAB_CHECK(directories.size() == sweep.trials.size(), "{} directories for {} trials",
             directories.size(), sweep.trials.size());
  const auto list = [](std::vector<std::string> keys) {
    for (std::string& key : keys) key = yaml_text(key);
    return fmt::format("[{}]", fmt::join(keys, ", "));
  };
  std::string out = "sweep:\n";
  out += fmt::format("  name: {}\n", yaml_text(sweep.name));
  out += fmt::format("  source: {}\n", yaml_text(sweep.source_file));
  out += fmt::format("  method: {}\n  metric: {}\n  goal: {}\n", sweep.method, sweep.metric,
                     sweep.goal);
  out += fmt::format("  seeds: [{}]\n", fmt::join(sweep.seeds, ", "));
  out += fmt::format("  swept_keys: {}\n", list(sweep.swept_keys));
  out += fmt::format("  derived_keys: {}\n", list(sweep.derived_keys));
  out += "environment:\n";
  for (const auto& [key, value] : environment) {
    out += fmt::format("  {}: {}\n", yaml_text(key), yaml_text(value));
  }
  out += "trials:\n";
  for (size_t i = 0; i < directories.size(); ++i) {
    const Trial& trial = sweep.trials[i];
    out += fmt::format("  - name: {}\n    directory: {}\n    seed: {}\n", yaml_text(trial.name),
                       yaml_text(directories[i]), trial.seed);
    out += trial.swept.empty() ? "    swept: {}\n" : "    swept:\n";
    for (const auto& [key, value] : trial.swept) {
      out += fmt::format("      {}: {}\n", yaml_text(key), yaml_text(value));
    }
    out += "    config:\n" + indented(to_yaml(trial.config), "      ");
  }
  fs::create_directories(dir);
  write_file_atomically(dir + "/plan.yaml", out);
}

ReportResult write_report(const std::string& dir) {
  std::optional<FileLock> lock;  // of a results directory, which read_results checks
  if (fs::exists(dir + "/plan.yaml")) lock.emplace(lock_results(dir));
  const Results results = read_results(dir);
  ReportResult report{.files = {}, .notes = results.notes};
  const auto write = [&](const std::string& name, const std::string& text) {
    write_file_atomically(dir + "/" + name, text);
    report.files.push_back(dir + "/" + name);
  };
  write("summary.csv", csv(results));
  write("summary.md", markdown(results));
  const std::string chart_js = find_chart_js();
  write("report.html", report_page(results, chart_js));
  if (chart_js.empty()) {
    report.notes.push_back(
        fmt::format("report.html has no charts, since Chart.js was not found: apt-get install "
                    "libjs-chart.js (or set QLAB_CHARTJS to chart.min.js), then qlab report {}",
                    dir));
  }
  return report;
}

std::string summary_table(const std::string& dir) {
  const Results results = read_results(dir);
  const std::vector<std::string> shown{"trainable_params", "steps",          "train_loss",
                                       "eval_loss_0",      "eval_loss",      "tokens_per_s",
                                       "peak_bytes",       "gang_size",      "gang",
                                       "moved_bytes",      "stalled_seconds"};
  std::vector<Column> columns;
  for (const std::string& name : shown)
    for (const Column& column : shown_columns(results))
      if (name == column.name) columns.push_back(column);
  Rows rows{{"trial"}};
  for (const Column& column : columns) rows[0].push_back(column.name);
  rows[0].push_back("status");
  for (const TrialResult* trial : ranked(results)) {
    std::vector<std::string> row{trial->name};
    for (const Column& column : columns) row.push_back(readable(column.name, trial->*column.value));
    row.push_back(status_text(*trial));
    rows.push_back(std::move(row));
  }
  return aligned_table(rows);
}

}  // namespace qlab
