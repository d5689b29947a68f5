#include "experiments/train.h"

#include "nn/adapter_file.h"
#include "tests/support/tiny_llama.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

using State = TrialRun::State;
using testing::HasSubstr;

using TrainTest = TrainingTest;

TEST_P(TrainTest, WritesWhatItPromises) {
  const Outcome run = train("a", config());
  ASSERT_EQ(run.state, State::finished) << run.error;
  EXPECT_EQ(run.values("step"), (std::vector<double>{0, 1, 2, 2, 3, 4, 4, 5, 6, 6}));
  EXPECT_EQ(run.values("loss").size(), 6u);
  EXPECT_EQ(run.values("grad_norm").size(), 6u);
  const std::vector<double> eval = run.values("eval_loss"), lr = run.values("lr");
  ASSERT_EQ(eval.size(), 4u);
  EXPECT_LT(eval.back(), eval.front());
  // Cosine over 6 steps, of which ceil(0.03 * 6) = 1 warms up.
  for (int64_t s = 0; s < 6; ++s)
    EXPECT_DOUBLE_EQ(lr[s], 5e-3 * schedule_factor(Schedule::cosine, s, 1, 6));
  const auto status = nlohmann::json::parse(read_text_file(folder_ / "a/status.json"));
  EXPECT_EQ(status["status"], "finished");
  EXPECT_EQ(status["steps"], 6);
  EXPECT_EQ(status["eval_loss_0"], eval.front());
  EXPECT_EQ(status["eval_loss"], eval.back());
  EXPECT_GT(status["peak_bytes"], 0);
  EXPECT_EQ(status["trained_tokens"], run.values("tokens").back());
  EXPECT_EQ(read_adapter_spec(folder_ / "a/adapter").r, 4);
  // What auto stands for is part of what a run's numbers follow from.
  const std::string compute = !device().is_cuda() ? "fp32" : has_bf16() ? "bf16" : "fp16";
  EXPECT_EQ(canonical(load_config(folder_ / "a/config.yaml", {})),
            canonical(config({"quant.compute_dtype=" + compute})));
}

TEST_P(TrainTest, TheSameRunGivesTheSameBits) {
  const Config c = config({"lora.dropout=0.1", "train.grad_accum=2"});
  expect_same(train("a", c), train("b", c));
}

TEST_P(TrainTest, RecomputeChangesNoBit) {
  const std::vector<std::string> sets = {"lora.dropout=0.2", "lora.targets=[q_proj, down_proj]"};
  std::vector<std::string> full = sets;
  full.push_back("train.recompute=full");
  expect_same(train("none", config(sets)), train("full", config(full)));
}

// Steps of one shape, which a GPU records and replays unless told not to.
TEST_P(TrainTest, LargeThePlanChangesNoBit) {
  for (const char* dropout : {"0", "0.1"}) {
    std::optional<Outcome> plain;
    for (const char* recompute : {"none", "full"})
      for (const char* resident : {"0", "auto"})
        for (const char* graphs : {"false", "true"}) {
          const std::string name = fmt::format("dropout {}, recompute {}, resident {}, graphs {}",
                                               dropout, recompute, resident, graphs);
          SCOPED_TRACE(name);
          const Outcome run =
              train(name, config({"data.train=synthetic", "data.eval=''", "data.seq_len=24",
                                  "train.steps=20", std::string("lora.dropout=") + dropout,
                                  std::string("train.recompute=") + recompute,
                                  std::string("quant.resident=") + resident,
                                  std::string("train.graphs=") + graphs}));
          ASSERT_EQ(run.state, State::finished) << run.error;
          ASSERT_EQ(run.values("loss").size(), 20u);
          if (plain)
            expect_same(run, *plain);
          else
            plain = run;
        }
  }
}

