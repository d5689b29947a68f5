#include "experiments/report.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "experiments/memory_log.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::Not;

std::string read(const fs::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> out;
  std::stringstream in(text);
  for (std::string line; std::getline(in, line);) out.push_back(line);
  return out;
}

class ReportTest : public testing::Test {
 protected:
  ReportTest() : dir_(fs::path(testing::TempDir()) / fmt::format("report_test_{}", getpid())) {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    std::ofstream(dir_ / "chart.js") << "/* CHART */ var x = '</script>';";
    setenv("QLAB_CHARTJS", (dir_ / "chart.js").c_str(), 1);
  }
  ~ReportTest() override {
    unsetenv("QLAB_CHARTJS");
    fs::remove_all(dir_);
  }

  /// Two ranks and a list of modules that needs quoting, two seeds; nothing has run.
  void plan() {
    std::ofstream(dir_ / "sweep.yaml") << R"(
name: "ranks <b>"
base:
  model: {path: "synthetic:tiny"}
  data: {train: synthetic, eval: synthetic}
  train: {steps: 20}
seeds: [0, 1]
parameters:
  lora.r: {values: [4, 8]}
  lora.targets: {values: [[q_proj, v_proj]]}
)";
    sweep_ = load_sweep((dir_ / "sweep.yaml").string(), {});
    std::vector<std::string> directories;
    for (size_t i = 0; i < sweep_.trials.size(); ++i) {
      directories.push_back("0000000" + std::to_string(i) + "-" + sweep_.trials[i].name);
    }
    write_plan(out(), sweep_, directories, {{"commit", "abc: 1"}, {"device", "a \"CPU\""}});
  }

  std::string out() const { return (dir_ / "out").string(); }
  fs::path trial_dir(size_t i) const {
    return fs::path(out()) / "trials" /
           ("0000000" + std::to_string(i) + "-" + sweep_.trials[i].name);
  }

  /// `steps` losses that fall from `start` by 0.1 a step, evaluated first and last.
  void run(size_t i, int steps, double start, const std::string& status) {
    fs::create_directories(trial_dir(i));
    std::ofstream metrics(trial_dir(i) / "metrics.jsonl");
    metrics << nlohmann::json{{"step", 0}, {"eval_loss", start}, {"tokens", 0}}.dump() << "\n";
    for (int s = 1; s <= steps; ++s) {
      const double loss = start - 0.1 * s;
      metrics
          << nlohmann::json{{"step", s}, {"loss", loss}, {"lr", 1e-4}, {"tokens", 100 * s}}.dump()
          << "\n";
    }
    const double last = start - 0.1 * steps;
    metrics << nlohmann::json{{"step", steps}, {"eval_loss", last}, {"tokens", 100 * steps}}.dump()
            << "\n";
    nlohmann::json json{{"status", status},       {"trainable_params", 1000},
                        {"steps", steps},         {"trained_tokens", 100 * steps},
                        {"tokens_per_s", 1234.5}, {"peak_bytes", 1500000000},
                        {"gang_size", 2}};
    if (status == "failed") json["error"] = "diverged at step 3: loss nan </script><b>";
    std::ofstream(trial_dir(i) / "status.json") << json.dump();
  }

  /// A trial's memory.jsonl: one second a line, half of them loading, from 1 to `count` MB.
  void remember(size_t i, int count, bool gpu = false) {
    fs::create_directories(trial_dir(i));
    std::ofstream memory(trial_dir(i) / "memory.jsonl");
    for (int n = 0; n < count; ++n) {
      MemorySample sample;
      sample.seconds = n;
      sample.phase = 2 * n < count ? "load" : "train";
      sample.bytes[static_cast<int>(Category::weights)] = int64_t{1'000'000} * (n + 1);
      sample.peak = sample.total() + 5;
      sample.host = 7'000'000;
      if (2 * n >= count) sample.step = n;
      if (gpu) sample.device_used = 9'000'000 + n;
      memory << memory_line(sample).dump() << "\n";
    }
  }
  nlohmann::json page_data() const {
    const std::string page = read(fs::path(out()) / "report.html"), begin = "id=\"data\">";
    const size_t from = page.find(begin) + begin.size();
    return nlohmann::json::parse(page.substr(from, page.find("</script>", from) - from));
  }

  fs::path dir_;
  Sweep sweep_;
};

