// qlab memory, and runs that do not fit, as a user meets them.
#include <regex>

#include "experiments/planner.h"
#include "tests/support/command.h"

namespace qlab::test {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

class MemoryCommandTest : public CommandTest {};

TEST_F(MemoryCommandTest, MemoryTables) {
  const Ended shown = run({"memory", "--table", "llama31-8b"});
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_THAT(shown.out, AllOf(HasSubstr("5.70 GB"), HasSubstr("+109,051,904 B 8-bit scales"),
                               HasSubstr("measured: unreadable: bench/results/memory.json: "),
                               HasSubstr("name it by --measured")));
  const std::string page = folder_ / "table.html";
  const Ended written = run({"memory", "--table", "qlora-fig6", "--format", "html", "--out", page});
  EXPECT_EQ(written.out, page + "\n");
  EXPECT_THAT(read_text_file(page), AllOf(StartsWith("<!doctype html>"), HasSubstr("<svg")));
  expect_refused({"memory"},
                 {"give a YAML file, a model, --check DIR, or --table", "llama31-8b, llama2-7b"});
  expect_refused({"memory", "--table", "qlora"}, {"--table qlora", "qlora-7b, qlora-fig6"});
  expect_refused({"memory", "--table", "qlora-7b", "--format", "pdf"},
                 {"--format pdf", "text, md, csv, tex, html"});
  expect_refused({"memory", "synthetic:tiny", "--table", "qlora-7b"},
                 {"--table qlora-7b", "leave out synthetic:tiny"});
  expect_refused({"memory", "--table", "qlora-7b", "--json"}, {"leave out", "--json"});
  expect_refused({"memory", "synthetic:tiny", "--format", "csv"}, {"--format", "--table"});
  expect_refused({"memory", "--check", ".", "--measured", "m.json"}, {"--measured", "--check"});
  expect_refused({"memory", "synthetic:tiny", "--measured", "m.json"}, {"--measured", "--table"});
  expect_refused({"memory", "--table", "qlora-7b", "--out", "gone/table.txt"}, {"gone/table.txt"});
}

TEST_F(MemoryCommandTest, WhatCannotFitIsRefusedBeforeAnythingIsWritten) {
  const Arguments train = {"train", run_file(), "--device", "cpu", "--device-memory", "1MB"};
  const Ended refused = run(train);
  EXPECT_EQ(refused.code, 2);
  EXPECT_THAT(refused.err,
              AllOf(HasSubstr("does not fit"), HasSubstr("has 1.00 MB"), HasSubstr("--force")));
  EXPECT_TRUE(fs::is_empty(work_));
  const Ended wrong = run({"train", run_file(), "--device-memory", "much"});
  EXPECT_EQ(wrong.code, 2);
  EXPECT_THAT(wrong.err, HasSubstr("--device-memory much: no number of bytes; give bytes"));
}

TEST_F(MemoryCommandTest, ABudgetBelowTheMinimumIsRefusedUnlessForced) {
  Arguments train = {
      "train", run_file("train: {steps: 2}\n"), "--device", "cpu",
      "--set", "train.recompute=auto",          "--set",    "train.memory_budget=100kB"};
  const Ended refused = run(train);
  EXPECT_EQ(refused.code, 2);
  EXPECT_THAT(refused.err,
              AllOf(HasSubstr("and its budget has 100.00 kB"), HasSubstr("leanest plan"),
                    HasSubstr("(weights "), HasSubstr("--force")));
  EXPECT_TRUE(fs::is_empty(work_));
  train.push_back("--force");
  const Ended forced = run(train);
  EXPECT_EQ(forced.code, 0) << forced.err;
}

// With recompute: auto a run leaves 1 GiB, of small GPUs an eighth, to other programs.
TEST_F(MemoryCommandTest, MemoryFitsWhereTheRunWouldBeAccepted) {
  const auto memory = [&](int64_t capacity, const std::vector<std::string>& sets) {
    const int64_t context = find_gpu("1GiB").context_bytes;
    Arguments arguments = {"memory",
                           "synthetic:tiny",
                           "--json",
                           "--gpu",
                           std::to_string(capacity + context),
                           "--set",
                           "lora.r=4",
                           "--set",
                           "data.train=synthetic"};
    for (const std::string& set : sets) arguments.insert(arguments.end(), {"--set", set});
    const Ended ended = run(arguments);
    EXPECT_EQ(ended.code, 0) << ended.err;
    return nlohmann::json::parse(ended.out);
  };
  const std::string planned = "train.recompute=auto", full = "train.recompute=full";
  constexpr int64_t plenty = int64_t{1} << 30;
  const auto too_little = memory(plenty, {planned, "train.memory_budget=1000B"});
  EXPECT_EQ(too_little["fits"], false);
  const int64_t least = too_little["peak_bytes"], barely = least + least / 16;
  const auto refused = memory(barely, {planned});
  EXPECT_EQ(refused["budget_bytes"], barely - barely / 8);
  EXPECT_EQ(refused["fits"], false);
  const auto accepted = memory(least + least / 6, {planned});
  EXPECT_EQ(accepted["fits"], true);
  EXPECT_LE(accepted["peak_bytes"], accepted["budget_bytes"]);
  const Ended told = run({"memory", "synthetic:tiny", "--gpu", "24GiB", "--set", "lora.r=4",
                          "--set", planned, "--set", "train.memory_budget=1000B"});
  EXPECT_THAT(told.out,
              AllOf(HasSubstr("the least that this run can take is " + format_minimum(least)),
                    HasSubstr("set train.memory_budget to " + format_minimum(least) + " or more"),
                    Not(HasSubstr("a larger GPU"))));
  const int64_t peak = memory(plenty, {full})["peak_bytes"];
  EXPECT_EQ(memory(peak, {full})["fits"], true);
  EXPECT_EQ(memory(peak - 1, {full})["fits"], false);
}

// Who gives what a refusal names gives enough, whatever its last digit was rounded to.
TEST_F(MemoryCommandTest, TheLeastThatIsNamedIsEnough) {
  const auto with = [&](const std::string& command, const std::string& what,
                        const std::string& budget) {
    Arguments arguments = {command,    what,
                           "--device", "cpu",
                           "--set",    "train.recompute=auto",
                           "--set",    "train.memory_budget=" + budget,
                           "--set",    "data.train=synthetic",
                           "--set",    "data.eval=null",
                           "--set",    "train.steps=1"};
    if (command == "memory") arguments.insert(arguments.end(), {"--set", "lora.r=5", "--json"});
    return run(arguments);
  };
  const std::string file = folder_.write("one.yaml",
                                         "model: {path: \"synthetic:tiny\"}\n"
                                         "lora: {r: 5}\n");
  const auto small = nlohmann::json::parse(with("memory", "synthetic:tiny", "1kB").out);
  const int64_t least = small["peak_bytes"];
  ASSERT_LT(*parse_bytes(format_bytes(least)), least) << "rounded up anyway";
  EXPECT_EQ(with("train", file, format_bytes(least)).code, 2);
  const Ended refused = with("train", file, "1kB");
  EXPECT_EQ(refused.code, 2);
  std::smatch named;
  ASSERT_TRUE(std::regex_search(refused.err, named, std::regex("(\\d+\\.\\d+ MB) at its peak")))
      << refused.err;
  EXPECT_EQ(named[1], format_minimum(least));
  const Ended enough = with("train", file, named[1]);
  EXPECT_EQ(enough.code, 0) << enough.err;
}

// What a run is refused with is what is said before: the settings, and their price.
TEST_F(MemoryCommandTest, ARefusedRunNamesTheRemedyThatMemoryNames) {
  for (const char* recompute : {"none", "auto"}) {
    const std::string file = folder_.write(
        "large.yaml", fmt::format("model: {{path: \"synthetic:tiny\"}}\nlora: {{r: 4}}\ndata: "
                                  "{{train: synthetic}}\ntrain: {{steps: 1, recompute: {}}}\n",
                                  recompute));
    const auto asked = [&](const std::string& command) {
      return run({command, file, "--device", "cpu", "--device-memory", "9MB"});
    };
    std::smatch remedy;
    const std::string foretold = asked("memory").out;
    ASSERT_TRUE(std::regex_search(foretold, remedy, std::regex("would fit with --set .*")))
        << foretold;
    const Ended trained = asked("train");
    EXPECT_EQ(trained.code, 2);
    EXPECT_THAT(trained.err, AllOf(HasSubstr(remedy[0]), HasSubstr("has 9.00 MB")));
    EXPECT_EQ(trained.err.find("leanest plan") != std::string::npos,
              std::string_view(recompute) == "auto");
  }
}

// Gangs are forecast as the run has them, and why is said by both.
TEST_F(MemoryCommandTest, AGangThatDoesNotFitIsForecastInHalves) {
  const std::string file = folder_.write(
      "gangs.yaml",
      "base: {model: {path: \"synthetic:tiny\"}, lora: {r: 64}, data: {train: synthetic}, "
      "train: {steps: 1}}\nparallel: {trials_per_gpu: 4}\nseeds: [0, 1, 2, 3]\n");
  const auto peak = [&](const std::string& trials) {
    return int64_t{nlohmann::json::parse(
        run({"memory", "synthetic:tiny", "--device", "cpu", "--json", "--set", "lora.r=64", "--set",
             "data.train=synthetic", "--set", "parallel.trials_per_gpu=" + trials})
            .out)["peak_bytes"]};
  };
  const int64_t two = peak("2");
  ASSERT_LT(two, peak("4"));
  Arguments sweep = {"sweep", file, "--device", "cpu", "--device-memory", fmt::format("{}B", two)};
  const Ended ran = run(sweep);
  EXPECT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("a gang of 4 does not fit; trying halves"));
  for (const auto& trial : fs::directory_iterator(work_ + "/runs/gangs/trials"))
    EXPECT_EQ(nlohmann::json::parse(read_text_file(trial.path() / "status.json"))["gang_size"], 2);
  sweep.emplace_back("--dry-run");
  EXPECT_THAT(
      run(sweep).out,
      AllOf(testing::ContainsRegex("s0  0     1     .*s1  1     1     .*\n.*s2  2     2     "
                                   ".*\n.*s3  3     2     "),
            HasSubstr("all 4 trials: a gang of 4 does not fit: in halves\n")));
}

