// memory.jsonl: which moments of a run it tells of, and what it says of them.
#include "experiments/memory_log.h"

#include <set>

#include "experiments/runner.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

using Json = nlohmann::json;
using testing::ElementsAre;

/// The phases in the order in which they were at work.
std::vector<std::string> phases(const std::vector<MemorySample>& samples) {
  std::vector<std::string> names;
  for (const MemorySample& s : samples)
    if (names.empty() || names.back() != s.phase) names.push_back(s.phase);
  return names;
}

class MemoryLinesTest : public TrainingTest {
 protected:
  std::vector<MemorySample> lines(const std::string& trial) const {
    const MemoryLines read = read_memory_lines(folder_ / (trial + "/memory.jsonl"));
    EXPECT_EQ(read.damaged, 0);
    return read.samples;
  }
};
INSTANTIATE_TEST_SUITE_P(Runs, MemoryLinesTest, cpu_and_cuda, device_name);

TEST_P(MemoryLinesTest, ARunTellsItsPhases) {
  ASSERT_EQ(train("a", config({"train.steps=4"})).state, TrialRun::State::finished);
  const std::vector<MemorySample> samples = lines("a");
  EXPECT_THAT(phases(samples), ElementsAre("load", "prepare", "reserve", "evaluate", "train",
                                           "evaluate", "save", "train", "evaluate", "save"));
  double seconds = 0;
  int64_t loading = 0, training = 0;
  std::set<std::string> stepless;
  for (const MemorySample& s : samples) {
    EXPECT_GE(s.seconds, seconds);
    seconds = s.seconds;
    EXPECT_GE(s.peak, s.total());
    EXPECT_GT(s.host.value_or(0), 0);
    EXPECT_GT(s.host_available.value_or(0), 0);
    EXPECT_EQ(s.device_used.has_value(), device().is_cuda());
    if (device().is_cuda()) {
      EXPECT_GT(s.device_used.value_or(0), s.total());
    }
    EXPECT_FALSE(s.shared);
    if (!s.step) stepless.insert(s.phase);
    int64_t& highest = s.phase == "load" ? loading : training;
    highest = std::max(highest, s.peak);
  }
  EXPECT_THAT(stepless, ElementsAre("load", "prepare", "reserve"));
  EXPECT_EQ(samples.back().step, 4);
  EXPECT_EQ(status("a")["peak_bytes"], training);
  EXPECT_EQ(status("a")["load_peak_bytes"], loading);
  int64_t at_peak = 0;
  const Json categories = status("a")["peak_bytes_by_category"];
  for (const auto& [category, bytes] : categories.items()) at_peak += bytes.get<int64_t>();
  EXPECT_EQ(at_peak, training);
  std::istringstream text(read_text_file(folder_ / "a/memory.jsonl"));
  for (std::string line; std::getline(text, line);) {
    const Json json = Json::parse(line);
    int64_t total = 0;
    for (const auto& [category, bytes] : json["bytes"].items()) total += bytes.get<int64_t>();
    EXPECT_EQ(json["total"], total);
  }
}

TEST_P(MemoryLinesTest, TrialsOfAGangTellTheSame) {
  gang({{"a", config()}, {"b", config({"lora.r=8"})}, {"c", config({"train.steps=4"})}});
  // A trial that is saved first ends first.
  const std::vector<MemorySample> a = lines("a"), b = lines("b"), c = lines("c");
  ASSERT_LT(c.size(), a.size());
  ASSERT_LE(a.size(), b.size());
  EXPECT_EQ(c.back().step, 4);
  EXPECT_EQ(a.back().step, 6);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(memory_line(a[i]), memory_line(b[i])) << i;
  for (size_t i = 0; i < c.size(); ++i) EXPECT_EQ(memory_line(c[i]), memory_line(b[i])) << i;
  // The gang's peak is everybody's.
  EXPECT_EQ(status("c")["peak_bytes"], status("a")["peak_bytes"]);
  EXPECT_EQ(status("c")["predicted_peak_bytes"], status("a")["predicted_peak_bytes"]);
}

