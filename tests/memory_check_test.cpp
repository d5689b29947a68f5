// qlab memory --check: predictions against what runs measured.
#include "experiments/memory_check.h"

#include "experiments/report_data.h"
#include "experiments/runner.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
namespace fs = std::filesystem;

class MemoryCheckTest : public TrainingTest {
 protected:
  void SetUp() override {
    QLAB_SKIP_WITHOUT_PLANS();
    TrainingTest::SetUp();
  }
  /// A sweep over the tiny model in the directory `out`; `rest` follows the base.
  RunnerResult sweep(const std::string& rest, const std::vector<std::string>& sets = {},
                     const TrainCallbacks& callbacks = {}) {
    const std::string file = folder_.write(
        "sweep.yaml",
        "base:\n  model: {path: \"synthetic:tiny\"}\n  lora: {r: 4}\n  data: {train: " + train_ +
            ", eval: " + eval_ +
            ", seq_len: 64, eval_seq_len: 64}\n"
            "  train: {steps: 4, batch_size: 3, eval_every: 2, save_every: 1}\n" +
            rest);
    return run_sweep(
        load_sweep(file, sets), {folder_ / "out", device(), "", false}, [](const std::string&) {},
        callbacks);
  }
  std::vector<TrialMemoryCheck> check(const std::string& dir = "out") const {
    return check_memory(folder_ / dir);
  }
  /// One value of a trial's status.json is another.
  void change_status(const std::string& trial, const std::function<void(Json&)>& change) const {
    const std::string file = trial + "/status.json";
    Json status = Json::parse(read_text_file(file));
    change(status);
    write_file_atomically(file, status.dump());
  }
};
INSTANTIATE_TEST_SUITE_P(Runs, MemoryCheckTest, cpu_and_cuda, device_name);

// The examples of this data have many lengths.
TEST_P(MemoryCheckTest, PlainRuns) {
  const std::vector<std::vector<std::string>> cases = {
      {},
      {"train.recompute=auto"},
      {"train.recompute=full", "quant.type=bf16"},
      {"train.grad_accum=2", "train.epochs=1.3", "train.steps=null"},
      {"train.batch_size=1", "train.eval_every=0"},
      {"lora.r=256", "data.seq_len=8", "data.eval_seq_len=8"},
  };
  for (const std::vector<std::string>& sets : cases) {
    SCOPED_TRACE(sets.empty() ? "" : sets[0]);
    fs::remove_all(folder_ / "out");
    ASSERT_EQ(sweep("", sets).finished, 1);
    const std::vector<TrialMemoryCheck> trials = check();
    ASSERT_EQ(trials.size(), 1u);
    EXPECT_TRUE(all_equal(trials)) << check_text(trials);
    EXPECT_GT(trials[0].training.measured, 0);
    EXPECT_GT(trials[0].loading.measured, 0);
    EXPECT_EQ(trials[0].device_used.has_value(), device().is_cuda());
  }
}

TEST_P(MemoryCheckTest, GangsOnOneBaseAndOnTwo) {
  ASSERT_EQ(sweep("parallel: {trials_per_gpu: 3}\nparameters:\n"
                  "  lora.r: {values: [2, 8, 64]}\n  quant.double_quant: {values: [true, false]}\n"
                  "  lora.targets: {values: [qv, all-linear]}\n")
                .finished,
            12);
  const std::vector<TrialMemoryCheck> trials = check();
  EXPECT_EQ(trials.size(), 12u);
  EXPECT_TRUE(all_equal(trials)) << check_text(trials);
  EXPECT_THAT(check_text(trials), HasSubstr("12 of 12 finished trials took what was predicted"));
}

TEST_P(MemoryCheckTest, AGangOfAdaptersInBf16) {
  ASSERT_EQ(sweep("parallel: {trials_per_gpu: 2}\nparameters: {lora.r: {values: [2, 64]}}\n",
                  {"lora.dtype=bf16"})
                .finished,
            2);
  EXPECT_TRUE(all_equal(check())) << check_text(check());
}

// Stopped in its last evaluation, a run has no step left to take.
TEST_P(MemoryCheckTest, ARunThatOnlyEvaluatesWhenItContinues) {
  bool last = false;
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress& p) { last = p.last; };
  callbacks.stop = [&] { return last; };
  ASSERT_TRUE(sweep("", {}, callbacks).interrupted);
  ASSERT_EQ(sweep("").finished, 1);
  EXPECT_TRUE(all_equal(check())) << check_text(check());
}

// So has a trial of a gang whose others go on; the optimizers' first step is not among its peaks.
TEST_P(MemoryCheckTest, ATrialThatOnlyEvaluatesWhenItsGangContinues) {
  const std::string gang =
      "parallel: {trials_per_gpu: 2}\npaired:\n  - {lora.r: 4, train.steps: 2}\n"
      "  - {lora.r: 64, train.steps: 4}\n";
  bool ended = false;
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress& p) { ended = ended || p.last; };
  callbacks.stop = [&] { return ended; };
  ASSERT_TRUE(sweep(gang, {}, callbacks).interrupted);
  ASSERT_EQ(sweep(gang).finished, 2);
  EXPECT_TRUE(all_equal(check())) << check_text(check());
}

