// Published memory tables beside ours. A row states what was printed, what the printed rule gives
// for the model's shapes, what predict_memory() says of the nearest run of ours, and what was
// measured; both sides are split into the same shares, so that their difference has names.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "experiments/memory_results.h"

namespace qlab {

/// How a row's amounts are shown. Those of the first four are in bytes, the others in their own.
enum class Unit : uint8_t { GB, MB, GiB, MiB, parameters, percent, bits };
bool in_bytes(Unit unit);

struct Share {
  std::string name;  // "rotary tables"
  double amount;
};
double total(const std::vector<Share>& shares);
/// a - b name by name, without what is equal in both.
std::vector<Share> less(std::vector<Share> a, const std::vector<Share>& b);

/// A figure as its source prints it.
struct Printed {
  std::string text;              // "5,046 MB"; "" where there is none
  std::optional<double> amount;  // nothing for "> 780 GB", a bound
  double half_digit = 0;         // what rounding to the printed digits may change
};
/// The first number in the text, read in `unit`.
Printed printed(const std::string& text, Unit unit);
/// A text in the place of a figure.
Printed unread(const std::string& text);

struct MemoryRow {
  std::string what;
  Unit unit = Unit::GB;
  Printed published = {};
  std::string rule = {};            // in words; "" where none is known
  std::vector<Share> by_rule = {};  // the rule applied
  std::string setting = {};         // of our run, as arguments of qlab memory
  std::vector<Share> ours = {};
  std::optional<MeasuredBytes> measured = {};
  std::string unmeasured = "not measured";
  std::vector<Share> bars = {};  // the published figure's own parts, where its source has them

  /// Ours less the rule, or less the published figure where no rule is known; shares without a
  /// difference are left out. Nothing where one side is missing.
  std::optional<std::vector<Share>> difference() const;
  /// The published figure less its own rule, where that does not round to it.
  std::optional<double> unexplained() const;
};

struct MemoryTable {
  std::string name, title;
  std::vector<std::string> sources, notes;
  std::string measured_note;  // where the measured column comes from, or why it is empty
  std::string unreadable;     // what keeps its file from being read; "" for nothing
  std::vector<MemoryRow> rows;
  std::vector<Share> sizes = {};  // one more chart of the HTML form: bytes
};

const std::vector<std::string>& memory_table_names();
/// `results`: a file of measured runs; where it cannot be read the table says why. Error with the
/// list of names for an unknown one.
MemoryTable memory_table(const std::string& name, const std::string& results);

const std::vector<std::string>& memory_table_formats();
/// In one of the formats, whose list an error for another one gives.
std::string format_table(const MemoryTable& table, const std::string& format);

// Parts of the formats.
std::string amount_text(double amount, Unit unit);      // "5.592 GB"
std::string exact_text(double amount, Unit unit);       // "5,591,539,712", "0.148317 %"
std::string difference_text(double amount, Unit unit);  // "+67.1 MB"
std::string unexplained_text(
    const MemoryRow& row);  // "the published figure is ... above ...", or ""
/// "NVIDIA H100 80GB HBM3, c829f90", and why that is not what is predicted; "" where nothing is.
std::string measured_on(const MemoryRow& row);
std::string table_page(const MemoryTable& table);  // html

}  // namespace qlab
