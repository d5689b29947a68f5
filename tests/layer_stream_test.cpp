// Layers whose weights wait on the host: there when they are needed, with the bits of a base that
// stays on the device.
#include "nn/layer_stream.h"

#include <algorithm>

#include "core/ops/copy.h"
#include "experiments/generate.h"
#include "experiments/planner.h"
#include "tests/support/error_of.h"
#include "tests/support/op_test.h"
#include "tests/support/replay.h"
#include "tests/support/tiny_llama.h"
#include "tests/support/training.h"

namespace qlab::test {
namespace {

class LayerStreamTest : public TrainingTest {
 protected:
  /// A run of synthetic:tiny-deep, six layers.
  Config deep(const std::vector<std::string>& sets) const {
    std::vector<std::string> all = {"model.path=synthetic:tiny-deep"};
    all.insert(all.end(), sets.begin(), sets.end());
    return config(all);
  }
  /// Runs with these numbers of streamed layers are the run with none.
  void expect_no_change(const std::vector<std::string>& sets,
                        const std::vector<std::string>& numbers) {
    SCOPED_TRACE(sets.empty() ? "" : sets[0]);
    const std::string name = "case" + std::to_string(++cases_) + "-";
    const Outcome resident = train(name + "resident", deep(sets));
    ASSERT_EQ(resident.state, TrialRun::State::finished) << resident.error;
    for (const std::string& streamed : numbers) {
      SCOPED_TRACE(streamed);
      std::vector<std::string> all = sets;
      all.push_back("model.streamed_layers=" + streamed);
      expect_same(train(name + streamed, deep(all)), resident);
    }
  }

 private:
  int cases_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Runs, LayerStreamTest, cpu_and_cuda, device_name);

/// Five layers of two tensors, all of a layer's values its number.
struct Layers {
  static constexpr int count = 5;

  explicit Layers(Device device, int64_t length = 1000) : stream(device) {
    for (int l = 0; l < count; ++l) {
      const std::vector<float> values(length, static_cast<float>(l));
      first.push_back(Tensor::from_vector(values, {length}, device));
      second.push_back(Tensor::from_vector(values, {10, length / 10}, device));
    }
    for (size_t l = 0; l < count; ++l) EXPECT_EQ(stream.add({&first[l], &second[l]}), l);
  }
  /// Whether both tensors of a layer now hold `value` everywhere.
  bool hold(size_t layer, float value) const {
    for (const Tensor& t : {first[layer], second[layer]})
      for (const float x : t.to_vector<float>())
        if (x != value) return false;
    return true;
  }

