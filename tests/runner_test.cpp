#include "experiments/runner.h"

#include <sys/resource.h>
#include <unistd.h>

#include "tests/support/training.h"

namespace qlab::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
namespace fs = std::filesystem;

class RunnerTest : public TrainingTest {
 protected:
  /// A sweep over the tiny model; `rest` follows the base.
  RunnerResult sweep(const std::string& rest, const std::vector<std::string>& sets = {},
                     const TrainCallbacks& callbacks = {}, const std::string& shard = "") {
    const std::string file = folder_.write(
        "sweep.yaml",
        "base:\n  model: {path: \"synthetic:tiny\"}\n  lora: {r: 4}\n  data: {train: " + train_ +
            ", eval: " + eval_ +
            ", seq_len: 64, eval_seq_len: 64}\n  train: {steps: 4, batch_size: 3}\n  "
            "optim: {lr: 5e-3}\n" +
            rest);
    printed_.clear();
    return run_sweep(
        load_sweep(file, sets), {folder_ / "out", device(), shard, false, force_},
        [&](const std::string& line) { printed_ += line + "\n"; }, callbacks);
  }
  bool force_ = false;  // --force
  std::vector<std::string> directories() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_ / "out/trials"))
      names.push_back(entry.path().string());
    std::sort(names.begin(), names.end());
    return names;
  }
  /// status.json of the trials in one state.
  std::vector<nlohmann::json> with_status(const std::string& state) const {
    std::vector<nlohmann::json> found;
    for (const std::string& dir : directories()) {
      found.push_back(nlohmann::json::parse(read_text_file(dir + "/status.json")));
      if (found.back()["status"] != state) found.pop_back();
    }
    return found;
  }

  std::string printed_;
};

TEST(Setup, EvaluationsLeft) {
  for (int64_t total = 1; total <= 12; ++total)
    for (int64_t every = 0; every <= 13; ++every)
      for (int64_t step = 1; step <= total; ++step) {
        int64_t due = 0;
        for (int64_t at = step; step < total && at <= total; ++at)
          due += at == total || (every > 0 && at % every == 0);
        EXPECT_EQ(evaluations_left(step, total, every), due) << step << " of " << total;
      }
}

TEST_P(RunnerTest, FinishedTrialsAreSkipped) {
  const std::string rest = "parameters: {lora.r: {values: [2, 4]}}\n";
  const RunnerResult first = sweep(rest);
  EXPECT_EQ(first.finished, 2);
  EXPECT_EQ(first.failed, 0);
  std::map<std::string, fs::file_time_type> written;
  for (const std::string& dir : directories())
    written[dir] = fs::last_write_time(dir + "/metrics.jsonl");
  EXPECT_EQ(written.size(), 2u);
  const RunnerResult second = sweep(rest);
  EXPECT_EQ(second.finished, 2);
  EXPECT_EQ(printed_.find("model "), std::string::npos) << "the model was loaded for nothing";
  for (const auto& [dir, time] : written)
    EXPECT_EQ(fs::last_write_time(dir + "/metrics.jsonl"), time);
  // One more value trains one more trial; logging is no part of a trial.
  EXPECT_EQ(sweep("parameters: {lora.r: {values: [2, 4, 8]}}\n", {"train.log_every=2"}).finished,
            3);
  EXPECT_EQ(directories().size(), 3u);
}

TEST_P(RunnerTest, EditedDataIsAnotherTrial) {
  EXPECT_EQ(sweep("").finished, 1);
  folder_.write("train.jsonl", examples(20, 3));
  EXPECT_EQ(sweep("").finished, 1);
  EXPECT_EQ(directories().size(), 2u);
  folder_.write("eval.jsonl", examples(5, 4));
  EXPECT_EQ(sweep("").finished, 1);
  EXPECT_EQ(directories().size(), 3u);
  EXPECT_EQ(sweep("").finished, 1);
  EXPECT_EQ(directories().size(), 3u);
}

