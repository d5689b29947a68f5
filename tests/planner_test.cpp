// Plans within a memory budget: kept to the byte, the same bits, faster with more.
#include "experiments/planner.h"

#include <chrono>
#include <map>

#include "experiments/gpus.h"
#include "tests/support/error_of.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

class PlannerTest : public TrainingTest {
 protected:
  void SetUp() override {
    QLAB_SKIP_WITHOUT_PLANS();
    TrainingTest::SetUp();
  }
  Config with(const std::vector<std::string>& sets) const {
    std::vector<std::string> all = {"data.train=synthetic", "data.eval=\"\"", "train.steps=3",
                                    "train.eval_every=0", "data.seq_len=200"};
    all.insert(all.end(), sets.begin(), sets.end());
    return config(all);
  }
  RunPlan plan(const Config& c, int64_t budget) const {
    const std::vector<PaperTrial> gang = {assumed_trial(c, device())};
    return plan_run(open_model(c.model.path), gang, device(), budget, rates_of(device()));
  }
};
INSTANTIATE_TEST_SUITE_P(Runs, PlannerTest, cpu_and_cuda, device_name);

TEST_P(PlannerTest, KeepsTheBudgetAndTheBits) {
  constexpr int64_t plenty = int64_t{1} << 40;
  const int64_t most = plan(with({}), plenty).peak;
  const int64_t least = plan(with({"train.recompute=full"}), plenty).peak;
  ASSERT_LT(least, most);
  const Outcome kept = train("none", with({}));
  double slower = std::numeric_limits<double>::infinity();
  std::set<std::string> plans;
  for (int i = 0; i <= 6; ++i) {
    const int64_t budget = least + (most - least) * i / 6;
    SCOPED_TRACE(budget);
    const Config c = with({"train.recompute=auto", fmt::format("train.memory_budget={}B", budget)});
    const RunPlan chosen = plan(c, budget);
    EXPECT_LE(chosen.peak, budget);
    EXPECT_LE(chosen.step_seconds, slower);
    slower = chosen.step_seconds;
    plans.insert(describe(chosen));
    const int64_t before = memory_account(device()).total;
    const Outcome planned = train("auto" + std::to_string(i), c);
    EXPECT_EQ(peak("auto" + std::to_string(i)) - before, chosen.peak);
    expect_same(planned, kept);
  }
  EXPECT_GE(plans.size(), 4u);  // it mixes
}

TEST_P(PlannerTest, SaysWhatIsNeededAtLeast) {
  const Config c = with({"train.recompute=auto", "train.memory_budget=100kB"});
  const std::string error = error_of([&] { plan(c, 100000); });
  EXPECT_THAT(error, testing::HasSubstr("100.00 kB is too little"));
  EXPECT_THAT(error, testing::HasSubstr("activations"));
  EXPECT_THAT(error_of([&] { train("small", c); }), testing::HasSubstr("too little"));
}

// States that move make room for what would be computed again, or for anything to fit at all.
TEST_P(PlannerTest, PagesStates) {
  const auto sets = [](const char* type, int64_t budget) {
    return std::vector<std::string>{"train.recompute=auto", "lora.r=128",
                                    fmt::format("train.memory_budget={}B", budget),
                                    fmt::format("optim.type={}", type)};
  };
  constexpr int64_t plenty = int64_t{1} << 40;
  const int64_t most = plan(with({"lora.r=128"}), plenty).peak;
  const int64_t least = plan(with({"lora.r=128", "train.recompute=full"}), plenty).peak;
  EXPECT_EQ(plan(with(sets("paged_adamw", most)), most).paged_out, 0);
  const int64_t small = least - 100000;
  EXPECT_THAT(error_of([&] { plan(with(sets("adamw", small)), small); }),
              testing::HasSubstr("too little"));
  const Config c = with(sets("paged_adamw", small));
  const RunPlan paged = plan(c, small);
  EXPECT_GT(paged.paged_out, 0);
  EXPECT_LE(paged.peak, small);
  EXPECT_THAT(describe(paged), testing::HasSubstr("of optimizer states in host memory"));
  const Outcome kept = train("kept", with({"lora.r=128"}));
  const int64_t before = memory_account(device()).total;
  limit_memory(device(), before + small);
  const Outcome planned = train("paged", c);
  limit_memory(device(), std::numeric_limits<int64_t>::max());
  expect_same(planned, kept);
  EXPECT_EQ(peak("paged") - before, paged.peak);
}