// As train has it: of the allocator, without room for a context.
TEST_F(MemoryCommandTest, MemoryWithinDeviceMemory) {
  const auto memory = [&](const std::string& bytes) {
    return run({"memory", "synthetic:tiny", "--json", "--device", "cpu", "--device-memory", bytes,
                "--set", "lora.r=4", "--set", "data.train=synthetic", "--set", "train.steps=1"});
  };
  expect_refused({"memory", "synthetic:tiny", "--device-memory", "much"},
                 {"--device-memory much: no number of bytes; give bytes"});
  const auto roomy = nlohmann::json::parse(memory("1GiB").out);
  EXPECT_EQ(roomy["device_memory_bytes"], int64_t{1} << 30);
  EXPECT_EQ(roomy["fits"], true);
  const int64_t peak = roomy["peak_bytes"];
  for (const int64_t bytes : {peak - 1, peak}) {
    EXPECT_EQ(nlohmann::json::parse(memory(fmt::format("{}B", bytes)).out)["fits"], bytes == peak);
    const std::string file =
        folder_.write("fits.yaml",
                      "model: {path: \"synthetic:tiny\"}\nlora: {r: 4}\ndata: {train: synthetic}\n"
                      "train: {steps: 1, save_every: 0}\n");
    EXPECT_EQ(
        run({"train", file, "--device", "cpu", "--device-memory", fmt::format("{}B", bytes)}).code,
        bytes == peak ? 0 : 2);
  }
  const Ended text = run({"memory", "synthetic:llama-3.1-8b", "--gpu", "h100-80gb", "--set",
                          "lora.r=16", "--device-memory", "9GiB"});
  EXPECT_THAT(text.out, AllOf(HasSubstr("--device-memory"), HasSubstr("would fit with --set")));
}