TEST_F(ReportTest, MemoryIsInThePage) {
  plan();
  run(0, 20, 4.0, "finished");
  run(1, 20, 4.0, "finished");
  remember(1, 4, true);
  std::ofstream(trial_dir(1) / "memory.jsonl", std::ios::app) << "not json\n{\"seconds\": 3}\n";
  nlohmann::json status = nlohmann::json::parse(read(trial_dir(1) / "status.json"));
  status["predicted_peak_bytes"] = 4'000'000;
  std::ofstream(trial_dir(1) / "status.json") << status.dump();
  const ReportResult result = write_report(out());
  ASSERT_EQ(result.notes.size(), 1u);
  EXPECT_THAT(result.notes[0],
              HasSubstr("r4-s1/memory.jsonl: 2 lines do not read and are left out"));
  const nlohmann::json data = page_data();
  EXPECT_EQ(data["categories"].size(), 7u);
  EXPECT_EQ(data["categories"][0], "weights");
  EXPECT_EQ(data["trials"][0]["memory"], nullptr);  // of a version that wrote none
  const nlohmann::json memory = data["trials"][1]["memory"];
  EXPECT_EQ(memory["damaged"], 2);
  EXPECT_EQ(memory["predicted"], 4'000'000);
  ASSERT_EQ(memory["moments"].size(), 4u);
  EXPECT_EQ(memory["moments"][2],
            nlohmann::json::parse("[2.0, \"train\", 2, [3000000, 0, 0, 0, 0, 0, 0], 3000000, "
                                  "3000005, 9000002, 7000000, false]"));
  EXPECT_EQ(memory["moments"][0][2], nullptr);  // no step
  ASSERT_EQ(memory["phases"].size(), 2u);
  EXPECT_EQ(memory["phases"][0], nlohmann::json({{"phase", "load"},
                                                 {"shared", false},
                                                 {"seconds", 2.0},
                                                 {"peak", 2'000'005},
                                                 {"device_used", 9'000'001},
                                                 {"host", 7'000'000}}));
  EXPECT_EQ(memory["phases"][1]["seconds"], 1.0);
}

TEST_F(ReportTest, LongMemoryIsThinnedToItsHighest) {
  plan();
  run(0, 20, 4.0, "finished");
  remember(0, 5000);
  write_report(out());
  const nlohmann::json moments = page_data()["trials"][0]["memory"]["moments"];
  ASSERT_EQ(moments.size(), 240u);
  EXPECT_EQ(moments[239][0], 4999.0);
  EXPECT_EQ(moments[0][4], 20 * 1'000'000);  // 5000 / 240 lines, the highest last
  EXPECT_EQ(moments[0][6], nullptr);         // on a CPU
}

// One process has loaded and trained up to 3 MB, the next one up to 2 MB.
TEST_F(ReportTest, AResumedTrialHasThePeakOfEachProcess) {
  plan();
  run(0, 20, 4.0, "finished");
  const auto append = [&](const char* phase, int64_t peak) {
    MemorySample sample;
    sample.phase = phase;
    sample.peak = peak;
    std::ofstream(trial_dir(0) / "memory.jsonl", std::ios::app)
        << memory_line(sample).dump() << "\n";
  };
  const auto memory = [&] {
    write_report(out());
    return page_data()["trials"][0]["memory"];
  };
  append("load", 9'000'000);
  append("load", 9'500'000);
  append("prepare", 1'000'000);
  append("train", 3'000'000);
  EXPECT_EQ(memory()["resumed"], false);
  EXPECT_EQ(memory()["before"], nullptr);
  append("load", 8'000'000);
  append("train", 2'000'000);
  EXPECT_EQ(memory()["resumed"], true);
  EXPECT_EQ(memory()["before"], 3'000'000);
  EXPECT_EQ(page_data()["trials"][0]["peak_bytes"], 1'500'000'000);
}

// What status.json of a running trial says is from its beginning.
TEST_F(ReportTest, OfARunningTrialWhatIsKnownSoFar) {
  plan();
  run(0, 7, 4.0, "running");
  std::ofstream(trial_dir(0) / "status.json")
      << R"({"status": "running", "trainable_params": 1000, "steps": 4, "total_steps": 20,
             "trained_tokens": 400, "tokens_per_s": 0.0, "peak_bytes": 5, "gang_size": 1})";
  auto lock = FileLock::take((trial_dir(0) / "lock").string(), false);
  const auto row = [&] {
    write_report(out());
    return lines(read(fs::path(out()) / "summary.csv"))[1];
  };
  EXPECT_EQ(row(), "r4-s0,4,\"[q_proj, v_proj]\",0,1000,7,700,3.3,,4,3.3,,,1,running");
  remember(0, 6);
  EXPECT_THAT(row(), HasSubstr(",,6000005,1,running"));  // not that of loading
  EXPECT_THAT(read(fs::path(out()) / "summary.md"), HasSubstr("| running, step 7 of 20 |"));
  EXPECT_THAT(summary_table(out()), HasSubstr("running, step 7 of 20\n"));
  EXPECT_EQ(page_data()["trials"][0]["status_text"], "running, step 7 of 20");
  EXPECT_EQ(page_data()["trials"][1]["status_text"], "pending");
  // Its process was killed.
  lock.reset();
  EXPECT_THAT(row(), HasSubstr(",7,700,3.3,,4,3.3,,6000005,1,interrupted"));
  EXPECT_EQ(page_data()["trials"][0]["status_text"], "interrupted, step 7 of 20");
  fs::remove(trial_dir(0) / "lock");
  EXPECT_THAT(row(), HasSubstr(",interrupted"));
  EXPECT_FALSE(fs::exists(trial_dir(0) / "lock"));
}