// The allocator's own limit, where nobody planned ahead.
TEST_P(PlannerTest, ALimitIsTheEndOfTheDevice) {
  const Config c = with({});
  const int64_t before = memory_account(device()).total, need = plan(c, int64_t{1} << 40).peak;
  limit_memory(device(), before + need - 1);
  const std::string error = error_of([&] { train("limited", c); });
  limit_memory(device(), std::numeric_limits<int64_t>::max());
  EXPECT_THAT(error, testing::HasSubstr("out of memory"));
  EXPECT_EQ(memory_account(device()).total, before);
  limit_memory(device(), before + need);
  EXPECT_EQ(train("enough", c).state, TrialRun::State::finished);
  limit_memory(device(), std::numeric_limits<int64_t>::max());
}

// Steps of Llama-3.1-8B, NF4 with double quantization, r 16 on all linear modules, on an H100 80GB
// HBM3 at commit b328b0a (bench/results/step.json).
TEST(CostModel, IsNearWhatWasMeasured) {
  struct Measured {
    int64_t batch, tokens;
    const char *recompute, *resident;
    double seconds;
  };
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  for (const Measured& m :
       {Measured{4, 2048, "none", "auto", 0.4637}, Measured{4, 2048, "selective", "0", 0.4908},
        Measured{4, 2048, "full", "0", 0.6328}, Measured{1, 512, "none", "auto", 0.0318},
        Measured{1, 512, "selective", "0", 0.0459}}) {
    const Config c = load_config(
        "", {"model.path=synthetic:llama-3.1-8b", "lora.r=16", "data.train=synthetic",
             fmt::format("train.batch_size={}", m.batch), fmt::format("data.seq_len={}", m.tokens),
             fmt::format("train.recompute={}", m.recompute),
             fmt::format("quant.resident={}", m.resident)});
    const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
    const GpuSpec gpu = find_gpu("h100-80gb");
    const RunPlan plan = plan_run(model, gang, Device::cuda(), gpu.usable(), gpu_rates(gpu.name));
    EXPECT_NEAR(plan.step_seconds / m.seconds, 1, 0.10) << m.batch << " " << m.recompute;
  }
}

// Of a layer that is computed again down_proj's product is left out, and where it has no adapter
// its input, the result of SwiGLU: nobody reads them.
TEST(CostModel, LayersAreComputedAgainUpToWhatIsRead) {
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  const int64_t layers = model.config.num_hidden_layers;
  const auto work = [&](const char* targets, int64_t batch, Recompute recompute) {
    const Config c =
        load_config("", {"model.path=synthetic:llama-3.1-8b", "lora.r=16", "data.train=synthetic",
                         "data.seq_len=2048", fmt::format("train.batch_size={}", batch),
                         fmt::format("lora.targets={}", targets)});
    const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
    RunPlan plan;
    plan.layers.assign(static_cast<size_t>(layers), recompute);
    std::map<std::string, ProfileLine> lines;  // of all parts together
    for (const ProfileLine& line : predict_memory(model, gang, Device::cuda(), {}, plan).work) {
      lines[line.name].work.flops += line.work.flops;
      lines[line.name].work.bytes += line.work.bytes;
    }
    return lines;
  };
  for (const int64_t batch : {4, 8})  // 8 x 2048 in chunks of 8,192 rows
    for (const bool mlp : {false, true}) {
      SCOPED_TRACE(fmt::format("{} x 2048, adapters on the MLP: {}", batch, mlp));
      const char* targets = mlp ? "all-linear" : "attention";
      auto none = work(targets, batch, Recompute::none);
      const int64_t r = 16, r_mlp = mlp ? r : 0;
      const double again = static_cast<double>((4096 + 3 * r) * (4096 + 2 * 1024) +
                                               (4096 + r) * 4096 + (4096 + 2 * r_mlp) * 2 * 14336);
      auto full = work(targets, batch, Recompute::full);
      EXPECT_DOUBLE_EQ(full["product"].work.flops - none["product"].work.flops,
                       2.0 * 2048 * static_cast<double>(batch * layers) * again);
      const double activations = 2.0 * 2048 * static_cast<double>(batch * layers) * 3 * 14336;
      for (const Recompute recompute : {Recompute::full, Recompute::selective})
        EXPECT_DOUBLE_EQ(work(targets, batch, recompute)["swiglu"].work.bytes,
                         activations * (mlp ? 2 : 1));
    }
}

