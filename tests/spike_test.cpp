// A long example among short ones, larger than what is free: its steps compute more again, the
// others keep what they can, and the losses are those of a device with room for all.
#include <limits>

#include "experiments/planner.h"
#include "experiments/runner.h"
#include "tests/support/error_of.h"
#include "tests/support/tiny_llama.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

constexpr int64_t plenty = int64_t{1} << 40;

/// Examples of 20 tokens, and one of `longest` in their middle.
std::string one_long(int count, int longest) {
  std::string lines;
  for (int e = 0; e < count; ++e) {
    std::vector<int> ids = {e + 1};
    const int length = e == count / 2 ? longest : 20;
    while (static_cast<int>(ids.size()) < length) ids.push_back((5 * ids.back() + 3) % 512);
    lines += nlohmann::json{{"input_ids", ids}, {"labels", ids}}.dump() + "\n";
  }
  return lines;
}

class LongExampleTest : public TrainingTest {
 protected:
  void SetUp() override {
    QLAB_SKIP_WITHOUT_PLANS();
    TrainingTest::SetUp();
  }
  /// One epoch, in the order of the file.
  Config with(const std::vector<std::string>& sets = {}) const {
    std::vector<std::string> all = {"model.path=synthetic:tiny-deep",
                                    "data.train=" + long_,
                                    "data.eval=\"\"",
                                    "data.seq_len=500",
                                    "data.shuffle=false",
                                    "lora.r=16",
                                    "train.steps=9",
                                    "train.batch_size=1",
                                    "train.eval_every=0",
                                    "train.recompute=auto"};
    all.insert(all.end(), sets.begin(), sets.end());
    return config(all);
  }
  /// On a GPU the library's workspace is most of what one trial of a tiny model needs.
  std::vector<std::pair<std::string, Config>> members(
      const std::string& name, const std::vector<std::string>& sets = {}) const {
    std::vector<std::pair<std::string, Config>> trials;
    for (int i = 0; i < (device().is_cuda() ? 24 : 1); ++i) {
      std::vector<std::string> all = sets;
      all.push_back(fmt::format("train.init_seed={}", i));
      trials.emplace_back(fmt::format("{}-{}", name, i), with(all));
    }
    return trials;
  }
  RunPlan plan(const std::vector<std::pair<std::string, Config>>& trials, int64_t budget) const {
    Library library;
    std::vector<PaperTrial> gang;
    for (const auto& [name, c] : trials) gang.push_back(paper_trial(c, library, device()));
    return plan_run(open_model(trials[0].second.model.path), gang, device(), budget,
                    rates_of(device()));
  }
  /// As with --device-memory.
  std::vector<Outcome> gang_within(int64_t bytes,
                                   const std::vector<std::pair<std::string, Config>>& trials,
                                   const std::function<bool()>& stop = {}) const {
    limit_memory(device(), memory_account(device()).total + bytes);
    const std::vector<Outcome> outcomes = gang(trials, stop);
    limit_memory(device(), std::numeric_limits<int64_t>::max());
    return outcomes;
  }
  std::string log_of(const std::string& trial) const {
    return read_text_file(folder_ / (trial + "/log.txt"));
  }

  std::string long_ = folder_.write("long.jsonl", one_long(9, 500));
};
INSTANTIATE_TEST_SUITE_P(Runs, LongExampleTest, cpu_and_cuda, device_name);

