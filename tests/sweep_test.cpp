#include "experiments/sweep.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

#include "core/error.h"
#include "experiments/expression.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

const char* const kBase = R"(
base:
  model: {path: "synthetic:tiny"}
  data: {train: synthetic}
  lora: {r: 16}
  train: {steps: 20}
)";

class SweepTest : public testing::Test {
 protected:
  SweepTest() : dir_(fs::path(testing::TempDir()) / fmt::format("sweep_test_{}", getpid())) {
    fs::create_directories(dir_);
  }
  ~SweepTest() override { fs::remove_all(dir_); }

  std::string write(const std::string& text, const std::string& name = "ranks.yaml") const {
    std::ofstream(dir_ / name) << text;
    return (dir_ / name).string();
  }
  Sweep load(const std::string& text, const std::vector<std::string>& sets = {}) const {
    return load_sweep(write(kBase + text), sets);
  }
  std::string error(const std::string& text, const std::vector<std::string>& sets = {}) const {
    try {
      load(text, sets);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  }
  static std::vector<std::string> names(const Sweep& sweep) {
    std::vector<std::string> out;
    for (const Trial& trial : sweep.trials) out.push_back(trial.name);
    return out;
  }

  fs::path dir_;
};

TEST_F(SweepTest, GridInFileOrderWithSeedsFastest) {
  const Sweep sweep = load(R"(
method: grid
metric: {name: eval/loss, goal: minimize}
seeds: [0, 1]
parameters:
  lora.r: {values: [4, 8]}
  lora:
    parameters:
      targets: {values: [attention, all-linear]}
  optim.lr: {value: 1e-3}
)");
  EXPECT_EQ(sweep.name, "ranks");
  EXPECT_EQ(sweep.metric, "eval_loss");
  EXPECT_THAT(sweep.swept_keys, ElementsAre("lora.r", "lora.targets"));
  EXPECT_THAT(names(sweep), ElementsAre("r4-attention-s0", "r4-attention-s1", "r4-all-linear-s0",
                                        "r4-all-linear-s1", "r8-attention-s0", "r8-attention-s1",
                                        "r8-all-linear-s0", "r8-all-linear-s1"));
  EXPECT_EQ(sweep.trials[5].config.lora.r, 8);
  EXPECT_EQ(sweep.trials[5].config.lora.alpha, 16);
  EXPECT_EQ(sweep.trials[5].config.train.init_seed, 1);
  EXPECT_EQ(sweep.trials[5].config.optim.lr, 1e-3);
  EXPECT_EQ(sweep.trials[5].swept[0], (std::pair<std::string, std::string>("lora.r", "8")));
}

TEST_F(SweepTest, PairedDerivedExcludeInclude) {
  const Sweep sweep = load(R"(
parameters:
  lora_r: {values: [4, 8]}
paired:
  - {lora.scaling: alpha/r, optim.lr: 2e-4}
  - {lora.scaling: alpha/sqrt(r), optim.lr: 1e-4}
derived:
  lora.alpha: 2*lora.r
  optim.warmup_steps: 0.125 * train.steps
exclude:
  - lora.r == 8 && lora.scaling == alpha/sqrt(r)
include:
  - {lora.r: 64, lora.alpha: 5}
)");
  EXPECT_THAT(names(sweep), ElementsAre("r4-lora-lr2e-4-s0", "r4-rslora-lr1e-4-s0",
                                        "r8-lora-lr2e-4-s0", "r64-lora-lr2e-4-s0"));
  EXPECT_EQ(sweep.trials[2].config.lora.alpha, 16);
  EXPECT_EQ(sweep.trials[2].config.optim.warmup_steps, 3);  // 2.5 rounded
  EXPECT_FALSE(sweep.trials[2].config.optim.warmup_ratio);
  EXPECT_EQ(sweep.trials[3].config.lora.alpha, 5);
}

TEST_F(SweepTest, AlphaOverRIsANumberAndAScaling) {
  const Sweep sweep = load(
      "parameters: {lora.r: {values: [4, 8]}}\n"
      "derived: {lora.alpha: 4*r, lora.scaling: alpha/r, optim.lr: 1e-4*alpha/r}");
  EXPECT_EQ(sweep.trials[1].config.lora.scaling, "alpha/r");
  EXPECT_EQ(sweep.trials[1].config.optim.lr, 4e-4);
}

TEST_F(SweepTest, DuplicatesAreDropped) {
  const Sweep sweep = load(R"(
parameters:
  quant.type: {values: [nf4, bf16]}
  quant.double_quant: {values: [true, false]}
  optim.lr: {values: [2e-4, 0.0002]}
)");
  EXPECT_EQ(sweep.trials.size(), 3u);
  ASSERT_EQ(sweep.notes.size(), 1u);
  EXPECT_THAT(sweep.notes[0], HasSubstr("5 duplicate trials dropped"));
}

TEST_F(SweepTest, PagedOptimizersCanBeCompared) {
  const Sweep sweep = load("parameters: {optim.type: {values: [adamw, paged_adamw_32bit]}}");
  EXPECT_EQ(sweep.trials.size(), 2u);
  EXPECT_NE(trial_hash(sweep.trials[0], {}, "fp32"), trial_hash(sweep.trials[1], {}, "fp32"));
}

TEST_F(SweepTest, KeysThatDoNotChangeNumbersCanBeSwept) {
  const Sweep sweep = load("parameters: {train.recompute: {values: [none, full]}}");
  EXPECT_THAT(names(sweep), ElementsAre("recompute-none-s0", "recompute-full-s0"));
  EXPECT_NE(trial_hash(sweep.trials[0], {}, "fp32"), trial_hash(sweep.trials[1], {}, "fp32"));
}

TEST_F(SweepTest, RandomPointsDependOnSeedIndexAndKeyAlone) {
  const std::string head = "method: random\nrun_cap: 6\nseeds: [0, 1]\nparameters:\n";
  const std::string lr =
      "  optim.lr: {distribution: log_uniform_values, min: 1e-5, max: 1e-3}\n"
      "  lora.r: {min: 2, max: 64}\n";
  const Sweep sweep = load(head + lr);
  ASSERT_EQ(sweep.trials.size(), 6u);
  const Sweep wider =
      load("method: random\ncount: 5\nparameters:\n  lora.dropout: {min: 0.0, max: 0.5}\n" + lr);
  ASSERT_EQ(wider.trials.size(), 5u);
  std::set<double> rates;
  for (size_t i = 0; i < 3; ++i) {
    const double rate = sweep.trials[2 * i].config.optim.lr;
    EXPECT_EQ(rate, wider.trials[i].config.optim.lr);
    EXPECT_EQ(sweep.trials[2 * i].config.lora.r, wider.trials[i].config.lora.r);
    EXPECT_GE(rate, 1e-5);
    EXPECT_LE(rate, 1e-3);
    rates.insert(rate);
  }
  EXPECT_EQ(rates.size(), 3u);
  const Sweep other = load("random_seed: 1\n" + head + lr);
  EXPECT_NE(other.trials[0].config.optim.lr, sweep.trials[0].config.optim.lr);
}

TEST_F(SweepTest, DistributionsStayInsideTheirSupport) {
  const Sweep sweep = load(R"(
method: random
count: 200
parameters:
  lora.alpha: {distribution: q_uniform, min: 4, max: 32, q: 4}
  lora.dropout: {distribution: uniform, min: 0, max: 0.2}
  lora.r: {distribution: int_uniform, min: 1, max: 3}
  lora.targets: {values: [mlp, attention], probabilities: [1, 0]}
)");
  ASSERT_EQ(sweep.trials.size(), 200u);
  std::set<int64_t> ranks;
  for (const Trial& trial : sweep.trials) {
    const LoraConfig& lora = trial.config.lora;
    EXPECT_EQ(std::fmod(*lora.alpha, 4), 0);
    EXPECT_LE(lora.dropout, 0.2);
    EXPECT_EQ(lora.targets.pattern, "mlp");
    ranks.insert(lora.r);
  }
  EXPECT_THAT(ranks, ElementsAre(1, 2, 3));
}

TEST_F(SweepTest, DrawsLieBetweenMinAndMax) {
  const auto values = [&](const std::string& range) {
    std::set<double> found;
    for (const Trial& trial :
         load("method: random\ncount: 40\nparameters: {lora.alpha: " + range + "}").trials)
      found.insert(*trial.config.lora.alpha);
    return found;
  };
  EXPECT_THAT(values("{distribution: q_uniform, min: 1, max: 10, q: 4}"), ElementsAre(4, 8));
  EXPECT_THAT(values("{distribution: q_uniform, min: 0.1, max: 0.3, q: 0.1}"),
              ElementsAre(0.1, 0.2, 0.3));
  EXPECT_THAT(values("{min: 1.23456781, max: 1.23456789}"),
              testing::Each(testing::AllOf(testing::Ge(1.23456781), testing::Le(1.23456789))));
  EXPECT_THAT(error("parameters: {lora.r: {min: 5, max: 7, q: 4, distribution: q_uniform}}"),
              HasSubstr("no multiple of q lies between min and max"));
  EXPECT_THAT(error("method: random\ncount: 3\n"
                    "parameters: {lora.r: {min: 5, max: 7, q: 4, distribution: q_uniform}}"),
              HasSubstr("no multiple of q lies between min and max"));
  EXPECT_THAT(error("parameters: {lora.r: {value: 5, values: [7]}}"),
              HasSubstr("both value and values"));
}

TEST_F(SweepTest, AFiniteSpaceIsExhausted) {
  const Sweep sweep = load("method: random\ncount: 50\nparameters: {lora.r: {values: [1, 2, 3]}}");
  EXPECT_EQ(sweep.trials.size(), 3u);
  ASSERT_EQ(sweep.notes.size(), 1u);
  EXPECT_THAT(sweep.notes[0], HasSubstr("only 3 different points"));
}

TEST_F(SweepTest, OptionsFixSweptKeys) {
  const std::string text = R"(
seeds: [0, 1, 2]
parameters:
  lora.r: {values: [4, 8]}
  train.steps: {values: [10, 20]}
derived: {alpha: 2*r}
)";
  const Sweep sweep = load(text, {"lora.r=2", "train.epochs=1", "lora.alpha=7", "seed=5"});
  ASSERT_EQ(sweep.trials.size(), 1u);
  EXPECT_EQ(sweep.trials[0].config.lora.r, 2);
  EXPECT_EQ(sweep.trials[0].config.lora.alpha, 7);
  EXPECT_EQ(sweep.trials[0].config.train.epochs, 1);
  EXPECT_FALSE(sweep.trials[0].config.train.steps);
  EXPECT_EQ(sweep.trials[0].seed, 5);
  EXPECT_EQ(sweep.trials[0].name, "ranks-s5");
  EXPECT_EQ(load(text, {"data.seq_len=64"}).trials.size(), 12u);
}