TEST_F(MemoryCommandTest, MemoryNeedsNoGpu) {
  const Ended text = run({"memory", "synthetic:llama-3.1-8b", "--gpu", "rtx3090", "--set",
                          "lora.r=16", "--set", "data.seq_len=2048"});
  ASSERT_EQ(text.code, 0) << text.err;
  EXPECT_THAT(text.out, AllOf(HasSubstr("does not fit"), HasSubstr("would fit with --set"),
                              HasSubstr("the largest tensors then"), HasSubstr("lm_head")));
  const Ended json = run({"memory", "synthetic:llama-3.1-8b", "--set", "quant.type=nf4", "--json"});
  ASSERT_EQ(json.code, 0) << json.err;
  const auto said = nlohmann::json::parse(json.out);
  EXPECT_EQ(said["footprint_bytes"], 5591539712);
  EXPECT_EQ(said["trainable_params"], 0);
  EXPECT_EQ(said["peak_bytes"], said["timeline"][0]["peak_bytes"]);
  for (const char* of_step :
       {"plan", "step_seconds", "micro_batch_seconds", "update_seconds", "step_tokens"})
    EXPECT_EQ(said.at(of_step), nullptr) << of_step;
  const Ended small = run(
      {"memory", "synthetic:llama-3.1-8b", "--gpu", "4GiB", "--set", "quant.type=nf4", "--json"});
  EXPECT_EQ(nlohmann::json::parse(small.out)["fits_with"]["step_seconds"], nullptr);
  const Ended table = run({"memory",
                           folder_.write("sweep.yaml",
                                         "base: {model: {path: \"synthetic:tiny\"}, lora: {r: 4}, "
                                         "data: {train: synthetic}}\nseeds: [0, 1]\n"),
                           "--device", "cpu"});
  EXPECT_THAT(table.out, AllOf(HasSubstr("2 trials"), HasSubstr("predicted for"))) << table.err;
  for (const Arguments& bad : {Arguments{"memory", "synthetic:nothing"},
                               {"memory", "synthetic:tiny", "--gpu", "abacus"},
                               {"memory", "nothing.yaml"}}) {
    const Ended ended = run(bad);
    EXPECT_EQ(ended.code, 2) << bad.back();
    EXPECT_FALSE(ended.err.empty());
  }
}

