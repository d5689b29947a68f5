// Runs whose optimizer states are in 8 bits or in pages: more than fits, the same bits, the bytes
// that were predicted.
#include <limits>

#include "experiments/gangs.h"
#include "experiments/memory_prediction.h"
#include "experiments/remedy.h"
#include "experiments/runner.h"
#include "tests/support/tiny_llama.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

class PagingTest : public TrainingTest {
 protected:
  void SetUp() override {
    QLAB_SKIP_WITHOUT_PLANS();
    TrainingTest::SetUp();
  }
  /// Adapters of high rank and short sequences: states are a large part of what the run needs.
  Config with(const std::string& optimizer, const std::vector<std::string>& sets = {}) const {
    std::vector<std::string> all = {"lora.r=256", "train.batch_size=2", "data.seq_len=64",
                                    "optim.type=" + optimizer};
    all.insert(all.end(), sets.begin(), sets.end());
    return config(all);
  }
  MemoryPrediction predicted(const std::vector<Config>& configs,
                             std::optional<int64_t> capacity = {}) const {
    Library library;
    std::vector<PaperTrial> gang;
    for (const Config& c : configs) gang.push_back(paper_trial(c, library, device()));
    return predict_memory(open_model(configs[0].model.path), gang, device(), capacity);
  }
  int64_t need(const Config& c) const { return predicted({c}).peak(); }
  /// The peak with every state on the host.
  int64_t least(const Config& paged) const { return predicted({paged}, 1).peak(); }
  /// Trains under a limit on what the device has.
  std::vector<Outcome> gang_within(int64_t bytes,
                                   const std::vector<std::pair<std::string, Config>>& trials,
                                   const std::function<bool()>& stop = {}) const {
    limit_memory(device(), memory_account(device()).total + bytes);
    std::vector<Outcome> outcomes;
    try {
      outcomes = gang(trials, stop);
    } catch (...) {
      limit_memory(device(), std::numeric_limits<int64_t>::max());
      throw;
    }
    limit_memory(device(), std::numeric_limits<int64_t>::max());
    return outcomes;
  }
  Outcome train_within(int64_t bytes, const std::string& name, const Config& c,
                       const std::function<bool()>& stop = {}) const {
    return gang_within(bytes, {{name, c}}, stop).at(0);
  }
};
INSTANTIATE_TEST_SUITE_P(Runs, PagingTest, cpu_and_cuda, device_name);

// At needs of 1.1 and 1.5 times the limit. On a GPU the library's workspace is most of what one
// trial of a tiny model needs, so that many train together there, and in fp32, where no block is
// expanded for all their adapters.
TEST_P(PagingTest, MoreThanFitsGivesTheSameBits) {
  for (const std::string optimizer : {"adamw", "adamw8bit"}) {
    SCOPED_TRACE(optimizer);
    const auto members = [&](const std::string& type, const std::string& name) {
      std::vector<std::pair<std::string, Config>> trials;
      for (int i = 0; i < (device().is_cuda() ? 24 : 1); ++i)
        trials.emplace_back(
            fmt::format("{}-{}", name, i),
            with(type, {fmt::format("train.seed={}", i), "quant.compute_dtype=fp32"}));
      return trials;
    };
    const auto configs = [](const std::vector<std::pair<std::string, Config>>& trials) {
      std::vector<Config> only;
      for (const auto& [name, c] : trials) only.push_back(c);
      return only;
    };
    const auto unpaged = members(optimizer, "whole-" + optimizer);
    const std::vector<Outcome> whole = gang(unpaged);
    const int64_t all = predicted(configs(unpaged)).peak();
    const MemoryPrediction leanest = predicted(configs(members("paged_" + optimizer, "")), 1);
    const int64_t states = leanest.paged_out;
    int64_t out_before = 0;
    for (const double times : {1.1, 1.5}) {
      SCOPED_TRACE(times);
      if (times == 1.5 && optimizer == "adamw8bit") continue;  // its states are too small for that
      const auto limit = static_cast<int64_t>(static_cast<double>(all) / times);
      ASSERT_GE(limit, leanest.peak());
      EXPECT_THAT(error_of([&] { gang_within(limit, members(optimizer, "no")); }),
                  testing::HasSubstr("out of memory"));
      const auto trials = members("paged_" + optimizer, fmt::format("{}-{}", optimizer, times));
      const int64_t before = memory_account(device()).total;
      const std::vector<Outcome> paged = gang_within(limit, trials);
      int64_t out = 0;
      for (size_t i = 0; i < trials.size(); ++i) {
        expect_same(paged[i], whole[i]);
        const nlohmann::json json = status(trials[i].first), paging = json["paging"];
        EXPECT_EQ(json["predicted_peak_bytes"], json["peak_bytes"].get<int64_t>() - before);
        const int64_t own = paging["host_bytes"];
        out += own;
        EXPECT_EQ(paging["step_moved_bytes"], 2 * own);
        EXPECT_EQ(paging["moved_bytes"], 6 * 2 * own);
        EXPECT_GE(paging["stalled_seconds"], 0.0);
        if (own == 0) continue;
        EXPECT_THAT(read_text_file(folder_ / (trials[i].first + "/log.txt")),
                    testing::HasSubstr("of paged states in host memory"));
      }
      EXPECT_LE(peak(trials[0].first) - before, limit);
      EXPECT_GT(out, out_before);
      EXPECT_LE(out, states);
      out_before = out;
    }
    EXPECT_THAT(error_of([&] {
                  gang_within(leanest.peak() - 100000, members("paged_" + optimizer, "least"));
                }),
                testing::HasSubstr("out of memory"));
  }
}

