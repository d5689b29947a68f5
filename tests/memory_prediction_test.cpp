// The prediction of a run's memory against the run: equal to the byte, phase by phase.
#include "experiments/memory_prediction.h"

#include <limits>

#include "core/ops/rms_norm.h"
#include "experiments/memory_text.h"
#include "nn/module_tree.h"
#include "tests/support/error_of.h"
#include "tests/support/training.h"

namespace qlab::test {

// The linker's --wrap (CMakeLists.txt) brings the program's calls of cross_entropy_inplace() here,
// where a test can give it a temporary. Nothing of the program knows.
#define QLAB_WRAPPED "_ZN4qlab21cross_entropy_inplaceERKNS_6TensorES2_S2_S2_"
int64_t more_bytes = 0;
void plain_cross_entropy(const Tensor& nll, const Tensor& z, const Tensor& labels,
                         const Tensor& scale) __asm__("__real_" QLAB_WRAPPED);
void cross_entropy_with_more(const Tensor& nll, const Tensor& z, const Tensor& labels,
                             const Tensor& scale) __asm__("__wrap_" QLAB_WRAPPED);
void cross_entropy_with_more(const Tensor& nll, const Tensor& z, const Tensor& labels,
                             const Tensor& scale) {
  Tensor temporary;
  if (more_bytes > 0) temporary = Tensor::empty({more_bytes}, DType::u8, z.device());
  plain_cross_entropy(nll, z, labels, scale);
}

namespace {

class PredictionTest : public TrainingTest {
 protected:
  void SetUp() override {
    QLAB_SKIP_WITHOUT_PLANS();
    TrainingTest::SetUp();
  }
  void TearDown() override {
    more_bytes = 0;
    TrainingTest::TearDown();
  }
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
    return peak(trials[0].first) - before;
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
      {"quant.compute_dtype=fp16"},
      {"quant.type=fp16"},
      {"train.recompute=selective"},
      {"train.recompute=full"},
      {"train.recompute=offload"},
      {"lora.r=64", "lora.targets=attention"},
      {"lora.r=7", "lora.dropout=0.1", "lora.dtype=bf16"},
      {"train.batch_size=1", "data.seq_len=300", "data.eval_seq_len=200"},
      {"data.eval_seq_len=500", "train.batch_size=1", "data.seq_len=20"},  // evaluation is larger
      {"data.eval=\"\"", "train.eval_every=0", "train.grad_accum=2"},
      {"lora.r=256", "train.batch_size=1", "data.seq_len=2"},  // the optimizer is most of it
      {"optim.type=adamw8bit"},
      {"optim.type=adamw8bit", "lora.r=256", "train.batch_size=1", "data.seq_len=2"},
      {"optim.type=paged_adamw", "lora.r=256"},
      {"optim.type=paged_adamw8bit", "lora.r=7", "lora.dtype=bf16"},
      {"model.streamed_layers=1", "model.path=synthetic:tiny-deep"},
      {"model.streamed_layers=4", "model.path=synthetic:tiny-deep", "train.recompute=offload"},
      {"model.streamed_layers=all", "model.path=synthetic:tiny-deep", "model.embeddings=host"},
      {"model.streamed_layers=all", "model.path=synthetic:tiny-deep", "quant.type=bf16"},
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

// Where states leave for the host, within limits that are met by more and more of them.
TEST_P(PredictionTest, WithStatesOnTheHost) {
  for (const char* type : {"optim.type=paged_adamw", "optim.type=paged_adamw8bit"}) {
    const Config c = synthetic({type, "lora.r=256"});
    const std::vector<PaperTrial> gang = {assumed_trial(c, device())};
    const auto within = [&](std::optional<int64_t> capacity) {
      return predict_memory(open_model(c.model.path), gang, device(), capacity);
    };
    const int64_t most = within({}).peak(), least = within(1).peak();
    int64_t out = 0;
    for (int i = 1; i <= 4; ++i) {
      const int64_t limit = most - (most - least) * i / 4;
      const MemoryPrediction prediction = within(limit);
      const int64_t before = memory_account(device()).total;
      limit_memory(device(), before + limit);
      EXPECT_EQ(measured({c}), prediction.peak()) << type << " " << i;
      limit_memory(device(), std::numeric_limits<int64_t>::max());
      EXPECT_LE(prediction.peak(), limit);
      EXPECT_GT(prediction.paged_out, out);
      out = prediction.paged_out;
    }
  }
}

// An operation takes 1 MiB more: what is predicted and what a run takes move alike, and by exactly
// that where the peak is there.
TEST_P(PredictionTest, AnOperationsTemporaryMovesPredictionAndRun) {
  constexpr int64_t mebibyte = 1 << 20;
  const Config c = synthetic({"train.recompute=full"});
  struct Peaks {
    int64_t predicted, run;
    std::string moment;
  };
  const auto both = [&](int64_t temporary) {
    more_bytes = temporary;
    const MemoryPrediction prediction = predicted({c});
    return Peaks{prediction.peak(), measured({c}), prediction.moment};
  };
  // 64 MiB are more than a product's workspace takes on a GPU at the same moment.
  const Peaks none = both(0), some = both(64 * mebibyte), more = both(65 * mebibyte);
  more_bytes = 0;
  for (const Peaks& p : {none, some, more}) EXPECT_EQ(p.predicted, p.run) << p.moment;
  EXPECT_THAT(some.moment, testing::EndsWith("lm_head and loss logits"));
  EXPECT_GT(some.run, none.run);
  EXPECT_EQ(more.predicted - some.predicted, mebibyte);
  EXPECT_EQ(more.run - some.run, mebibyte);
}

// Where training leaves little room evaluations come in smaller batches, with the same bits.
TEST_P(PredictionTest, EvaluationTakesNoMoreThanTraining) {
  const std::vector<std::string> small = {"train.batch_size=1", "data.seq_len=8",
                                          "train.recompute=full", "data.eval_seq_len=16"};
  const auto with = [&](std::vector<std::string> sets) {
    sets.insert(sets.begin(), small.begin(), small.end());
    return synthetic(sets);
  };
  const Config c = with({}), roomy = with({"train.batch_size=32"});
  const MemoryPrediction prediction = predicted({c});
  const int64_t training = predicted({with({"data.eval=\"\"", "train.eval_every=0"})}).peak();
  const int64_t whole = predicted({with({"data.eval_seq_len=256"})}).peak();
  EXPECT_GT(whole, prediction.peak());
  const int64_t before = memory_account(device()).total;
  limit_memory(device(), before + prediction.peak());
  EXPECT_EQ(measured({c}), prediction.peak());
  const Outcome within = train("small", c);
  limit_memory(device(), std::numeric_limits<int64_t>::max());
  constexpr int64_t index_tensors = 16384;
  EXPECT_LE(prediction.peak() - training, index_tensors);
  EXPECT_EQ(within.values("eval_loss").at(0), train("roomy", roomy).values("eval_loss").at(0));
}

/// Two norms, one after the other; with `extra` the first takes 1 MiB more, for longer than it
/// runs.
Tensor two_norms(const Tensor& x, const Tensor& w, bool extra) {
  Tensor temporary;
  const Tensor y = rms_norm(x, w, 1e-5f).y;
  if (extra) temporary = Tensor::empty({1 << 20}, DType::u8, x.device());
  return rms_norm(y, w, 1e-5f).y;
}

// What an operation takes moves the plan and the device alike, with nothing said about it anywhere.
TEST_P(PredictionTest, ATemporaryIsPredictedAndMeasured) {
  const Shape rows = {300, 64}, row = {64};
  const Tensor x = Tensor::zeros(rows, DType::f32, device()),
               w = Tensor::zeros(row, DType::f32, device()),
               x_meta = Tensor::empty(rows, DType::f32, device().meta()),
               w_meta = Tensor::empty(row, DType::f32, device().meta());
  const auto plan = [&](bool extra) {
    PlanRecorder recorder;
    two_norms(x_meta, w_meta, extra);
    return recorder.finish();
  };
  /// In its reservation, and allocated tensor by tensor.
  const auto measured = [&](bool extra) {
    const int64_t before = memory_account(device()).total;
    reset_peak(device());
    two_norms(x, w, extra);
    const int64_t by_tensor = memory_account(device()).peak - before;
    StepMemory memory(device());
    StepPlan own = plan(extra);
    memory.reserve(own);
    const StepMemory::Scope scope(memory, own);
    two_norms(x, w, extra);
    return std::pair(by_tensor, memory_account(device()).total - before);
  };
  constexpr int64_t mebibyte = 1 << 20;
  StepPlan without = plan(false), with = plan(true);
  const auto [tensors_without, step_without] = measured(false);
  const auto [tensors_with, step_with] = measured(true);
  EXPECT_EQ(with.bytes - without.bytes, mebibyte);
  EXPECT_EQ(step_with - step_without, mebibyte);
  EXPECT_EQ(tensors_with - tensors_without, mebibyte);
  EXPECT_EQ(with.bytes, step_with);
  EXPECT_EQ(sum(with.at_peak), tensors_with);
  EXPECT_EQ(sum(without.at_peak), tensors_without);
  // It cannot go unnoticed: a step that takes what was not planned is refused.
  StepMemory memory(device());
  memory.reserve(with);
  const StepMemory::Scope scope(memory, without);
  const int64_t held = memory_account(device()).total;
  EXPECT_THAT(error_of([&] { two_norms(x, w, true); }), testing::HasSubstr("not in its plan"));
  EXPECT_EQ(memory_account(device()).total, held);
}

// The lengths of the data as it is: what a gang's reservation goes by.
TEST_P(PredictionTest, RealDataGivesItsLongestExamples) {
  Library library;
  const auto lengths = [&](const std::vector<std::string>& sets) {
    return paper_trial(config(sets), library, device());
  };
  std::vector<int64_t> all;
  for (const Example& e : library.train_set(config()).examples)
    all.push_back(static_cast<int64_t>(e.input_ids.size()));
  std::sort(all.begin(), all.end(), std::greater<>());
  ASSERT_GT(all[0], all[2]);
  EXPECT_EQ(lengths({}).train_lengths, std::vector<int64_t>(all.begin(), all.begin() + 3));
  EXPECT_EQ(lengths({"train.batch_size=40", "train.epochs=0.5", "train.steps=null"}).train_lengths,
            std::vector<int64_t>(all.begin(), all.begin() + 10));
  EXPECT_EQ(lengths({"data.seq_len=20"}).train_lengths, (std::vector<int64_t>{20, 20, 20}));
  EXPECT_FALSE(lengths({}).eval_lengths.empty());
  EXPECT_TRUE(lengths({"data.eval=\"\"", "train.eval_every=0"}).eval_lengths.empty());
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