TEST_F(SweepTest, OptionsLeaveTheRestOfAPairAlone) {
  const Sweep sweep = load(R"(
paired: [{train.steps: 3, optim.lr: 1e-3, lora.dropout: 0.25, train.grad_accum: 5}]
)",
                           {"train.steps=2"});
  ASSERT_EQ(sweep.trials.size(), 1u);
  const Config& config = sweep.trials[0].config;
  EXPECT_EQ(config.train.steps, 2);
  EXPECT_EQ(config.optim.lr, 1e-3);
  EXPECT_EQ(config.lora.dropout, 0.25);
  EXPECT_EQ(config.train.grad_accum, 5);
}

TEST_F(SweepTest, OptionsFixWhatTheyExclude) {
  const std::string betas = "parameters: {optim.betas: {values: [[0.9, 0.99], [0.8, 0.99]]}}";
  const Sweep sweep = load(betas, {"adam_beta1=0.5"});
  ASSERT_EQ(sweep.trials.size(), 1u);
  EXPECT_EQ(sweep.trials[0].config.optim.betas, (std::array{0.5, 0.999}));
  const Sweep both =
      load("parameters: {adam_beta1: {values: [0.9, 0.8]}, adam_beta2: {values: [0.99, 0.95]}}",
           {"optim.betas=[0.5, 0.6]"});
  ASSERT_EQ(both.trials.size(), 1u);
  EXPECT_EQ(both.trials[0].config.optim.betas, (std::array{0.5, 0.6}));
}