// Backward would fill the last layer again as soon as it is dropped; and as it goes down, the
// inputs of the layers above make room for weights that are expanded once for second run and
// backward.
TEST(Planner, UsesSpareMemory) {
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  const Rates rates = gpu_rates("h100-80gb");
  const auto all_again = [&](const std::vector<PaperTrial>& gang) {
    RunPlan plan;
    plan.layers.assign(static_cast<size_t>(model.config.num_hidden_layers), Recompute::full);
    return predict_memory(model, gang, Device::cuda(), {}, plan);
  };
  // What down_proj's adapter needs would be kept beside all else; 8 x 2048 would not run in chunks.
  for (const auto& [targets, batch, free] :
       {std::tuple{"attention", 4, true}, {"all-linear", 4, false}, {"all-linear", 8, false}}) {
    SCOPED_TRACE(fmt::format("{} x 2048, adapters on {}", batch, targets));
    const Config c = load_config(
        "", {"model.path=synthetic:llama-3.1-8b", "lora.r=16", "data.train=synthetic",
             "data.seq_len=2048", "train.recompute=full", fmt::format("lora.targets={}", targets),
             fmt::format("train.batch_size={}", batch)});
    const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
    const RunPlan plan = plan_run(model, gang, Device::cuda(), int64_t{1} << 40, rates);
    const MemoryPrediction again = all_again(gang);
    EXPECT_LE(plan.peak, again.peak());
    EXPECT_EQ(std::count(plan.layers.begin(), plan.layers.end() - 1, Recompute::full), 31);
    EXPECT_EQ(plan.layers.back(), free ? Recompute::none : Recompute::full);
    EXPECT_LT(plan.step_seconds, predicted_seconds(again.work, rates));
    // One layer more would be one too many.
    EXPECT_GT(plan.expanded_once, 20);
    RunPlan more = plan;
    more.expanded_once += 1;
    EXPECT_GT(predict_memory(model, gang, Device::cuda(), {}, more).step_bytes, again.step_bytes);
  }
}

// What waits on the host has room there, or the run is refused before it loads anything.
TEST(Planner, HostMemoryThatIsTooLittleIsSaid) {
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  const auto plan = [&](std::vector<std::string> sets) {
    sets.insert(sets.end(), {"model.path=synthetic:llama-3.1-8b", "lora.r=16",
                             "data.train=synthetic", "train.batch_size=4", "data.seq_len=2048"});
    const std::vector<PaperTrial> gang = {assumed_trial(load_config("", sets), Device::cuda())};
    return plan_run(model, gang, Device::cuda(), int64_t{60} << 30, gpu_rates("h100-80gb"));
  };
  const RunPlan plain = plan({"train.recompute=full"});
  const RunPlan aside = plan({"train.recompute=offload", "model.embeddings=host"});
  constexpr int64_t inputs = int64_t{31} * 8192 * 4096 * 2, table = int64_t{128256} * 4096 * 2;
  EXPECT_GE(aside.host_peak, inputs + table);
  EXPECT_GE(plain.host_peak, table);  // as it is read
  EXPECT_LT(plain.host_peak, inputs);
  const auto refused = [](const RunPlan& p, int64_t available) {
    return error_of([&] { check_host_memory(p, available); });
  };
  EXPECT_EQ(refused(aside, aside.host_peak), "");
  EXPECT_THAT(refused(aside, aside.host_peak - 1),
              testing::AllOf(testing::HasSubstr(format_minimum(aside.host_peak)),
                             testing::HasSubstr("train.recompute: full"),
                             testing::HasSubstr("model.embeddings: device"),
                             testing::Not(testing::HasSubstr("optim.type"))));
  EXPECT_THAT(refused(plain, plain.host_peak - 1),
              testing::AllOf(testing::HasSubstr("host memory"),
                             testing::Not(testing::HasSubstr("or set"))));
}

