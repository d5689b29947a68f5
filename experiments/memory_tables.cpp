#include "experiments/memory_tables.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "core/error.h"
#include "experiments/memory_table_rows.h"

namespace qlab {
namespace {

struct Entry {
  const char* name;
  MemoryTable (*make)(RowMaker&);
};
constexpr Entry entries[] = {
    {"llama31-8b", llama31_8b_table},       {"llama2-7b", llama2_7b_table},
    {"full-finetune", full_finetune_table}, {"qlora-7b", qlora_7b_table},
    {"qlora-fig6", qlora_fig6_table},       {"qlora-section3", qlora_section3_table}};

double size_of(Unit unit) {
  switch (unit) {
    case Unit::GB:
      return 1e9;
    case Unit::MB:
      return 1e6;
    case Unit::GiB:
      return 0x1p30;
    case Unit::MiB:
      return 0x1p20;
    default:
      return 1;
  }
}

}  // namespace

bool in_bytes(Unit unit) {
  return unit == Unit::GB || unit == Unit::MB || unit == Unit::GiB || unit == Unit::MiB;
}

double total(const std::vector<Share>& shares) {
  double sum = 0;
  for (const Share& s : shares) sum += s.amount;
  return sum;
}

std::vector<Share> less(std::vector<Share> a, const std::vector<Share>& b) {
  for (const Share& s : b) {
    const auto same =
        std::find_if(a.begin(), a.end(), [&](const Share& own) { return own.name == s.name; });
    if (same == a.end())
      a.push_back({s.name, -s.amount});
    else
      same->amount -= s.amount;
  }
  std::erase_if(a, [](const Share& s) { return s.amount == 0; });
  return a;
}

Printed printed(const std::string& text, Unit unit) {
  Printed out{text, {}, 0};
  const bool bound = text.starts_with("<") || text.starts_with(">");
  const size_t begin = text.find_first_of("0123456789");
  if (bound || begin == std::string::npos) return out;
  const size_t end = std::min(text.find_first_not_of("0123456789.,", begin), text.size());
  std::string digits = text.substr(begin, end - begin);
  std::erase(digits, ',');
  const size_t point = digits.find('.');
  const auto decimals =
      static_cast<double>(point == std::string::npos ? 0 : digits.size() - point - 1);
  out.amount = std::stod(digits) * size_of(unit);
  out.half_digit = 0.5 * std::pow(10.0, -decimals) * size_of(unit);
  return out;
}

Printed unread(const std::string& text) { return {text, {}, 0}; }

std::optional<std::vector<Share>> MemoryRow::difference() const {
  std::vector<Share> other = by_rule;
  if (other.empty() && published.amount)
    other.push_back({"the published figure, whose parts are not known", *published.amount});
  if (other.empty() || ours.empty()) return {};
  return less(ours, other);
}

std::optional<double> MemoryRow::unexplained() const {
  if (!published.amount || by_rule.empty()) return {};
  const double rest = *published.amount - total(by_rule);
  // A figure just on the edge of rounding counts as explained.
  return std::abs(rest) > published.half_digit * (1 + 1e-9) ? std::optional(rest) : std::nullopt;
}

const std::vector<std::string>& memory_table_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Entry& entry : entries) list.emplace_back(entry.name);
    return list;
  }();
  return names;
}

MemoryTable memory_table(const std::string& name, const std::string& results) {
  const auto entry = std::find_if(std::begin(entries), std::end(entries),
                                  [&](const Entry& e) { return name == e.name; });
  if (entry == std::end(entries))
    fail("--table {}: unknown; the tables are {}", name, fmt::join(memory_table_names(), ", "));
  std::vector<MeasuredRun> runs;
  std::string unreadable;
  try {
    runs = read_memory_results(results);
  } catch (const Error& error) {
    unreadable = error.what();
    unreadable = unreadable.substr(0, unreadable.find('\n'));
    if (results == memory_results_file && !std::filesystem::exists(results))
      unreadable += "; the file lies in qlab's sources: run qlab there, or name it by --measured";
  }
  RowMaker make(std::move(runs));
  MemoryTable table = entry->make(make);
  table.name = name;
  table.unreadable = unreadable;
  if (unreadable.empty()) {
    table.measured_note = "measured: bytes of the allocator, from " + results +
                          " where it has a run with the row's settings on a GPU, by the commit "
                          "named with them";
  } else {
    table.measured_note = "measured: unreadable: " + unreadable;
    for (MemoryRow& row : table.rows)
      if (row.unmeasured == MemoryRow().unmeasured) row.unmeasured = "unreadable";
  }
  table.notes.insert(table.notes.begin(), "GB is 10^9 bytes, MB 10^6, GiB 2^30, MiB 2^20.");
  table.notes.emplace_back(
      "difference: ours less the rule applied, or less the published figure where it has no known "
      "rule. Its parts are exact and add up to it.");
  return table;
}

}  // namespace qlab