  std::vector<Tensor> first, second;
  LayerStream stream;
};

TEST_P(LayerStreamTest, LayersAreThereWhenNeeded) {
  Layers layers(device());
  for (int pass = 0; pass < 2; ++pass) {
    layers.stream.begin(device());
    for (size_t l = 0; l < Layers::count; ++l) {
      layers.stream.need(l);
      layers.stream.need(l);
      EXPECT_TRUE(layers.hold(l, static_cast<float>(l))) << l;
    }
    for (size_t l = Layers::count; l-- > 0;) {
      layers.stream.need(l);
      EXPECT_TRUE(layers.hold(l, static_cast<float>(l))) << l;
    }
    layers.stream.end();
  }
  // In any order, as of a pass that leaves layers out.
  layers.stream.begin(device());
  for (const size_t l : {3, 1, 4, 0, 2, 3}) {
    layers.stream.need(l);
    EXPECT_TRUE(layers.hold(l, static_cast<float>(l))) << l;
  }
  layers.stream.end();
}

// Nobody waits between issuing and the end: what is read of a layer must come after its copy, and
// the copy of the next into its slot after that, both where copies are slower and where reading is.
TEST_P(LayerStreamTest, CopiesAndReadersWaitForEachOther) {
  constexpr int64_t length = 1'000'000;
  constexpr size_t visits = 2 * Layers::count - 1;  // layer 0 is sent for in vain at last
  const auto layer_of = [](size_t i) { return i < Layers::count ? i : 2 * Layers::count - 1 - i; };
  Layers layers(device(), length);
  std::vector<Tensor> seen;
  for (size_t i = 0; i < visits; ++i) seen.push_back(Tensor::zeros({length}, DType::f32, device()));
  for (const int readings : {1, 100}) {
    const auto issue = [&] {
      layers.stream.begin(device());
      for (size_t i = 0; i < visits; ++i) {
        const size_t layer = layer_of(i);
        layers.stream.need(layer);
        for (int r = 0; r < readings; ++r) copy(seen[i], layers.first[layer]);
      }
      layers.stream.end();
    };
    const auto expect_seen = [&] {
      for (size_t i = 0; i < visits; ++i) {
        const auto value = static_cast<float>(layer_of(i));
        const std::vector<float> values = seen[i].to_vector<float>();
        EXPECT_EQ(std::count(values.begin(), values.end(), value), length) << readings << " " << i;
        fill_zero(seen[i]);
      }
    };
    issue_and_replay(device(), issue, expect_seen);
  }
}

// Layers take turns in two slots, one ahead of its use.
TEST_P(LayerStreamTest, TwoSlotsServeAll) {
  Layers layers(device());
  EXPECT_EQ(layers.first[0].raw(), layers.first[2].raw());
  EXPECT_EQ(layers.first[1].raw(), layers.first[3].raw());
  EXPECT_NE(layers.first[0].raw(), layers.first[1].raw());
  layers.stream.begin(device());
  layers.stream.need(0);
  layers.stream.need(1);
  layers.stream.end();
  EXPECT_TRUE(layers.hold(0, 2));  // gone, its place taken by the next
  layers.stream.need(2);
  layers.stream.end();
  EXPECT_TRUE(layers.hold(1, 3));
  layers.stream.need(1);  // back: what goes before it comes next
  layers.stream.end();
  EXPECT_TRUE(layers.hold(2, 0));
}

// Plain bookkeeping on paper, of a GPU whether there is one or not.
TEST(LayerStream, BytesLieOnTheHost) {
  const Device meta = Device::cuda().meta(), host = Device::cpu().meta();
  const auto held = [&](int64_t streamed) {
    const int64_t before = memory_account(meta).total, aside = memory_account(host).total;
    const auto model =
        load_llama(open_model("synthetic:llama-2-7b"), {}, DType::bf16, meta, false, streamed);
    return std::pair(memory_account(meta).total - before, memory_account(host).total - aside);
  };
  const auto [all, none] = held(0);
  EXPECT_EQ(none, 0);
  const auto [half, out] = held(16);
  const int64_t layer = out / 16;
  EXPECT_EQ(held(32).second, 32 * layer);
  // Each tensor of a layer begins at a multiple of 256 bytes, on the device as well.
  EXPECT_EQ(held(32).first, half - 16 * layer);
  EXPECT_EQ(half, all - 14 * layer);
  EXPECT_EQ(held(2).first, all);
}

TEST_P(LayerStreamTest, ChangesNoBit) { expect_no_change({}, {"1", "2", "3", "all"}); }

TEST_P(LayerStreamTest, LargeChoiceOfSettingsChangesNoBit) {
  const std::vector<std::vector<std::string>> cases = {
      {"train.recompute=selective"},
      {"train.recompute=full", "lora.dropout=0.1"},
      {"train.recompute=offload", "model.embeddings=host"},
      {"quant.double_quant=false", "train.graphs=false"},
      {"quant.type=fp32", "quant.compute_dtype=fp32"},
      {"quant.resident=1MB", "data.train=synthetic"},  // equal shapes: steps are recorded
      {"train.recompute=full", "data.train=synthetic", "train.grad_accum=2"},
      {"lora.targets=model\\.layers\\.[45]\\..*_proj"},  // backward does not reach the others
      {"lora.targets=model\\.layers\\.[45]\\..*_proj", "data.train=synthetic"},
  };
  for (const std::vector<std::string>& sets : cases) expect_no_change(sets, {"3", "all"});
}

TEST_P(LayerStreamTest, OfAGang) {
  const auto trials = [&](const char* name, const char* streamed) {
    const std::string set = std::string("model.streamed_layers=") + streamed, own(name);
    return std::vector<std::pair<std::string, Config>>{
        {own + "-a", deep({set, "lora.r=8"})},
        {own + "-b", deep({set, "lora.targets=qv", "lora.dropout=0.1", "train.seed=1"})}};
  };
  const std::vector<Outcome> resident = gang(trials("resident", "0"));
  const std::vector<Outcome> streamed = gang(trials("streamed", "all"));
  for (size_t i = 0; i < resident.size(); ++i) expect_same(streamed[i], resident[i]);
  expect_same(streamed[0], train("alone", trials("alone", "4")[0].second));
}

// The number is of the machine, not of the run: a run goes on with another one.
TEST_P(LayerStreamTest, AResumedRunMayStreamOthers) {
  const Outcome whole = train("whole", deep({}));
  int asked = 0;
  const Outcome part =
      train("resumed", deep({"model.streamed_layers=all"}), [&] { return ++asked > 5; });
  EXPECT_EQ(part.state, TrialRun::State::interrupted);
  expect_same(train("resumed", deep({"model.streamed_layers=3"})), whole);
}

TEST_P(LayerStreamTest, GenerationIsTheSame) {
  LlamaConfig config = synthetic_config("tiny-deep");
  const DType compute = device().is_cuda() && has_bf16() ? DType::bf16 : DType::f32;
  const auto tokens = [&](int64_t streamed, bool trained) {
    const Llama model(config, {}, compute, device(), tiny_tensor, false, streamed);
    const auto adapter = trained ? trained_adapter(model, {}) : nullptr;
    SamplingOptions options;
    options.max_new_tokens = 12;
    return generate(model, adapter.get(), random_tokens(9, 7).ids, {}, options);
  };
  for (const bool trained : {false, true})
    for (const int64_t streamed : {1, 4, 6})
      EXPECT_EQ(tokens(streamed, trained), tokens(0, trained));
}

TEST_P(LayerStreamTest, MoreThanAllIsAnError) {
  EXPECT_THAT(error_of([&] { train("more", deep({"model.streamed_layers=7"})); }),
              testing::HasSubstr("7 of the 6 layers of synthetic:tiny-deep"));
  for (const char* value : {"-1", "some", "1.5", "[1]"})
    EXPECT_THAT(error_of([&] { deep({std::string("model.streamed_layers=") + value}); }),
                testing::HasSubstr("a number of layers, all, or auto"));
}

}  // namespace
}  // namespace qlab::test
