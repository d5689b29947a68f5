// Weights of synthetic models: normal, and another stream for every tensor. Files that do not fit
// their configuration.
#include "nn/load.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/ops/copy.h"
#include "tests/support/tiny_model.h"

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
