#include "nn/adapter_file.h"

#include <nlohmann/json.hpp>

#include "data/json.h"
#include "data/safetensors.h"
#include "tests/support/files.h"
#include "tests/support/tiny_llama.h"

namespace qlab::test {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class AdapterFileTest : public testing::Test {
 protected:
  std::unique_ptr<Adapter> saved(const LoraSpec& spec, const std::string& base = "base") {
    auto adapter = trained_adapter(*model_, spec);
    save_adapter(dir_, *adapter, base);
    return adapter;
  }
  Json config() const { return read_json_file(dir_ + "/adapter_config.json"); }
  /// Changes one key of adapter_config.json and reads it again.
  std::string error_with(const std::string& key, const Json& value) const {
    const std::string path = dir_ + "/adapter_config.json";
    const std::string before = read_text_file(path);
    Json json = Json::parse(before);
    json[key] = value;
    if (value.is_discarded()) json.erase(key);
    folder_.write("adapter/adapter_config.json", json.dump());
    const std::string text = error_of([&] { read_adapter_spec(dir_); });
    folder_.write("adapter/adapter_config.json", before);
    return text;
  }
  std::string load_error(const LoraSpec& spec) const {
    const auto adapter = fresh_adapter(*model_, spec);
    return error_of([&] { load_adapter(dir_, *adapter); });
  }

  TemporaryFolder folder_;
  std::string dir_ = folder_ / "adapter";
  std::unique_ptr<Llama> model_ = tiny_llama(WeightFormat::fp32, cpu_f32);
};

TEST_F(AdapterFileTest, RoundTrip) {
  for (const char* targets : {"all-linear", "attention", "qv", ".*layers\\.1\\..*_proj"}) {
    LoraSpec spec;
    spec.r = 5;
    spec.alpha = 7.5;
    spec.dropout = 0.05;
    spec.rslora = targets == std::string("qv");
    spec.pattern = targets;
    const auto adapter = saved(spec);
    const LoraSpec read = read_adapter_spec(dir_);
    EXPECT_EQ(read.r, 5);
    EXPECT_EQ(read.alpha, 7.5);
    EXPECT_EQ(read.dropout, 0.05);
    EXPECT_EQ(read.rslora, spec.rslora);
    EXPECT_EQ(read.scale(), spec.scale());
    const auto again = fresh_adapter(*model_, read);
    load_adapter(dir_, *again);
    expect_same_bits(again->parameters(), adapter->parameters());
  }
}

TEST_F(AdapterFileTest, RoundTripInBf16) {
  LoraSpec spec;
  spec.dtype = DType::bf16;
  const auto adapter = saved(spec);
  const SafetensorsFile file(dir_ + "/adapter_model.safetensors");
  for (const auto& [name, entry] : file.entries()) EXPECT_EQ(entry.dtype, "BF16") << name;
  // The masters were rounded when they changed, so nothing is lost.
  const auto again = fresh_adapter(*model_, spec);
  load_adapter(dir_, *again);
  expect_same_bits(again->parameters(), adapter->parameters());
}

TEST_F(AdapterFileTest, TensorsAreNamedAsInPeft) {
  LoraSpec spec;
  spec.r = 4;
  spec.pattern = "";
  spec.names = {"model.layers.1.mlp.down_proj"};
  const auto adapter = saved(spec);
  const SafetensorsFile file(dir_ + "/adapter_model.safetensors");
  ASSERT_EQ(file.entries().size(), 2u);
  const std::string prefix = "base_model.model.model.layers.1.mlp.down_proj.";
  EXPECT_EQ(file.entries().at(prefix + "lora_A.weight").shape, (std::vector<int64_t>{4, 160}));
  EXPECT_EQ(file.entries().at(prefix + "lora_B.weight").shape, (std::vector<int64_t>{64, 4}));
  expect_same_bits(file.read(prefix + "lora_B.weight", DType::f32),
                   adapter->module(spec.names[0]).b.clone());
  EXPECT_EQ(file.metadata().at("format"), "pt");
}

TEST_F(AdapterFileTest, ConfigHasTheLongStandingKeys) {
  LoraSpec spec;
  spec.pattern = "attention";
  saved(spec, "some/base");
  Json expected = Json::parse(R"({
    "alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "some/base",
    "bias": "none", "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true,
    "layers_pattern": null, "layers_to_transform": null, "lora_alpha": 32, "lora_dropout": 0.0,
    "modules_to_save": null, "peft_type": "LORA", "r": 16, "rank_pattern": {}, "revision": null,
    "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"], "task_type": "CAUSAL_LM"})");
  EXPECT_EQ(config(), expected);
  EXPECT_TRUE(config()["lora_alpha"].is_number_integer());
  spec.rslora = true;
  saved(spec, "some/base");
  expected["use_rslora"] = true;
  EXPECT_EQ(config(), expected);
}