TEST_P(LongExampleTest, FitsWithTheSameBits) {
  for (const std::string optimizer : {"adamw", "paged_adamw"}) {
    SCOPED_TRACE(optimizer);
    const std::vector<std::string> sets = {"optim.type=" + optimizer};
    const auto free = members("free-" + optimizer, sets);
    const std::vector<Outcome> whole = gang(free);
    const RunPlan roomy = plan(free, plenty);
    EXPECT_TRUE(roomy.leaner.empty());
    for (const double times : {1.1, 1.5}) {
      SCOPED_TRACE(times);
      const auto limit = static_cast<int64_t>(static_cast<double>(roomy.peak) / times);
      const auto trials = members(fmt::format("{}-{}", optimizer, times), sets);
      const int64_t before = memory_account(device()).total;
      const std::vector<Outcome> small = gang_within(limit, trials);
      for (size_t i = 0; i < trials.size(); ++i) expect_same(small[i], whole[i]);
      const std::string& name = trials[0].first;
      EXPECT_EQ(status(name)["predicted_peak_bytes"], peak(name) - before);
      EXPECT_LE(peak(name) - before, limit);
      const auto tokens = static_cast<int>(500 * trials.size());
      EXPECT_THAT(log_of(name), testing::HasSubstr(fmt::format(
                                    "step 5: a micro-batch of {} tokens: layer", tokens)));
      EXPECT_THAT(log_of(name), testing::HasSubstr("plan: layers 0-5 keeping everything; in "
                                                   "micro-batches of more than"));
    }
  }
}

// The plan is the same when a run goes on, and before and after the long example.
TEST_P(LongExampleTest, ARunThatIsContinuedPlansTheSame) {
  const auto whole = gang(members("whole"));
  const int64_t limit = plan(members(""), plenty).peak * 10 / 15;
  for (const int steps : {2, 7}) {
    SCOPED_TRACE(steps);
    const auto trials = members(fmt::format("stopped-{}", steps));
    int asked = 0;
    const auto part = gang_within(limit, trials, [&] { return ++asked > steps; });
    EXPECT_EQ(part[0].state, TrialRun::State::interrupted);
    const nlohmann::json first = status(trials[0].first);
    const auto rest = gang_within(limit, trials);
    for (size_t i = 0; i < trials.size(); ++i) expect_same(rest[i], whole[i]);
    EXPECT_EQ(status(trials[0].first)["plan"], first["plan"]);
    EXPECT_EQ(status(trials[0].first)["predicted_peak_bytes"], first["predicted_peak_bytes"]);
  }
}

// Each of three trials meets its long example in another step.
TEST_P(LongExampleTest, InAGang) {
  const auto trials = [&](const char* name) {
    std::vector<std::pair<std::string, Config>> three;
    for (int i = 0; i < 3; ++i)
      three.emplace_back(fmt::format("{}-{}", name, i),
                         with({"data.shuffle=true", fmt::format("train.seed={}", i),
                               fmt::format("lora.r={}", 8 << i)}));
    return three;
  };
  const std::vector<Outcome> whole = gang(trials("whole"));
  const RunPlan roomy = plan(trials(""), plenty);
  const int64_t least = [&] {
    auto leanest = trials("");
    for (auto& [name, c] : leanest) c.train.recompute = "full";
    return plan(leanest, plenty).peak;
  }();
  ASSERT_LT(least, roomy.peak);
  const int64_t limit = (least + roomy.peak) / 2, before = memory_account(device()).total;
  const std::vector<Outcome> small = gang_within(limit, trials("small"));
  for (size_t i = 0; i < whole.size(); ++i) expect_same(small[i], whole[i]);
  EXPECT_EQ(status("small-0")["predicted_peak_bytes"], peak("small-0") - before);
  EXPECT_FALSE(plan(trials(""), limit).leaner.empty());
}

// As the command runs it: refused where no plan fits, otherwise finished.
TEST_P(LongExampleTest, AsACommand) {
  const auto run = [&](const char* out, int64_t bytes) {
    const Config c = with({fmt::format("train.memory_budget={}B", bytes)});
    const std::string file = folder_.write("run.yaml", to_yaml(c));
    limit_memory(device(), memory_account(device()).total + bytes);
    return run_sweep(load_sweep(file, {}), {folder_ / out, device(), "", false},
                     [](const std::string&) {}, {});
  };
  const int64_t need = plan({{"one", with()}}, plenty).peak;
  EXPECT_EQ(run("all", need).finished, 1);
  EXPECT_EQ(run("small", need * 10 / (device().is_cuda() ? 11 : 15)).finished, 1);
  EXPECT_THAT(error_of([&] { run("none", need / 4); }),
              testing::HasSubstr("does not fit: the run would take"));
}

