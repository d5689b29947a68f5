// Memory tables as text, Markdown, CSV and TeX.
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "core/error.h"
#include "experiments/memory_tables.h"
#include "nn/module_tree.h"

namespace qlab {
namespace {

constexpr const char* headings[] = {"published", "rule applied", "ours predicted",
                                    "measured on a GPU", "difference"};

struct Form {
  const char* name;
  std::string (*write)(const MemoryTable&);
};

std::string rule_cell(const MemoryRow& row) {
  return row.by_rule.empty() ? "-" : amount_text(total(row.by_rule), row.unit);
}
std::string ours_cell(const MemoryRow& row) {
  return row.ours.empty() ? "-" : amount_text(total(row.ours), row.unit);
}
std::string measured_cell(const MemoryRow& row) {
  if (!in_bytes(row.unit) || row.ours.empty()) return "-";
  if (!row.measured) return row.unmeasured;
  return amount_text(static_cast<double>(row.measured->bytes), row.unit);
}
std::string published_cell(const MemoryRow& row) {
  return row.published.text.empty() ? "-" : row.published.text;
}
std::string difference_cell(const MemoryRow& row) {
  const auto parts = row.difference();
  return parts ? difference_text(total(*parts), row.unit) : "-";
}

/// "+67,108,864 B rotary tables; ..."
std::string parts_text(const MemoryRow& row) {
  std::string text;
  for (const Share& s : row.difference().value_or(std::vector<Share>{}))
    text += fmt::format("{}{}{} {}", text.empty() ? "" : "; ", s.amount > 0 ? "+" : "-",
                        exact_text(std::abs(s.amount), row.unit), s.name);
  return text;
}

/// Everything that the cells leave out, each with its heading.
std::vector<std::string> details(const MemoryRow& row) {
  std::vector<std::string> lines;
  if (!row.rule.empty()) lines.push_back("rule: " + row.rule);
  if (!row.setting.empty()) lines.push_back("ours: " + row.setting);
  if (row.measured) lines.push_back("measured on " + measured_on(row));
  if (const std::string text = unexplained_text(row); !text.empty()) lines.push_back(text);
  if (const std::string text = parts_text(row); !text.empty())
    lines.push_back("difference: " + text);
  return lines;
}

std::string wrapped(const std::string& text, size_t indent, size_t hanging) {
  constexpr size_t width = 110;
  std::string out, line(indent, ' ');
  size_t start = 0, empty = indent;
  while (start < text.size()) {
    const size_t end = std::min(text.find(' ', start), text.size());
    const std::string word = text.substr(start, end - start);
    if (line.size() > empty && line.size() + 1 + word.size() > width) {
      out += line + "\n";
      empty = indent + hanging;
      line = std::string(empty, ' ');
    }
    line += (line.size() > empty ? " " : "") + word;
    start = end + 1;
  }
  return out + line + "\n";
}

/// Columns as wide as they must be. Below a row what its cells leave out, and once what rows share.
std::string as_text(const MemoryTable& table) {
  using Cells = std::array<std::string, 6>;
  std::vector<Cells> lines = {
      {"", headings[0], headings[1], headings[2], headings[3], headings[4]}};
  for (const MemoryRow& row : table.rows)
    lines.push_back({row.what, published_cell(row), rule_cell(row), ours_cell(row),
                     measured_cell(row), difference_cell(row)});
  std::array<size_t, 6> widths{};
  for (const Cells& cells : lines)
    for (size_t i = 0; i < cells.size(); ++i) widths[i] = std::max(widths[i], cells[i].size());
  std::string out = fmt::format("{} ({})\n\n", table.title, table.name);
  std::vector<std::string> above;
  for (size_t l = 0; l < lines.size(); ++l) {
    out += fmt::format("{:<{}}", lines[l][0], widths[0]);
    for (size_t i = 1; i < widths.size(); ++i)
      out += fmt::format("  {:>{}}", lines[l][i], widths[i]);
    out += "\n";
    if (l == 0) continue;
    const std::vector<std::string> own = details(table.rows[l - 1]);
    for (const std::string& detail : own)
      if (detail.starts_with("measured") ||
          std::find(above.begin(), above.end(), detail) == above.end())
        out += wrapped(detail, 4, 2);
      else if (detail.starts_with("ours: "))
        out += "    ours: as above\n";
    above = own;
  }
  out += "\n";
  for (const auto* list : {&table.sources, &table.notes})
    for (const std::string& note : *list) out += wrapped(note, 0, 2);
  return out + wrapped(table.measured_note, 0, 2);
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

/// The cells of the formats with a column for everything.
std::vector<std::string> full_cells(const MemoryRow& row) {
  const auto two = [](const std::string& a, const std::string& b, const char* between) {
    return a + (b.empty() ? "" : between + b);
  };
  const std::string difference =
      two(unexplained_text(row), two(difference_cell(row), parts_text(row), ": "),
          row.unexplained() ? "; ours " : "");
  return {row.what,
          published_cell(row),
          two(rule_cell(row), row.rule, ": "),
          two(ours_cell(row), row.setting, ": "),
          two(measured_cell(row), measured_on(row), " on "),
          difference};
}

std::string as_markdown(const MemoryTable& table) {
  const auto line = [](const std::vector<std::string>& cells) {
    std::string text = "|";
    for (const std::string& cell : cells) text += " " + replaced(cell, "|", "\\|") + " |";
    return text + "\n";
  };
  std::string out = "## " + table.title + "\n\n";
  std::vector<std::string> heads = {""};
  heads.insert(heads.end(), std::begin(headings), std::end(headings));
  heads.back() = "difference, and which bytes make it";
  out += line(heads) + "| --- | ---: | --- | --- | --- | --- |\n";
  for (const MemoryRow& row : table.rows) {
    std::vector<std::string> cells = full_cells(row);
    for (std::string& cell : cells) cell = replaced(replaced(cell, "<", "&lt;"), "*", "\\*");
    out += line(cells);
  }
  out += "\n";
  for (const auto* list : {&table.sources, &table.notes})
    for (const std::string& note : *list) out += "- " + replaced(note, "*", "\\*") + "\n";
  return out + "- " + table.measured_note + "\n";
}

std::string as_csv(const MemoryTable& table) {
  const auto quoted = [](const std::string& text) {
    if (text.find_first_of(",\"\n") == std::string::npos) return text;
    return "\"" + replaced(text, "\"", "\"\"") + "\"";
  };
  const auto number = [](const std::optional<double>& amount, Unit unit) -> std::string {
    if (!amount) return "";
    return unit == Unit::percent || unit == Unit::bits ? fmt::format("{:.6f}", *amount)
                                                       : fmt::format("{:.0f}", *amount);
  };
  std::string out =
      "table,row,unit,published,published_value,rule,rule_value,predicted_value,setting,measured,"
      "measured_value,device,commit,difference_value,difference_parts,published_less_rule\n";
  for (const MemoryRow& row : table.rows) {
    const auto sum = [](const std::vector<Share>& shares) {
      return shares.empty() ? std::nullopt : std::optional(total(shares));
    };
    std::string parts;
    const auto difference = row.difference();
    for (const Share& s : difference.value_or(std::vector<Share>{}))
      parts += (parts.empty() ? "" : "; ") + s.name + "=" + number(s.amount, row.unit);
    const std::string unit = in_bytes(row.unit)             ? "bytes"
                             : row.unit == Unit::percent    ? "percent"
                             : row.unit == Unit::parameters ? "parameters"
                                                            : "bits";
    std::string measured = measured_cell(row);
    if (measured == "unreadable") measured += ": " + table.unreadable;  // there are no notes here
    const std::vector<std::string> cells = {
        table.name,
        row.what,
        unit,
        row.published.text,
        number(row.published.amount, row.unit),
        row.rule,
        number(sum(row.by_rule), row.unit),
        number(sum(row.ours), row.unit),
        row.setting,
        measured,
        row.measured ? std::to_string(row.measured->bytes) : "",
        row.measured ? row.measured->device : "",
        row.measured ? row.measured->commit : "",
        number(difference ? std::optional(total(*difference)) : std::nullopt, row.unit),
        parts,
        number(row.unexplained(), row.unit)};
    for (size_t i = 0; i < cells.size(); ++i) out += (i > 0 ? "," : "") + quoted(cells[i]);
    out += "\n";
  }
  return out;
}

std::string tex_escaped(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '^') {  // a power: 2^30
      const size_t end = std::min(text.find_first_not_of("0123456789", i + 1), text.size());
      out += "$^{" + text.substr(i + 1, end - i - 1) + "}$";
      i = end - 1;
    } else if (c == '\\') {
      out += "\\textbackslash{}";
    } else if (c == '~') {
      out += "\\textasciitilde{}";
    } else if (c == '<' || c == '>' || c == '*' || c == '|') {
      out += std::string("$") + c + "$";
    } else if (c == '-' && text.substr(i, 2) == "--") {
      out += "-{}";  // "--set", not a dash
    } else {
      if (std::string("&%$#_{}").find(c) != std::string::npos) out += '\\';
      out += c;
      if (c == '_') out += "\\allowbreak{}";
    }
  }
  return out;
}

/// A page of article has 345 pt, so that the cells keep to their figures and each row's words stand
/// below it, over all columns; the table breaks between rows.
std::string as_tex(const MemoryTable& table) {
  const auto line = [](const std::vector<std::string>& cells) {
    std::string text;
    for (const std::string& cell : cells) text += (text.empty() ? "" : " & ") + tex_escaped(cell);
    return text + " \\\\*\n";
  };
  std::string out = "% " + table.title + R"(
% in the preamble: \usepackage{array,longtable}; the document has one column
\begingroup\footnotesize\setlength{\tabcolsep}{3pt}
\begin{longtable}{@{}>{\raggedright\arraybackslash}p{0.24\linewidth}*{5}{>{\raggedleft\arraybackslash}p{0.13\linewidth}}@{}}
\hline
)";
  std::vector<std::string> heads = {"row"};
  heads.insert(heads.end(), std::begin(headings), std::end(headings));
  out += line(heads) + "\\hline\n\\endhead\n";
  for (const MemoryRow& row : table.rows) {
    out += line({row.what, published_cell(row), rule_cell(row), ours_cell(row), measured_cell(row),
                 difference_cell(row)});
    for (const std::string& detail : details(row))
      out += "\\multicolumn{6}{@{\\hspace{1em}}p{0.92\\linewidth}@{}}{\\scriptsize\\raggedright " +
             tex_escaped(detail) + "} \\\\*\n";
    out += "\\noalign{\\vskip 2pt}\\pagebreak[1]\n";
  }
  out += "\\hline\n\\end{longtable}\n\n";
  for (const auto* list : {&table.sources, &table.notes})
    for (const std::string& note : *list) out += tex_escaped(note) + "\n\n";
  return out + tex_escaped(table.measured_note) + "\\par\n\\endgroup\n";
}

