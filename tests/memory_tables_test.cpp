// Published memory tables: their figures, where our side comes from, parts that add up, and forms
// that programs can read.
#include "experiments/memory_tables.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>

#include "experiments/memory_prediction.h"
#include "experiments/setup.h"
#include "nn/module_tree.h"
#include "tests/support/error_of.h"
#include "tests/support/files.h"

namespace qlab::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

/// Without measured runs.
MemoryTable table(const std::string& name) {
  const TemporaryFolder folder;
  return memory_table(name, folder.write("memory.json", "[]"));
}

const MemoryRow& row(const MemoryTable& table, const std::string& what) {
  const auto it = std::find_if(table.rows.begin(), table.rows.end(),
                               [&](const MemoryRow& r) { return r.what == what; });
  if (it == table.rows.end()) fail("{} has no row {}", table.name, what);
  return *it;
}

MemoryPrediction predicted(const std::string& model, const std::vector<std::string>& sets) {
  const std::vector<PaperTrial> gang = {assumed_trial(load_config("", sets), Device::cuda())};
  return predict_memory(open_model(model), gang, Device::cuda());
}

struct Figure {
  const char *what, *published;
  double by_rule;
};
void expect_figures(const MemoryTable& table, const std::vector<Figure>& figures) {
  for (const Figure& f : figures) {
    SCOPED_TRACE(f.what);
    const MemoryRow& r = row(table, f.what);
    EXPECT_EQ(r.published.text, f.published);
    EXPECT_NEAR(total(r.by_rule), f.by_rule, in_bytes(r.unit) ? 0 : 5e-4);
  }
}