TEST_P(RunnerTest, ATrialThatDivergesFailsAlone) {
  const RunnerResult result = sweep(
      "parallel: {trials_per_gpu: 2}\nparameters: {optim.lr: {values: [1e30, 1e-3, 2e-3]}}\n");
  EXPECT_EQ(result.finished, 2);
  EXPECT_EQ(result.failed, 1);
  EXPECT_FALSE(result.interrupted);
  ASSERT_EQ(with_status("failed").size(), 1u);
  EXPECT_THAT(with_status("failed")[0]["error"].get<std::string>(),
              AllOf(HasSubstr("diverged at step"), HasSubstr("optim.lr")));
  EXPECT_EQ(with_status("failed")[0]["gang_size"], 2);
  EXPECT_THAT(printed_, HasSubstr("failed: diverged"));
  EXPECT_THAT(read_text_file(folder_ / "out/summary.csv"),
              AllOf(HasSubstr(",status,error\n"), HasSubstr(",failed,\"diverged at step")));
}

TEST_P(RunnerTest, ARunningTrialTellsItsGangAndPeak) {
  std::vector<nlohmann::json> running;
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress&) {
    if (running.empty()) running = with_status("running");
  };
  sweep("parallel: {trials_per_gpu: 2}\nparameters: {lora.r: {values: [2, 4, 8]}}\n", {},
        callbacks);
  ASSERT_EQ(running.size(), 2u);
  std::map<std::string, int> gangs;
  for (const nlohmann::json& status : running) {
    EXPECT_EQ(status["gang"], "r2-s0");
    EXPECT_EQ(status["gang_size"], 2);
    EXPECT_GT(status["predicted_peak_bytes"], 0);
  }
  for (const nlohmann::json& status : with_status("finished")) ++gangs[status["gang"]];
  EXPECT_EQ(gangs, (std::map<std::string, int>{{"r2-s0", 2}, {"r8-s0", 1}}));
}

// On a CPU a copy of bf16 adapters is made beside all else, and the largest comes last.
TEST_P(RunnerTest, ThePeakOfAGangHasTheSavingOfAll) {
  sweep("parallel: {trials_per_gpu: 2}\nparameters: {lora.r: {values: [2, 3]}}\n",
        {"lora.dtype=bf16", "data.eval=\"\""});
  const auto finished = with_status("finished");
  ASSERT_EQ(finished.size(), 2u);
  for (const nlohmann::json& status : finished)
    EXPECT_EQ(status["peak_bytes"], status["predicted_peak_bytes"]);
}

TEST_P(RunnerTest, AGangThatIsSlowerThanItsHalvesIsHalved) {
  QLAB_SKIP_WITHOUT_PLANS();
  if (device().is_cuda()) GTEST_SKIP() << "the steps of a tiny model are launches on a GPU";
  const std::vector<std::string> sets = {"data.train=synthetic", "data.eval=\"\"",
                                         "data.seq_len=256",     "train.batch_size=8",
                                         "train.steps=1",        "train.recompute=auto"};
  Config lean = config(sets);
  lean.train.recompute = "full";
  const std::vector<PaperTrial> two(2, assumed_trial(lean, device()));
  const int64_t enough =
      plan_run(open_model(lean.model.path), two, device(), int64_t{1} << 40, rates_of(device()))
          .peak;
  const std::string gang = "parallel: {trials_per_gpu: 2}\nseeds: [0, 1]\n";
  std::vector<std::string> within = sets;
  within.push_back(fmt::format("train.memory_budget={}B", enough));
  EXPECT_EQ(sweep(gang, within).finished, 2);
  EXPECT_THAT(printed_, HasSubstr("a gang of 2 is predicted to take"));
  for (const auto& status : with_status("finished")) EXPECT_EQ(status["gang_size"], 1);
  fs::remove_all(folder_ / "out");
  EXPECT_EQ(sweep(gang, sets).finished, 2);
  for (const auto& status : with_status("finished")) EXPECT_EQ(status["gang_size"], 2);
}