TEST_F(SweepTest, SettingsOfOnePointMayNotContradictEachOther) {
  EXPECT_THAT(error("parameters:\n  train.steps: {values: [1, 2]}\n  train.epochs: {values: [1]}"),
              HasSubstr("ranks.yaml:9: train.epochs excludes train.steps (" +
                        (dir_ / "ranks.yaml").string() + ":8): keep one"));
  EXPECT_THAT(error("parameters: {train.steps: {value: 5}, train.epochs: {values: [1, 2]}}"),
              HasSubstr("excludes train.steps"));
  EXPECT_THAT(error("parameters: {optim.betas: {values: [[0.9, 0.9]]}, adam_beta1: {values: [0]}}"),
              HasSubstr("adam_beta1 excludes optim.betas"));
  EXPECT_THAT(error("paired: [{lora.r: 4, lora_r: 8}]"), HasSubstr("lora_r contradicts lora.r"));
  EXPECT_THAT(error("parameters: {r: {value: 4}}\npaired: [{lora.r: 8}]"),
              HasSubstr("lora.r contradicts r"));
  EXPECT_THAT(error("parameters: {train.steps: {values: [1, 2]}}\nderived: {train.epochs: 2}"),
              HasSubstr("train.epochs is already given by train.steps"));
  EXPECT_THAT(error("derived: {optim.warmup_ratio: 0.5, warmup_steps: 2}"),
              HasSubstr("optim.warmup_steps is already given by optim.warmup_ratio"));
  const Sweep apart = load("paired: [{train.steps: 5}, {train.epochs: 2}]");
  EXPECT_EQ(apart.trials[0].config.train.steps, 5);
  EXPECT_EQ(apart.trials[1].config.train.epochs, 2);
  const Sweep included = load(
      "parameters: {lora.r: {values: [4]}}\nderived: {warmup_steps: lora.r}\n"
      "include: [{lora.r: 8, warmup_ratio: 0.5}]");
  EXPECT_EQ(included.trials[1].config.optim.warmup_ratio, 0.5);
}

