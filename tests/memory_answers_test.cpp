// What qlab memory says about rates, limits and settings that no run has.
#include "experiments/cost_model.h"
#include "experiments/forecast.h"
#include "experiments/gpus.h"
#include "tests/support/command.h"

namespace qlab::test {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class MemoryAnswersTest : public CommandTest {
 protected:
  /// Of `target`, by default with LoRA.
  std::string text(const std::string& target, const Arguments& more) const {
    Arguments arguments = {"memory", target, "--set", "lora.r=4", "--set", "data.train=synthetic"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ended ended = run(arguments);
    EXPECT_EQ(ended.code, 0) << ended.err;
    return ended.out;
  }
  Json json(const std::string& target, Arguments more) const {
    more.emplace_back("--json");
    return Json::parse(text(target, more));
  }
};

TEST_F(MemoryAnswersTest, BytesWithoutTheirUnitAreRefused) {
  const std::string hint = "did you mean 24GiB?";
  for (const char* option : {"--gpu", "--device-memory", "--host-memory"})
    expect_refused({"memory", "synthetic:tiny", option, "24"}, {option, "24", hint});
  expect_refused({"train", run_file(), "--device-memory", "24"}, {"--device-memory 24", hint});
  for (const char* key : {"train.memory_budget", "quant.resident"})
    expect_refused({"memory", "synthetic:tiny", "--set", std::string(key) + "=24"}, {key, hint});
  text("synthetic:tiny", {"--gpu", "25769803776", "--set", "quant.resident=0", "--host-memory", "0",
                          "--set", "train.memory_budget=24kB"});
}

TEST_F(MemoryAnswersTest, AConfigurationAloneHasShapes) {
  const LlamaConfig c = synthetic_config("tiny");
  Json config = {{"model_type", "llama"},
                 {"torch_dtype", "bfloat16"},
                 {"vocab_size", c.vocab_size},
                 {"hidden_size", c.hidden_size},
                 {"intermediate_size", c.intermediate_size},
                 {"num_hidden_layers", c.num_hidden_layers},
                 {"num_attention_heads", c.num_attention_heads},
                 {"num_key_value_heads", c.num_key_value_heads},
                 {"max_position_embeddings", c.max_position_embeddings},
                 {"tie_word_embeddings", c.tie_word_embeddings}};
  folder_.write("config.json", config.dump());
  const std::string folder = folder_ / ".";
  const Arguments short_batch = {"--gpu", "t4", "--set", "data.seq_len=64"};
  Json said = json(folder, short_batch), expected = json("synthetic:tiny", short_batch);
  EXPECT_THAT(std::string(said["assumed"]), HasSubstr("shapes by config.json"));
  for (const char* key : {"resident", "categories", "peak_bytes", "footprint_bytes", "timeline"})
    EXPECT_EQ(said[key], expected[key]) << key;
  expect_refused({"train", run_file(), "--set", "model.path=" + folder, "--device", "cpu"},
                 {"model.safetensors"});
}

}  // namespace
}  // namespace qlab::test