TEST_P(RunnerTest, AnErrorInTheMiddleIsItsTrialsAlone) {
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress& p) {
    for (const std::string& dir : directories())
      if (p.name == "r4-s0" && dir.ends_with(p.name)) {
        fs::remove_all(dir + "/eval.json");
        fs::create_directories(dir + "/eval.json/in the way");
      }
  };
  const RunnerResult result = sweep(
      "parallel: {trials_per_gpu: 2}\nparameters: {lora.r: {values: [2, 4, 8]}}\n", {}, callbacks);
  EXPECT_EQ(result.finished, 2);
  EXPECT_EQ(result.failed, 1);
  ASSERT_EQ(with_status("failed").size(), 1u);
  EXPECT_THAT(with_status("failed")[0]["error"].get<std::string>(), HasSubstr("eval.json"));
  EXPECT_THAT(printed_, AllOf(HasSubstr("a gang of 2 failed: "), HasSubstr("r4-s0: failed: ")));
  EXPECT_THAT(read_text_file(folder_ / "out/summary.csv"), HasSubstr(",failed"));
}

TEST_P(RunnerTest, ATrialOfAnotherProcessIsSkippedAlone) {
  sweep("parameters: {lora.r: {values: [4]}}\n");
  const std::string dir = directories().at(0);
  const std::string four =
      "parallel: {trials_per_gpu: 2}\nparameters: {lora.r: {values: [2, 4, 8, 16]}}\n";
  fs::remove_all(dir);
  {
    const TrialFiles other(dir);
    const RunnerResult result = sweep(four);
    EXPECT_EQ(result.finished, 3);
    EXPECT_EQ(result.failed, 0);
    EXPECT_EQ(result.elsewhere, 1);
    EXPECT_EQ(result.interrupted, false);
    EXPECT_THAT(printed_, AllOf(HasSubstr("r4-s0: skipped: "), HasSubstr("another qlab process"),
                                HasSubstr("1 trial was skipped")));
    EXPECT_THAT(read_text_file(folder_ / "out/summary.csv"),
                AllOf(HasSubstr("r16-s0,16,"), HasSubstr("r4-s0,4,0,,,,,,,,,,,,pending")));
  }
  EXPECT_EQ(sweep(four).finished, 4);
}

// Two processes with one sweep: what the other has finished by the end counts.
TEST_P(RunnerTest, ASweepCanBeSharedWithoutShards) {
  const std::string rest = "parameters: {lora.r: {values: [2, 4, 8]}}\n";
  bool nested = false;
  RunnerResult second;
  std::string second_printed;
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress&) {
    if (std::exchange(nested, true)) return;
    second = sweep(rest);
    second_printed = std::exchange(printed_, "");
  };
  const RunnerResult first = sweep(rest, {}, callbacks);
  EXPECT_EQ(second.finished, 2);
  EXPECT_EQ(second.elsewhere, 1);
  EXPECT_THAT(second_printed, HasSubstr("r2-s0: skipped: "));
  EXPECT_EQ(first.finished, 3);
  EXPECT_EQ(printed_.find("r4-s0"), std::string::npos) << "trained again";
  EXPECT_EQ(with_status("finished").size(), 3u);
}

TEST_P(RunnerTest, ATrialThatDoesNotFitFailsAlone) {
  sweep("", {"optim.lr=1e-3"});
  const int64_t held = memory_account(device()).total;  // the map that all NF4 tensors share
  // A GPU takes no rank of more than some tens of millions, whatever its memory.
  const std::string rank = device().is_cuda() ? "20000000" : "2000000000";
  const std::string ranks = "parameters: {lora.r: {values: [2, " + rank + ", 4]}}\n";
  const RunnerResult result = sweep("parallel: {trials_per_gpu: 3}\n" + ranks);
  EXPECT_EQ(result.finished, 2);
  EXPECT_EQ(result.failed, 1);
  ASSERT_EQ(with_status("failed").size(), 1u);
  EXPECT_THAT(with_status("failed")[0]["error"].get<std::string>(),
              AllOf(HasSubstr("does not fit: the run would take"), HasSubstr("--force")));
  EXPECT_THAT(printed_, HasSubstr("a gang of 3 does not fit; trying halves"));
  force_ = true;
  sweep(ranks);
  ASSERT_EQ(with_status("failed").size(), 1u);
  EXPECT_THAT(with_status("failed")[0]["error"].get<std::string>(),
              AllOf(HasSubstr("out of memory"), HasSubstr("adapters asked for 17"),
                    HasSubstr("held: weights"), HasSubstr("train.batch_size")));
  EXPECT_EQ(memory_account(device()).total, held) << "something was not given back";
}