TEST_F(ReportTest, ATrialWithoutAStepHasNoSpeed) {
  plan();
  fs::create_directories(trial_dir(0));
  std::ofstream(trial_dir(0) / "status.json")
      << R"({"status": "interrupted", "trainable_params": 1000, "steps": 0, "total_steps": 20,
             "trained_tokens": 0, "tokens_per_s": 0.0, "peak_bytes": 5, "gang_size": 1})";
  write_report(out());
  EXPECT_EQ(lines(read(fs::path(out()) / "summary.csv"))[1],
            "r4-s0,4,\"[q_proj, v_proj]\",0,1000,0,0,,,,,,5,1,interrupted");
  EXPECT_EQ(page_data()["trials"][0]["tokens_per_s"], nullptr);
}

TEST_F(ReportTest, TheMedianSpeedIsOfTrialsThatHaveOne) {
  plan();
  const auto median = [&] {
    write_report(out());
    return page_data()["median_tokens_per_s"];
  };
  EXPECT_EQ(median(), nullptr);
  const double speeds[] = {1000, 0, 400, 500};  // 0: interrupted before its first step
  for (size_t i = 0; i < 4; ++i) {
    run(i, 20, 4.0, "finished");
    nlohmann::json status = nlohmann::json::parse(read(trial_dir(i) / "status.json"));
    status["tokens_per_s"] = speeds[i];
    std::ofstream(trial_dir(i) / "status.json") << status.dump();
  }
  EXPECT_EQ(median(), 500);
  fs::remove_all(trial_dir(2));
  EXPECT_EQ(median(), 750);
}

TEST_F(ReportTest, GangsHaveNumbersWhereThereAreSome) {
  plan();
  for (size_t i = 0; i < 4; ++i) run(i, 20, 4.0, "finished");
  const auto train_with = [&](size_t i, const char* gang, int size) {
    nlohmann::json status = nlohmann::json::parse(read(trial_dir(i) / "status.json"));
    status["gang"] = gang;
    status["gang_size"] = size;
    std::ofstream(trial_dir(i) / "status.json") << status.dump();
  };
  const auto rows = [&] {
    write_report(out());
    return lines(read(fs::path(out()) / "summary.csv"));
  };
  EXPECT_THAT(rows()[0], HasSubstr("gang_size,status"));  // of a version that wrote no names
  for (size_t i = 0; i < 4; ++i) train_with(i, std::to_string(i).c_str(), 1);
  EXPECT_THAT(rows()[0], HasSubstr("gang_size,status"));
  train_with(0, "r4-s0", 2);
  train_with(2, "r4-s0", 2);
  EXPECT_THAT(rows()[0], HasSubstr("gang_size,gang,status"));
  EXPECT_THAT(rows()[1], HasSubstr(",2,1,finished"));
  EXPECT_THAT(rows()[2], HasSubstr(",1,,finished"));
  EXPECT_THAT(rows()[3], HasSubstr(",2,1,finished"));
  EXPECT_THAT(summary_table(out()), HasSubstr("gang_size  gang  status"));
}

