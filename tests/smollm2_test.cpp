// SmolLM2-135M-Instruct against Transformers and PEFT, in fp32. The figures stand in
// golden/smollm2.json, which golden/make_smollm2_golden.py writes.
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "data/json.h"
#include "experiments/train.h"
#include "tests/support/files.h"

namespace qlab::test {
namespace {

using Json = nlohmann::json;

void expect_relative(double actual, const Json& expected, double bound, const std::string& what) {
  const double value = expected.get<double>();
  EXPECT_LE(std::abs(actual - value), bound * std::abs(value))
      << what << ": " << actual << ", expected " << value;
}

class Smollm2Test : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    if (device().is_cuda() && cuda::device_count() == 0)
      GTEST_SKIP() << "needs a GPU and a build with CUDA";
    QLAB_SKIP_WITHOUT_DEMO_MODEL();
    golden_ = read_json_file(golden("smollm2.json"));
  }
  Device device() const { return GetParam(); }

  Json golden_;
};

// A logit is off by at most 1e-4 of the root mean square of its row. Transformers' own fp32 logits
// are up to 1.1e-5 of it away from those of fp64.
TEST_P(Smollm2Test, LogitsAreThoseOfTransformers) {
  constexpr double bound = 1e-4;
  const ModelSource source = open_model(demo_model());
  for (const auto& [quant, inputs] : golden_["logits"].items()) {
    const WeightSpec spec{quant == "none" ? WeightFormat::fp32 : WeightFormat::nf4};
    const auto model = load_llama(source, spec, DType::f32, device());
    BatchBuilder builder;  // all inputs as one packed batch
    std::vector<int64_t> begins;
    std::vector<std::vector<int32_t>> ids;
    for (const auto& [name, input] : golden_["inputs"].items())
      ids.push_back(input.get<std::vector<int32_t>>());
    std::vector<Sequence> sequences;
    for (const std::vector<int32_t>& sequence : ids) sequences.push_back({sequence, sequence});
    builder.add(sequences, nullptr, false, 0.0f);
    Tape tape(false);
    const std::vector<float> logits =
        model->logits(model->hidden(tape, builder.to(device())).value).to_vector<float>();
    size_t begin = 0, index = 0;
    double worst = 0;
    for (const auto& [name, input] : golden_["inputs"].items()) {
      for (const Json& record : inputs[name]) {
        const auto vocab = static_cast<size_t>(model->config().vocab_size);
        const float* row = logits.data() + (begin + record["position"].get<size_t>()) * vocab;
        const double scale = record["rms"];
        const auto compare = [&](const Json& at, const Json& expected) {
          for (size_t i = 0; i < at.size(); ++i) {
            const double actual = row[at[i].get<size_t>()];
            worst = std::max(worst, std::abs(actual - expected[i].get<double>()) / scale);
          }
        };
        compare(record["top_ids"], record["top"]);
        compare(golden_["other_ids"], record["others"]);
        double sum = 0;
        for (size_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(row[i]));
        worst =
            std::max(worst, std::abs(std::log(sum) - record["logsumexp"].get<double>()) / scale);
      }
      begin += ids[index++].size();
    }
    EXPECT_LE(worst, bound) << "quant " << quant;
    RecordProperty("largest_difference_" + quant, std::to_string(worst));
  }
}

// AdamW's first steps have the size of the learning rate whatever that of the gradient: rounding
// that turns the sign of a tiny gradient turns a full step, and some steps' gradient norms show it.
// How far PEFT's own fp32 runs are from the same run in fp64 when rounding of their weights' size
// disturbs them measures that: some 1e-6 at most steps, 1e-4 at step 8 of all-linear. Another order
// of sums may be as far off, to either side.
void expect_gradient_norm(double actual, const Json& step, const std::string& what) {
  expect_relative(actual, step["grad_norm_fp64"], 1e-4 + step["grad_norm_rounding"].get<double>(),
                  what);
}