TEST_P(RunnerTest, ABatchThatDoesNotFitFailsBeforeItsFirstStep) {
  if (device().is_cuda()) GTEST_SKIP() << "the address space of the host is limited here";
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer ends the program where memory does";
#endif
  // 20000 examples of up to 64 tokens, of which 256 MB are left to hold the activations.
  std::ifstream pages("/proc/self/statm");
  rlim_t used = 0;
  pages >> used;
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &limit), 0);
  const rlimit before = limit;
  limit.rlim_cur = used * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) + (rlim_t{256} << 20);
  ASSERT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
  const RunnerResult result = sweep("parameters: {train.batch_size: {values: [2, 20000]}}\n");
  ASSERT_EQ(setrlimit(RLIMIT_AS, &before), 0);
  EXPECT_EQ(result.finished, 1);
  EXPECT_EQ(result.failed, 1);
  EXPECT_THAT(printed_, AllOf(HasSubstr("out of memory on cpu: a step asked for"),
                              HasSubstr("held: weights"), HasSubstr("optimizer")));
  EXPECT_EQ(printed_.find("step 1"), std::string::npos);
}

TEST_P(RunnerTest, LongExamplesAreCutAndCounted) {
  EXPECT_EQ(sweep("", {"data.seq_len=20", "train.steps=1"}).finished, 1);
  int64_t longer = 0;
  std::istringstream lines(examples(20, 1));
  for (std::string line; std::getline(lines, line);)
    longer += nlohmann::json::parse(line)["input_ids"].size() > 20;
  ASSERT_GT(longer, 0);
  EXPECT_THAT(printed_, HasSubstr(fmt::format("{} cut at 20 tokens", longer)));
}

TEST_P(RunnerTest, ShardsShareOneDirectory) {
  const std::string rest = "parameters: {lora.r: {values: [2, 4, 8]}}\n";
  sweep(rest, {}, {}, "1/2");
  EXPECT_EQ(with_status("finished").size(), 2u);
  EXPECT_EQ(sweep(rest, {}, {}, "2/2").finished, 1);
  EXPECT_EQ(with_status("finished").size(), 3u);
  EXPECT_EQ(read_text_file(folder_ / "out/summary.csv").find("pending"), std::string::npos);
}

TEST_P(RunnerTest, ADamagedStateFailsAlone) {
  const std::string rest = "parameters: {lora.r: {values: [2, 4]}}\n";
  bool stepped = false;
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress&) { stepped = true; };
  callbacks.stop = [&] { return stepped; };
  const RunnerResult interrupted = sweep(rest, {}, callbacks);
  EXPECT_TRUE(interrupted.interrupted);
  EXPECT_EQ(interrupted.finished + interrupted.failed, 0);
  ASSERT_EQ(directories().size(), 1u);
  folder_.write("damage", "short");
  fs::copy_file(folder_ / "damage", directories()[0] + "/state/state.safetensors",
                fs::copy_options::overwrite_existing);
  const RunnerResult result = sweep(rest);
  EXPECT_EQ(result.finished, 1);
  EXPECT_EQ(result.failed, 1);
  EXPECT_THAT(printed_, AllOf(HasSubstr("state.safetensors"), HasSubstr("remove "),
                              HasSubstr("to start this trial over")));
}

