// The prediction of a run's memory against the run: equal to the byte, phase by phase.
#include "experiments/memory_prediction.h"

#include "experiments/memory_text.h"
#include "nn/module_tree.h"
#include "tests/support/error_of.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

class PredictionTest : public TrainingTest {
 protected:
  /// The highest total of the device's account while the base is loaded and the gang trains, above
  /// what was held before.
  int64_t measured(const std::vector<Config>& configs) const {
    const int64_t before = memory_account(device()).total;
    std::vector<std::pair<std::string, Config>> trials;
    for (size_t i = 0; i < configs.size(); ++i)
      trials.emplace_back("t" + std::to_string(runs_) + "-" + std::to_string(i), configs[i]);
    ++runs_;
    for (const Outcome& outcome : gang(trials))
      EXPECT_EQ(outcome.state, TrialRun::State::finished) << outcome.error;
    const std::string file = folder_ / (trials[0].first + "/status.json");
    const auto status = nlohmann::json::parse(read_text_file(file));
    return std::max(status["load_peak_bytes"].get<int64_t>(), status["peak_bytes"].get<int64_t>()) -
           before;
  }
  MemoryPrediction predicted(const std::vector<Config>& configs) const {
    std::vector<PaperTrial> trials;
    for (const Config& c : configs) trials.push_back(assumed_trial(c, device()));
    return predict_memory(open_model(configs[0].model.path), trials, device());
  }
  Config synthetic(const std::vector<std::string>& sets) const {
    std::vector<std::string> all = {"data.train=synthetic", "data.eval=synthetic", "train.steps=2",
                                    "train.eval_every=1"};
    all.insert(all.end(), sets.begin(), sets.end());
    return config(all);
  }

 private:
  mutable int runs_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Runs, PredictionTest, cpu_and_cuda, device_name);

TEST_P(PredictionTest, IsThePeakToTheByte) {
  const std::vector<std::vector<std::string>> cases = {
      {},
      {"quant.double_quant=false"},
      {"quant.type=bf16"},
      {"quant.type=fp32", "quant.compute_dtype=fp32"},
      {"quant.compute_dtype=bf16"},
      {"train.recompute=selective"},
      {"train.recompute=full"},
      {"lora.r=64", "lora.targets=attention"},
      {"lora.r=7", "lora.dropout=0.1", "lora.dtype=bf16"},
      {"train.batch_size=1", "data.seq_len=300", "data.eval_seq_len=200"},
      {"data.eval_seq_len=500", "train.batch_size=1", "data.seq_len=20"},  // evaluation is larger
      {"data.eval=\"\"", "train.eval_every=0", "train.grad_accum=2"},
      {"lora.r=256", "train.batch_size=1", "data.seq_len=2"},  // the optimizer is most of it
  };
  for (const std::vector<std::string>& sets : cases) {
    SCOPED_TRACE(sets.empty() ? "" : sets[0]);
    const Config c = synthetic(sets);
    const MemoryPrediction prediction = predicted({c});
    EXPECT_EQ(prediction.peak(), measured({c})) << prediction.moment;
  }
}

TEST_P(PredictionTest, OfAGang) {
  const std::vector<Config> gang = {synthetic({"lora.r=4"}),
                                    synthetic({"lora.r=16", "optim.lr=1e-3"}),
                                    synthetic({"lora.targets=qv", "train.batch_size=1"}),
                                    synthetic({"lora.dropout=0.1", "train.seed=1"})};
  EXPECT_EQ(predicted(gang).peak(), measured(gang));
}

// A plain value of the program that needs no GPU: sizes follow from shapes on any machine.
TEST(Prediction, LeavesNothingBehind) {
  const Config c =
      load_config("", {"model.path=synthetic:tiny", "lora.r=4", "data.train=synthetic"});
  const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
  const ModelSource model = open_model("synthetic:tiny");
  const Device meta = Device::cuda().meta();
  const int64_t before = memory_account(meta).total;
  const int64_t peak = predict_memory(model, gang, Device::cuda()).peak();
  EXPECT_GT(peak, 0);
  EXPECT_EQ(predict_memory(model, gang, Device::cuda()).peak(), peak);
  EXPECT_EQ(memory_account(meta).total, before);
  EXPECT_TRUE(live_tensors(meta).empty());
}

}  // namespace
}  // namespace qlab::test
