// What a step puts aside on the host comes back unchanged, whatever else is issued around it.
#include "core/host_slots.h"

#include <algorithm>

#include "autograd/tape.h"
#include "core/ops/copy.h"
#include "experiments/cost_model.h"
#include "tests/support/error_of.h"
#include "tests/support/replay.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

class HostSlotsTest : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    if (GetParam().is_cuda() && cuda::device_count() == 0)
      GTEST_SKIP() << "needs a GPU and a build with CUDA";
  }
  Device device() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ops, HostSlotsTest, cpu_and_cuda, device_name);

// Nobody waits between issuing and the end: a copy out must come after what made the block and
// before what writes over it, a copy back after what read the block before, and before readers.
TEST_P(HostSlotsTest, CopiesAndTheirNeighboursWaitForEachOther) {
  constexpr int64_t length = 1'000'000;
  constexpr size_t count = 5;
  HostSlots slots(device());
  const Tensor paper = Tensor::empty({length}, DType::f32, device().meta());
  for (size_t s = 0; s < count; ++s) slots.put(s, paper), slots.wait();
  slots.reserve();
  std::vector<Tensor> source, seen;
  for (size_t s = 0; s < count; ++s) {
    const std::vector<float> values(length, static_cast<float>(s + 1));
    source.push_back(Tensor::from_vector(values, {length}, device()));
    seen.push_back(Tensor::zeros({length}, DType::f32, device()));
  }
  // Two blocks that take turns, as memory of a plan does.
  const Tensor blocks[] = {Tensor::zeros({length}, DType::f32, device()),
                           Tensor::zeros({length}, DType::f32, device())};
  for (const int readings : {1, 100}) {
    const auto issue = [&] {
      for (size_t s = 0; s < count; ++s) {
        for (int r = 0; r < readings; ++r) copy(blocks[s % 2], source[s]);
        slots.put(s, blocks[s % 2]);
        for (int r = 0; r < readings; ++r) copy(seen[s], blocks[s % 2]);
        slots.wait();
        fill_zero(blocks[s % 2]);
      }
      for (size_t s = 0; s < count; ++s) fill_zero(seen[s]);
      slots.get(count - 1, blocks[(count - 1) % 2]);
      for (size_t s = count; s-- > 0;) {
        slots.wait();
        if (s > 0) slots.get(s - 1, blocks[(s - 1) % 2]);
        for (int r = 0; r < readings; ++r) copy(seen[s], blocks[s % 2]);
        fill_zero(blocks[s % 2]);
      }
    };
    const auto expect_seen = [&] {
      for (size_t s = 0; s < count; ++s) {
        const std::vector<float> values = seen[s].to_vector<float>();
        EXPECT_EQ(std::count(values.begin(), values.end(), static_cast<float>(s + 1)), length)
            << readings << " " << s;
        fill_zero(seen[s]);
      }
    };
    issue_and_replay(device(), issue, expect_seen);
  }
}

TEST_P(HostSlotsTest, OneCopyIsUnderWayAtATime) {
  HostSlots slots(device());
  const Tensor paper = Tensor::empty({8}, DType::f32, device().meta());
  EXPECT_THAT(error_of([&] { slots.wait(); }), testing::HasSubstr("nothing is on its way"));
  slots.put(0, paper);
  EXPECT_THAT(error_of([&] { slots.put(1, paper); }), testing::HasSubstr("on its way already"));
  slots.wait();
  const Tensor more = Tensor::zeros({16}, DType::f32, device());
  slots.reserve();
  EXPECT_THAT(error_of([&] { slots.put(0, more); }), testing::HasSubstr("its plan did not"));
}

class OffloadTest : public TrainingTest {};
INSTANTIATE_TEST_SUITE_P(Runs, OffloadTest, cpu_and_cuda, device_name);

TEST_P(OffloadTest, ChangesNoBit) {
  const auto run = [&](const std::string& name, const std::string& recompute, bool graphs,
                       const char* data) {
    std::vector<std::pair<std::string, Config>> three;
    for (int i = 0; i < 3; ++i)
      three.emplace_back(
          fmt::format("{}-{}", name, i),
          config({"model.path=synthetic:tiny-deep", "train.recompute=" + recompute,
                  fmt::format("train.graphs={}", graphs), fmt::format("train.seed={}", i),
                  fmt::format("lora.r={}", 4 << i), "data.train=" + std::string(data),
                  i == 1 ? "lora.dropout=0.1" : "lora.dropout=0"}));
    return gang(three);
  };
  for (const std::string& data : {train_, std::string("synthetic")}) {  // graphs: equal shapes
    SCOPED_TRACE(data);
    const std::string own = data == train_ ? "a" : "b";
    const std::vector<Outcome> kept = run(own + "kept", "none", false, data.c_str());
    for (const bool graphs : {true, false}) {
      const auto aside =
          run(fmt::format("{}aside-{}", own, graphs), "offload", graphs, data.c_str());
      for (size_t i = 0; i < kept.size(); ++i) expect_same(aside[i], kept[i]);
    }
  }
}

// Copies overlap with what their part computes, and share the bus with streamed layers.
TEST(CostModel, PuttingAsideOverlaps) {
  const Rates rates{1e12, 1e12, 0, true};
  const auto seconds = [&](double aside, double streamed, double products) {
    return predicted_seconds({{"offload", 1, 0, {0, aside}, 0},
                              {"streamed layer", 1, 0, {0, streamed}, 0},
                              {"product", 1, 0, {products, 0}, 0}},
                             rates);
  };
  const double copy = seconds(1e9, 0, 0);
  EXPECT_GT(copy, 0);
  EXPECT_DOUBLE_EQ(seconds(1e9, 1e9, 0), 2 * copy);
  EXPECT_DOUBLE_EQ(seconds(1e9, 1e9, 1e12), 1);
}

// What is fetched ahead lies in room that the layer at work has given back.
TEST(Offload, FetchingAheadCostsNoMemory) {
  const ModelSource model = open_model("synthetic:llama-3.1-8b");
  for (const auto& [batch, length] : {std::pair{1, 512}, {4, 2048}, {8, 2048}, {1, 65536}}) {
    SCOPED_TRACE(fmt::format("{} x {}", batch, length));
    const auto peak = [&](const char* recompute) {
      const Config c = load_config(
          "", {"model.path=synthetic:llama-3.1-8b", "lora.r=16", "data.train=synthetic",
               fmt::format("train.recompute={}", recompute),
               fmt::format("train.batch_size={}", batch), fmt::format("data.seq_len={}", length)});
      const std::vector<PaperTrial> gang = {assumed_trial(c, Device::cuda())};
      const MemoryPrediction p = predict_memory(model, gang, Device::cuda());
      return std::pair(p.step_bytes, p.host_peak);
    };
    const int64_t inputs = int64_t{2} * 4096 * batch * length;
    EXPECT_LE(peak("offload").first, peak("full").first - 30 * inputs);
    EXPECT_GE(peak("offload").second, 31 * inputs);
  }
}

}  // namespace
}  // namespace qlab::test