TEST_F(SweepTest, PointsHaveTheirOwnSeeds) {
  const auto seeds = [](const Sweep& sweep) {
    std::vector<int64_t> found;
    for (const Trial& trial : sweep.trials) {
      EXPECT_EQ(trial.seed, trial.config.train.seed);
      EXPECT_EQ(trial.seed, trial.config.train.init_seed);
      found.push_back(trial.seed);
    }
    return found;
  };
  const std::string paired = "paired: [{train.seed: 1, lora.r: 8}, {seed: 2, lora.r: 4}]";
  const Sweep sweep = load(paired);
  EXPECT_THAT(seeds(sweep), ElementsAre(1, 2));
  EXPECT_THAT(names(sweep), ElementsAre("r8-s1", "r4-s2"));
  EXPECT_THAT(sweep.seeds, ElementsAre(1, 2));
  EXPECT_THAT(sweep.swept_keys, ElementsAre("lora.r"));
  EXPECT_THAT(seeds(load(paired, {"seed=5"})), ElementsAre(5, 5));
  const std::string ranks = "parameters: {lora.r: {values: [2, 4]}}\n";
  EXPECT_THAT(seeds(load(ranks + "include: [{train.seed: 7, lora.r: 4}]")), ElementsAre(0, 0, 7));
  EXPECT_THAT(seeds(load(ranks + "derived: {train.seed: lora.r}")), ElementsAre(2, 4));
  for (const std::string& own :
       {std::string("derived: {train.seed: lora.r}"), std::string("include: [{seed: 7}]"), paired,
        std::string("parameters: {seed: {value: 3}}")}) {
    EXPECT_THAT(error("seeds: [0, 1]\n" + own), HasSubstr("both seeds and train.seed")) << own;
  }
}