TEST_P(MemoryLinesTest, ABaseThatWasLoadedEarlierIsMarked) {
  const std::string file = folder_.write(
      "sweep.yaml", "base:\n  model: {path: \"synthetic:tiny\"}\n  data: {train: " + train_ +
                        ", seq_len: 64}\n  train: {steps: 2, batch_size: 3}\n"
                        "parameters: {lora.r: {values: [2, 4]}}\n");
  const RunnerResult result = run_sweep(
      load_sweep(file, {}), {folder_ / "out", device(), "", false}, [](const std::string&) {}, {});
  ASSERT_EQ(result.finished, 2);
  int shared = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder_ / "out/trials")) {
    const auto samples = read_memory_lines(entry.path().string() + "/memory.jsonl").samples;
    EXPECT_THAT(phases(samples), ElementsAre("load", "prepare", "reserve", "train", "save"));
    size_t loading = 0;
    while (samples[loading].phase == "load") ++loading;
    EXPECT_EQ(samples[0].seconds, 0);
    // What the other trial did in between is left out: at least its two steps and a file or two.
    EXPECT_LT(samples[loading].seconds - samples[loading - 1].seconds, 0.05);
    EXPECT_EQ(samples[loading].total(), samples[loading - 1].total());
    for (size_t i = 0; i < samples.size(); ++i)
      EXPECT_EQ(samples[i].shared, samples[0].shared && i < loading);
    shared += samples[0].shared;
  }
  EXPECT_EQ(shared, 1);
}

TEST_P(MemoryLinesTest, ARunThatContinuesAppends) {
  int asked = 0;
  const Config c = config({"data.eval=\"\"", "train.eval_every=0"});
  train("a", c, [&] { return ++asked > 3; });
  const std::vector<MemorySample> before = lines("a");
  ASSERT_EQ(status("a")["status"], "interrupted");
  // As of a process that went on and was killed while it wrote.
  MemorySample later = before.back();
  ++*later.step;
  std::ofstream(folder_ / "a/memory.jsonl", std::ios::app)
      << memory_line(later).dump() << "\n{\"seconds\": 1, \"pha";
  EXPECT_EQ(train("a", c).state, TrialRun::State::finished);
  const std::vector<MemorySample> samples = lines("a");
  EXPECT_THAT(phases(samples),
              ElementsAre("load", "prepare", "reserve", "train", "save", "train", "save", "load",
                          "prepare", "reserve", "train", "save", "train", "save"));
  for (size_t i = 0; i < before.size(); ++i)
    EXPECT_EQ(memory_line(samples[i]), memory_line(before[i])) << i;
  EXPECT_EQ(samples[before.size()].phase, "load");
  for (size_t i = 1; i < samples.size(); ++i)
    EXPECT_GE(samples[i].seconds, samples[i - 1].seconds) << i;
  // Without a saved state it starts over.
  std::filesystem::remove_all(folder_ / "a/state");
  train("a", c);
  EXPECT_EQ(lines("a")[0].seconds, 0);
  const std::vector<std::string> again = phases(lines("a"));
  EXPECT_EQ(std::count(again.begin(), again.end(), "load"), 1);
}

/// A log whose time passes when told to.
struct FakeTime {
  double seconds = 0;
  MemoryLog log{Device::cpu(), [this] { return seconds; }};
};

TEST(MemoryLog, QuietRunsSayLittle) {
  FakeTime time;
  time.log.use_base();
  time.log.begin("train");
  time.log.take();
  for (int step = 0; step < 3000; ++step) time.seconds += 0.2, time.log.look();
  // The first three steps, and then one in 30 seconds (unless this process itself grew).
  const size_t lines = time.log.take().size();
  EXPECT_GE(lines, 3u + 600 / 31);
  EXPECT_LE(lines, 3u + 600 / 30 + 8);
}