// What a base took on for the longer sequences of one gang is gone when the next one begins.
TEST_P(MemoryCheckTest, GangsThatFollowOneAnother) {
  ASSERT_EQ(sweep("parameters:\n  data.seq_len: {values: [64, 20]}\n  lora.r: {values: [64, 2]}\n"
                  "  data.eval: {values: [" +
                  eval_ + ", \"\"]}\n")
                .finished,
            8);
  EXPECT_TRUE(all_equal(check())) << check_text(check());
}

TEST_P(MemoryCheckTest, RunsThatWereStoppedAndContinued) {
  for (const char* set : {"lora.r=4", "lora.r=256"}) {
    fs::remove_all(folder_ / "out");
    int asked = 0;
    TrainCallbacks callbacks;
    bool stepped = false;
    callbacks.progress = [&](const TrainProgress&) { stepped = true; };
    callbacks.stop = [&] { return stepped && ++asked > 2; };
    const std::string gang = "parallel: {trials_per_gpu: 2}\nseeds: [0, 1]\n";
    const std::vector<std::string> sets = {set, "data.seq_len=8", "data.eval_seq_len=8"};
    ASSERT_TRUE(sweep(gang, sets, callbacks).interrupted);
    EXPECT_THAT(error_of([&] { check(); }), HasSubstr("of 2 trials none has finished"));
    ASSERT_EQ(sweep(gang, sets).finished, 2);
    EXPECT_TRUE(all_equal(check())) << check_text(check());
  }
}

TEST_P(MemoryCheckTest, DifferencesAreNamed) {
  ASSERT_EQ(sweep("parameters: {lora.r: {values: [2, 4]}}\n").finished, 2);
  const std::string trial = check().at(0).directory;
  EXPECT_TRUE(all_equal(check_memory(trial)));
  change_status(trial, [](Json& s) { s["peak_bytes"] = s["peak_bytes"].get<int64_t>() - 2048; });
  const std::vector<TrialMemoryCheck> trials = check();
  EXPECT_FALSE(all_equal(trials));
  EXPECT_EQ(trials[0].training.difference(), -2048);
  EXPECT_THAT(check_text(trials), AllOf(HasSubstr("-2,048"), HasSubstr("1 of 2 finished trials")));
  const Json json = check_json(trials);
  EXPECT_EQ(json["equal"], false);
  EXPECT_EQ(json["trials"][0]["training"]["difference_bytes"], -2048);
  EXPECT_LT(json["trials"][0]["training"]["difference_percent"], 0);
  EXPECT_EQ(json["trials"][1]["equal"], true);
  // Of a version that predicted nothing.
  change_status(trial, [](Json& s) { s.erase("predicted_peak_bytes"); });
  EXPECT_FALSE(all_equal(check()));
  EXPECT_THAT(check_text(check()), HasSubstr("not recorded"));
  EXPECT_EQ(check_json(check())["trials"][0]["training"]["predicted_bytes"], nullptr);
  // A trial that did not finish decides nothing.
  change_status(trial, [](Json& s) { s["status"] = "interrupted"; });
  EXPECT_TRUE(all_equal(check()));
  // Nor does one whose process was killed: nobody holds its lock.
  change_status(trial, [](Json& s) { s["status"] = "running"; });
  EXPECT_EQ(check_json(check())["trials"][0]["status"], "interrupted");
  // Of one that cannot be read nothing is known, which is said.
  const std::string file = trial + "/status.json";
  write_file_atomically(file, std::string_view("half"));
  EXPECT_FALSE(all_equal(check()));
  EXPECT_THAT(check_text(check()), HasSubstr(file + " does not read"));
  EXPECT_EQ(check_json(check())["trials"][0]["status"], "unreadable");
  EXPECT_FALSE(all_equal(check_memory(trial)));
  const Results results = read_results(folder_ / "out");
  EXPECT_EQ(results.trials[0].status, "unreadable");
  EXPECT_THAT(results.notes, testing::Contains(HasSubstr("status.json does not read")));
}

TEST(MemoryCheck, BadInputIsNamed) {
  const TemporaryFolder folder;
  EXPECT_THAT(error_of([&] { check_memory(folder / "nowhere"); }), HasSubstr("no such directory"));
  EXPECT_THAT(error_of([&] { check_memory(folder.path()); }), HasSubstr("neither a results"));
  folder.write("plan.yaml", "sweep: {name: x}\ntrials: []\n");
  EXPECT_THAT(error_of([&] { check_memory(folder.path()); }), HasSubstr("of 0 trials"));
  folder.write("t/status.json", "{\"status\": \"failed\"}");
  EXPECT_THAT(error_of([&] { check_memory(folder / "t"); }), HasSubstr("of 1 trial none"));
}

}  // namespace
}  // namespace qlab::test