// Both runs as one gang, through the training loop itself. Against fp64, PEFT's fp32 losses are off
// by up to 7e-6.
TEST_P(Smollm2Test, TrainsAsPeft) {
  const TemporaryFolder folder;
  std::string lines;
  for (const Json& sequence : golden_["sequences"]) lines += sequence.dump() + "\n";
  const std::string train = folder.write("train.jsonl", lines);
  const std::string eval = folder.write("eval.jsonl", golden_["held_out"].dump() + "\n");
  const Json& t = golden_["training"];
  const auto setting = [](const char* key, const Json& value) {
    return key + ("=" + value.dump());
  };

  Library library;
  std::vector<std::unique_ptr<TrialRun>> runs;
  Llama* model = nullptr;
  for (const auto& [name, run] : golden_["runs"].items()) {
    const Config config = load_config(
        "",
        {"model.path=" + demo_model(), "quant.compute_dtype=fp32", "data.train=" + train,
         "data.eval=" + eval, "data.shuffle=false", setting("lora.r", run["r"]),
         setting("lora.alpha", run["alpha"]), setting("lora.targets", run["targets"]),
         setting("train.init_seed", run["seed"]), setting("train.steps", t["steps"]),
         setting("train.batch_size", t["batch_size"]), setting("train.grad_accum", t["grad_accum"]),
         setting("optim.lr", t["lr"]), setting("optim.betas", t["betas"]),
         setting("optim.eps", t["eps"]), setting("optim.weight_decay", t["weight_decay"]),
         setting("optim.max_grad_norm", t["max_grad_norm"]), "optim.schedule=cosine",
         setting("optim.warmup_steps", t["warmup_steps"])});
    model = &library.base(config, DType::f32, device());
    runs.push_back(
        std::make_unique<TrialRun>(config, name, TrialFiles(folder / name), library, *model));
  }
  std::vector<TrialRun*> gang;
  for (const auto& run : runs) gang.push_back(run.get());
  Gang(library, *model, gang, {}).run();

  for (const auto& run : runs) {
    SCOPED_TRACE(run->name());
    const Json& expected = golden_["runs"][run->name()];
    ASSERT_EQ(run->state(), TrialRun::State::finished) << run->error();
    std::string norms;  // of each step, how far off: ours and PEFT's fp32, in millionths
    std::ifstream metrics(folder / run->name() + "/metrics.jsonl");
    for (std::string line; std::getline(metrics, line);) {
      const Json record = Json::parse(line);
      const auto step = record["step"].get<size_t>();
      const std::string where = " of step " + std::to_string(step);
      if (record.contains("eval_loss")) {
        expect_relative(record["eval_loss"], expected[step == 0 ? "eval_loss_0" : "eval_loss"],
                        1e-4, "eval loss" + where);
        continue;
      }
      const Json& at = expected["steps"][step - 1];
      expect_relative(record["loss"], at["loss"], 1e-4, "loss" + where);
      expect_gradient_norm(record["grad_norm"], at, "gradient norm" + where);
      const double fp64 = at["grad_norm_fp64"];
      norms += fmt::format(" {:.1f}/{:.1f}", 1e6 * (record["grad_norm"].get<double>() / fp64 - 1),
                           1e6 * (at["grad_norm"].get<double>() / fp64 - 1));
      expect_relative(record["lr"], at["lr"], 1e-12, "learning rate" + where);
    }
    RecordProperty("gradient_norms_" + run->name(), norms);
    EXPECT_EQ(run->step(), t["steps"].get<int64_t>());
    // Parameters moved by about 5e-3: a hundredth of that.
    for (const auto& [name, first] : expected["adapter"].items()) {
      const LoraModule& module = run->adapter().module(name.substr(0, name.rfind('.')));
      const auto actual = (name.ends_with("lora_A") ? module.a : module.b).to_vector<float>();
      for (size_t i = 0; i < first.size(); ++i)
        EXPECT_NEAR(actual[i], first[i].get<double>(), 5e-5) << name << "[" << i << "]";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, Smollm2Test, testing::Values(Device::cpu(), Device::cuda()),
                         [](const auto& info) {
                           return info.param.is_cuda() ? "cuda_f32" : "cpu_f32";
                         });

}  // namespace
}  // namespace qlab::test