TEST(MemoryLog, WhatMovesIsTold) {
  FakeTime time;
  const Tensor base = Tensor::empty({10'000'000}, DType::u8, Device::cpu());
  time.log.use_base();
  time.log.begin("train");
  for (int step = 0; step < 3; ++step) time.log.look();
  time.log.take();
  const auto look = [&] {
    time.seconds += 0.001;
    time.log.look();
    return time.log.take();
  };
  EXPECT_TRUE(look().empty());
  const Tensor little = Tensor::empty({50'000}, DType::u8, Device::cpu());
  EXPECT_TRUE(look().empty());
  Tensor more = Tensor::empty({200'000}, DType::u8, Device::cpu());
  const std::vector<MemorySample> grown = look();
  ASSERT_EQ(grown.size(), 1u);
  EXPECT_EQ(grown[0].total(), memory_account(Device::cpu()).total);
  more = Tensor::empty({256}, DType::u8, Device::cpu());
  const std::vector<MemorySample> shrunk = look();
  ASSERT_EQ(shrunk.size(), 1u);
  EXPECT_EQ(shrunk[0].peak, memory_account(Device::cpu()).peak);
  EXPECT_GT(shrunk[0].peak, shrunk[0].total());
  EXPECT_EQ(time.log.highest().peak, shrunk[0].peak);
  // A new phase has a peak of its own; the log remembers the highest.
  time.log.begin("save");
  EXPECT_EQ(time.log.take().back().peak, memory_account(Device::cpu()).total);
  EXPECT_EQ(time.log.highest().peak, shrunk[0].peak);
}

TEST(MemoryLog, LoadingIsTenLinesASecondAndFewerLater) {
  FakeTime time;
  for (int tensor = 0; tensor < 9999; ++tensor) time.seconds += 0.001, time.log.look();
  time.log.use_base();
  const size_t ten_seconds = time.log.take().size();
  EXPECT_GE(ten_seconds, 90u);
  EXPECT_LE(ten_seconds, 110u);
  FakeTime slow;
  for (int tensor = 0; tensor < 36'000; ++tensor) slow.seconds += 0.1, slow.log.look();
  slow.log.use_base();
  EXPECT_LE(slow.log.take().size(), 750u);  // of an hour
}

// A month of steps of a minute each, evaluations and saves at every one, memory up and down.
TEST(MemoryLog, LongRunsStaySmall) {
  FakeTime time;
  time.log.use_base();
  size_t lines = 0;
  double last = 0;
  std::optional<Tensor> tensor;
  for (int step = 0; step < 30 * 24 * 60; ++step) {
    for (const char* phase : {"train", "evaluate", "save"}) {
      time.log.begin(phase);
      time.seconds += 20;
      tensor ? tensor.reset() : void(tensor = Tensor::empty({1 << 20}, DType::u8, Device::cpu()));
      time.log.look();
    }
    for (const MemorySample& s : time.log.take()) {
      ++lines;
      EXPECT_LE(s.seconds - last, 0.021 * s.seconds + 60) << "a gap";
      last = s.seconds;
    }
  }
  EXPECT_GT(lines, static_cast<size_t>(MemoryLog::unrationed));
  EXPECT_LT(lines, 1500u);
}

TEST(MemoryLog, TheSystemMayNotSay) {
  const TemporaryFolder folder;
  const std::string file =
      folder.write("status", "Name:\tqlab\nVmRSS2:\t7 kB\nVmRSS:\t  12 kB\nVmHWM:\tmany kB\n");
  EXPECT_EQ(proc_bytes(file, "VmRSS"), 12 * 1024);
  EXPECT_EQ(proc_bytes(file, "VmHWM"), std::nullopt);
  EXPECT_EQ(proc_bytes(file, "VmSwap"), std::nullopt);
  EXPECT_EQ(proc_bytes(folder / "nowhere", "VmRSS"), std::nullopt);
  MemorySample sample;
  sample.phase = "train";
  const Json line = memory_line(sample);
  for (const char* key : {"device_used", "host", "host_available", "step", "shared"})
    EXPECT_FALSE(line.contains(key)) << key;
}

TEST(MemoryLog, DamagedLinesArePassedOver) {
  const TemporaryFolder folder;
  MemorySample sample;
  sample.seconds = 1.5;
  sample.phase = "train";
  sample.step = 7;
  sample.bytes[0] = 100;
  sample.bytes[6] = 30;
  sample.peak = 150;
  sample.host = 99;
  const std::string good = memory_line(sample).dump();
  const std::string file = folder.write(
      "memory.jsonl", good + "\n[1]\n{\"seconds\":\"x\"}\n" + good.substr(0, 40) + "\n" + good);
  const MemoryLines lines = read_memory_lines(file);
  EXPECT_EQ(lines.damaged, 3);
  ASSERT_EQ(lines.samples.size(), 2u);
  EXPECT_EQ(memory_line(lines.samples[1]).dump(), good);
  EXPECT_EQ(lines.samples[0].total(), 130);
  EXPECT_TRUE(read_memory_lines(folder / "nowhere").samples.empty());
}

}  // namespace
}  // namespace qlab::test
