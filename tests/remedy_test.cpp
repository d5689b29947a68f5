// What to change where a run does not fit: the fastest of what is enough, and nothing needless.
#include "experiments/remedy.h"

#include <gmock/gmock.h>

#include "experiments/gpus.h"
#include "experiments/setup.h"

namespace qlab::test {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

struct Asked {
  Config config;
  ModelSource model;
  MemoryLimits limits;
  Rates rates;

  Asked(const std::string& name, std::vector<std::string> sets, const MemoryLimits& within,
        const std::string& gpu = "h100-80gb")
      : model(open_model("synthetic:" + name)), limits(within), rates(gpu_rates(gpu)) {
    sets.insert(sets.end(), {"model.path=synthetic:" + name, "data.train=synthetic"});
    config = load_config("", sets);
  }
  std::optional<Remedy> remedy() const {
    const std::vector<PaperTrial> gang = {assumed_trial(config, Device::cuda())};
    return cheapest_fit(model, gang, Device::cuda(), limits, rates);
  }
  /// With settings made: whether it fits, as a run would see it.
  bool fits(const std::vector<std::string>& sets) const {
    Config c = config;
    for (const std::string& set : sets) {
      const size_t equals = set.find('=');
      set_key(c, set.substr(0, equals), YAML::Load(set.substr(equals + 1)), "");
    }
    const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
    const int64_t budget = device_limit(c, Device::cuda(), limits.budget);
    try {
      const RunPlan plan = plan_run(model, gang, Device::cuda(), {budget, limits.host}, rates);
      return plan.peak <= budget && plan.host_peak <= limits.host;
    } catch (const OutOfMemory&) {
      return false;
    }
  }
  void expect_minimal(const Remedy& remedy) const {
    EXPECT_TRUE(fits(remedy.sets));
    for (const std::string& left_out : remedy.sets) {
      // A micro-batch and how many of them there are is one change.
      if (left_out.starts_with("train.grad_accum")) continue;
      std::vector<std::string> fewer = remedy.sets;
      std::erase(fewer, left_out);
      EXPECT_FALSE(fits(fewer)) << left_out << " is needless";
    }
  }
};

TEST(Remedy, IsTheFastestSingleSetting) {
  const GpuSpec gpu = find_gpu("rtx4090");
  const Asked asked("llama-3.1-8b", {"lora.r=16", "train.batch_size=4", "data.seq_len=2048"},
                    gpu.usable(), gpu.name);
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  EXPECT_THAT(remedy->sets, ElementsAre("train.recompute=auto"));
  EXPECT_LE(remedy->peak, gpu.usable());
  asked.expect_minimal(*remedy);
  for (const char* set : {"train.recompute=full", "train.recompute=offload"}) {
    ASSERT_TRUE(asked.fits({set}));
    Asked alone = asked;
    set_key(alone.config, "train.recompute", YAML::Load(std::string(set).substr(16)), "");
    const std::vector<PaperTrial> gang = {assumed_trial(alone.config, Device::cuda())};
    EXPECT_GE(plan_run(asked.model, gang, Device::cuda(), gpu.usable(), asked.rates).step_seconds,
              remedy->step_seconds)
        << set;
  }
}

// Four together with more computed again, or one after the other as they are: what is faster.
TEST(Remedy, SmallerGangsAreAWayToo) {
  const GpuSpec gpu = find_gpu("rtx4090");
  const Asked asked("llama-3.1-8b", {"lora.r=16", "parallel.trials_per_gpu=4"}, gpu.usable(),
                    gpu.name);
  const PaperTrial one = assumed_trial(asked.config, Device::cuda());
  const std::vector<PaperTrial> gang(4, one);
  const auto remedy = cheapest_fit(asked.model, gang, Device::cuda(), asked.limits, asked.rates);
  ASSERT_TRUE(remedy);
  EXPECT_THAT(remedy->sets, ElementsAre("parallel.trials_per_gpu=1"));
  EXPECT_EQ(remedy->trials, 1u);
  std::vector<PaperTrial> planned = gang;
  for (PaperTrial& t : planned) t.config.train.recompute = "auto";
  const int64_t budget = device_limit(planned[0].config, Device::cuda(), gpu.usable());
  EXPECT_GT(plan_run(asked.model, planned, Device::cuda(), budget, asked.rates).step_seconds,
            4 * remedy->step_seconds);
  // Where even one does not fit as it is.
  const Asked tight("llama-3.1-8b", {"lora.r=16"}, *parse_bytes("12GiB"), gpu.name);
  const auto pair = cheapest_fit(tight.model, std::span(gang).first(2), Device::cuda(),
                                 tight.limits, tight.rates);
  ASSERT_TRUE(pair);
  EXPECT_EQ(pair->trials, 2u);
  EXPECT_THAT(price_text(*pair), HasSubstr(fmt::format(" a step of 2 trials, {} for each",
                                                       duration_text(pair->step_seconds / 2))));
}

// Where no single setting is enough.
TEST(Remedy, PairsWhatIsNotEnoughAlone) {
  const std::vector<std::string> sets = {"lora.r=256", "train.batch_size=4", "data.seq_len=2048",
                                         "model.streamed_layers=0"};
  const Asked roomy("llama-3.1-8b", sets, MemoryLimits::none);
  const std::vector<PaperTrial> gang = {assumed_trial(roomy.config, Device::cuda())};
  Config lean = roomy.config;
  lean.train.recompute = "offload", lean.model.embeddings = "host";
  const std::vector<PaperTrial> leanest = {assumed_trial(lean, Device::cuda())};
  const int64_t least =
      plan_run(roomy.model, leanest, Device::cuda(), MemoryLimits::none, roomy.rates).peak;
  const Asked asked("llama-3.1-8b", sets, least - 500'000'000);
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  EXPECT_GE(remedy->sets.size(), 2u);
  asked.expect_minimal(*remedy);
}

TEST(Remedy, SmallerMicroBatchesKeepTheNumbers) {
  const Asked asked("llama-3.1-8b",
                    {"lora.r=16", "train.batch_size=16", "data.seq_len=4096", "data.eval=\"\""},
                    5'500'000'000);
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  EXPECT_THAT(remedy->sets, Contains(StartsWith("train.batch_size=")));
  EXPECT_THAT(remedy->sets, Contains(StartsWith("train.grad_accum=")));
  EXPECT_THAT(remedy->sets, testing::Not(Contains(StartsWith("data."))));
  asked.expect_minimal(*remedy);
}

// A shorter training sequence is of no use there.
TEST(Remedy, ShortensEvaluationWhereThatIsThePeak) {
  const Asked asked("llama-3.1-8b",
                    {"lora.r=16", "train.batch_size=1", "data.seq_len=256", "data.eval=synthetic",
                     "data.eval_seq_len=131072", "model.streamed_layers=0"},
                    8'000'000'000);
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  EXPECT_THAT(remedy->sets, Contains(StartsWith("data.eval_seq_len=")));
  EXPECT_THAT(remedy->sets, testing::Not(Contains(StartsWith("data.seq_len="))));
  asked.expect_minimal(*remedy);
}

// Of the base alone, as few layers as fit.
TEST(Remedy, StreamsAsFewLayersAsFit) {
  const Asked asked("llama-2-7b", {}, 3'000'000'000);
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  ASSERT_THAT(remedy->sets, ElementsAre(StartsWith("model.streamed_layers=")));
  const int count = std::stoi(remedy->sets.front().substr(22));
  EXPECT_GT(count, 2);
  EXPECT_FALSE(asked.fits({fmt::format("model.streamed_layers={}", count - 1)}));
}

TEST(Remedy, KeepsToTheHostsMemory) {
  const std::vector<std::string> sets = {"lora.r=16", "train.batch_size=1", "train.recompute=auto"};
  const Asked free("llama-2-7b", sets, 3'500'000'000);
  EXPECT_TRUE(free.fits({}));
  const Asked bound("llama-2-7b", sets, {3'500'000'000, int64_t{300} << 20});
  const auto none = bound.remedy();  // it is the host that lacks something, no setting
  EXPECT_FALSE(none) << none->sets.front();
}

// Where the host's memory is what is short, what would fit on a larger one.
TEST(Remedy, SaysWhatTheHostLacks) {
  constexpr int64_t device = 3'500'000'000, host = int64_t{300} << 20;
  const Asked asked("llama-2-7b", {"lora.r=16", "train.batch_size=1"}, {device, host});
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  EXPECT_EQ(remedy->host_has, host);
  EXPECT_GT(remedy->host_peak, host);
  EXPECT_FALSE(asked.fits(remedy->sets));
  Asked roomier = asked;
  roomier.limits.host = remedy->host_peak;
  EXPECT_TRUE(roomier.fits(remedy->sets));
  EXPECT_THAT(price_text(*remedy),
              HasSubstr(fmt::format("{} on the host ({} more than the {} it has)",
                                    format_minimum(remedy->host_peak),
                                    format_minimum(remedy->host_peak - host), format_bytes(host))));
}

// Of both, what can be set here comes first.
TEST(Remedy, AnotherExperimentOrALargerHost) {
  const Asked asked("llama-3.1-8b", {"lora.r=16"},
                    {find_gpu("6GiB").usable(), *parse_bytes("2GiB")});
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  EXPECT_THAT(remedy->sets, Contains(StartsWith("lora.r=")));
  EXPECT_THAT(remedy->caution, HasSubstr("with the same results it would fit on a larger host"));
  EXPECT_LE(remedy->host_peak, asked.limits.host);
  asked.expect_minimal(*remedy);
}

// Shorter than is usual, and with fewer parameters, before nothing helps; and it is said.
TEST(Remedy, SaysWhatMakesAnotherExperiment) {
  const Asked asked("llama-3.1-8b", {"lora.r=256"}, *parse_bytes("1.8GiB"));
  const auto remedy = asked.remedy();
  ASSERT_TRUE(remedy);
  EXPECT_THAT(remedy->sets, Contains(StartsWith("lora.r=")));
  EXPECT_THAT(remedy->sets, Contains(StartsWith("data.seq_len=")));
  EXPECT_THAT(remedy->sets, testing::Not(Contains("data.seq_len=256")));
  EXPECT_THAT(price_text(*remedy), HasSubstr(" a step; another experiment: "));
  EXPECT_THAT(remedy->caution, HasSubstr("cuts the data, examples of up to 512 tokens"));
  EXPECT_THAT(remedy->caution, HasSubstr("trains fewer parameters"));
  asked.expect_minimal(*remedy);
  const auto same = Asked("llama-3.1-8b", {"lora.r=16"}, *parse_bytes("5GiB")).remedy();
  ASSERT_TRUE(same);
  EXPECT_EQ(same->caution, "");
}

// The mean of more and smaller micro-batches' means is another one.
TEST(Remedy, ADivisionMayChangeTheLoss) {
  for (const char* norm : {"tokens", "microbatch"}) {
    const Asked asked("llama-3.1-8b",
                      {"lora.r=16", "data.seq_len=2048", std::string("train.loss_norm=") + norm},
                      *parse_bytes("3GiB"));
    const auto remedy = asked.remedy();
    ASSERT_TRUE(remedy);
    EXPECT_THAT(remedy->sets, Contains("train.batch_size=2"));
    EXPECT_EQ(remedy->caution,
              std::string_view(norm) == "tokens"
                  ? ""
                  : "another experiment: train.batch_size=2 weighs examples otherwise, as "
                    "train.loss_norm: microbatch does");
  }
}

}  // namespace
}  // namespace qlab::test