TEST_F(SweepTest, FormulasKnowTheSeed) {
  const Sweep sweep = load(
      "seeds: [0, 1, 2]\nparameters: {lora.r: {values: [2, 4]}}\n"
      "derived: {train.data_seed: 100 + train.seed}\nexclude: [lora.r == 4 && seed > 0]");
  EXPECT_THAT(names(sweep), ElementsAre("r2-s0", "r2-s1", "r2-s2", "r4-s0"));
  EXPECT_EQ(sweep.trials[2].config.train.data_seed, 102);
}

TEST_F(SweepTest, WordsOfWandb) {
  const Sweep sweep = load(R"(
program: train.py
project: ablation
command: [python, train.py]
parameters:
  learning_rate: {values: [1e-4, 2e-4]}
  use_rslora: {values: [true, false]}
  seed: {values: [3, 4]}
)");
  EXPECT_EQ(sweep.trials.size(), 8u);
  EXPECT_THAT(sweep.seeds, ElementsAre(3, 4));
  EXPECT_EQ(sweep.trials[0].config.lora.scaling, "alpha/sqrt(r)");
  EXPECT_EQ(sweep.notes.size(), 3u);
  EXPECT_THAT(sweep.notes[0], HasSubstr("\"program\" is ignored"));
}

TEST_F(SweepTest, BaseFileAndPlainConfig) {
  write("model: {path: \"synthetic:tiny\"}\ndata: {train: synthetic}\nlora: {r: 4}\n", "one.yaml");
  const Sweep sweep = load_sweep(write("base: one.yaml\nparallel: {trials_per_gpu: 3}\n"
                                       "parameters: {lora.r: {values: [1, 2]}}\n"),
                                 {});
  EXPECT_EQ(sweep.trials.size(), 2u);
  EXPECT_EQ(sweep.trials[0].config.parallel.trials_per_gpu, 3);
  const Sweep one = load_sweep((dir_ / "one.yaml").string(), {"lora.r=9"});
  ASSERT_EQ(one.trials.size(), 1u);
  EXPECT_EQ(one.trials[0].config.lora.r, 9);
  EXPECT_EQ(one.trials[0].name, "one-r9-s0");
  EXPECT_EQ(load_sweep((dir_ / "one.yaml").string(), {"lora.r=4"}).trials[0].name, "one-s0");
}

TEST_F(SweepTest, LearningRatesHaveOneNotationInNames) {
  const Sweep sweep = load("parameters: {optim.lr: {values: [5e-5, 0.0001, 1e-3, 0.02]}}");
  EXPECT_THAT(names(sweep), ElementsAre("lr5e-5-s0", "lr1e-4-s0", "lr1e-3-s0", "lr2e-2-s0"));
}

TEST_F(SweepTest, SweptPathsAreLookedUpBesideTheFile) {
  write("{}", "a.jsonl");
  const Sweep sweep = load("parameters: {data.train: {values: [a.jsonl, gone.jsonl]}}");
  EXPECT_EQ(sweep.trials[0].config.data.train, (dir_ / "a.jsonl").string());
  EXPECT_EQ(sweep.trials[1].config.data.train, "gone.jsonl");
  EXPECT_THAT(names(sweep), ElementsAre("a-s0", "gone-s0"));
}