TEST_P(PagingTest, StaysWhereThereIsRoom) {
  const Outcome whole = train("whole", with("adamw")), paged = train("paged", with("paged_adamw"));
  expect_same(paged, whole);
  const nlohmann::json json = status("paged");
  EXPECT_EQ(json["paging"]["host_bytes"], 0);
  EXPECT_EQ(json["paging"]["moved_bytes"], 0);
  EXPECT_EQ(json["paging"]["stalled_seconds"], 0.0);
  EXPECT_FALSE(status("whole").contains("paging"));
}

// Stopped, and continued with its states elsewhere.
TEST_P(PagingTest, ContinuesBitForBit) {
  for (const std::string optimizer : {"adamw", "adamw8bit"}) {
    SCOPED_TRACE(optimizer);
    const int64_t all = need(with(optimizer));
    const int64_t limit = std::max(all * 10 / 12, least(with("paged_" + optimizer)));
    const Outcome whole = train("whole-" + optimizer, with(optimizer));
    for (const bool paged_first : {true, false}) {
      const std::string name = optimizer + (paged_first ? "-first" : "-then");
      int asked = 0;
      const auto stop = [&] { return ++asked > 8; };
      const auto run = [&](bool paged, const std::function<bool()>& until) {
        return paged ? train_within(limit, name, with("paged_" + optimizer), until)
                     : train(name, with(optimizer), until);
      };
      const Outcome part = run(paged_first, stop);
      EXPECT_EQ(part.state, TrialRun::State::interrupted);
      expect_same(run(!paged_first, {}), whole);
    }
  }
}

TEST_P(PagingTest, InAGang) {
  const std::vector<std::pair<std::string, Config>> trials = {
      {"a", with("paged_adamw")},
      {"b", with("paged_adamw8bit", {"lora.r=32"})},
      {"c", with("adamw", {"lora.r=8"})}};
  const std::vector<Outcome> whole = gang(trials);
  const int64_t all = peak("a"), states = status("a")["paging"]["state_bytes"];
  std::vector<std::pair<std::string, Config>> again = trials;
  for (auto& [name, c] : again) name += "2";
  const std::vector<Outcome> paged = gang_within(all - states, again);
  for (size_t i = 0; i < whole.size(); ++i) expect_same(paged[i], whole[i]);
  EXPECT_EQ(status("a2")["predicted_peak_bytes"], status("a2")["peak_bytes"]);
  EXPECT_GT(status("a2")["paging"]["host_bytes"].get<int64_t>() +
                status("b2")["paging"]["host_bytes"].get<int64_t>(),
            0);
}

// Whichever comes first, one with pages and one without do not share what bounds the allocator.
TEST_P(PagingTest, GangsAreOfOneKind) {
  const std::vector<std::string> three = {"parallel.trials_per_gpu=3"};
  const Config plain = with("adamw", three), paged = with("paged_adamw", three),
               small = with("paged_adamw8bit", three);
  const std::vector<const Config*> trials = {&plain, &paged, &small};
  EXPECT_EQ(gangs_of(trials, device()), (std::vector<std::vector<size_t>>{{0}, {1, 2}}));
}