TEST_F(AdapterFileTest, RefusesWhatItDoesNotImplement) {
  saved({});
  const std::vector<std::pair<std::string, Json>> settings = {
      {"use_dora", true},
      {"lora_bias", true},
      {"rank_pattern", {{"q_proj", 4}}},
      {"alpha_pattern", {{"q_proj", 4}}},
      {"layers_to_transform", Json::array({0})},
      {"modules_to_save", Json::array({"lm_head"})},
      {"target_parameters", Json::array({"x"})},
      {"fan_in_fan_out", true},
      {"use_qalora", true}};
  for (const auto& [key, value] : settings)
    EXPECT_THAT(error_with(key, value),
                AllOf(HasSubstr("adapter_config.json"), HasSubstr(key), HasSubstr("not support")));
  EXPECT_THAT(error_with("bias", "all"), AllOf(HasSubstr("bias"), HasSubstr("none")));
  EXPECT_THAT(error_with("peft_type", "IA3"), HasSubstr("peft_type must be LORA"));
}

TEST_F(AdapterFileTest, NamesTheAdapterOfATrial) {
  saved({});
  EXPECT_EQ(error_of([&] { read_adapter_spec(folder_ / "."); }),
            fmt::format("{0}: is a trial's directory; its adapter is {0}/adapter", folder_ / "."));
  EXPECT_THAT(error_of([&] { read_adapter_spec(folder_ / "gone"); }),
              HasSubstr("gone/adapter_config.json"));
}

TEST_F(AdapterFileTest, RefusesMalformedConfigs) {
  saved({});
  EXPECT_EQ(error_with("r", 16), "");
  EXPECT_EQ(error_with("a_key_of_the_future", nullptr), "");
  EXPECT_THAT(error_with("r", 0), HasSubstr("r must be positive"));
  for (const char* key :
       {"r", "lora_alpha", "target_modules", "lora_dropout", "bias", "peft_type", "use_rslora"})
    EXPECT_THAT(error_with(key, Json{{"wrong", "type"}}), HasSubstr("adapter_config.json")) << key;
  for (const char* key : {"r", "lora_alpha", "target_modules", "peft_type"})
    EXPECT_THAT(error_with(key, Json(Json::value_t::discarded)), HasSubstr("adapter_config.json"))
        << key;
  folder_.write("adapter/adapter_config.json", "[1]");
  EXPECT_THAT(error_of([&] { read_adapter_spec(dir_); }), HasSubstr("must be a JSON object"));
  folder_.write("adapter/adapter_config.json", "{");
  EXPECT_THAT(error_of([&] { read_adapter_spec(dir_); }), HasSubstr("adapter_config.json"));
  EXPECT_THAT(error_of([&] { read_adapter_spec(dir_ + "/nowhere"); }), HasSubstr("nowhere"));
}

TEST_F(AdapterFileTest, RefusesWeightsThatDoNotFit) {
  LoraSpec spec;
  spec.r = 4;
  spec.pattern = "qv";
  saved(spec);
  EXPECT_EQ(load_error(spec), "");
  LoraSpec wider = spec;
  wider.pattern = "attention";
  EXPECT_THAT(load_error(wider), AllOf(HasSubstr("adapter_model.safetensors"),
                                       HasSubstr("layers.0.self_attn.k_proj.lora_A.weight"),
                                       HasSubstr("lora.targets")));
  LoraSpec narrower = spec;
  narrower.pattern = "";
  narrower.names = {"q_proj"};
  EXPECT_THAT(load_error(narrower),
              AllOf(HasSubstr("4 tensors have no module under lora.targets"), HasSubstr("v_proj")));
  LoraSpec higher = spec;
  higher.r = 8;
  EXPECT_THAT(load_error(higher), HasSubstr("set lora.r: 4,"));
  LoraSpec scaled = spec;
  scaled.alpha += 1;
  EXPECT_THAT(load_error(scaled), HasSubstr("the run has r 4, alpha 33"));
  std::filesystem::remove(dir_ + "/adapter_model.safetensors");
  EXPECT_THAT(load_error(spec), HasSubstr("adapter_model.safetensors"));
}