TEST_F(SweepTest, Errors) {
  EXPECT_THAT(
      error("method: bayes"),
      HasSubstr("ranks.yaml:7: method: expected grid or random, got \"bayes\": trials are"));
  EXPECT_THAT(error("early_terminate: {type: hyperband}"), HasSubstr("not supported"));
  EXPECT_THAT(error("paramters: {}"), HasSubstr("did you mean \"parameters\"?"));
  EXPECT_THAT(error("lora: {r: 4}"), HasSubstr("move it under base"));
  EXPECT_THAT(error("parameters: {lora.r: [4, 8]}"), HasSubstr("write {value: ...}"));
  EXPECT_THAT(error("parameters: {lora.q: {values: [4]}}"), HasSubstr("unknown key \"lora.q\""));
  EXPECT_THAT(error("parameters: {lora.r: {valeus: [4]}}"), HasSubstr("did you mean \"values\"?"));
  EXPECT_THAT(error("parameters: {lora.r: {values: []}}"), HasSubstr("an empty one"));
  EXPECT_THAT(error("parameters:\n  lora.r: {values: [4, x]}\n"),
              HasSubstr("ranks.yaml:8: lora.r: expected a whole number, got \"x\""));
  EXPECT_THAT(error("parameters: {optim.lr: {min: 1e-5, max: 1e-3}}"), HasSubstr("method: random"));
  EXPECT_THAT(error("parameters: {optim.lr: {min: 2, max: 1}}"), HasSubstr("below min"));
  EXPECT_THAT(error("parameters: {optim.lr: {distribution: log_uniform, min: -9, max: -7}}"),
              HasSubstr("write log_uniform_values"));
  EXPECT_THAT(error("parameters: {lora.r: {values: [4]}, lora_r: {values: [4]}}"),
              HasSubstr("stands twice"));
  EXPECT_THAT(error("parameters: {lora.r: {values: [4]}}\nderived: {lora.r: 2}"),
              HasSubstr("ranks.yaml:8: lora.r is already given by lora.r"));
  EXPECT_THAT(error("method: random\nparameters: {lora.r: {values: [4]}}"),
              HasSubstr("needs run_cap"));
  EXPECT_THAT(error("parameters: {lora.r: {values: [4]}}\nexclude: [lora.r == 4]"),
              HasSubstr("the sweep is empty"));
  for (const char* empty :
       {"parameters: {}", "paired: []", "include: []", "parameters: {lora: {}}"})
    EXPECT_THAT(error(empty), HasSubstr("ranks.yaml:7: the sweep is empty")) << empty;
  EXPECT_EQ(error("parameters: {}\nseeds: [0, 1]"), "");
  EXPECT_THAT(error("derived: {lora.r: lora.q * 2}"), HasSubstr("unknown key \"lora.q\""));
  EXPECT_THAT(error("exclude: [quant.type == bf61]"), HasSubstr("one of nf4, bf16, fp16, fp32"));
  EXPECT_THAT(error("seeds: []"), HasSubstr("empty"));
  EXPECT_THAT(error("seeds: 3"), HasSubstr("expected a list"));
  EXPECT_THAT(error("metric: {name: accuracy}"), HasSubstr("one of eval_loss"));
  EXPECT_THAT(error("method: grid", {"lora.x=1"}), HasSubstr("--set lora.x=1: unknown key"));
}

TEST_F(SweepTest, RunCapCountsTrials) {
  const Sweep sweep = load("run_cap: 3\nparameters: {lora.r: {values: [1, 2, 3, 4]}}");
  EXPECT_EQ(sweep.trials.size(), 3u);
  EXPECT_THAT(sweep.notes[0], HasSubstr("run_cap keeps the first 3 of 4"));
}