// Ends at five pseudo-random moments, some of them between two batches of an evaluation: in turn as
// by Ctrl-C, which saves the state, and as by a kill, after which an older state is continued.
TEST_P(TrainTest, RunsThatEndedContinueBitForBit) {
  struct Killed {};
  for (const char* variant : {"lora.dtype=fp32", "lora.dtype=bf16", "quant.compute_dtype=bf16",
                              "quant.compute_dtype=fp16"}) {
    if (variant == std::string("quant.compute_dtype=bf16") && !has_bf16()) continue;
    const Config c = config({variant, "lora.dropout=0.1", "train.epochs=1.3"});
    const Outcome whole = train(std::string("whole-") + variant, c);
    ASSERT_EQ(whole.state, State::finished) << whole.error;
    int number = 0;
    for (const int moment : integers(5, 16, 77)) {
      SCOPED_TRACE(moment);
      const std::string name = std::string(variant) + "-" + std::to_string(++number);
      const bool killed = number % 2 == 0;
      int asked = 0;
      const auto stop = [&] {
        if (++asked > moment && killed) throw Killed();
        return asked > moment;
      };
      if (killed) {
        EXPECT_THROW(train(name, c, stop), Killed);
      } else {
        const Outcome part = train(name, c, stop);
        EXPECT_EQ(part.state, State::interrupted);
        EXPECT_TRUE(part.adapter.empty());
      }
      expect_same(train(name, c), whole);
    }
  }
  const Config c = config();
  Outcome last;
  int starts = 0;
  do {
    int asked = 0;
    last = train("often", c, [&] { return ++asked > 3; });
  } while (last.state == State::interrupted && ++starts < 20);
  EXPECT_GE(starts, 3);
  expect_same(last, train("once", c));
}

// In 16 bits on a GPU, which auto is there.
TEST_P(TrainTest, AGangIsItsTrialsAlone) {
  const std::vector<std::pair<std::string, Config>> trials = {
      {"a", config({"lora.targets=qv", "lora.r=2", "optim.lr=1e-3"})},
      {"b", config({"lora.dropout=0.1", "train.seed=5", "train.grad_accum=2"})},
      {"c", config({"lora.targets=mlp", "lora.r=9", "train.batch_size=5", "train.steps=4",
                    "optim.schedule=linear", "train.loss_norm=microbatch"})},
      {"diverges", config({"optim.lr=1e30", "train.eval_every=0"})}};
  const std::vector<Outcome> together = gang(trials);
  for (size_t i = 0; i < trials.size(); ++i) {
    SCOPED_TRACE(trials[i].first);
    const Outcome alone = train(trials[i].first + "-alone", trials[i].second);
    EXPECT_EQ(together[i].state, i == 3 ? State::failed : State::finished) << together[i].error;
    expect_same(together[i], alone);
  }
  EXPECT_THAT(together[3].error, HasSubstr("diverged at step 3"));
  EXPECT_THAT(together[3].error, HasSubstr("optim.lr"));
  const auto status = nlohmann::json::parse(read_text_file(folder_ / "diverges/status.json"));
  EXPECT_EQ(status["status"], "failed");
  EXPECT_EQ(status["error"], together[3].error);
}

TEST_P(TrainTest, AnEvaluationThatDivergesFailsTheTrial) {
  const Outcome run = train("a", config({"optim.lr=1e30"}));
  EXPECT_EQ(run.state, State::failed);
  EXPECT_THAT(run.error,
              testing::AllOf(HasSubstr("eval loss after step 2"), HasSubstr("optim.lr")));
  EXPECT_EQ(run.values("eval_loss").size(), 1u);
  EXPECT_EQ(train("a", config({"optim.lr=1e30"})).error, run.error);  // again, from the start
}