// A finished trial keeps what it was run with, whatever was asked for since.
TEST_F(ReportTest, SettingsAreThoseOfTheRuns) {
  plan();
  const auto recompute = [&]() -> std::string {
    write_report(out());
    const nlohmann::json data = page_data();
    for (const auto& setting : data["shared"])
      if (setting[0] == "train.recompute") return setting[1];
    return "";
  };
  EXPECT_EQ(recompute(), "none");
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(recompute(), i == 0 ? "none" : "");  // differs between trials
    run(i, 20, 4.0, "finished");
    Config config = sweep_.trials[i].config;
    config.train.recompute = "full";
    std::ofstream(trial_dir(i) / "config.yaml") << to_yaml(config);
  }
  EXPECT_EQ(recompute(), "full");
  std::ofstream(trial_dir(0) / "config.yaml") << "lora: {rank_of_another_version: 3}";
  EXPECT_EQ(recompute(), "");
}

TEST_F(ReportTest, CsvHasOneRowPerTrialInTheOrderOfThePlan) {
  plan();
  run(0, 20, 4.0, "finished");
  run(1, 20, 3.5, "finished");
  run(2, 3, 5.0, "failed");
  write_report(out());
  const auto rows = lines(read(fs::path(out()) / "summary.csv"));
  ASSERT_EQ(rows.size(), 5u);
  EXPECT_EQ(rows[0],
            "trial,lora.r,lora.targets,seed,trainable_params,steps,trained_tokens,train_loss,"
            "eval_loss,eval_loss_0,best_eval_loss,tokens_per_s,peak_bytes,gang_size,status,error");
  EXPECT_EQ(rows[1],
            "r4-s0,4,\"[q_proj, v_proj]\",0,1000,20,2000,2.05,2,4,2,1234.5,1500000000,2,finished,");
  EXPECT_THAT(rows[3], HasSubstr(",5,4.7,1234.5,1500000000,2,failed,"));  // no eval_loss at the end
  EXPECT_EQ(rows[4], "r8-s1,8,\"[q_proj, v_proj]\",1,,,,,,,,,,,pending,");
}

// metrics.jsonl may have every tenth step alone.
TEST_F(ReportTest, TrainLossIsTheRunsOwn) {
  plan();
  run(0, 20, 4.0, "finished");
  nlohmann::json status = nlohmann::json::parse(read(trial_dir(0) / "status.json"));
  status["train_loss"] = 2.125;
  std::ofstream(trial_dir(0) / "status.json") << status.dump();
  write_report(out());
  EXPECT_THAT(lines(read(fs::path(out()) / "summary.csv"))[1], HasSubstr(",20,2000,2.125,2,4,2,"));
}

TEST_F(ReportTest, MarkdownIsSortedAndAveragesOverSeeds) {
  plan();
  run(0, 20, 4.0, "finished");
  run(1, 20, 3.5, "finished");
  run(2, 20, 3.0, "finished");
  run(3, 3, 5.0, "failed");
  write_report(out());
  const std::string text = read(fs::path(out()) / "summary.md");
  EXPECT_LT(text.find("| r8-s0 |"), text.find("| r4-s1 |"));
  EXPECT_LT(text.find("| r4-s1 |"), text.find("| r4-s0 |"));
  EXPECT_LT(text.find("| r4-s0 |"), text.find("| r8-s1 |"));
  EXPECT_THAT(text, HasSubstr("| 4 | [q_proj, v_proj] | 2 | 1.8000 ± 0.3536 | 1.7500 ± 0.3536 |"));
  EXPECT_THAT(text, HasSubstr("- r8-s1: diverged at step 3"));
  EXPECT_THAT(text, HasSubstr("1.50 GB"));
  EXPECT_THAT(summary_table(out()), HasSubstr("r8-s0  1,000"));
}

TEST_F(ReportTest, PageIsSelfContainedAndSafe) {
  plan();
  run(0, 20, 4.0, "finished");
  run(2, 3, 5.0, "failed");
  const ReportResult result = write_report(out());
  EXPECT_TRUE(result.notes.empty());
  EXPECT_EQ(result.files.size(), 3u);
  const std::string page = read(fs::path(out()) / "report.html");
  EXPECT_THAT(page, HasSubstr("/* CHART */"));
  EXPECT_THAT(page, HasSubstr("<title>ranks &lt;b>"));
  EXPECT_THAT(page, Not(HasSubstr("src=")));
  EXPECT_THAT(page, Not(HasSubstr("href=")));
  EXPECT_THAT(page, Not(HasSubstr("</script><b>")));
  EXPECT_THAT(page, HasSubstr("diverged at step 3: loss nan \\u003c/script>"));
  size_t closing = 0;
  for (size_t at = 0; (at = page.find("</script", at)) != std::string::npos; ++at) ++closing;
  EXPECT_EQ(closing, 3u);
  const nlohmann::json data = page_data();
  EXPECT_EQ(data["trials"].size(), 4u);
  EXPECT_EQ(data["trials"][0]["train"].size(), 20u);
  EXPECT_EQ(data["trials"][0]["eval"], nlohmann::json::parse("[[0,0,4.0],[20,2000,2.0]]"));
  EXPECT_EQ(data["trials"][1]["eval_loss"], nullptr);
  EXPECT_EQ(data["environment"]["device"], "a \"CPU\"");
}

