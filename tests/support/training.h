// Small training runs through the real loop, in temporary directories.
#pragma once
#include <limits>
#include <nlohmann/json.hpp>

#include "data/file.h"
#include "experiments/train.h"
#include "tests/support/files.h"
#include "tests/support/op_test.h"

namespace qlab::test {

/// Examples of different lengths up to 64, the first third of each not trained. Each token follows
/// from the one before it, so that there is something to learn.
inline std::string examples(int count, uint64_t seed) {
  std::string lines;
  for (int e = 0; e < count; ++e) {
    const uint64_t key = seed * 1000 + static_cast<uint64_t>(e);
    const int length = 6 + integers(1, 58, key)[0];
    std::vector<int> ids = {integers(1, 512, key + 500)[0]}, labels;
    while (static_cast<int>(ids.size()) < length) ids.push_back((5 * ids.back() + 3) % 512);
    for (int i = 0; i < length; ++i) labels.push_back(i < length / 3 ? -100 : ids[i]);
    lines += nlohmann::json{{"input_ids", ids}, {"labels", labels}}.dump() + "\n";
  }
  return lines;
}

/// For tests about peaks, which plans predict.
#define QLAB_SKIP_WITHOUT_PLANS() \
  if (!StepMemory::planned()) GTEST_SKIP() << "QLAB_PLAIN_ALLOC is set"

/// What a run left behind.
struct Outcome {
  TrialRun::State state;
  std::string error, metrics, adapter;
  /// The values of one key, line by line, where it stands.
  std::vector<double> values(const std::string& key) const {
    std::vector<double> found;
    std::istringstream lines(metrics);
    for (std::string line; std::getline(lines, line);) {
      const auto json = nlohmann::json::parse(line);
      if (json.contains(key)) found.push_back(json[key]);
    }
    return found;
  }
  /// The metrics without how pages moved, which is a matter of memory and of time.
  std::string numbers() const {
    std::string text;
    std::istringstream lines(metrics);
    for (std::string line; std::getline(lines, line);) {
      auto json = nlohmann::json::parse(line);
      json.erase("moved_bytes");
      json.erase("stalled_seconds");
      text += json.dump() + "\n";
    }
    return text;
  }
};

class TrainingTest : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    if (device().is_cuda() && cuda::device_count() == 0)
      GTEST_SKIP() << "needs a GPU and a build with CUDA";
  }
  /// A limit that a failed test left behind would fail all that follow.
  void TearDown() override { limit_memory(device(), std::numeric_limits<int64_t>::max()); }
  Device device() const { return GetParam(); }
  bool has_bf16() const { return !device().is_cuda() || cuda::supports_bf16(0); }

  /// A run of six steps that evaluates and saves every second one.
  Config config(const std::vector<std::string>& sets = {}) const {
    Config c = load_config(
        "", {"model.path=synthetic:tiny", "data.train=" + train_, "data.eval=" + eval_,
             "data.seq_len=64", "data.eval_seq_len=64", "lora.r=4", "train.steps=6",
             "train.batch_size=3", "train.eval_every=2", "train.save_every=2", "optim.lr=5e-3"});
    for (const std::string& set : sets) {
      const size_t equals = set.find('=');
      set_key(c, set.substr(0, equals), YAML::Load(set.substr(equals + 1)), "test");
    }
    resolve(c);
    return c;
  }

  /// Trains the configurations as one gang, each in the directory of its name.
  std::vector<Outcome> gang(const std::vector<std::pair<std::string, Config>>& trials,
                            const std::function<bool()>& stop = {}) const {
    Library library;
    const Config& first = trials.at(0).second;
    Llama& model = library.base(first, compute_dtype(first, device()), device());
    std::vector<std::unique_ptr<TrialRun>> runs;
    std::vector<TrialRun*> pointers;
    for (const auto& [name, c] : trials) {
      runs.push_back(
          std::make_unique<TrialRun>(c, name, TrialFiles(folder_ / name), library, model));
      pointers.push_back(runs.back().get());
    }
    TrainCallbacks callbacks;
    callbacks.stop = stop;
    Gang(library, model, pointers, callbacks).run();
    std::vector<Outcome> outcomes;
    for (const auto& run : runs) outcomes.push_back(outcome(*run));
    return outcomes;
  }
  Outcome train(const std::string& name, const Config& c,
                const std::function<bool()>& stop = {}) const {
    return gang({{name, c}}, stop).at(0);
  }
  nlohmann::json status(const std::string& trial) const {
    return nlohmann::json::parse(read_text_file(folder_ / (trial + "/status.json")));
  }
  /// The highest total of the device's account while a trial's base was loaded and its gang
  /// trained.
  int64_t peak(const std::string& trial) const {
    const nlohmann::json json = status(trial);
    return std::max(json["load_peak_bytes"].get<int64_t>(), json["peak_bytes"].get<int64_t>());
  }
  static void expect_same(const Outcome& a, const Outcome& b) {
    EXPECT_EQ(a.state, b.state) << a.error << b.error;
    EXPECT_EQ(a.numbers(), b.numbers());
    EXPECT_TRUE(a.adapter == b.adapter) << "the adapters differ";
  }

  TemporaryFolder folder_;
  std::string train_ = folder_.write("train.jsonl", examples(20, 1));
  std::string eval_ = folder_.write("eval.jsonl", examples(5, 2));

 private:
  Outcome outcome(const TrialRun& run) const {
    const std::string dir = folder_ / run.name();
    Outcome result{run.state(), run.error(), read_text_file(dir + "/metrics.jsonl"), ""};
    const std::string file = dir + "/adapter/adapter_model.safetensors";
    if (std::filesystem::exists(file)) result.adapter = read_text_file(file);
    return result;
  }
};

inline const auto cpu_and_cuda = testing::Values(Device::cpu(), Device::cuda());
inline std::string device_name(const testing::TestParamInfo<Device>& info) {
  return info.param.is_cuda() ? "cuda" : "cpu";
}

}  // namespace qlab::test
