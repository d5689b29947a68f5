// Runs in fp16: the rule of the loss scale, and what a run does with it.
#include "optim/loss_scale.h"

#include "tests/support/training.h"

namespace qlab::test {
namespace {

TEST(LossScale, FollowsTheRule) {
  LossScale s;
  EXPECT_EQ(s.factor, 65536);
  for (int i = 0; i < 1999; ++i) s.update(true);
  EXPECT_EQ(s.factor, 65536);
  s.update(true);
  EXPECT_EQ(s.factor, 131072);
  EXPECT_EQ(s.finite, 0);
  for (int i = 0; i < 1999; ++i) s.update(true);
  s.update(false);  // begins to count anew
  EXPECT_EQ(s.factor, 65536);
  EXPECT_EQ(s.skipped, 1);
  for (int i = 0; i < 1999; ++i) s.update(true);
  EXPECT_EQ(s.factor, 65536);
  s.factor = 0x1p127f, s.finite = 1999;
  s.update(true);
  EXPECT_EQ(s.factor, 0x1p127f);  // there is no larger one
}

class LossScaleTest : public TrainingTest {
 protected:
  Config half(std::vector<std::string> sets = {}) const {
    sets.insert(sets.end(), {"quant.compute_dtype=fp16", "train.steps=12"});
    return config(sets);
  }
  /// Begins a run and saves it with a loss scale at which gradients overflow.
  void begin_overflowing(const std::string& name, const Config& c) const {
    int asked = 0;
    train(name, c, [&] { return ++asked > 4; });
    const std::string file = name + "/state/state.safetensors", usual = R"("loss_scale":"65536")";
    std::string state = read_text_file(folder_ / file);
    const size_t at = state.find(usual);
    ASSERT_NE(at, std::string::npos);
    state.replace(at, usual.size(), R"("loss_scale":"3e+08")");
    folder_.write(file, state);
  }
};

TEST_P(LossScaleTest, TrainsLikeFp32) {
  const Outcome run = train("half", half());
  ASSERT_EQ(run.state, TrialRun::State::finished) << run.error;
  const Outcome full = train("full", config({"quant.compute_dtype=fp32", "train.steps=12"}));
  const std::vector<double> a = run.values("loss"), b = full.values("loss");
  ASSERT_EQ(a.size(), b.size());
  // Eight times finer than bf16, whose losses are within 1e-3 a step (tests/train_test.cpp).
  for (size_t s = 0; s < a.size(); ++s)
    EXPECT_NEAR(a[s], b[s], 1e-3 / 8 * static_cast<double>(s + 1)) << s;
  EXPECT_NEAR(run.values("grad_norm")[0], full.values("grad_norm")[0],
              0.01 * full.values("grad_norm")[0]);
  EXPECT_LT(run.values("eval_loss").back(), run.values("eval_loss").front());
  EXPECT_EQ(status("half")["loss_scale"], 65536);
  EXPECT_EQ(status("half")["skipped_steps"], 0);
  EXPECT_FALSE(status("full").contains("loss_scale"));
}

TEST_P(LossScaleTest, AStepThatOverflowsIsSkipped) {
  begin_overflowing("a", half());
  const Outcome run = train("a", half());
  ASSERT_EQ(run.state, TrialRun::State::finished) << run.error;
  const std::vector<double> scales = run.values("loss_scale"), skips = run.values("skipped_steps");
  ASSERT_EQ(scales.size(), 12u);
  const auto skipped = static_cast<size_t>(skips.back());
  EXPECT_GE(skipped, 1u);
  EXPECT_LE(skipped, 8u);
  EXPECT_EQ(run.values("grad_norm").size(), 12 - skipped);
  EXPECT_THAT(read_text_file(folder_ / "a/state/state.safetensors"),
              testing::HasSubstr(fmt::format(R"("optimizer_steps":"{}")", 12 - skipped)));
  size_t s = 1;
  while (s < 11 && scales[s] < 3e8) ++s;
  for (; s + 1 < 12; ++s)
    EXPECT_EQ(scales[s + 1], skips[s] > skips[s - 1] ? scales[s] / 2 : scales[s]);
  EXPECT_EQ(status("a")["skipped_steps"], skips.back());
  EXPECT_LT(run.values("eval_loss").back(), run.values("eval_loss").front());
}

TEST_P(LossScaleTest, SkippingRunsContinueBitForBit) {
  begin_overflowing("whole", half());
  std::filesystem::copy(folder_ / "whole", folder_ / "parts",
                        std::filesystem::copy_options::recursive);
  const Outcome whole = train("whole", half());
  Outcome parts;
  do {
    int asked = 0;
    parts = train("parts", half(), [&] { return ++asked > 3; });
  } while (parts.state == TrialRun::State::interrupted);
  expect_same(parts, whole);
  EXPECT_EQ(status("parts")["loss_scale"], status("whole")["loss_scale"]);
}

TEST_P(LossScaleTest, AScaleIsThatOfATrialAlone) {
  const Config a = half({"train.seed=5"}), b = half({"lora.r=2", "lora.targets=qv"});
  begin_overflowing("b", b);
  std::filesystem::copy(folder_ / "b", folder_ / "b-alone",
                        std::filesystem::copy_options::recursive);
  const std::vector<Outcome> together = gang({{"a", a}, {"b", b}});
  const Outcome alone[] = {train("a-alone", a), train("b-alone", b)};
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(together[i].values("loss_scale"), alone[i].values("loss_scale"));
    if (!device().is_cuda()) expect_same(together[i], alone[i]);
  }
  EXPECT_EQ(status("a")["skipped_steps"], 0);
  EXPECT_GE(status("b")["skipped_steps"], 1);
}

// Below 1 there is nothing left to scale.
TEST_P(LossScaleTest, WhatOverflowsAtAScaleOfOneHasDiverged) {
  const Outcome run = train("a", half({"optim.lr=1e30", "train.eval_every=0"}));
  EXPECT_EQ(run.state, TrialRun::State::failed);
  EXPECT_THAT(run.error, testing::HasSubstr("diverged at step"));
}

INSTANTIATE_TEST_SUITE_P(Runs, LossScaleTest, cpu_and_cuda, device_name);

}  // namespace
}  // namespace qlab::test