TEST_P(RunnerTest, AStateWithNumbersThatAreNoneFailsAlone) {
  bool stepped = false;
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress&) { stepped = true; };
  callbacks.stop = [&] { return stepped; };
  EXPECT_TRUE(sweep("", {}, callbacks).interrupted);
  const std::string file = directories().at(0) + "/state/state.safetensors";
  std::string state = read_text_file(file);
  const std::string key = "\"step\":\"";
  const size_t at = state.find(key);
  ASSERT_NE(at, std::string::npos);
  state[at + key.size()] = 'x';
  write_file_atomically(file, state);
  EXPECT_EQ(sweep("").failed, 1);
  EXPECT_THAT(printed_, HasSubstr("to start this trial over"));
}

TEST_P(RunnerTest, StopIsSeenWhileFilesAreReadAndTheBaseIsLoaded) {
  int64_t all = 0;
  TrainCallbacks callbacks;
  bool loaded = false;
  callbacks.evaluating = [&](const EvaluationProgress& p) {
    EXPECT_TRUE(p.base || loaded);
    loaded = true;
  };
  callbacks.stop = [&] { return all += !loaded, false; };
  EXPECT_EQ(sweep("", {}, callbacks).finished, 1);
  EXPECT_GT(all, 25 + 10);  // the examples, and the base's tensors
  fs::remove_all(folder_ / "out");
  for (int64_t after = 1; after <= all; after += 7) {
    int64_t asked = 0;
    callbacks.stop = [&] { return ++asked >= after; };
    bool thrown = false, interrupted = false;
    try {
      interrupted = sweep("", {}, callbacks).interrupted;
    } catch (const Interrupted&) {
      thrown = true;
      EXPECT_FALSE(fs::exists(folder_ / "out"));
    }
    EXPECT_TRUE(thrown || interrupted) << after;
  }
}

TEST_P(RunnerTest, RunsOfOneFileGather) {
  const auto train = [&](const std::vector<std::string>& sets, int64_t r = 4) {
    const std::string file = folder_.write(
        "one.yaml", "model: {path: \"synthetic:tiny\"}\ndata: {train: " + train_ +
                        ", seq_len: 64}\ntrain: {steps: 2, batch_size: 3}\nlora: {r: " +
                        std::to_string(r) + "}\n");
    printed_.clear();
    return run_sweep(load_sweep(file, sets), {folder_ / "out", device(), "", false},
                     [&](const std::string& line) { printed_ += line + "\n"; }, {});
  };
  const auto summary = [&] { return read_text_file(folder_ / "out/summary.csv"); };
  train({"lora.r=8"});
  EXPECT_THAT(summary(), HasSubstr("one-r8-s0,8,0,"));
  EXPECT_EQ(train({}).finished, 1);
  EXPECT_THAT(summary(), AllOf(HasSubstr("trial,lora.r,seed,"), HasSubstr("one-r8-s0,8,0,"),
                               HasSubstr("\none-s0,4,0,")));
  EXPECT_EQ(printed_.find("not reported"), std::string::npos) << printed_;
  train({}, 2);  // the file was edited
  train({"optim.lr=1e-3"}, 2);
  EXPECT_THAT(summary(), AllOf(HasSubstr("trial,lora.r,optim.lr,seed,"),
                               HasSubstr("one-r8-s0,8,0.0002,0,"), HasSubstr("\none-s0,4,"),
                               HasSubstr("\none-s0-2,2,"), HasSubstr("\none-lr1e-3-s0,2,0.001,")));
  const std::string before = summary();
  EXPECT_EQ(train({}, 2).finished, 1);
  EXPECT_THAT(printed_, HasSubstr("1 trial is finished already"));
  EXPECT_THAT(summary(), HasSubstr("\none-s0-2,2,"));
  // A trial has the name of its first run, also where the file has come to say what was set then.
  train({}, 8);
  EXPECT_THAT(summary(), AllOf(HasSubstr("\none-r8-s0,8,"), Not(HasSubstr("\none-s0,8,"))));
  // A trial whose folder is gone leaves the report with the next run.
  for (const std::string& dir : directories())
    if (dir.ends_with("one-r8-s0")) fs::remove_all(dir);
  train({}, 2);
  EXPECT_EQ(summary().find("one-r8"), std::string::npos);
}