// A T4 has no bf16: auto is fp16 there, and has fp16's bytes, which with dropout are not bf16's.
TEST_F(MemoryCommandTest, MemoryComputesInWhatTheGpuHas) {
  const auto memory = [&](const std::string& compute) {
    return run({"memory", "synthetic:tiny", "--gpu", "t4", "--json", "--set", "lora.r=16", "--set",
                "lora.dropout=0.1", "--set", "train.recompute=full", "--set",
                "quant.compute_dtype=" + compute});
  };
  const Ended of_auto = memory("auto"), fp16 = memory("fp16"), bf16 = memory("bf16");
  ASSERT_EQ(of_auto.code, 0) << of_auto.err;
  EXPECT_EQ(of_auto.out, fp16.out);
  EXPECT_EQ(bf16.code, 2);
  EXPECT_THAT(bf16.err, AllOf(HasSubstr("quant.compute_dtype: bf16 needs"),
                              HasSubstr("compute capability 7.5"), HasSubstr("set fp16 or auto")));
  const Ended ampere =
      run({"memory", "synthetic:tiny", "--gpu", "a100-40gb", "--json", "--set", "lora.r=16",
           "--set", "lora.dropout=0.1", "--set", "train.recompute=full"});
  EXPECT_NE(nlohmann::json::parse(ampere.out)["peak_bytes"],
            nlohmann::json::parse(fp16.out)["peak_bytes"]);
}

TEST_F(MemoryCommandTest, MemoryIsCheckedAfterARun) {
  ASSERT_EQ(run({"train", run_file("train: {steps: 2}\n"), "--device", "cpu"}).code, 0);
  const Ended equal = run({"memory", "--check", "runs/run"});
  EXPECT_EQ(equal.code, 0) << equal.out << equal.err;
  EXPECT_THAT(equal.out, HasSubstr("1 of 1 finished trial took what was predicted"));
  const fs::path trial = fs::directory_iterator(work_ + "/runs/run/trials")->path();
  const std::string file = trial.string() + "/status.json";
  auto status = nlohmann::json::parse(read_text_file(file));
  status["predicted_peak_bytes"] = status["predicted_peak_bytes"].get<int64_t>() + 256;
  write_file_atomically(file, status.dump());
  const Ended differs = run({"memory", "--check", trial.string(), "--json"});
  EXPECT_EQ(differs.code, 1);
  const auto said = nlohmann::json::parse(differs.out);
  EXPECT_EQ(said["trials"][0]["training"]["difference_bytes"], -256);
  EXPECT_EQ(said["trials"][0]["loading"]["difference_bytes"], 0);
  for (const Arguments& bad : {Arguments{"memory", "--check", "nowhere"},
                               {"memory", "--check", "runs"},
                               {"memory", "--check", "runs/run", "--gpu", "t4"},
                               {"memory", "synthetic:tiny", "--check", "runs/run"},
                               {"memory"}}) {
    const Ended ended = run(bad);
    EXPECT_EQ(ended.code, 2) << testing::PrintToString(bad);
    EXPECT_THAT(ended.err, StartsWith("qlab: "));
  }
}

}  // namespace
}  // namespace qlab::test