// The same products, summed over the tokens of a window in one chain or in four that are added: the
// gradient agrees to about sqrt(n) 2^-24, the loss to that times the distance moved. Adam turns the
// sign of a gradient that is all rounding into a step of lr, which by then hardly moves the loss.
TEST_P(TrainTest, ABatchIsItsMicroBatches) {
  std::vector<std::string> sets = {"quant.compute_dtype=fp32", "lora.dropout=0.1"};
  const auto with = [&](const char* batch, const char* accum) {
    std::vector<std::string> all = sets;
    all.push_back(batch), all.push_back(accum);
    return config(all);
  };
  const Outcome one = train("one", with("train.batch_size=4", "train.grad_accum=1"));
  const Outcome four = train("four", with("train.batch_size=1", "train.grad_accum=4"));
  const Outcome two = train("two", with("train.batch_size=2", "train.grad_accum=2"));
  for (const Outcome* other : {&four, &two})
    for (const char* key : {"loss", "eval_loss", "grad_norm", "tokens"}) {
      const std::vector<double> a = one.values(key), b = other->values(key);
      ASSERT_EQ(a.size(), b.size());
      for (size_t s = 0; s < a.size(); ++s)
        EXPECT_NEAR(a[s], b[s], (key == std::string("grad_norm") ? 1e-4 : 1e-5) * a[s]) << key;
    }
  // The mean of the micro-batches' means is another loss when they differ in length, by far more
  // than rounding.
  sets.push_back("train.loss_norm=microbatch");
  const Outcome means = train("means", with("train.batch_size=1", "train.grad_accum=4"));
  EXPECT_GT(std::abs(means.values("loss")[0] - one.values("loss")[0]), 2e-4);
}

TEST_P(TrainTest, DropoutActsAndIsSeeded) {
  const Outcome none = train("none", config()), some = train("some", config({"lora.dropout=0.5"})),
                seeded = train("seeded", config({"lora.dropout=0.5", "train.dropout_seed=9"}));
  EXPECT_TRUE(none.adapter != some.adapter);
  EXPECT_TRUE(some.adapter != seeded.adapter);
  // B is zero at first, so what is dropped shows in the gradient, not in the loss.
  EXPECT_EQ(none.values("loss")[0], some.values("loss")[0]);
  EXPECT_NE(none.values("grad_norm")[0], some.values("grad_norm")[0]);
}

TEST_P(TrainTest, TheFirstEvaluationIsOfTheBase) {
  const Outcome run = train("a", config());
  Library library;
  const Config c = config();
  const Llama& model = library.base(c, compute_dtype(c, device()), device());
  Stepper stepper(model, Recompute::none);
  const Evaluation base = evaluate(stepper, library.eval_set(c), nullptr);
  EXPECT_EQ(run.values("eval_loss")[0], base.loss);
  // A gang evaluates the base once, and every member has it.
  const std::vector<Outcome> two = gang({{"b", config()}, {"c", config({"train.seed=1"})}});
  for (const Outcome& o : two) EXPECT_EQ(o.values("eval_loss")[0], base.loss);
}

TEST_P(TrainTest, StartsFromAnAdapter) {
  const Outcome first = train("first", config());
  const Outcome second =
      train("second", config({"lora.adapter=" + folder_ / "first/adapter", "optim.lr=1e-3"}));
  EXPECT_EQ(second.values("eval_loss").front(), first.values("eval_loss").back());
  EXPECT_LT(second.values("eval_loss").back(), second.values("eval_loss").front());
}

// 20 examples in windows of 3 x 4: the last micro-batches of the second one are short or empty.
TEST_P(TrainTest, TheLastWindowMayBeShort) {
  const Outcome run =
      train("a", config({"train.epochs=1", "train.batch_size=3", "train.grad_accum=4"}));
  ASSERT_EQ(run.state, State::finished) << run.error;
  const std::vector<double> tokens = run.values("tokens");
  int64_t all = 0;
  Library library;
  for (const Example& e : library.train_set(config()).examples)
    all += trained_tokens({e.input_ids, e.labels});
  EXPECT_EQ(run.values("loss").size(), 2u);
  EXPECT_EQ(tokens.back(), all);
}

TEST_P(TrainTest, SyntheticSetsDoNotOverlap) {
  Library library;
  const Config c = config({"data.train=synthetic", "data.eval=synthetic"});
  const Dataset &train_set = library.train_set(c), &eval_set = library.eval_set(c);
  ASSERT_NE(&train_set, &eval_set);
  for (const Example& e : eval_set.examples)
    for (const Example& t : train_set.examples) ASSERT_NE(e.input_ids, t.input_ids);
}