// Without streamed layers, embeddings go to the host where computing again is not enough.
TEST(Planner, MovesEmbeddings) {
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  const auto plan = [&](const char* budget, const char* where, const char* streamed = "0") {
    const Config c =
        load_config("", {"model.path=synthetic:llama-3.1-8b", "lora.r=16", "data.train=synthetic",
                         "train.batch_size=4", "data.seq_len=2048", "train.recompute=auto",
                         fmt::format("model.embeddings={}", where),
                         fmt::format("model.streamed_layers={}", streamed)});
    const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
    return plan_run(model, gang, Device::cuda(), *parse_bytes(budget), gpu_rates("h100-80gb"));
  };
  EXPECT_FALSE(plan("60GB", "auto").host_embeddings);
  EXPECT_TRUE(plan("12GB", "host").host_embeddings);
  EXPECT_TRUE(plan("7.5GB", "auto").host_embeddings);  // on the device they do not fit
  EXPECT_LE(plan("7.5GB", "auto").peak, 7'500'000'000);
  for (const char* where : {"device", "host"})
    EXPECT_LE(plan("9.5GB", "auto").step_seconds, plan("9.5GB", where).step_seconds * 1.001);
  EXPECT_GT(plan("6GB", "auto", "auto").streamed_layers, 0);
}

/// Of a synthetic model, 1 x 512 tokens.
Config small_batch(const std::string& model, const std::string& recompute,
                   const std::vector<std::string>& sets = {}) {
  std::vector<std::string> all = {"model.path=synthetic:" + model, "lora.r=16",
                                  "data.train=synthetic", "train.batch_size=1",
                                  "train.recompute=" + recompute};
  all.insert(all.end(), sets.begin(), sets.end());
  return load_config("", all);
}
Config llama_2_7b(const std::string& recompute, const std::vector<std::string>& sets = {}) {
  return small_batch("llama-2-7b", recompute, sets);
}
/// On an H100.
RunPlan h100_plan(const Config& c, const char* budget) {
  const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
  return plan_run(open_model(c.model.path), gang, Device::cuda(), *parse_bytes(budget),
                  gpu_rates("h100-80gb"));
}

// The less memory, the more layers come from the host.
TEST(Planner, StreamsLayers) {
  EXPECT_EQ(h100_plan(llama_2_7b("auto"), "40GB").streamed_layers, 0);
  int64_t before = 0;
  double seconds = 0;
  for (const char* budget : {"4GB", "3GB", "2GB"}) {
    SCOPED_TRACE(budget);
    const RunPlan plan = h100_plan(llama_2_7b("auto"), budget);
    EXPECT_LE(plan.peak, *parse_bytes(budget));
    EXPECT_GT(plan.streamed_layers, before);
    EXPECT_GE(plan.step_seconds, seconds);
    EXPECT_GT(plan.host_peak, plan.streamed_layers * 100'000'000);
    EXPECT_THAT(describe(plan),
                testing::HasSubstr(fmt::format("the weights of {} of 32 layers streamed from host "
                                               "memory",
                                               plan.streamed_layers)));
    // One fewer, with everything put aside, is too much or no faster.
    const RunPlan fewer = h100_plan(
        llama_2_7b("offload", {"model.embeddings=host",
                               fmt::format("model.streamed_layers={}", plan.streamed_layers - 1)}),
        budget);
    EXPECT_TRUE(fewer.peak > *parse_bytes(budget) || fewer.step_seconds >= plan.step_seconds);
    before = plan.streamed_layers, seconds = plan.step_seconds;
  }
  EXPECT_THAT(error_of([&] { h100_plan(llama_2_7b("auto"), "600MB"); }),
              testing::AllOf(testing::HasSubstr("the weights of 32 of 32 layers streamed"),
                             testing::HasSubstr("at its peak, ")));
  // A number is kept to.
  EXPECT_EQ(h100_plan(llama_2_7b("auto", {"model.streamed_layers=8"}), "40GB").streamed_layers, 8);
  EXPECT_THROW(h100_plan(llama_2_7b("auto", {"model.streamed_layers=0"}), "3GB"), OutOfMemory);
}

TEST(Planner, SeventyBillionParametersFitIn24GiB) {
  for (const char* model : {"llama-3.1-70b", "llama-2-70b"}) {
    SCOPED_TRACE(model);
    const RunPlan plan = h100_plan(small_batch(model, "auto"), "24GiB");
    EXPECT_LE(plan.peak, int64_t{24} << 30);
    EXPECT_GT(plan.streamed_layers, 20);
    EXPECT_LT(plan.streamed_layers, 60);
  }
}

/// A run whose plans are compared with one another.
struct Planned {
  std::string model;
  std::vector<std::string> sets;
  RunPlan plan(const std::vector<std::string>& more, const MemoryLimits& limits,
               const std::string& recompute = "auto") const {
    std::vector<std::string> all = {"model.path=synthetic:" + model, "data.train=synthetic",
                                    "train.recompute=" + recompute, "quant.resident=auto"};
    all.insert(all.end(), sets.begin(), sets.end());
    all.insert(all.end(), more.begin(), more.end());
    const Config c = load_config("", all);
    const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
    return plan_run(open_model(c.model.path), gang, Device::cuda(), limits, gpu_rates("h100-80gb"));
  }
};
const Planned long_8b{"llama-3.1-8b", {"lora.r=16", "train.batch_size=4", "data.seq_len=2048"}};
const Planned short_8b{"llama-3.1-8b", {"lora.r=16", "train.batch_size=1"}};
const Planned short_65b{"llama-65b", {"lora.r=64", "train.batch_size=1"}};
/// What the search leaves undone: it tries nothing that promises less.
constexpr double of_the_search = 1e-3;

TEST(Planner, MoreMemoryIsNeverSlower) {
  const auto expect_faster = [](const Planned& run, const std::vector<int>& budgets) {
    double slowest = std::numeric_limits<double>::infinity();
    for (const int gib : budgets) {
      SCOPED_TRACE(fmt::format("{} in {} GiB", run.model, gib));
      const RunPlan plan = run.plan({}, int64_t{gib} << 30);
      EXPECT_LE(plan.peak, int64_t{gib} << 30);
      EXPECT_LE(plan.step_seconds, slowest * (1 + of_the_search)) << describe(plan);
      slowest = std::min(slowest, plan.step_seconds);
    }
  };
  expect_faster(long_8b, {5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 48, 64});
  expect_faster(short_8b, {4, 5, 6, 7, 8, 10, 16, 24});
  expect_faster(short_65b, {16, 24, 32, 40, 44, 48, 60});
}

TEST(Planner, NothingSetByHandIsFaster) {
  const auto expect_best = [](const Planned& run, int64_t budget,
                              const std::vector<int64_t>& streamed) {
    const RunPlan best = run.plan({}, budget);
    for (const int64_t n : streamed)
      for (const char* embeddings : {"device", "host"})
        for (const char* recompute : {"auto", "none", "selective", "full", "offload"}) {
          SCOPED_TRACE(fmt::format("{}: {} streamed, embeddings {}, recompute {}", run.model, n,
                                   embeddings, recompute));
          try {
            const RunPlan plan = run.plan({fmt::format("model.streamed_layers={}", n),
                                           fmt::format("model.embeddings={}", embeddings)},
                                          budget, recompute);
            if (plan.peak > budget) continue;
            EXPECT_GE(plan.step_seconds, best.step_seconds * (1 - of_the_search))
                << describe(best) << "\n"
                << describe(plan);
          } catch (const OutOfMemory&) {
            EXPECT_STREQ(recompute, "auto");
          }
        }
  };
  for (const int gib : {8, 12, 16, 24})
    expect_best(long_8b, int64_t{gib} << 30, {0, 6, 16, 30, 32});
  expect_best(short_8b, int64_t{7} << 30, {0, 4, 12, 32});
  expect_best(short_65b, 48'000'000'000 - (int64_t{600} << 20), {0, 8, 24, 60});
}

// Both are what a run may take.
TEST(Planner, KeepsToTheHostsMemory) {
  constexpr int64_t budget = int64_t{8} << 30, host = int64_t{2} << 30;
  const RunPlan free = long_8b.plan({}, budget);
  ASSERT_GT(free.host_peak, host);
  const RunPlan bound = long_8b.plan({}, {budget, host});
  EXPECT_LE(bound.peak, budget);
  EXPECT_LE(bound.host_peak, host);
  EXPECT_GE(bound.step_seconds, free.step_seconds);
  EXPECT_THAT(error_of([&] {
                long_8b.plan({}, {int64_t{5} << 30, int64_t{1} << 30});
              }),
              testing::HasSubstr("too little host memory"));
  // The least that the host must have, and what makes it up.
  const Config c = load_config(
      "", {"model.path=synthetic:llama-3.1-8b", "data.train=synthetic", "train.recompute=auto",
           "quant.resident=auto", "lora.r=16", "train.batch_size=4", "data.seq_len=2048"});
  const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
  const ModelSource model = open_model(c.model.path);
  const Rates rates = gpu_rates("h100-80gb");
  const auto least = PlanSearch(model, gang, Device::cuda(), budget, rates).leanest_on_host();
  ASSERT_TRUE(least);
  EXPECT_LT(least->host_peak, bound.host_peak);
  EXPECT_EQ(sum(least->host_at_peak), least->host_peak);
  EXPECT_THAT(
      error_of([&] {
        long_8b.plan({}, {budget, int64_t{1} << 20});
      }),
      testing::HasSubstr(fmt::format("take {} (activations ", format_minimum(least->host_peak))));
  EXPECT_LE(long_8b.plan({}, {budget, least->host_peak}).host_peak, least->host_peak);
}

// A search of a step of millions of tokens would predict it some 60 times, seconds each.
TEST(Planner, WhatIsFarTooLargeIsKnownAtOnce) {
  const Config c = small_batch("llama-3.1-8b", "auto", {"data.seq_len=1000000"});
  const ModelSource model = open_model(c.model.path);
  const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
  const Rates rates = gpu_rates("h100-80gb");
  const auto seconds = [](const auto& run) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  RunPlan lean;
  lean.layers.assign(static_cast<size_t>(model.config.num_hidden_layers), Recompute::offload);
  lean.streamed_layers = model.config.num_hidden_layers;
  MemoryPrediction least;
  const double once =
      seconds([&] { least = predict_memory(model, gang, Device::cuda(), {}, lean); });
  const auto plan = [&](int64_t budget) {
    return plan_run(model, gang, Device::cuda(), budget, rates);
  };
  std::string error;
  EXPECT_LT(seconds([&] { error = error_of([&] { plan(*parse_bytes("40GB")); }); }), 4 * once);
  EXPECT_THAT(error, testing::HasSubstr("40.00 GB is too little"));
  EXPECT_THAT(error, testing::HasSubstr(needed_text(least)));
  // Nor is there anything to search for where memory has no end.
  EXPECT_LT(seconds([&] { EXPECT_EQ(plan(MemoryLimits::none).layers.front(), Recompute::none); }),
            4 * once);
  // In proportion means about: what is near is predicted.
  const auto fits = [&](int64_t budget) {
    return some_plan_fits(model, gang, Device::cuda(), budget, rates);
  };
  EXPECT_TRUE(fits(least.peak()));
  EXPECT_FALSE(fits(least.peak() - least.peak() / 100));
  EXPECT_FALSE(fits(least.peak() - least.peak() / 10));
}

TEST(Planner, MinimaAreRoundedUp) {
  EXPECT_EQ(format_minimum(999), "999 B");
  EXPECT_EQ(format_minimum(1'185'000), "1.19 MB");
  EXPECT_EQ(format_minimum(1'190'000), "1.19 MB");
  EXPECT_EQ(format_minimum(1'190'001), "1.20 MB");
  for (int64_t n = 1; n < 2'000'000'000'000'000; n += n / 7 + 1)
    for (const int64_t bytes : {n, n / 1000 * 1000 + 999, n / 1000 * 1000}) {
      const int64_t given = *parse_bytes(format_minimum(bytes));
      EXPECT_GE(given, bytes);
      EXPECT_LE(static_cast<double>(given), static_cast<double>(bytes) * 1.0102);
    }
}

TEST(Planner, AsksTheHostForRoom) {
  const RunPlan plan = h100_plan(llama_2_7b("auto"), "3GB");
  ASSERT_GT(plan.streamed_layers, 0);
  EXPECT_THAT(
      error_of([&] { check_host_memory(plan, plan.host_peak - 1); }),
      testing::HasSubstr(fmt::format("model.streamed_layers below {}", plan.streamed_layers)));
  check_host_memory(plan, plan.host_peak);
}

// Copies of a part overlap with what it computes, not with the next part.
TEST(CostModel, StreamedLayersOverlap) {
  const Rates rates{1e12, 1e12, 0, true};
  const auto line = [](const char* name, double flops, double bytes, int part) {
    return ProfileLine{name, 1, 0, {flops, bytes}, part};
  };
  const double copy = predicted_seconds({line("streamed layer", 0, 1e12, 0)}, rates);
  const double product = predicted_seconds({line("product", 1e12, 0, 0)}, rates);
  EXPECT_GT(copy, 2 * product);
  const auto both = [&](double products, int part) {
    return predicted_seconds(
        {line("streamed layer", 0, 1e12, 0), line("product", products * 1e12, 0, part)}, rates);
  };
  EXPECT_EQ(both(1, 0), copy);
  EXPECT_EQ(both(1000, 0), 1000 * product);
  EXPECT_EQ(both(1, 1), copy + product);
}

// With 16 micro-batches a step the optimizer runs once, and its pages move once.
TEST(CostModel, AnUpdateComesOnceAStep) {
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  const Rates rates = gpu_rates("h100-80gb");
  const auto plan = [&](int64_t accum, int64_t budget) {
    const Config c =
        load_config("", {"model.path=synthetic:llama-3.1-8b", "lora.r=256", "data.train=synthetic",
                         "train.batch_size=1", "optim.type=paged_adamw",
                         fmt::format("train.grad_accum={}", accum)});
    const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
    return plan_run(model, gang, Device::cuda(), budget, rates);
  };
  const RunPlan roomy = plan(1, int64_t{60} << 30);
  ASSERT_EQ(roomy.paged_out, 0);
  const RunPlan one = plan(1, roomy.peak * 8 / 10), many = plan(16, roomy.peak * 8 / 10);
  ASSERT_GT(one.paged_out, int64_t{1} << 30);
  EXPECT_EQ(many.paged_out, one.paged_out);
  EXPECT_EQ(one.seconds.micro, roomy.seconds.micro);
  EXPECT_EQ(many.seconds.micro, one.seconds.micro);
  EXPECT_EQ(many.seconds.update, one.seconds.update);
  EXPECT_EQ(one.step_seconds, one.seconds.micro + one.seconds.update);
  EXPECT_EQ(many.step_seconds, 16 * one.seconds.micro + one.seconds.update);
  const double moved = 2 * static_cast<double>(one.paged_out) / 104e9;  // in and out
  EXPECT_GE(one.seconds.update, moved);
  EXPECT_LE(one.seconds.update, 1.1 * moved + roomy.seconds.update);
}

TEST(Gpus, AreKnownByNameOrBytes) {
  EXPECT_EQ(find_gpu("T4").memory_bytes, int64_t{15360} << 20);
  EXPECT_EQ(find_gpu("24GiB").memory_bytes, int64_t{24} << 30);
  EXPECT_EQ(find_gpu("t4").capability, 75);
  EXPECT_EQ(memory_target("t4", "auto").device, Device::gpu(75));
  EXPECT_EQ(memory_target("rtx5090", "auto").device, Device::gpu(120));
  EXPECT_TRUE(supports_bf16(memory_target("24GiB", "auto").device));
  EXPECT_ERROR(find_gpu("gtx"), "h100-80gb, h200, a100-40gb");
  EXPECT_ERROR(find_gpu("0"), "out of range");
  EXPECT_ERROR(memory_target("t4", "cpu"), "give one of them");
}

}  // namespace
}  // namespace qlab::test