constexpr Form forms[] = {
    {"text", as_text}, {"md", as_markdown}, {"csv", as_csv}, {"tex", as_tex}, {"html", table_page}};

}  // namespace

std::string amount_text(double amount, Unit unit) {
  switch (unit) {
    case Unit::GB:
      return fmt::format("{:.3f} GB", amount / 1e9);
    case Unit::MB:
      return fmt::format("{:.1f} MB", amount / 1e6);
    case Unit::GiB:
      return fmt::format("{:.3f} GiB", amount / 0x1p30);
    case Unit::MiB:
      return fmt::format("{:.1f} MiB", amount / 0x1p20);
    case Unit::parameters:
      return with_commas(std::llround(amount));
    case Unit::percent:
      return fmt::format("{:.3f} %", amount);
    case Unit::bits:
      break;
  }
  return fmt::format("{:.4f} bits", amount);
}

std::string exact_text(double amount, Unit unit) {
  if (in_bytes(unit)) return with_commas(std::llround(amount)) + " B";
  if (unit == Unit::parameters) return amount_text(amount, unit);
  return fmt::format("{:.6f}{}", amount, unit == Unit::percent ? " %" : " bits");
}

std::string difference_text(double amount, Unit unit) {
  if (amount == 0) return "0";
  const double size = std::abs(amount);
  const bool binary = unit == Unit::GiB || unit == Unit::MiB;
  const double giga = binary ? 0x1p30 : 1e9, mega = binary ? 0x1p20 : 1e6;
  const std::string text = !in_bytes(unit) || size < 1e5 ? exact_text(size, unit)
                           : size < giga
                               ? fmt::format("{:.1f} {}", size / mega, binary ? "MiB" : "MB")
                               : fmt::format("{:.3f} {}", size / giga, binary ? "GiB" : "GB");
  return (amount > 0 ? "+" : "-") + text;
}

std::string unexplained_text(const MemoryRow& row) {
  const std::optional<double> rest = row.unexplained();
  if (!rest) return "";
  return fmt::format("the published figure is {} {} what its rule gives",
                     difference_text(std::abs(*rest), row.unit).substr(1),
                     *rest > 0 ? "above" : "below");
}

std::string measured_on(const MemoryRow& row) {
  if (!row.measured) return "";
  const MeasuredBytes& m = *row.measured;
  std::string text = m.device + ", " + m.commit;
  const double more = static_cast<double>(m.bytes) - total(row.ours);
  if (more == 0 || row.ours.empty()) return text;
  text += fmt::format(": {} {} than predicted now, ", exact_text(std::abs(more), row.unit),
                      more > 0 ? "more" : "less");
  return text + (m.own ? "by that commit's plan" : "with the rotary tables of another run");
}

const std::vector<std::string>& memory_table_formats() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Form& form : forms) list.emplace_back(form.name);
    return list;
  }();
  return names;
}

std::string format_table(const MemoryTable& table, const std::string& format) {
  for (const Form& form : forms)
    if (format == form.name) return form.write(table);
  fail("--format {}: unknown; the formats are {}", format, fmt::join(memory_table_formats(), ", "));
}

}  // namespace qlab