// A state that was damaged, or belongs to another adapter, is named with the remedy.
TEST_P(TrainTest, DamagedStatesAreRefused) {
  int asked = 0;
  train("a", config(), [&] { return ++asked > 4; });
  EXPECT_THAT(error_of([&] { train("a", config({"lora.r=8"})); }),
              testing::AllOf(HasSubstr("state.safetensors"), HasSubstr("remove ")));
  folder_.write("a/state/state.safetensors", "short");
  EXPECT_THAT(error_of([&] { train("a", config()); }), HasSubstr("state.safetensors"));
}

// Whatever is logged, and wherever the run was stopped.
TEST_P(TrainTest, TrainLossIsTheMeanOfTheLastTenth) {
  const auto long_run = [&](const std::string& log_every) {
    return config(
        {"train.steps=29", "data.eval=''", "train.save_every=0", "train.log_every=" + log_every});
  };
  const std::vector<double> losses = train("all", long_run("1")).values("loss");
  ASSERT_EQ(losses.size(), 29u);
  const double mean = (losses[27] + losses[28]) / 2;
  EXPECT_EQ(status("all")["train_loss"], mean);
  train("some", long_run("10"));
  EXPECT_EQ(status("some")["train_loss"], mean);
  for (const int stop : {5, 28}) {
    const std::string name = fmt::format("stopped{}", stop);
    int asked = 0;
    train(name, long_run("10"), [&] { return asked++ == stop; });
    EXPECT_EQ(status(name)["steps"], stop);
    EXPECT_FALSE(status(name).contains("train_loss"));
    train(name, long_run("10"));
    EXPECT_EQ(status(name)["train_loss"], mean) << stop;
  }
}

TEST_P(TrainTest, AStateAheadOfItsMetricsIsRefused) {
  train("a", config());
  const std::string metrics = folder_ / "a/metrics.jsonl", all = read_text_file(metrics);
  write_file_atomically(metrics, all.substr(0, all.rfind('\n', all.size() - 2) + 1));
  EXPECT_THAT(error_of([&] { train("a", config()); }),
              testing::AllOf(HasSubstr("metrics.jsonl has 9 of the 10 lines"),
                             HasSubstr("remove " + folder_ / "a")));
  std::filesystem::remove(metrics);
  EXPECT_THAT(error_of([&] { train("a", config()); }),
              HasSubstr("metrics.jsonl has 0 of the 10 lines that were written up to step 6"));
}

TEST_P(TrainTest, WhatKilledProcessesLeftUnfinishedIsRemoved) {
  const std::string old = folder_.write("a/state/state.safetensors.4711-3.tmp", "half"),
                    left = folder_.write("a/state/state.safetensors.0123456789abcdef.tmp", "half");
  {
    const TrialFiles files(folder_ / "a");
    EXPECT_FALSE(std::filesystem::exists(old));
    EXPECT_FALSE(std::filesystem::exists(left));
    folder_.write("a/state/state.safetensors.0123456789abcdef.tmp", "of the one that holds it");
    EXPECT_THROW(TrialFiles(folder_ / "a"), Busy);
    EXPECT_TRUE(std::filesystem::exists(left));
  }
}

TEST_P(TrainTest, ADirectoryBelongsToOneProcess) {
  const TrialFiles files(folder_ / "a");
  EXPECT_THAT(error_of([&] { train("a", config()); }), HasSubstr("another qlab process"));
}

INSTANTIATE_TEST_SUITE_P(Runs, TrainTest, cpu_and_cuda, device_name);

class StepperTest : public OpTest {};

