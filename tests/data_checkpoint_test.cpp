#include "data/checkpoint.h"

#include <cmath>

#include "data/json.h"
#include "data/safetensors.h"
#include "data/tokenizer.h"
#include "tests/support/files.h"

namespace qlab {
namespace {

using test::golden;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const std::string llama_folder = golden("model_files/llama");

TEST(Checkpoint, GgufEqualsHuggingFace) {
  const auto expected = Checkpoint::open(llama_folder);
  const auto actual = Checkpoint::open(golden("model_files/llama.gguf"));
  EXPECT_EQ(actual->names(), expected->names());
  for (const std::string& name : expected->names()) {
    ASSERT_EQ(actual->shape(name), expected->shape(name)) << name;
    EXPECT_EQ(actual->read(name, DType::f32).to_vector<float>(),
              expected->read(name, DType::f32).to_vector<float>())
        << name;
    EXPECT_EQ(actual->source_dtype(name), "F32");
  }
  EXPECT_THAT(actual->rope_divisors(), ElementsAre(1, 2, 8));
  EXPECT_TRUE(expected->rope_divisors().empty());
  nlohmann::json config = expected->config();
  config.erase("torch_dtype");
  EXPECT_EQ(actual->config(), config);
}

TEST(Checkpoint, ConfigInTheSpellingOfVersion4) {
  const auto checkpoint = Checkpoint::open(llama_folder);
  EXPECT_EQ(checkpoint->config()["rope_theta"], 50000.0);
  EXPECT_TRUE(checkpoint->config()["rope_scaling"].is_null());
  EXPECT_EQ(checkpoint->config()["torch_dtype"], "float32");
  EXPECT_FALSE(checkpoint->config().contains("rope_parameters"));

  const test::TemporaryFolder folder;
  nlohmann::json config = read_json_file(llama_folder + "/config.json");
  config["rope_parameters"] = {{"rope_type", "llama3"}, {"factor", 8.0}, {"rope_theta", 5e5}};
  folder.write("config.json", config.dump());
  folder.write("model.safetensors", read_text_file(llama_folder + "/model.safetensors"));
  const auto scaled = Checkpoint::open(folder.path());
  EXPECT_EQ(scaled->config()["rope_scaling"],
            (nlohmann::json{{"rope_type", "llama3"}, {"factor", 8.0}}));
  EXPECT_EQ(scaled->config()["rope_theta"], 5e5);
}

TEST(Checkpoint, ShapeMismatchNamesBoth) {
  for (const std::string& path : {llama_folder, golden("model_files/llama.gguf")}) {
    const auto checkpoint = Checkpoint::open(path);
    EXPECT_EQ(checkpoint->read("model.norm.weight", {24}, DType::f32).numel(), 24);
    EXPECT_THAT(test::error_of([&] { checkpoint->read("model.norm.weight", {25}, DType::f32); }),
                AllOf(HasSubstr(path), HasSubstr("model.norm.weight"), HasSubstr("[24]"),
                      HasSubstr("[25]")));
    EXPECT_FALSE(checkpoint->contains("model.norm.bias"));
    EXPECT_THAT(test::error_of([&] { checkpoint->read("model.norm.bias", {25}, DType::f32); }),
                AllOf(HasSubstr(path), HasSubstr("model.norm.bias")));
  }
}

/// A folder with two shards, of which `index` is the description.
class Shards {
 public:
  Shards() {
    const Tensor x = Tensor::from_vector<float>({1, 2}, {2}, Device::cpu());
    folder_.write("config.json", "{}");
    write_safetensors(folder_ / "one.safetensors", {{"a", x}});
    write_safetensors(folder_ / "two.safetensors", {{"b", x}});
    index["weight_map"] = {{"a", "one.safetensors"}, {"b", "two.safetensors"}};
    index["metadata"]["total_size"] = 16;
  }
  std::unique_ptr<Checkpoint> open() const {
    folder_.write("model.safetensors.index.json", index.dump());
    return Checkpoint::open(folder_.path());
  }
  std::string error() const {
    return test::error_of([&] { open(); });
  }
  std::string path(const std::string& name) const { return folder_ / name; }
  nlohmann::json index;