TEST_F(SweepTest, HashSeesConfigAndContentAlone) {
  const Trial trial = load("method: grid").trials[0];
  const Fingerprints content{.model = "m", .train = "t", .eval = "", .adapter = ""};
  const std::string hash = trial_hash(trial, content, "fp32");
  EXPECT_EQ(hash.size(), 16u);
  EXPECT_EQ(hash.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(trial_hash(trial, content, "fp32"), hash);
  EXPECT_NE(trial_hash(trial, content, "bf16"), hash);
  EXPECT_NE(trial_hash(trial, {.model = "m", .train = "u", .eval = "", .adapter = ""}, "fp32"),
            hash);
  Trial moved = trial;
  moved.config.model.path = "elsewhere";
  moved.config.train.log_every = 7;
  moved.config.parallel.trials_per_gpu = 4;
  moved.config.quant.compute_dtype = "fp32";
  EXPECT_EQ(trial_hash(moved, content, "fp32"), hash);
  moved.config.optim.lr *= 2;
  EXPECT_NE(trial_hash(moved, content, "fp32"), hash);
}

TEST_F(SweepTest, DirectoriesAreFoundByHash) {
  Trial trial = load("method: grid").trials[0];
  trial.name = "r8-s0";
  const auto found = [&](const std::string& hash) {
    return trial_directory((dir_ / "trials").string(), hash, trial);
  };
  const std::string hash = "0123abcd01234567";
  EXPECT_EQ(found(hash), hash + "-r8-s0");
  fs::create_directories(dir_ / "trials" / (hash + "-older-name"));
  EXPECT_EQ(found(hash), hash + "-older-name");
  EXPECT_EQ(found("0123abcd01234568"), "0123abcd01234568-r8-s0");
}

// They had 8 digits, which two trials can share.
TEST_F(SweepTest, ShortHashesOfEarlierVersionsCountForTheSameSettingsAlone) {
  Trial trial = load("method: grid").trials[0];
  trial.name = "r8-s0";
  trial.config.data.train = "train.jsonl";
  const std::string hash = "0123abcd01234567", earlier = "0123abcd-older-name";
  const auto found = [&] { return trial_directory((dir_ / "trials").string(), hash, trial); };
  const fs::path directory = dir_ / "trials" / earlier;
  fs::create_directories(directory);
  EXPECT_EQ(found(), earlier);
  Config written = trial.config;
  written.data.train = "/elsewhere/train.jsonl";
  written.quant.compute_dtype = "bf16";
  written.train.log_every = 7;
  std::ofstream(directory / "config.yaml") << to_yaml(written);
  EXPECT_EQ(found(), earlier);
  trial.config.optim.lr = 0.524587;
  EXPECT_EQ(found(), hash + "-r8-s0");
  std::ofstream(directory / "config.yaml") << "keys: of another version\n";
  EXPECT_EQ(found(), earlier);
}

TEST_F(SweepTest, NamesAreShortAndUnique) {
  const std::string a = ".*layers\\\\.[0-9]+\\\\.self_attn\\\\.(q|k|v|o)_proj";
  const Sweep sweep = load("parameters:\n  lora.targets: {values: [\"" + a + "\", \"" + a +
                           "$\", [q_proj, v_proj]]}\n  quant.double_quant: {values: [true, "
                           "false]}\n  optim.schedule: {values: [cosine, linear]}\n");
  std::set<std::string> names;
  for (const Trial& trial : sweep.trials) {
    EXPECT_LE(trial.name.size(), 64u);
    EXPECT_EQ(trial.name.find_first_of("/\\ *$|()[]"), std::string::npos) << trial.name;
    names.insert(trial.name);
  }
  EXPECT_EQ(names.size(), 12u);
  EXPECT_EQ(sweep.trials[8].name, "q-v-double_quant-cosine-s0");
}

TEST(Shard, PartitionsTheTrials) {
  EXPECT_THAT(shard("1/3", 7), ElementsAre(0, 3, 6));
  EXPECT_THAT(shard("3/3", 7), ElementsAre(2, 5));
  EXPECT_THAT(shard("2/2", 1), ElementsAre());
  for (const char* text : {"", "1", "0/2", "3/2", "a/b", "1/0", "1/2/3", "-1/2"}) {
    EXPECT_THROW(shard(text, 4), Error) << text;
  }
}

TEST(Expression, Arithmetic) {
  const Config c = load_config("", {"lora.r=8", "train.steps=250", "lora.dropout=0.05"});
  const auto number = [&](const std::string& text) {
    return std::get<double>(evaluate(text, c, "test"));
  };
  EXPECT_EQ(number("2*lora.r"), 16);
  EXPECT_EQ(number("2 * lora_r + 1 - -3"), 20);
  EXPECT_EQ(number("(1 + 2) * 3 / 2"), 4.5);
  EXPECT_EQ(number("7 % 4"), 3);
  EXPECT_EQ(number("round(0.03 * train.steps)"), 8);
  EXPECT_EQ(number("max(4, min(lora.r, 6), 5)"), 6);
  EXPECT_EQ(number("sqrt(4) + floor(1.9) + ceil(0.1)"), 4);
  EXPECT_EQ(number("2e-4"), 2e-4);
  EXPECT_EQ(number("alpha/r"), 2);
  EXPECT_EQ(number("32/alpha/r"), 0.25);
  EXPECT_EQ(number("1e-4*alpha/r"), 1e-4 * 16 / 8);
  EXPECT_EQ(number("alpha/sqrt(r) * sqrt(r)"), 16);
}

TEST(Expression, Conditions) {
  const Config c = load_config("", {"lora.targets=all-linear", "quant.type=bf16"});
  const auto holds = [&](const std::string& text) { return evaluate_condition(text, c, "test"); };
  EXPECT_TRUE(holds("quant.type == bf16 && quant.double_quant"));
  EXPECT_TRUE(holds("lora.targets == all-linear"));
  EXPECT_TRUE(holds("lora.targets != 'mlp' || false"));
  EXPECT_TRUE(holds("lora.scaling == alpha/r"));
  EXPECT_FALSE(holds("lora.scaling == alpha/sqrt(r)"));
  EXPECT_TRUE(holds("!(lora.r > 16) && lora.r >= 16 && lora.alpha == 2*lora.r"));
  EXPECT_FALSE(holds("!quant.double_quant"));
  EXPECT_TRUE(holds("alpha/sqrt(r) != lora.scaling"));
  EXPECT_TRUE(holds("lora.scaling == 'alpha/r' && alpha/r == 2"));
  EXPECT_TRUE(holds("quant.type == 'torch.bfloat16' && optim.type == adamw_torch"));
  EXPECT_TRUE(holds("optim.betas == '[0.9,0.999]'"));
  const Config list = load_config("", {"lora.targets=[q_proj, v_proj]", "data.train=a/b.jsonl"});
  EXPECT_TRUE(evaluate_condition("lora.targets == '[q_proj,v_proj]'", list, "test"));
  EXPECT_TRUE(evaluate_condition("data.train == 'b.jsonl' && data.train == 'a/b.jsonl'", list, ""));
  EXPECT_FALSE(evaluate_condition("data.train == 'jsonl'", list, "test"));
}

TEST(Expression, Errors) {
  const Config c = load_config("", {});
  const auto error = [&](const std::string& text) -> std::string {
    try {
      evaluate_condition(text, c, "x.yaml:3");
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(error("2*lora.r"), HasSubstr("x.yaml:3: \"2*lora.r\" is 32, expected a condition"));
  EXPECT_THAT(error("lora.rr == 2"), HasSubstr("did you mean \"lora.r\"?"));
  EXPECT_THAT(error("quant.type * 2 > 1"), HasSubstr("\"nf4\" is not a number"));
  EXPECT_THAT(error("lora.r == nf4"), HasSubstr("cannot be compared"));
  EXPECT_THAT(error("quant.type == nf5"), HasSubstr("one of nf4, bf16, fp16, fp32"));
  EXPECT_THAT(error("targets == attention"),
              HasSubstr("x.yaml:3: in \"targets == attention\": neither \"targets\" nor "
                        "\"attention\" is a key; did you mean \"lora.targets\"?"));
  EXPECT_THAT(error("bf16 == type"), HasSubstr("did you mean \"quant.type\"?"));
  EXPECT_THAT(error("'scaling' != 'alpha/r'"), HasSubstr("did you mean \"lora.scaling\"?"));
  EXPECT_THAT(error("lora.targets == atention"), HasSubstr("did you mean \"attention\"?"));
  EXPECT_THAT(error("optim.betas == '[0.9]'"), HasSubstr("expected two numbers"));
  EXPECT_THAT(error("lora.scaling == alpha*r"), HasSubstr("cannot be compared"));
  EXPECT_THAT(error("train.steps > 5"), HasSubstr("has no value here"));
  EXPECT_THAT(error("(1 > 2"), HasSubstr("\")\" is missing"));
  EXPECT_THAT(error("1 >"), HasSubstr("missing at the end"));
  EXPECT_THAT(error("1 > 2 3"), HasSubstr("unexpected \"3\""));
  EXPECT_THAT(error("1/0 > 2"), HasSubstr("division by zero"));
  EXPECT_THAT(error("log(2) > 1"), HasSubstr("unknown function \"log\""));
  EXPECT_THAT(error("sqrt(-1) > 1"), HasSubstr("square root of -1"));
  EXPECT_THAT(error("'abc"), HasSubstr("quote is not closed"));
  EXPECT_THAT(error(std::string(1000, '!') + "true"), HasSubstr("deeply nested"));
  EXPECT_THAT(error(std::string(1000, '(') + "true"), HasSubstr("deeply nested"));
}

}  // namespace
}  // namespace qlab