// A step takes its memory from the plan, and throws when it asks for anything else.
TEST_P(StepperTest, StepsRunInsideTheirPlan) {
  QLAB_SKIP_WITHOUT_PLANS();
  const auto model = tiny_llama(WeightFormat::nf4, GetParam());
  LoraSpec some, all;
  some.pattern = "qv";
  all.dropout = 0.1;
  const auto a = fresh_adapter(*model, some), b = fresh_adapter(*model, all);
  for (const Recompute recompute :
       {Recompute::none, Recompute::selective, Recompute::full, Recompute::offload}) {
    Stepper stepper(*model, recompute);
    for (const bool train : {true, false})
      for (const std::vector<int64_t>& lengths :
           {std::vector<int64_t>{40, 1, 7}, {300, 300}, {2}}) {
        BatchBuilder builder;
        std::vector<Tokens> tokens;
        for (const int64_t length : lengths)
          tokens.push_back(random_tokens(length, static_cast<uint64_t>(length)));
        for (size_t i = 0; i < tokens.size(); ++i)
          builder.add({tokens[i].sequence()}, (i % 2 == 0 ? a : b).get(), train, 1.0f);
        stepper.reserve(builder, train);
        reset_peak(device());
        const int64_t before = memory_account(device()).total;
        // Eager, recorded and replayed where the device has graphs.
        const std::vector<float> first = stepper.run(builder, train);
        // Beside the reservation there are only the batch's arrays: seven, and the results, in a
        // buffer that grows by half more than is asked for.
        const int64_t beside = memory_account(device()).peak - before;
        EXPECT_LE(beside, (8 * 256 + builder.tokens() * 36 + 4 * loss_chunk * 4) * 3 / 2);
        const int64_t after = memory_account(device()).total;
        EXPECT_LE(after, before + beside);
        for (int again = 0; again < 2; ++again) EXPECT_EQ(stepper.run(builder, train), first);
        EXPECT_EQ(memory_account(device()).total, after);
      }
  }
}

TEST_P(StepperTest, WhatDoesNotFitIsAnErrorThatSaysWhatToDo) {
  const auto model = tiny_llama(WeightFormat::nf4, GetParam());
  const auto adapter = fresh_adapter(*model, {});
  StepPlan plan;
  plan.bytes = int64_t{1} << 50;
  plan.blocks = {{plan.bytes, 0, Category::activations}};
  plan.events = {0};
  StepMemory memory(device());
  EXPECT_THROW(memory.reserve(plan), OutOfMemory);
  const std::string text = error_of([&] { memory.reserve(plan); });
  for (const char* part : {"out of memory on", "asked for 1125.90 TB", "held: ", "weights",
                           "constants", "adapters", "gradients", "train.recompute: full",
                           "train.batch_size", "data.seq_len", "parallel.trials_per_gpu"})
    EXPECT_THAT(text, HasSubstr(part));
  LoraSpec huge;
  huge.r = 2'000'000'000;
  const std::string adapters = error_of([&] { fresh_adapter(*model, huge); });
  EXPECT_THAT(adapters, HasSubstr("adapters asked for"));
  EXPECT_EQ(adapters.find("held: nothing"), std::string::npos);
}

TEST_P(StepperTest, ARankIsTheFirstRowsOfAHigherOne) {
  const auto model = tiny_llama(WeightFormat::fp32, GetParam());
  LoraSpec four, eight;
  four.r = 4;
  eight.r = 8;
  eight.pattern = "qv";
  const auto low = fresh_adapter(*model, four), high = fresh_adapter(*model, eight);
  for (const Adapter::Shape& m : high->modules()) {
    const Tensor a = high->module(m.name).a;
    expect_same_bits(low->module(m.name).a.clone(), a.slice_rows(0, 4).clone());
    for (const double x : values(a)) EXPECT_LE(std::abs(x), 1 / std::sqrt(m.in));
    for (const double x : values(high->module(m.name).b)) ASSERT_EQ(x, 0);
  }
  const Adapter other(four, model->adapter_shapes(four), 99, 4, model->compute_dtype(), device());
  EXPECT_GT(relative_difference(other.parameters(), low->parameters()), 0.5);
}

INSTANTIATE_TEST_SUITE_P(Models, StepperTest, model_cases, name);

}  // namespace
}  // namespace qlab::test