 private:
  test::TemporaryFolder folder_;
};

TEST(Checkpoint, ReadsShards) {
  const Shards shards;
  const auto checkpoint = shards.open();
  EXPECT_THAT(checkpoint->names(), ElementsAre("a", "b"));
  EXPECT_THAT(checkpoint->read("b", DType::f32).to_vector<float>(), ElementsAre(1, 2));
}

TEST(Checkpoint, RefusesBrokenShards) {
  Shards shards;
  shards.index["metadata"]["total_size"] = 17;
  EXPECT_THAT(shards.error(), HasSubstr("total_size is 17"));
  shards.index["metadata"]["total_size"] = 16;
  shards.index["weight_map"]["b"] = "one.safetensors";
  EXPECT_THAT(shards.error(), AllOf(HasSubstr("\"b\" is not in"), HasSubstr("one.safetensors")));
  shards.index["weight_map"]["b"] = "three.safetensors";
  EXPECT_THAT(shards.error(), AllOf(HasSubstr("three.safetensors"), HasSubstr("missing")));
  shards.index["weight_map"]["b"] = "../two.safetensors";
  EXPECT_THAT(shards.error(), HasSubstr("not a file name"));
  shards.index["weight_map"]["b"] = "two.safetensors";
  const std::string shard = read_text_file(shards.path("two.safetensors"));
  write_file_atomically(shards.path("two.safetensors"), shard.substr(0, shard.size() - 1));
  EXPECT_THAT(shards.error(), AllOf(HasSubstr("two.safetensors"), HasSubstr("truncated")));
  shards.index = {{"weights", 1}};
  EXPECT_THAT(shards.error(), HasSubstr("weight_map"));
}

TEST(Checkpoint, RefusesWhatIsNoModel) {
  const test::TemporaryFolder folder;
  const auto error = [&] { return test::error_of([&] { Checkpoint::open(folder.path()); }); };
  EXPECT_THAT(error(), HasSubstr("no config.json"));
  folder.write("adapter_config.json", "{}");
  EXPECT_THAT(error(), HasSubstr("adapter"));
  folder.write("config.json", "{}");
  EXPECT_THAT(error(), HasSubstr("neither model.safetensors"));
  folder.write("config.json", "{");
  EXPECT_THAT(error(), HasSubstr("not valid JSON"));
  const std::string other = folder.write("model.bin", "x");
  EXPECT_THAT(test::error_of([&] { Checkpoint::open(other); }), HasSubstr("model.bin"));
  EXPECT_THAT(test::error_of([&] { Checkpoint::open(folder / "absent"); }),
              HasSubstr("no such file"));
}

TEST(Checkpoint, RefusesUnknownArchitecture) {
  std::string text = read_text_file(golden("model_files/llama.gguf"));
  const std::string key = "general.architecture";
  const size_t value = text.find(key) + key.size() + 4 + 8;
  ASSERT_EQ(text.substr(value, 5), "llama");
  text.replace(value, 5, "mamba");
  const test::TemporaryFolder folder;
  const std::string path = folder.write("model.gguf", text);
  EXPECT_THAT(test::error_of([&] { Checkpoint::open(path); }),
              AllOf(HasSubstr(path), HasSubstr("\"mamba\" is not supported")));
}

TEST(Checkpoint, FindsHubIdsInTheCache) {
  const test::TemporaryFolder cache;
  ::setenv("HF_HUB_CACHE", cache.path().c_str(), 1);
  EXPECT_THAT(test::error_of([] { Checkpoint::open("org/name"); }),
              AllOf(HasSubstr("hf download org/name"), HasSubstr(cache.path())));
  const std::string snapshot = "models--org--name/snapshots/abc/";
  cache.write("models--org--name/refs/main", "abc\n");
  cache.write(snapshot + "config.json", read_text_file(llama_folder + "/config.json"));
  cache.write(snapshot + "model.safetensors", read_text_file(llama_folder + "/model.safetensors"));
  const auto checkpoint = Checkpoint::open("org/name");
  EXPECT_EQ(checkpoint->path(), cache / "models--org--name/snapshots/abc");
  EXPECT_EQ(checkpoint->fingerprint(), Checkpoint::open(llama_folder)->fingerprint());
  // A snapshot of which only some files were fetched.
  EXPECT_THAT(test::error_of([] { Tokenizer::load("org/name"); }),
              AllOf(HasSubstr("no tokenizer.json"), HasSubstr("hf download org/name")));
  for (const char* file : {"model.safetensors", "config.json"}) {
    std::filesystem::remove(cache / (snapshot + file));
    EXPECT_THAT(test::error_of([] { Checkpoint::open("org/name"); }),
                AllOf(HasSubstr(file), HasSubstr("hf download org/name")));
  }
  // Of a folder that is here, what is missing is a file.
  EXPECT_THAT(test::error_of([] { Checkpoint::open("tests/name"); }),
              AllOf(HasSubstr("no such file or directory"), Not(HasSubstr("hf download"))));
  ::unsetenv("HF_HUB_CACHE");
  ::setenv("HF_HOME", (cache / "home").c_str(), 1);
  EXPECT_THAT(test::error_of([] { Checkpoint::open("org/name"); }), HasSubstr(cache / "home/hub"));
  ::unsetenv("HF_HOME");
}

TEST(Checkpoint, FingerprintFollowsContent) {
  const test::TemporaryFolder folder;
  const std::string gguf = read_text_file(golden("model_files/llama.gguf"));
  const auto fingerprint = [&](std::string text, size_t changed) {
    if (changed < text.size()) text[changed] = static_cast<char>(text[changed] ^ 1);
    return Checkpoint::open(folder.write("model.gguf", text))->fingerprint();
  };
  const std::string before = fingerprint(gguf, gguf.size());
  EXPECT_EQ(before, Checkpoint::open(golden("model_files/llama.gguf"))->fingerprint());
  for (const size_t back : {200, 5000, 20000})
    EXPECT_NE(before, fingerprint(gguf, gguf.size() - back));
  EXPECT_NE(before, Checkpoint::open(llama_folder)->fingerprint());
}

TEST(Checkpoint, FingerprintReadsEveryByte) {
  const test::TemporaryFolder folder;
  folder.write("config.json", read_text_file(llama_folder + "/config.json"));
  const Tensor x = Tensor::zeros({1024, 1024}, DType::f32, Device::cpu());
  const auto fingerprint = [&] {
    write_safetensors(folder / "model.safetensors", {{"x", x}});
    return Checkpoint::open(folder.path())->fingerprint();
  };
  const std::string before = fingerprint();
  for (const int64_t i : {300000, 524288, 700001}) {  // of 1,048,576
    x.data<float>()[i] = 1;
    EXPECT_NE(fingerprint(), before) << i;
    x.data<float>()[i] = 0;
  }
  EXPECT_EQ(fingerprint(), before);
  EXPECT_THROW(Checkpoint::open(folder.path())->fingerprint([] { throw std::runtime_error(""); }),
               std::runtime_error);
}

TEST(Checkpoint, FingerprintReadsEveryByteOfGguf) {
  QLAB_SKIP_WITHOUT_DEMO_MODEL();
  const test::TemporaryFolder folder;
  const std::string path = folder / "model.gguf";
  std::filesystem::copy_file(test::demo_model(), path);
  const std::string before = Checkpoint::open(path)->fingerprint();
  {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    file.seekg(10'000'000);  // inside the embeddings
    const char changed = static_cast<char>(file.get() ^ 1);
    file.seekp(10'000'000);
    file.put(changed);
  }
  EXPECT_NE(Checkpoint::open(path)->fingerprint(), before);
}

TEST(Checkpoint, SmolLm2) {
  QLAB_SKIP_WITHOUT_DEMO_MODEL();
  const auto checkpoint = Checkpoint::open(test::demo_model());
  const nlohmann::json& config = checkpoint->config();
  EXPECT_EQ(config["hidden_size"], 576);
  EXPECT_EQ(config["intermediate_size"], 1536);
  EXPECT_EQ(config["num_hidden_layers"], 30);
  EXPECT_EQ(config["num_attention_heads"], 9);
  EXPECT_EQ(config["num_key_value_heads"], 3);
  EXPECT_EQ(config["head_dim"], 64);
  EXPECT_EQ(config["vocab_size"], 49152);
  EXPECT_EQ(config["max_position_embeddings"], 8192);
  EXPECT_EQ(config["rms_norm_eps"], 1e-5);
  EXPECT_EQ(config["rope_theta"], 100000.0);
  EXPECT_EQ(config["tie_word_embeddings"], true);
  EXPECT_EQ(config["eos_token_id"], 2);
  EXPECT_EQ(checkpoint->names().size(), 272u);
  EXPECT_FALSE(checkpoint->contains("lm_head.weight"));
  EXPECT_EQ(checkpoint->source_dtype("model.embed_tokens.weight"), "Q8_0");
  EXPECT_EQ(checkpoint->source_dtype("model.layers.29.self_attn.k_proj.weight"), "Q4_1");
  EXPECT_EQ(checkpoint->shape("model.layers.29.self_attn.k_proj.weight"), (Shape{192, 576}));
  for (const std::string& name : checkpoint->names())
    for (const float x : checkpoint->read(name, DType::f32).to_vector<float>())
      ASSERT_LT(std::abs(x), 1000.0f) << name;
}

}  // namespace
}  // namespace qlab