TEST_F(AdapterFileTest, RefusesValuesThatAreNotFinite) {
  LoraSpec spec;
  spec.pattern = "qv";
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), HUGE_VALF, -HUGE_VALF}) {
    const auto adapter = saved(spec);
    const Tensor b = adapter->module("model.layers.1.self_attn.v_proj").b;
    b.data<float>()[b.numel() - 1] = bad;
    save_adapter(dir_, *adapter, "base");
    EXPECT_THAT(load_error(spec),
                AllOf(HasSubstr("adapter_model.safetensors"),
                      HasSubstr("layers.1.self_attn.v_proj.lora_B.weight has values that are not "
                                "finite")));
  }
}

const std::vector<std::string> names = [] {
  std::vector<std::string> all;
  for (const char* layer : {"0", "1", "10"})
    for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                             "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
      all.push_back(std::string("model.layers.") + layer + "." + name);
  return all;
}();

std::vector<int> resolve(const std::string& pattern, std::vector<std::string> list = {}) {
  LoraSpec spec;
  spec.pattern = pattern;
  spec.names = std::move(list);
  return resolve_targets(spec, names);
}

TEST(Targets, Keywords) {
  using testing::ElementsAre;
  EXPECT_THAT(resolve("attention"), ElementsAre(0, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 17));
  EXPECT_THAT(resolve("mlp"), ElementsAre(4, 5, 6, 11, 12, 13, 18, 19, 20));
  EXPECT_THAT(resolve("qk"), ElementsAre(0, 1, 7, 8, 14, 15));
  EXPECT_THAT(resolve("qv"), ElementsAre(0, 2, 7, 9, 14, 16));
  EXPECT_EQ(resolve("all-linear").size(), names.size());
}

TEST(Targets, NamesAreSuffixesOfWholeSegments) {
  using testing::ElementsAre;
  EXPECT_THAT(resolve("", {"o_proj", "mlp.up_proj"}), ElementsAre(3, 5, 10, 12, 17, 19));
  EXPECT_THAT(resolve("", {"model.layers.1.self_attn.q_proj"}), ElementsAre(7));
  EXPECT_THAT(resolve("", {"0.mlp.up_proj"}), ElementsAre(5));  // not layer 10
  EXPECT_THAT(error_of([] {
                resolve("", {"q_proj", "proj"});
              }),
              HasSubstr("no module matches proj"));
}

TEST(Targets, ARegexMatchesTheWholeName) {
  using testing::ElementsAre;
  EXPECT_THAT(resolve(R"(model\.layers\.(0|10)\.self_attn\.(q|v)_proj)"),
              ElementsAre(0, 2, 14, 16));
  EXPECT_THAT(resolve(".*down_proj"), ElementsAre(6, 13, 20));
  EXPECT_THAT(error_of([] { resolve("down_proj"); }), HasSubstr("no module matches down_proj"));
  EXPECT_THAT(error_of([] { resolve("("); }), HasSubstr("neither a keyword"));
}

// Each takes a backtracking matcher minutes or more.
TEST(Targets, NoRegexTakesExponentialTime) {
  for (const char* pattern : {"(.*)*x", "((.*)*)*[xz]", "(a|e|.)*!", "(?=(.*)*z).*"})
    EXPECT_THAT(error_of([&] { resolve(pattern); }), HasSubstr("no module matches")) << pattern;
  EXPECT_EQ(resolve("(.*)*j").size(), names.size());
  EXPECT_EQ(resolve("((.*)*)*[ij]").size(), names.size());
  EXPECT_THAT(error_of([] { resolve(R"((.*)\1)"); }), HasSubstr("back-reference"));
}

TEST(Targets, ARegexMayLookAhead) {
  EXPECT_THAT(resolve(R"(.*layers\.(?!0\.)\d+\..*?q_proj)"), testing::ElementsAre(7, 14));
}

TEST(Targets, NothingThatMatchesIsAnError) {
  EXPECT_THAT(error_of([] { resolve("", {"c_attn"}); }),
              AllOf(HasSubstr("lora.targets: no module matches c_attn"), HasSubstr("q_proj"),
                    HasSubstr("model.layers.0.self_attn.q_proj")));
  EXPECT_THAT(error_of([] { resolve(""); }), HasSubstr("an empty list"));
}

}  // namespace
}  // namespace qlab::test
