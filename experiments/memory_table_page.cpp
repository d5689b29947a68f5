// A memory table as one HTML page: the table, and its rows as stacked bars in inline SVG.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "experiments/memory_tables.h"
#include "experiments/report_page.h"
#include "nn/module_tree.h"

namespace qlab {
namespace {

// Beside the report's style. The colours keep their distance from both backgrounds.
constexpr int colours = 20;
constexpr const char* style = R"css(
.scroll { max-height: none; }
th { cursor: default; white-space: normal; }
td { vertical-align: top; }
td.words { white-space: normal; min-width: 210px; }
td .soft { color: var(--soft); font-size: 12.5px; display: block; }
td ul { margin: 0; padding: 0; list-style: none; font-variant-numeric: tabular-nums; }
td code { font-size: 12px; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.soft { fill: var(--soft); }
svg text.title { font-weight: 600; }
svg rect { stroke: var(--card); stroke-width: 0.5; }
.printed { fill: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 12px 0 0; padding: 0; font-size: 13px; }
.key li { list-style: none; display: flex; gap: 7px; align-items: center; }
.key svg { width: 12px; height: 12px; flex: none; }
.s0 { fill: #4477cc; } .s1 { fill: #d9822b; } .s2 { fill: #3a9d6a; } .s3 { fill: #c44e52; }
.s4 { fill: #8a6fc0; } .s5 { fill: #9a7350; } .s6 { fill: #d672a8; } .s7 { fill: #2aa198; }
.s8 { fill: #a8a23a; } .s9 { fill: #34a3d5; } .s10 { fill: #6b8e23; } .s11 { fill: #b5651d; }
.s12 { fill: #5f9ea0; } .s13 { fill: #c97b9b; } .s14 { fill: #7b68ee; } .s15 { fill: #c9a227; }
.s16 { fill: #4f9d4f; } .s17 { fill: #b04fb0; } .s18 { fill: #e0735c; } .s19 { fill: #5c7fa8; }
)css";

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text)
    out += c == '&'   ? "&amp;"
           : c == '<' ? "&lt;"
           : c == '>' ? "&gt;"
           : c == '"' ? "&quot;"
                      : std::string(1, c);
  return out;
}

std::string element(const std::string& tag, const std::string& text,
                    const std::string& attributes = "") {
  return "<" + tag + (attributes.empty() ? "" : " " + attributes) + ">" + text + "</" +
         tag.substr(0, tag.find(' ')) + ">";
}

std::string words(const std::string& first, const std::string& second, const char* tag = "span") {
  return escaped(first) +
         (second.empty() ? "" : element("span", element(tag, escaped(second)), "class=\"soft\""));
}

std::string table_row(const MemoryRow& row) {
  const auto sum = [&](const std::vector<Share>& shares) {
    return shares.empty() ? std::string("-") : amount_text(total(shares), row.unit);
  };
  std::string difference;
  if (const std::string text = unexplained_text(row); !text.empty())
    difference += element("span", escaped(text), "class=\"soft\"");
  if (const auto parts = row.difference()) {
    std::string items;
    for (const Share& s : *parts)
      items += element("li", escaped((s.amount > 0 ? "+" : "-") +
                                     exact_text(std::abs(s.amount), row.unit) + " " + s.name));
    difference += element("b", difference_text(total(*parts), row.unit));
    if (!items.empty()) difference += element("ul", items);
  }
  std::string measured = "-", on;
  if (row.measured) {
    measured = amount_text(static_cast<double>(row.measured->bytes), row.unit);
    on = measured_on(row);
  } else if (in_bytes(row.unit) && !row.ours.empty()) {
    measured = row.unmeasured;
  }
  return element("tr",
                 element("td", escaped(row.what), "class=\"words\"") +
                     element("td", row.published.text.empty() ? "-" : escaped(row.published.text)) +
                     element("td", words(sum(row.by_rule), row.rule), "class=\"words\"") +
                     element("td", words(sum(row.ours), row.setting, "code"), "class=\"words\"") +
                     element("td", words(measured, on), "class=\"words\"") +
                     element("td", difference.empty() ? "-" : difference, "class=\"words\""));
}

/// Stacked bars to one scale, each with its caption; groups of them have titles.
class Chart {
 public:
  Chart(std::vector<std::string>& names, double largest) : names_(names), largest_(largest) {}

  void title(const std::string& text) {
    y_ += 8;
    body_ +=
        fmt::format("<text class=\"title\" x=\"0\" y=\"{}\">{}</text>\n", y_ + 13, escaped(text));
    y_ += 20;
  }
  /// `shares` without names are one bar in the colour of printed figures.
  void bar(const std::string& caption, const std::vector<Share>& shares, const std::string& value) {
    body_ += fmt::format("<text class=\"soft\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n",
                         left_ - 8, y_ + 12, escaped(caption));
    double x = left_;
    for (const Share& s : shares) {
      const double width = s.amount / largest_ * width_;
      const std::string tip =
          fmt::format("{}{}", s.name.empty() ? "" : s.name + ": ", exact_text(s.amount, Unit::GB));
      body_ += fmt::format(
          "<rect class=\"{}\" x=\"{:.2f}\" y=\"{}\" width=\"{:.2f}\" height=\"15\"><title>{}"
          "</title></rect>\n",
          style_of(s.name), x, y_, width, escaped(tip));
      x += width;
    }
    body_ += fmt::format("<text x=\"{:.2f}\" y=\"{}\">{}</text>\n", x + 6, y_ + 12, escaped(value));
    y_ += 17;
  }
  std::string svg(const std::string& label) const {
    return fmt::format("<svg role=\"img\" aria-label=\"{}\" viewBox=\"0 0 1000 {}\">\n{}</svg>\n",
                       escaped(label), y_ + 6, body_);
  }

 private:
  std::string style_of(const std::string& name) {
    if (name.empty()) return "printed";
    auto it = std::find(names_.begin(), names_.end(), name);
    if (it == names_.end()) it = names_.insert(names_.end(), name);
    return "s" + std::to_string((it - names_.begin()) % colours);
  }

  static constexpr double left_ = 200, width_ = 690;
  std::vector<std::string>& names_;  // of shares, in the order of their colours
  double largest_;
  int y_ = 0;
  std::string body_;
};

/// Rows that bars can show; where some have a figure's own bars, those alone.
std::vector<const MemoryRow*> drawn_rows(const MemoryTable& table) {
  std::vector<const MemoryRow*> rows;
  const bool own = std::any_of(table.rows.begin(), table.rows.end(),
                               [](const MemoryRow& r) { return !r.bars.empty(); });
  const auto negative = [](const Share& s) { return s.amount < 0; };
  for (const MemoryRow& row : table.rows)
    if (in_bytes(row.unit) && (!own || !row.bars.empty()) &&
        std::none_of(row.by_rule.begin(), row.by_rule.end(), negative) &&
        std::none_of(row.ours.begin(), row.ours.end(), negative))
      rows.push_back(&row);
  return rows;
}

std::string rows_chart(const MemoryTable& table, const std::vector<const MemoryRow*>& rows,
                       std::vector<std::string>& names) {
  double largest = 0;
  for (const MemoryRow* row : rows)
    largest = std::max(
        {largest, row->published.amount.value_or(0), total(row->by_rule), total(row->ours)});
  Chart chart(names, largest);
  for (const MemoryRow* row : rows) {
    chart.title(row->what);
    if (row->published.amount)
      chart.bar("published",
                row->bars.empty() ? std::vector<Share>{{"", *row->published.amount}} : row->bars,
                row->published.text);
    if (!row->by_rule.empty())
      chart.bar("rule applied", row->by_rule, amount_text(total(row->by_rule), row->unit));
    if (!row->ours.empty())
      chart.bar("ours predicted", row->ours, amount_text(total(row->ours), row->unit));
    if (row->measured) {
      const auto bytes = static_cast<double>(row->measured->bytes);
      chart.bar("measured", {{"", bytes}}, amount_text(bytes, row->unit));
    }
  }
  return chart.svg(table.title);
}

std::string key(const std::vector<std::string>& names) {
  std::string items;
  for (size_t i = 0; i < names.size(); ++i)
    items +=
        element("li", fmt::format("<svg viewBox=\"0 0 12 12\"><rect class=\"s{}\" width=\"12\" "
                                  "height=\"12\"></rect></svg>",
                                  i % colours) +
                          escaped(names[i]));
  return element("ul", items, "class=\"key\"");
}

std::string section(const std::string& title, const std::string& content) {
  return element("section",
                 element("div", element("h2", title), "class=\"bar\"") + "\n" + content) +
         "\n";
}

/// One chart a unit, so that megabytes are seen beside gigabytes.
std::string charts(const MemoryTable& table) {
  std::vector<std::string> names;
  std::string out;
  const std::vector<const MemoryRow*> rows = drawn_rows(table);
  for (const Unit unit : {Unit::GB, Unit::GiB, Unit::MB, Unit::MiB}) {
    std::vector<const MemoryRow*> of_unit;
    for (const MemoryRow* row : rows)
      if (row->unit == unit) of_unit.push_back(row);
    if (!of_unit.empty()) out += rows_chart(table, of_unit, names);
  }
  out = section("As bars, by what the bytes are for", out + key(names));
  if (table.sizes.empty()) return out;
  std::vector<std::string> none;
  Chart chart(none, total({table.sizes.front()}));
  std::string series;
  for (const Share& s : table.sizes) {
    const std::string size = with_commas(std::llround(s.amount / 1e6)) + " MB";
    chart.bar(s.name, {{"", s.amount}}, size);
    series += (series.empty() ? "" : ", ") + size;
  }
  return section("Size of the weights", chart.svg("Size of the weights: " + series)) + out;
}

}  // namespace

std::string table_page(const MemoryTable& table) {
  std::string rows, notes;
  for (const MemoryRow& row : table.rows) rows += table_row(row) + "\n";
  for (const auto* list : {&table.sources, &table.notes})
    for (const std::string& note : *list) notes += element("p", escaped(note)) + "\n";
  std::string heads;
  for (const char* head : {"", "published", "published rule applied", "ours predicted",
                           "measured on a GPU", "difference, and which bytes make it"})
    heads += element("th", head);
  return "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n" +
         element("title", escaped(table.title) + " - qlab memory") + "\n<style>" + report_style +
         style + "</style>\n</head>\n<body>\n<main>\n" + element("h1", escaped(table.title)) +
         "\n" + element("p", escaped(table.measured_note), "class=\"sub\"") + "\n" +
         section("The table", element("div",
                                      element("table", element("thead", element("tr", heads)) +
                                                           element("tbody", "\n" + rows)),
                                      "class=\"scroll\"")) +
         charts(table) + section("Sources and notes", notes) +
         element("footer", "Written by qlab memory --table " + escaped(table.name) +
                               ". One file, nothing loaded from elsewhere.") +
         "\n</main>\n</body>\n</html>\n";
}

}  // namespace qlab