// An explicit budget holds where no planner is asked for, and says so before anything is loaded.
TEST_P(PagingTest, ABudgetHoldsWithoutAPlanner) {
  const auto sweep = [&](const std::string& type, const std::string& budget) {
    const std::string file = folder_.write(
        "sweep.yaml",
        "base:\n  model: {path: \"synthetic:tiny\"}\n  lora: {r: 4}\n  data: {train: " + train_ +
            ", seq_len: 64}\n  train: {steps: 2, batch_size: 3, memory_budget: " + budget +
            "}\n  optim: {type: " + type + "}\n");
    return run_sweep(load_sweep(file, {}), {folder_ / (type + budget), device(), "", false},
                     [](const std::string&) {}, {});
  };
  EXPECT_EQ(sweep("paged_adamw", "100kB").failed, 1);
  EXPECT_EQ(sweep("paged_adamw", "10GB").finished, 1);
  EXPECT_EQ(sweep("adamw", "100kB").finished, 1);  // without pages it is the planner's alone
  EXPECT_EQ(limit_memory(device(), std::numeric_limits<int64_t>::max()),
            std::numeric_limits<int64_t>::max());
}

// On a CPU its pages would be in the same memory.
TEST_P(PagingTest, IsARemedyForGpusAlone) {
  const Config c =
      with("adamw", {"train.recompute=full", "lora.r=4096", "quant.compute_dtype=fp32"});
  Library library;
  const std::vector<PaperTrial> gang = {paper_trial(c, library, device())};
  const int64_t limit = need(c) * 9 / 10;
  const auto remedy =
      cheapest_fit(open_model(c.model.path), gang, device(), limit, rates_of(device()));
  EXPECT_LE(remedy ? remedy->peak : 0, limit);
  if (device().is_cuda()) {
    EXPECT_TRUE(remedy);
  } else {
    const auto sets = remedy ? remedy->sets : std::vector<std::string>();
    EXPECT_THAT(sets, testing::Not(testing::Contains("optim.type=paged_adamw")));
  }
}

class SpikeTest : public OpTest {
 protected:
  void SetUp() override {
    QLAB_SKIP_WITHOUT_PLANS();
    OpTest::SetUp();
  }
  void TearDown() override { limit_memory(device(), std::numeric_limits<int64_t>::max()); }
};
INSTANTIATE_TEST_SUITE_P(Runs, SpikeTest, testing::Values(cpu_f32, cuda_bf16), name);

// A step in the middle of a run that is larger than any before it, and than what is free: states
// move out for it, and it gives the same bits.
TEST_P(SpikeTest, MovesStatesOutAndGoesOn) {
  const std::unique_ptr<Llama> model = tiny_llama(WeightFormat::nf4, GetParam());
  constexpr int spike = 3;
  struct Ran {
    std::vector<std::vector<float>> nll;
    std::vector<int64_t> held, out;  // after each step
    int64_t states;
    Tensor parameters;
  };
  const auto run = [&](std::optional<int64_t> limit) {
    const int64_t start = memory_account(device()).total;
    LoraSpec spec;
    spec.r = 256;
    const std::unique_ptr<Adapter> adapter = fresh_adapter(*model, spec);
    AdamWConfig config;
    config.paged = true;
    AdamW optimizer(config, adapter->sizes(), device());
    Stepper stepper(*model, Recompute::none);
    Ran ran;
    for (int t = 0; t < 6; ++t) {
      const Tokens tokens = random_tokens(t == spike ? 400 : 16, static_cast<uint64_t>(t), t);
      if (t == spike && limit) limit_memory(device(), start + *limit);
      fill_zero(adapter->gradients());
      BatchBuilder batch;
      batch.add({tokens.sequence()}, adapter.get(), true, 0.1f);
      ran.nll.push_back(stepper.run(batch, true));
      optimizer.step(adapter->parameters(), adapter->gradients(), 1e-3f, stepper.idle());
      adapter->refresh();
      ran.held.push_back(memory_account(device()).total - start);
      ran.out.push_back(optimizer.moments().bytes_on_host());
    }
    limit_memory(device(), std::numeric_limits<int64_t>::max());
    ran.states = optimizer.moments().bytes();
    ran.parameters = adapter->parameters().clone();
    return ran;
  };
  const Ran whole = run({});
  const Ran small = run(whole.held[spike] - whole.states / 2);
  EXPECT_EQ(whole.out.back(), 0);
  EXPECT_EQ(small.out[spike - 1], 0);
  EXPECT_GE(small.out[spike], whole.states / 2);
  EXPECT_LE(small.held[spike], whole.held[spike] - whole.states / 2);
  EXPECT_EQ(small.out.back(), small.out[spike]);
  EXPECT_EQ(small.nll, whole.nll);
  expect_same_bits(small.parameters, whole.parameters);
}

}  // namespace
}  // namespace qlab::test
