// Trials whose optimizers step together: fewer launches, the bits of each alone.
#include "optim/optimizer.h"

#include <numeric>

#include "core/profile.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

/// One trial: a flat buffer of tensors of these sizes, and its optimizer.
struct Trial {
  AdamWConfig config;
  std::vector<int64_t> sizes;
  uint64_t seed;

  int64_t total() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}); }
};

/// More than fit one launch (32 trials, 16 with 8-bit moments), of different sizes, whole multiples
/// of eight and not, with and without decay and clipping; every seventh meets a NaN in its second
/// step.
std::vector<Trial> all_trials() {
  std::vector<Trial> trials;
  for (uint64_t i = 0; i < 70; ++i) {
    AdamWConfig config;
    config.eight_bit = i % 2 == 1;
    config.paged = i % 10 == 4 || i % 10 == 9;
    config.weight_decay = i % 3 == 0 ? 0.1f : 0.0f;
    config.max_grad_norm = i % 4 == 0 ? 0.0f : 0.5f;
    const auto n = static_cast<int64_t>(i);
    trials.push_back({config, {4096 + 8 * n, 3 + n, 5000 + 8 * (n % 5)}, i});
  }
  return trials;
}

struct State {
  Tensor parameters;
  AdamW optimizer;
  State(const Trial& t, const Case& at)
      : parameters(tensor(normals(t.total(), t.seed), {t.total()}, at)),
        optimizer(t.config, t.sizes, at.device) {}
};

Tensor gradient(const Trial& t, int step, const Case& at) {
  std::vector<double> g = normals(t.total(), 1000 * t.seed + static_cast<uint64_t>(step));
  if (t.seed % 7 == 6 && step == 1) g[17] = NAN;
  return tensor(g, {t.total()}, at);
}

using OptimizerTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, OptimizerTest, testing::Values(cpu_f32, cuda_f32), name);

TEST_P(OptimizerTest, TrialsThatStepTogetherHaveTheBitsOfEachAlone) {
  const std::vector<Trial> trials = all_trials();
  std::vector<std::unique_ptr<State>> alone, together;
  for (const Trial& t : trials) {
    alone.push_back(std::make_unique<State>(t, GetParam()));
    together.push_back(std::make_unique<State>(t, GetParam()));
  }
  for (int step = 0; step < 3; ++step) {
    std::vector<AdamW::Step> steps;
    for (size_t i = 0; i < trials.size(); ++i) {
      const Tensor g = gradient(trials[i], step, GetParam());
      const float lr = 1e-3f * static_cast<float>(i + 1);
      alone[i]->optimizer.step(alone[i]->parameters, g, lr);
      steps.push_back({&together[i]->optimizer, together[i]->parameters, g, lr});
    }
    AdamW::step(steps);
    for (size_t i = 0; i < trials.size(); ++i) {
      SCOPED_TRACE(fmt::format("step {}, trial {}", step, i));
      expect_same_bits(together[i]->parameters, alone[i]->parameters);
      expect_same_bits(together[i]->optimizer.grad_norm(), alone[i]->optimizer.grad_norm());
      const auto a = together[i]->optimizer.state(), b = alone[i]->optimizer.state();
      ASSERT_EQ(a.size(), b.size());
      for (size_t s = 0; s < a.size(); ++s) expect_same_bits(a[s].second, b[s].second);
    }
  }
  for (size_t i = 0; i < trials.size(); ++i)
    EXPECT_FALSE(bytes_of(together[i]->parameters) ==
                 bytes_of(tensor(normals(trials[i].total(), trials[i].seed), {trials[i].total()},
                                 GetParam())));
}

TEST(Optimizer, TrialsShareTheirLaunches) {
  const Device meta = Device::cuda().meta();
  for (const bool eight_bit : {false, true}) {
    AdamWConfig config;
    config.eight_bit = eight_bit;
    const Tensor flat = Tensor::empty({8192}, DType::f32, meta);
    std::vector<std::unique_ptr<AdamW>> optimizers;
    std::vector<AdamW::Step> steps;
    for (int i = 0; i < 8; ++i) {
      optimizers.push_back(std::make_unique<AdamW>(config, std::vector<int64_t>{8192}, meta));
      steps.push_back({optimizers.back().get(), flat, flat, 1e-3f});
    }
    const WorkCounter counter;
    AdamW::step(steps);
    ASSERT_EQ(counter.lines().size(), 2u);
    for (const ProfileLine& line : counter.lines()) EXPECT_EQ(line.calls, 1) << line.name;
    EXPECT_EQ(counter.lines()[1].name, eight_bit ? "adamw8bit" : "adamw");
  }
}

}  // namespace
}  // namespace qlab::test