TEST(MemoryTables, FiguresOfLlama31) {
  const MemoryTable t = table("llama31-8b");
  expect_figures(t,
                 {{"fp32", "32.12 GB", 32'121'044'992},
                  {"bf16", "16.06 GB", 16'060'522'496},
                  {"int8 (LLM.int8 storage)", "9.08 GB", 9'081'200'640},
                  {"NF4", "5.59 GB", 5'591'539'712},
                  {"NF4 + double quantization", "5.59 GB", 5'591'539'712},
                  {"the same + LoRA r=32 on q, k, v, o", "5.70 GB", 5'700'591'616},
                  {"NF4, constants counted", "", 6'027'747'328},
                  {"NF4 + double quantization, constants counted", "", 5'702'295'552},
                  {"the same + LoRA r=32, constants counted", "", 5'811'347'456},
                  {"LoRA r=32 on q, k, v, o (adapter_model.safetensors)", "109.1 MB", 109'051'904},
                  {"its parameters", "27,262,976", 27'262'976}});
  for (const MemoryRow& r : t.rows) EXPECT_FALSE(r.unexplained()) << r.what;
  // The trap: two kinds of bytes with one total.
  EXPECT_THAT(t.notes, testing::Contains(HasSubstr("109,051,904 is the number of blocks")));
}

TEST(MemoryTables, FiguresOfLlama2) {
  const MemoryTable t = table("llama2-7b");
  expect_figures(t, {{"fp32", "28 GB", 28'000'000'000},
                     {"fp32, by its shapes", "26.95 GB", 26'953'662'464},
                     {"NF4: footprint", "about 4 GB", 3'762'823'168},
                     {"NF4: with double-quantized constants", "about 4 GB", 3'865'591'808},
                     {"NF4: with fp32 constants", "about 4 GB", 4'167'573'504},
                     {"NF4: footprint, the rest cast to fp32", "about 4 GB", 4'287'643'648},
                     {"LoRA r=4 on all linear layers", "0.15 %", 0.1481},
                     {"LoRA r=10 on q, k, v, o", "0.15 %", 0.1554},
                     {"LoRA r=10 on q, v, packed weights counted as bytes", "0.15 %", 0.1496}});
  // 0.155 rounds to 0.16; all other readings round to what was printed.
  for (const MemoryRow& r : t.rows)
    EXPECT_EQ(r.unexplained().has_value(), r.what == "LoRA r=10 on q, k, v, o") << r.what;
}

TEST(MemoryTables, FiguresOfFineTuning) {
  const MemoryTable full = table("full-finetune");
  EXPECT_EQ(full.rows[0].published.text, "112 GB");
  EXPECT_EQ(total(full.rows[0].by_rule), 112e9);
  EXPECT_EQ(full.rows[1].published.text, "24 B a parameter");
  EXPECT_EQ(total(full.rows[1].by_rule), 168e9);

  const MemoryTable qlora = table("qlora-7b");
  expect_figures(qlora, {{"before activations", "about 4.5 GB", 3'784'200'000},
                         {"1 x 512 tokens", "7 GB", 3'784'200'000},
                         {"1 x 1024 tokens", "10 GB", 3'784'200'000},
                         {"in all, setting not stated", "24 GB", 0}});
  // Both are printed: what the text says, and that its rule does not give it.
  EXPECT_EQ(row(qlora, "before activations").unexplained(), 4.5e9 - 3'784'200'000);
  EXPECT_THAT(format_table(qlora, "text"),
              AllOf(HasSubstr("about 4.5 GB"), HasSubstr("3.784 GB"),
                    HasSubstr("the published figure is 715.8 MB above what its rule gives")));
}

TEST(MemoryTables, FiguresOfFigure6) {
  const MemoryTable t = table("qlora-fig6");
  constexpr double mib = 0x1p20;
  expect_figures(t, {{"7B: adapters", "288 MB", 288 * mib},
                     {"13B: adapters", "450 MB", 450 * mib},
                     {"33B: adapters", "877.5 MB", 877.5 * mib},
                     {"65B: adapters", "1,440 MB", 1440 * mib},
                     {"7B: optimizer", "1,152 MB", 1152 * mib},
                     {"13B: optimizer", "1,800 MB", 1800 * mib},
                     {"33B: optimizer", "3,510 MB", 3510 * mib},
                     {"65B: optimizer", "5,760 MB", 5760 * mib},
                     {"7B: model", "5,046 MB", 3'865'591'808}});
  const std::vector<std::pair<std::string, std::string>> others = {
      {"13B: model", "8,476 MB"}, {"33B: model", "19,302 MB"}, {"65B: model", "37,074 MB"},
      {"7B: total", "6.9 GB"},    {"13B: total", "11.3 GB"},   {"33B: total", "24.7 GB"},
      {"65B: total", "45.0 GB"}};
  for (const auto& [what, published] : others) {
    EXPECT_EQ(row(t, what).published.text, published);
    EXPECT_GT(row(t, what).unexplained(), 0) << what;
  }
  // LLaMA's own shapes: 159.9 million parameters, in fp32.
  EXPECT_EQ(total(row(t, "7B: adapters").ours), 4.0 * 159'907'840);
  for (const MemoryRow& r : t.rows)
    if (!r.bars.empty()) {
      EXPECT_DOUBLE_EQ(total(r.bars), *r.published.amount) << r.what;
    }
}

TEST(MemoryTables, FiguresOfSection3) {
  const MemoryTable t = table("qlora-section3");
  expect_figures(t, {{"7B: LoRA weights", "26 MB", 2 * 13'476'831},
                     {"7B: the same with gradient checkpointing", "18 MB", 567 * 0x1p20 / 32},
                     {"7B: 4-bit base", "5,048 MB", 3'865'591'808},
                     {"7B: bits a weight, NF4", "4 + 0.5 bits", 4.5},
                     {"7B: bits a weight, NF4 + double quantization", "4 + 0.127 bits", 4.127},
                     {"65B: full fine-tuning in 16 bits", "> 780 GB", 780e9}});
  EXPECT_NEAR(total(row(t, "65B: saved by double quantization").by_rule), 3.03e9, 2e6);
  const MemoryRow& large = row(t, "65B: QLoRA, r=64 on all linear layers");
  EXPECT_FALSE(large.published.amount);  // a bound
  EXPECT_FALSE(large.difference());
}

TEST(MemoryTables, OursIsThePrediction) {
  const MemoryTable t = table("llama31-8b");
  const MemoryPrediction base = predicted("synthetic:llama-3.1-8b", {});
  EXPECT_EQ(total(row(t, "NF4 + double quantization").ours),
            static_cast<double>(base.resident.total()));
  const LlamaConfig llama = synthetic_config("llama-3.1-8b");
  EXPECT_EQ(total(row(t, "int8 (LLM.int8 storage)").by_rule),
            static_cast<double>(hf_footprint(llama, {WeightFormat::int8}, {})));
  const MemoryTable qlora = table("qlora-7b");
  for (const char* what : {"1 x 512 tokens", "1 x 1024 tokens, layers recomputed"}) {
    const MemoryRow& r = row(qlora, what);
    std::istringstream words(r.setting);
    std::string model, word;
    std::vector<std::string> sets;
    for (words >> model; words >> word && word == "--set"; sets.push_back(word)) words >> word;
    EXPECT_EQ(total(r.ours), static_cast<double>(predicted(model, sets).peak())) << what;
  }
}

TEST(MemoryTables, PartsAddUp) {
  for (const std::string& name : memory_table_names()) {
    for (const MemoryRow& r : table(name).rows) {
      SCOPED_TRACE(name + ": " + r.what);
      for (const auto* shares : {&r.by_rule, &r.ours})
        for (const Share& s : *shares)
          if (in_bytes(r.unit)) {
            EXPECT_EQ(s.amount, std::round(s.amount)) << s.name;
          }
      const auto parts = r.difference();
      if (!parts) continue;
      const double other = r.by_rule.empty() ? *r.published.amount : total(r.by_rule);
      const double tolerance = in_bytes(r.unit) ? 0 : 1e-12;
      EXPECT_NEAR(total(*parts), total(r.ours) - other, tolerance);
      std::set<std::string> names;
      for (const Share& s : *parts) EXPECT_TRUE(names.insert(s.name).second) << s.name;
    }
  }
}

TEST(MemoryTables, PrintedFigures) {
  const Printed bar = printed("5,046 MB", Unit::MiB);
  EXPECT_EQ(bar.amount, 5046 * 0x1p20);
  EXPECT_EQ(bar.half_digit, 0.5 * 0x1p20);
  EXPECT_EQ(printed("about 4.5 GB", Unit::GB).amount, 4.5e9);
  EXPECT_NEAR(printed("5.70 GB", Unit::GB).half_digit, 0.005e9, 1e-3);
  EXPECT_FALSE(printed("> 780 GB", Unit::GB).amount);
  EXPECT_FALSE(printed("", Unit::GB).amount);
}

/// Cells of the lines of a CSV text.
std::vector<std::vector<std::string>> csv_cells(const std::string& text) {
  std::vector<std::vector<std::string>> lines(1, {""});
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '"') {
      if (quoted && i + 1 < text.size() && text[i + 1] == '"')
        lines.back().back() += text[++i];
      else
        quoted = !quoted;
    } else if (text[i] == ',' && !quoted) {
      lines.back().emplace_back();
    } else if (text[i] == '\n' && !quoted) {
      lines.push_back({""});
    } else {
      lines.back().back() += text[i];
    }
  }
  lines.pop_back();
  return lines;
}

TEST(MemoryTables, Csv) {
  for (const std::string& name : memory_table_names()) {
    const auto lines = csv_cells(format_table(table(name), "csv"));
    ASSERT_EQ(lines.size(), table(name).rows.size() + 1);
    for (const auto& cells : lines) ASSERT_EQ(cells.size(), 16u) << cells[1];
  }
  const auto lines = csv_cells(format_table(table("llama31-8b"), "csv"));
  EXPECT_EQ(lines[1][1], "fp32");
  EXPECT_EQ(lines[1][4], "32120000000");
  EXPECT_EQ(lines[1][6], "32121044992");
  EXPECT_EQ(lines[2][13], "532480");
  EXPECT_EQ(lines[2][9], "not measured");
  EXPECT_EQ(lines[3][9], "bytes alone");
  EXPECT_EQ(lines[2][14], "norms (ours in fp32)=532480");
  EXPECT_EQ(lines[6][1], "the same + LoRA r=32 on q, k, v, o");
}

TEST(MemoryTables, TextMarkdownAndTex) {
  for (const std::string& name : memory_table_names()) {
    SCOPED_TRACE(name);
    const MemoryTable t = table(name);
    const std::string text = format_table(t, "text"), md = format_table(t, "md"),
                      tex = format_table(t, "tex");
    for (const MemoryRow& r : t.rows) {
      EXPECT_THAT(text, HasSubstr(r.what));
      EXPECT_THAT(md, HasSubstr("| " + r.what + " |"));
    }
    EXPECT_THAT(text, AllOf(HasSubstr(t.title), HasSubstr("not measured"),
                            HasSubstr("GB is 10^9 bytes, MB 10^6, GiB 2^30, MiB 2^20.")));
    std::istringstream lines(md);
    for (std::string line; std::getline(lines, line);)
      if (line.starts_with("|")) {
        EXPECT_EQ(std::count(line.begin(), line.end(), '|'), 7) << line;
      }
    // Every row has its cells, and no character that TeX would take for its own.
    std::istringstream tex_lines(tex);
    size_t rows = 0;
    for (std::string line; std::getline(tex_lines, line);) {
      if (!line.ends_with(" \\\\*") || line.starts_with("\\multicolumn{6}")) continue;
      size_t cells = 1;
      for (size_t i = 1; i < line.size(); ++i) cells += line[i] == '&' && line[i - 1] != '\\';
      EXPECT_EQ(cells, 6u) << line;
      ++rows;
    }
    EXPECT_EQ(rows, t.rows.size() + 1);
    const std::string body = tex.substr(tex.find("\\begingroup"));
    for (size_t i = 1; i < body.size(); ++i) {
      EXPECT_FALSE((body[i] == '%' || body[i] == '_' || body[i] == '#') && body[i - 1] != '\\')
          << body.substr(i - std::min<size_t>(i, 20), 40);
      EXPECT_FALSE(body[i] == '^' && body[i - 1] != '$');
    }
    EXPECT_THAT(tex, AllOf(HasSubstr("\\begin{longtable}"), HasSubstr("\\end{longtable}"),
                           HasSubstr("% in the preamble: \\usepackage{array,longtable}")));
  }
}

/// "" when every tag that opens closes in order; otherwise what does not.
std::string unbalanced(const std::string& html) {
  std::vector<std::string> open;
  for (size_t at = 0; (at = html.find('<', at)) != std::string::npos;) {
    const size_t end = html.find('>', at);
    if (end == std::string::npos) return "a tag without an end";
    const std::string tag = html.substr(at + 1, end - at - 1);
    at = end;
    if (tag.starts_with("!") || tag.starts_with("meta")) continue;
    const std::string name =
        tag.substr(tag.starts_with("/"), tag.find_first_of(" \n") - (tag.starts_with("/") ? 1 : 0));
    if (!tag.starts_with("/")) {
      open.push_back(name.substr(0, name.find(' ')));
    } else {
      if (open.empty() || open.back() != name) return "</" + name + ">";
      open.pop_back();
    }
  }
  return open.empty() ? "" : "<" + open.back() + ">";
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
  return n;
}

TEST(MemoryTables, Html) {
  EXPECT_EQ(unbalanced("<p>a<b>c</b></p>"), "");
  EXPECT_EQ(unbalanced("<p><b></p>"), "</p>");
  for (const std::string& name : memory_table_names()) {
    SCOPED_TRACE(name);
    const MemoryTable t = table(name);
    const std::string page = format_table(t, "html");
    EXPECT_EQ(unbalanced(page), "");
    EXPECT_THAT(page, AllOf(Not(HasSubstr("http")), Not(HasSubstr("<script")),
                            HasSubstr("prefers-color-scheme: dark"), HasSubstr(t.title)));
    EXPECT_EQ(count(page, "<tr>"), t.rows.size() + 1);
    EXPECT_GE(count(page, "<svg role"), 1u);
    EXPECT_GE(count(page, "<rect"), 2 * t.rows.size() / 3);
    EXPECT_EQ(count(page, "nan"), 0u);
    EXPECT_EQ(count(page, "-,"), 0u);
    EXPECT_EQ(count(page, "width=\"-"), 0u);
  }
  const std::string page = format_table(table("llama31-8b"), "html");
  EXPECT_THAT(page, HasSubstr("Size of the weights: 32,121 MB, 9,081 MB, 5,592 MB, 109 MB"));
  EXPECT_THAT(page, HasSubstr("<title>8-bit scales: 109,051,904 B</title>"));
  // A bar of the longest length is as wide as the chart; the int8 bar in proportion.
  EXPECT_THAT(page, HasSubstr("width=\"690.00\""));
  EXPECT_THAT(page,
              HasSubstr(fmt::format("width=\"{:.2f}\"", 690.0 * 9'081'200'640 / 32'121'044'992)));
}

// No run of int8 can be measured, and its column says why there is none.
TEST(MemoryTables, Int8IsBytesAlone) {
  const MemoryTable t = table("llama31-8b");
  for (const char* format : {"text", "md", "tex", "html"})
    EXPECT_THAT(format_table(t, format), HasSubstr("bytes alone")) << format;
  EXPECT_EQ(row(t, "int8 (LLM.int8 storage)").unmeasured, "bytes alone");
  EXPECT_EQ(row(t, "bf16").unmeasured, "not measured");
}

TEST(MemoryTables, UnknownNames) {
  EXPECT_EQ(error_of([] { table("llama31"); }),
            "--table llama31: unknown; the tables are llama31-8b, llama2-7b, full-finetune, "
            "qlora-7b, qlora-fig6, qlora-section3");
  EXPECT_EQ(error_of([] { format_table(MemoryTable(), "pdf"); }),
            "--format pdf: unknown; the formats are text, md, csv, tex, html");
}

class MeasuredTest : public testing::Test {
 protected:
  std::string written(const std::string& text) const { return folder_.write("memory.json", text); }
  /// A run of llama-2-7b as the row "1 x 512 tokens" has it.
  static std::string entry(const std::string& set, int64_t peak, int64_t used = 7'000'000'000) {
    return fmt::format(
        R"({{"model": "synthetic:llama-2-7b", "set": {{{}}}, "device": "NVIDIA A10G",
             "commit": "0123456", "date": "2025-01-02", "peak_bytes": {},
             "device_used_bytes": {}, "predicted_bytes": 2,
             "categories": {{"weights": 3763355648, "constants": 5, "adapters": 119930880,
               "gradients": 1, "optimizer": 1, "activations": 1, "workspace": 1}}}})",
        set, peak, used);
  }
  const std::string qlora_ =
      R"("lora.r": 8, "train.batch_size": 1, "train.steps": 3, "optim.lr": "1e-3")";
  TemporaryFolder folder_;
};

TEST_F(MeasuredTest, MissingFile) {
  const MemoryTable t = memory_table("qlora-7b", "no/memory.json");
  EXPECT_THAT(t.measured_note, HasSubstr("measured: unreadable: no/memory.json: cannot open"));
  EXPECT_EQ(t.measured_note.find('\n'), std::string::npos);
  for (const MemoryRow& r : t.rows) EXPECT_FALSE(r.measured);
  EXPECT_EQ(row(t, "1 x 512 tokens").unmeasured, "unreadable");
  EXPECT_THAT(format_table(t, "csv"), HasSubstr(",unreadable: no/memory.json: "));
  EXPECT_EQ(row(memory_table("llama31-8b", folder_ / "."), "bf16").unmeasured, "unreadable");
  EXPECT_THAT(memory_table("qlora-7b", folder_ / ".").measured_note, HasSubstr("regular file"));
}

TEST_F(MeasuredTest, DamagedFile) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{", "memory.json"},
      {"{}", "expected a list"},
      {"[3]", "entry 1: expected an object"},
      {"[" + entry(qlora_, 1) + ", {}]", "entry 2: no model"},
      {"[" + entry("\"lora.rr\": 8", 1) + "]", "entry 1: --set lora.rr=8: unknown key"},
      {"[" + entry("\"lora.r\": [8]", 1) + "]", "set: lora.r must be one value"},
      {"[" + entry(qlora_, -1) + "]", "peak_bytes must be a number of bytes"}};
  for (const auto& [text, part] : cases) {
    const std::string file = written(text);
    const MemoryTable t = memory_table("qlora-7b", file);
    EXPECT_THAT(t.measured_note, AllOf(HasSubstr("measured: unreadable: "), HasSubstr(part)));
    EXPECT_EQ(t.measured_note.find('\n'), std::string::npos);
    EXPECT_THAT(format_table(t, "text"),
                AllOf(HasSubstr("measured: unreadable: "), HasSubstr("   unreadable "),
                      Not(HasSubstr("not measured"))));
    EXPECT_THAT(error_of([&] { read_memory_results(file); }), HasSubstr(part));
  }
}

TEST_F(MeasuredTest, MatchingRuns) {
  const std::string other = entry(R"("lora.r": 8, "train.batch_size": 2)", 9);
  const std::string on_cpu = entry(qlora_, 8, 0);
  const MemoryTable t = memory_table(
      "qlora-7b", written("[" + entry(qlora_, 6'630'000'000) + ", " + other + ", " + on_cpu + "]"));
  const MemoryRow& r = row(t, "1 x 512 tokens");
  ASSERT_TRUE(r.measured);
  EXPECT_EQ(r.measured->bytes, 6'630'000'000);
  EXPECT_EQ(r.measured->device, "NVIDIA A10G");
  EXPECT_EQ(r.measured->commit, "0123456");
  EXPECT_FALSE(row(t, "1 x 1024 tokens").measured);
  EXPECT_FALSE(row(t, "1 x 512 tokens, layers recomputed").measured);
  EXPECT_THAT(format_table(t, "text"), AllOf(HasSubstr("6.630 GB"), HasSubstr("on NVIDIA A10G")));
  EXPECT_THAT(format_table(t, "html"), HasSubstr("NVIDIA A10G, 0123456"));
  EXPECT_THAT(format_table(t, "csv"), HasSubstr(",6.630 GB,6630000000,NVIDIA A10G,0123456,"));
}

// A page's columns are shares of its width, less the gaps between them.
TEST(MemoryTables, TexIsAsWideAsAPage) {
  for (const std::string& name : memory_table_names()) {
    const std::string tex = format_table(table(name), "tex");
    const double gaps = 5 * 2 * 3 / 345.0, first = 0.24, other = 0.13;
    EXPECT_LE(first + 5 * other + gaps, 1);
    EXPECT_THAT(tex, AllOf(HasSubstr("p{0.24\\linewidth}*{5}{"), HasSubstr("p{0.13\\linewidth}}"),
                           HasSubstr("\\setlength{\\tabcolsep}{3pt}")));
    // Each cell's longest word in digits' width, 4.25 pt in \footnotesize.
    std::istringstream lines(tex);
    for (std::string line; std::getline(lines, line);) {
      if (!line.ends_with(" \\\\*") || line.starts_with("\\multicolumn")) continue;
      std::istringstream cells(line.substr(line.find('&') + 1));
      for (std::string word; cells >> word;)
        EXPECT_LE(static_cast<double>(word.size()) * 4.25, other * 345) << word;
    }
  }
}

// Every measured row says by which commit, in one length, and why it is not what is predicted.
TEST_F(MeasuredTest, EachRowSaysWhereItIsFrom) {
  std::string run = entry(qlora_, 6'630'000'000);
  run.replace(run.find("0123456"), 7, "0123456789ab-dirty");
  const MemoryTable t = memory_table("qlora-7b", written("[" + run + "]"));
  const MemoryRow& own = row(t, "1 x 512 tokens");
  EXPECT_EQ(own.measured->commit, "0123456-dirty");
  const auto more = std::llround(6'630'000'000 - total(own.ours));
  const std::string text = format_table(t, "text"), on = "on NVIDIA A10G, 0123456-dirty";
  const std::string why =
      fmt::format("{}: {} B more than predicted now, by that commit's plan", on, with_commas(more));
  std::string unwrapped = text;
  for (size_t at; (at = unwrapped.find("\n      ")) != std::string::npos;)
    unwrapped.replace(at, 7, " ");
  EXPECT_THAT(unwrapped, HasSubstr("measured " + why));
  for (const char* format : {"md", "tex"}) EXPECT_THAT(format_table(t, format), HasSubstr(why));
  EXPECT_THAT(format_table(t, "html"), HasSubstr("more than predicted now"));
  const size_t measured_rows = static_cast<size_t>(std::count_if(
      t.rows.begin(), t.rows.end(), [](const MemoryRow& r) { return r.measured.has_value(); }));
  EXPECT_GT(measured_rows, 1u);
  EXPECT_EQ(count(text, "    measured on "), measured_rows);
  // A base alone is another run's, with the tables of its sequences.
  const MemoryTable two = memory_table("llama2-7b", written("[" + entry(qlora_, 1) + "]"));
  EXPECT_THAT(format_table(two, "md"),
              HasSubstr("than predicted now, with the rotary tables of another run"));
}

// A base holds the tables of its own run's positions, so that its row's own run comes first.
TEST_F(MeasuredTest, TheRowsOwnRunComesFirst) {
  const std::string model = "synthetic:llama-2-7b";
  std::string longer = entry(R"("lora.r": 8, "data.seq_len": 2048)", 9);
  longer.replace(longer.find("0123456"), 7, "fffffff");
  const std::vector<MeasuredRun> runs =
      read_memory_results(written("[" + entry(qlora_, 1) + ", " + longer + "]"));
  const std::vector<Category> base = {Category::weights, Category::constants};
  EXPECT_EQ(find_measured(runs, model, {"lora.r=8", "train.batch_size=1"}, base)->commit,
            "0123456");
  EXPECT_EQ(find_measured(runs, model, {"lora.r=4"}, base)->commit, "fffffff");
}

// What double quantization saves of 65B is one measured base less another.
TEST_F(MeasuredTest, ADifferenceOfTwoRuns) {
  const auto run = [](const char* commit, const char* set, int64_t constants) {
    return fmt::format(
        R"({{"model": "synthetic:llama-65b", "set": {{"lora.r": 64{}}}, "device": "G",
             "commit": "{}", "date": "2025-01-02", "peak_bytes": 9, "device_used_bytes": 9,
             "predicted_bytes": 9, "categories": {{"weights": 1000, "constants": {},
               "adapters": 1, "gradients": 1, "optimizer": 1, "activations": 1, "workspace": 1}}}})",
        set, commit, constants);
  };
  const std::string nested = run("a", "", 100),
                    single = run("b", R"(, "quant.double_quant": false)", 400);
  const auto saved = [&](const std::string& runs) {
    const MemoryTable t = memory_table("qlora-section3", written("[" + runs + "]"));
    return row(t, "65B: saved by double quantization").measured;
  };
  const auto both = saved(nested + ", " + single);
  ASSERT_TRUE(both);
  EXPECT_EQ(both->bytes, 300);
  EXPECT_EQ(both->commit, "b and a");
  EXPECT_FALSE(saved(nested));
  EXPECT_FALSE(saved(single));
}

// Bytes of the base do not depend on the adapters, nor those on the batch.
TEST_F(MeasuredTest, PartsOfOtherRuns) {
  const std::string model = "synthetic:llama-2-7b";
  const std::vector<MeasuredRun> runs = read_memory_results(written("[" + entry(qlora_, 1) + "]"));
  const std::vector<Category> base = {Category::weights, Category::constants};
  const std::vector<Category> adapters = {Category::adapters};
  const auto found = [&](const std::vector<std::string>& sets, const std::vector<Category>& what) {
    const auto measured = find_measured(runs, model, sets, what);
    return measured ? measured->bytes : -1;
  };
  EXPECT_EQ(found({}, base), 3'763'355'653);
  EXPECT_EQ(found({"lora.r=64"}, base), 3'763'355'653);
  EXPECT_EQ(found({"quant.double_quant=false"}, base), -1);
  EXPECT_EQ(found({"lora.r=8", "train.batch_size=4", "data.seq_len=64"}, adapters), 119'930'880);
  EXPECT_EQ(found({"lora.r=4"}, adapters), -1);
  EXPECT_EQ(found({"lora.r=8"}, {Category::activations}), -1);  // of another batch
  EXPECT_EQ(find_measured(runs, "synthetic:llama-7b", {}, base), std::nullopt);
}

}  // namespace
}  // namespace qlab::test