// A run that is still loading its base is known by its directory.
TEST_P(RunnerTest, RunsThatBeginTogetherAreAllListed) {
  const std::string file =
      folder_.write("one.yaml", "model: {path: \"synthetic:tiny\"}\ndata: {train: " + train_ +
                                    ", seq_len: 64}\ntrain: {steps: 2, batch_size: 3}\n");
  const auto train = [&](const std::string& r, const TrainCallbacks& callbacks) {
    run_sweep(
        load_sweep(file, {"lora.r=" + r}), {folder_ / "out", device(), "", false},
        [](const std::string&) {}, callbacks);
  };
  bool loading = false;
  TrainCallbacks callbacks;
  callbacks.stop = [&] {
    if (!loading && fs::exists(folder_ / "out/plan.yaml")) {
      loading = true;
      EXPECT_FALSE(fs::exists(directories().at(0) + "/status.json"));
      train("8", {});
    }
    return false;
  };
  train("2", callbacks);
  EXPECT_TRUE(loading);
  EXPECT_THAT(read_text_file(folder_ / "out/summary.csv"),
              AllOf(HasSubstr("one-r2-s0,2,"), HasSubstr("one-r8-s0,8,")));
}

TEST_P(RunnerTest, ThePlanNamesEveryModelAndSet) {
  const std::string other = folder_.write("other.jsonl", examples(20, 7));
  sweep("parameters: {data.train: {values: [" + train_ + ", " + other +
        "]}, lora.r: {values: [2, 4]}}\n");
  const std::string plan = read_text_file(folder_ / "out/plan.yaml");
  EXPECT_THAT(plan, HasSubstr(train_ + ", " + other));
  EXPECT_THAT(read_text_file(folder_ / "out/summary.md"),
              AllOf(HasSubstr("- model: synthetic:tiny\n"),
                    HasSubstr("- data: " + train_ + ", " + other + "\n")));
}

TEST_P(RunnerTest, MistakesSurfaceBeforeAnythingIsWritten) {
  const auto error = [&](const std::string& rest) { return error_of([&] { sweep(rest); }); };
  EXPECT_THAT(error("parameters: {lora.targets: {values: [mlp, [c_attn]]}}\n"),
              HasSubstr("sweep.yaml:7: lora.targets: no module matches c_attn"));
  EXPECT_THAT(error("parameters: {data.train: {values: [nowhere.jsonl]}}\n"),
              HasSubstr("sweep.yaml:7: data.train: there is no file nowhere.jsonl"));
  EXPECT_THAT(error("parameters: {lora.adapter: {values: [nowhere]}}\n"), HasSubstr("nowhere"));
  EXPECT_FALSE(fs::exists(folder_ / "out"));
}

TEST_P(RunnerTest, AnAdapterThatDoesNotFitIsRefused) {
  sweep("");
  const std::string adapter = folder_ / "adapter";
  fs::rename(directories()[0] + "/adapter", adapter);
  fs::remove_all(folder_ / "out");
  EXPECT_THAT(error_of([&] {
                sweep("", {"lora.adapter=" + adapter, "lora.r=8"});
              }),
              AllOf(HasSubstr("adapter_config.json"), HasSubstr("set lora.r: 4")));
  EXPECT_THAT(error_of([&] {
                sweep("", {"lora.adapter=" + adapter, "lora.targets=qv"});
              }),
              AllOf(HasSubstr("--set lora.adapter="), HasSubstr("lora.targets: [down_proj, "),
                    HasSubstr("v_proj]")));
  EXPECT_FALSE(fs::exists(folder_ / "out"));
  EXPECT_EQ(sweep("", {"lora.adapter=" + adapter}).finished, 1);
}

INSTANTIATE_TEST_SUITE_P(Sweeps, RunnerTest, cpu_and_cuda, device_name);

}  // namespace
}  // namespace qlab::test