class SizedStepTest : public OpTest {};
INSTANTIATE_TEST_SUITE_P(Runs, SizedStepTest, testing::Values(cpu_f32, cuda_bf16), name);

// A shape that lays out larger than what was reserved for its size takes a leaner policy.
TEST_P(SizedStepTest, StaysWithinTheReservation) {
  QLAB_SKIP_WITHOUT_PLANS();
  const auto model = tiny_llama(WeightFormat::nf4, GetParam());
  const auto adapter = fresh_adapter(*model, {});
  const auto all = static_cast<size_t>(model->config().num_hidden_layers);
  const std::vector<Recompute> full(all, Recompute::full);
  const Tokens shorter = random_tokens(200, 1), longer = random_tokens(400, 2);
  const auto batch = [&](const Tokens& tokens) {
    BatchBuilder builder;
    builder.add({tokens.sequence()}, adapter.get(), true, 1.0f);
    return builder;
  };
  const auto loss = [&](const std::vector<LeanerPolicy>& leaner, const Tokens& reserved,
                        size_t policy) {
    Stepper stepper(*model, Recompute::none, true, leaner);
    stepper.reserve(batch(reserved), true);
    const int64_t bytes = stepper.idle().bytes();
    fill_zero(adapter->gradients());
    const std::vector<float> nll = stepper.run(batch(longer), true);
    EXPECT_EQ(stepper.policy_of_last(), policy);
    EXPECT_EQ(stepper.idle().bytes() > bytes, leaner.empty() && &reserved == &shorter);
    return std::pair(nll, adapter->gradients().clone());
  };
  const auto kept = loss({}, longer, 0);
  EXPECT_EQ(loss({}, shorter, 0).first, kept.first);
  for (const auto& [above, reserved, policy] :
       {std::tuple{int64_t{1000}, &longer, 0}, {300, &longer, 1}, {1000, &shorter, 1}}) {
    const auto [nll, gradients] = loss({{above, full}}, *reserved, static_cast<size_t>(policy));
    EXPECT_EQ(nll, kept.first);
    expect_same_bits(gradients, kept.second);
  }
}

// Lengths of examples in an 8B run on a GPU, on paper.
TEST(PlannerBySize, TheUsualMicroBatchIsFastAndTheLongestFits) {
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  const Config c = load_config("", {"model.path=synthetic:llama-3.1-8b", "lora.r=16",
                                    "data.train=synthetic", "train.recompute=auto"});
  const auto plan = [&](int64_t usual, int64_t longest, const char* budget) {
    const std::vector<PaperTrial> gang = {{c, {longest}, {}, {usual}}};
    return plan_run(model, gang, Device::cuda(), *parse_bytes(budget), gpu_rates("h100-80gb"));
  };
  const RunPlan usual = plan(512, 512, "9GiB"), longest = plan(8192, 8192, "9GiB");
  EXPECT_TRUE(usual.leaner.empty());
  const RunPlan mixed = plan(512, 8192, "9GiB");
  EXPECT_LE(mixed.peak, int64_t{9} << 30);
  ASSERT_FALSE(mixed.leaner.empty());
  EXPECT_GE(mixed.leaner.front().above, 512);
  EXPECT_LT(mixed.step_seconds, 2 * usual.step_seconds);
  EXPECT_LT(mixed.step_seconds, longest.step_seconds / 4);
  int64_t above = 0;
  for (const LeanerPolicy& leaner : mixed.leaner) {
    EXPECT_GT(leaner.above, above);
    above = leaner.above;
  }
  EXPECT_LT(above, 8192);
  EXPECT_THAT(describe(mixed), testing::HasSubstr("; in micro-batches of more than "));
  // With room for the longest there is one policy.
  EXPECT_TRUE(plan(512, 8192, "80GB").leaner.empty());
}

}  // namespace
}  // namespace qlab::test