// They have no chart of their own; an alpha that one trial sets itself has.
TEST_F(ReportTest, ThePageKnowsDerivedKeys) {
  const auto derived = [&](const std::string& more) {
    const std::string file = (dir_ / "sweep.yaml").string();
    std::ofstream(file) << R"(
base: {model: {path: "synthetic:tiny"}, data: {train: synthetic}}
parameters: {lora.r: {values: [4, 8]}}
derived: {lora.alpha: 2*lora.r}
)" << more;
    sweep_ = load_sweep(file, {});
    std::vector<std::string> directories;
    for (const Trial& trial : sweep_.trials) directories.push_back(trial.name);
    write_plan(out(), sweep_, directories, {});
    write_report(out());
    const nlohmann::json data = page_data();
    EXPECT_EQ(data["keys"], nlohmann::json({"lora.r", "lora.alpha"}));
    return data["derived"];
  };
  EXPECT_EQ(derived(""), nlohmann::json::array({"lora.alpha"}));
  EXPECT_EQ(derived("include: [{lora.r: 16}]"), nlohmann::json::array({"lora.alpha"}));
  EXPECT_EQ(derived("include: [{lora.r: 4, lora.alpha: 1}]"), nlohmann::json::array());
}

TEST_F(ReportTest, LongCurvesAreThinned) {
  plan();
  run(0, 5000, 1000.0, "finished");
  write_report(out());
  const nlohmann::json data = page_data();
  EXPECT_EQ(data["trials"][0]["train"].size(), 600u);
  EXPECT_EQ(data["trials"][0]["train"][599][0], 5000);
}

TEST_F(ReportTest, WithoutChartJsTheRestIsWritten) {
  plan();
  run(0, 20, 4.0, "finished");
  setenv("QLAB_CHARTJS", (dir_ / "gone.js").c_str(), 1);
  const ReportResult result = write_report(out());
  ASSERT_EQ(result.notes.size(), 1u);
  EXPECT_THAT(result.notes[0], HasSubstr("apt-get install libjs-chart.js"));
  EXPECT_EQ(result.files.size(), 3u);
  EXPECT_THAT(read(fs::path(out()) / "report.html"), HasSubstr("libjs-chart.js"));
}

TEST_F(ReportTest, HalfWrittenTrialsDoNotStopTheReport) {
  plan();
  run(0, 20, 4.0, "finished");
  fs::create_directories(trial_dir(1));
  std::ofstream(trial_dir(1) / "status.json") << "{\"status\": \"fin";
  std::ofstream(trial_dir(1) / "metrics.jsonl")
      << "{\"step\":1,\"loss\":2.5,\"tokens\":7}\n{\"step\":2,\"loss\":null,\"tokens\":9}\n"
      << "[1]\nnot json\n{\"step\":3,\"lo";
  std::ofstream(trial_dir(2)) << "a file where a directory should be";
  fs::create_directories(fs::path(out()) / "trials" / "ffffffff-older");
  const ReportResult result = write_report(out());
  ASSERT_EQ(result.notes.size(), 2u);
  EXPECT_THAT(result.notes[0], HasSubstr("status.json does not read"));
  EXPECT_THAT(result.notes[1], HasSubstr("1 other directory in "));
  const auto rows = lines(read(fs::path(out()) / "summary.csv"));
  EXPECT_EQ(rows[2], "r4-s1,4,\"[q_proj, v_proj]\",1,,1,7,2.5,,,,,,,unreadable");
}

TEST_F(ReportTest, NotAResultsDirectory) {
  EXPECT_THROW(write_report(out()), Error);
  fs::create_directories(out());
  for (const char* text : {"a: 1", "sweep: {}\ntrials: [7]", "sweep: {}\ntrials: [{}]\nx: ["}) {
    std::ofstream(fs::path(out()) / "plan.yaml") << text;
    EXPECT_THROW(write_report(out()), Error) << text;
  }
}

}  // namespace
}  // namespace qlab
