// Weights of synthetic models: normal, and another stream for every tensor. Files that do not fit
// their configuration.
#include "nn/load.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/ops/copy.h"
#include "data/safetensors.h"
#include "tests/support/files.h"

namespace qlab::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::vector<float> weights(const std::string& name, const Shape& shape) {
  return cast(open_model("synthetic:tiny").read(name, shape), DType::f32).to_vector<float>();
}

TEST(SyntheticWeights, AreNormal) {
  const std::vector<float> values = weights("a.weight", {1001, 333});
  const auto count = static_cast<double>(values.size());
  double sum = 0, squares = 0, fourth = 0, beyond = 0;
  for (const float v : values) {
    const double x = v / 0.02;
    sum += x, squares += x * x, fourth += x * x * x * x, beyond += std::abs(x) > 2;
  }
  // Within five standard deviations of each statistic; sqrt(96 / n) is that of the fourth moment.
  EXPECT_NEAR(sum / count, 0, 5 / std::sqrt(count));
  EXPECT_NEAR(squares / count, 1, 5 * std::sqrt(2 / count));
  EXPECT_NEAR(fourth / count, 3, 5 * std::sqrt(96 / count));
  EXPECT_NEAR(beyond / count, std::erfc(std::sqrt(2.0)), 5 * std::sqrt(0.0455 * 0.9545 / count));
}

TEST(SyntheticWeights, DependOnNameAndPlaceAlone) {
  const std::vector<float> all = weights("a.weight", {40, 25});
  const std::vector<float> part = weights("a.weight", {1, 13});
  EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin()));
  EXPECT_NE(weights("b.weight", {40, 25}), all);
  // A draw makes eight values, none of them the same for all.
  for (size_t lane = 1; lane < 8; ++lane) EXPECT_NE(all[lane], all[0]) << lane;
  EXPECT_EQ(weights("a_norm.weight", {3}), std::vector<float>(3, 1.0f));
}

/// The tiny model as a directory, whose configuration says `layers`; `extras` lie beside its
/// tensors.
std::string write_model(const TemporaryFolder& folder, int64_t layers, bool tied,
                        const std::vector<std::string>& extras = {}) {
  LlamaConfig c = synthetic_config("tiny");
  c.tie_word_embeddings = tied;
  std::vector<std::pair<std::string, Tensor>> tensors;
  Llama(c, {WeightFormat::bf16}, DType::bf16, Device::cpu(),
        [&](const std::string& name, const Shape& shape) {
          tensors.emplace_back(name, Tensor::zeros(shape, DType::bf16, Device::cpu()));
          return tensors.back().second;
        });
  for (const std::string& name : extras)
    tensors.emplace_back(name, Tensor::zeros({4}, DType::bf16, Device::cpu()));
  write_safetensors(folder / "model.safetensors", tensors);
  folder.write("config.json", nlohmann::json{{"model_type", "llama"},
                                             {"architectures", {"LlamaForCausalLM"}},
                                             {"vocab_size", c.vocab_size},
                                             {"hidden_size", c.hidden_size},
                                             {"intermediate_size", c.intermediate_size},
                                             {"num_hidden_layers", layers},
                                             {"num_attention_heads", c.num_attention_heads},
                                             {"num_key_value_heads", c.num_key_value_heads},
                                             {"head_dim", c.head_dim},
                                             {"max_position_embeddings", c.max_position_embeddings},
                                             {"rms_norm_eps", c.rms_norm_eps},
                                             {"rope_theta", c.rope_theta},
                                             {"tie_word_embeddings", tied}}
                                  .dump());
  return folder.path();
}

TEST(OpenModel, RefusesTensorsThatTheConfigurationLeavesOut) {
  const int64_t layers = synthetic_config("tiny").num_hidden_layers;
  const TemporaryFolder folder;
  const auto error = [&](int64_t said, bool tied, const std::vector<std::string>& extras) {
    const std::string path = write_model(folder, said, tied, extras);
    return error_of([&] { open_model(path); });
  };
  EXPECT_EQ(error(layers, false, {}), "");
  EXPECT_THAT(error(layers - 1, false, {}),
              AllOf(HasSubstr("model.safetensors"), HasSubstr(fmt::format("{} layers", layers - 1)),
                    HasSubstr(fmt::format("\"model.layers.{}.input_layernorm.weight\" and 8 more",
                                          layers - 1))));
  const std::string bias = "model.layers.0.self_attn.q_proj.bias";
  EXPECT_THAT(error(layers, false, {bias}), HasSubstr(bias));
  EXPECT_EQ(error(layers, false,
                  {"model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"}),
            "");
  EXPECT_EQ(error(layers, true, {"lm_head.weight"}), "");
}

}  // namespace
}  // namespace qlab::test
