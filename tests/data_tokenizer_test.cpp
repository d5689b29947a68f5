#include "data/tokenizer.h"

#include <fstream>

#include "data/file.h"
#include "data/json.h"
#include "tests/support/files.h"

namespace qlab {
namespace {

using test::golden;
using testing::ElementsAre;
using testing::HasSubstr;

/// Every line of a golden file: the same ids, and the same text back.
void expect_golden(const Tokenizer& tokenizer, const std::string& path, int at_least) {
  std::ifstream file(path);
  std::string line;
  ASSERT_TRUE(std::getline(file, line)) << path;  // versions
  int lines = 0, wrong = 0;
  for (; std::getline(file, line) && wrong < 5; ++lines) {
    const nlohmann::json row = parse_json(line, path);
    const auto text = row["text"].get<std::string>();
    const auto ids = row["ids"].get<std::vector<int32_t>>();
    const auto got = tokenizer.encode(text);
    if (got != ids) ++wrong;
    EXPECT_EQ(got, ids) << path << ":" << lines + 2 << ": " << line;
    const auto decoded = row.value("decoded", text);
    EXPECT_EQ(tokenizer.decode(ids, false), decoded) << path << ":" << lines + 2;
  }
  EXPECT_GE(lines, at_least);
}

TEST(Tokenizer, SmolLm2EqualsReference) {
  QLAB_SKIP_WITHOUT_DEMO_MODEL();
  const Tokenizer tokenizer = Tokenizer::load(test::demo_model());
  expect_golden(tokenizer, golden("tokenizer/smollm2.jsonl"), 3000);
  EXPECT_EQ(tokenizer.vocab_size(), 49152);
  EXPECT_EQ(tokenizer.eos_id(), tokenizer.token_id("<|im_end|>"));
  EXPECT_EQ(tokenizer.bos_id(), tokenizer.token_id("<|im_start|>"));
  EXPECT_TRUE(tokenizer.prefix_ids().empty());
  EXPECT_EQ(tokenizer.encode("x", true), tokenizer.encode("x", false));
}

class TokenizerFamily : public testing::TestWithParam<const char*> {};

TEST_P(TokenizerFamily, EqualsReference) {
  const std::string name = golden(std::string("tokenizer/") + GetParam());
#ifndef QLAB_WITH_PCRE2
  if (GetParam() == std::string("other")) {
    EXPECT_THAT(test::error_of([&] { Tokenizer::from_file(name + ".json"); }),
                HasSubstr("libpcre2-dev"));
    return;
  }
#endif
  expect_golden(Tokenizer::from_file(name + ".json"), name + ".jsonl", 700);
}
INSTANTIATE_TEST_SUITE_P(Data, TokenizerFamily, testing::Values("gpt2", "llama3", "qwen2", "other"),
                         [](const auto& param) { return std::string(param.param); });

TEST(Tokenizer, TemplateAddsBos) {
  const Tokenizer tokenizer = Tokenizer::from_file(golden("tokenizer/llama3.json"));
  EXPECT_THAT(tokenizer.prefix_ids(), ElementsAre(1456));
  auto ids = tokenizer.encode("self", true);
  EXPECT_EQ(ids.front(), 1456);
  ids.erase(ids.begin());
  EXPECT_EQ(ids, tokenizer.encode("self"));
  EXPECT_TRUE(tokenizer.is_special(1456));
  EXPECT_EQ(tokenizer.decode({1456, ids[0]}), "self");
}

TEST(Tokenizer, EndOfSequenceFromTheFilesBesideIt) {
  const test::TemporaryFolder folder;
  folder.write("tokenizer.json", read_text_file(golden("tokenizer/llama3.json")));
  EXPECT_EQ(Tokenizer::load(folder.path()).eos_id(), -1);
  folder.write("config.json", R"({"eos_token_id": [5, 6]})");
  EXPECT_EQ(Tokenizer::load(folder.path()).eos_id(), 5);
  folder.write("tokenizer_config.json",
               R"({"eos_token": {"content": "<|end|>"}, "bos_token": "<|begin|>"})");
  const Tokenizer tokenizer = Tokenizer::load(folder.path());
  EXPECT_EQ(tokenizer.eos_id(), 1457);
  EXPECT_EQ(tokenizer.bos_id(), 1456);
  EXPECT_THAT(tokenizer.stop_ids(), ElementsAre(1457, 5, 6));
}

TEST(Tokenizer, KeepsBytesThatAreNotUtf8) {
  const Tokenizer tokenizer = Tokenizer::from_file(golden("tokenizer/gpt2.json"));
  const std::string bytes = "a\xff\xe4\xb8 b\xc0\xaf";
  std::string back;
  for (const int32_t id : tokenizer.encode(bytes)) back += tokenizer.token_bytes(id);
  EXPECT_EQ(back, bytes);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(bytes)), "a\ufffd\ufffd b\ufffd\ufffd");
}

TEST(Tokenizer, LongPieces) {
  const Tokenizer tokenizer = Tokenizer::from_file(golden("tokenizer/llama3.json"));
  const std::string text(200000, 'e');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
}

std::string error_with(const std::string& key, const nlohmann::json& value) {
  nlohmann::json file = read_json_file(golden("tokenizer/gpt2.json"));
  file[nlohmann::json::json_pointer(key)] = value;
  const test::TemporaryFolder folder;
  const std::string path = folder.write("tokenizer.json", file.dump());
  const std::string error = test::error_of([&] { Tokenizer::from_file(path); });
  EXPECT_THAT(error, HasSubstr(path)) << key;
  return error;
}

TEST(Tokenizer, RefusesWhatItCannotDo) {
  EXPECT_THAT(error_with("/model/type", "Unigram"), HasSubstr("Unigram"));
  EXPECT_THAT(error_with("/model/type", "WordPiece"), HasSubstr("WordPiece"));
  EXPECT_THAT(error_with("/model/byte_fallback", true), HasSubstr("sentencepiece"));
  EXPECT_THAT(error_with("/model/dropout", 0.1), HasSubstr("dropout"));
  EXPECT_THAT(error_with("/model/vocab/zz", "x"), HasSubstr("must be an integer"));
  EXPECT_THAT(error_with("/model/vocab/zz", 5), HasSubstr("id 5"));
  EXPECT_THAT(error_with("/model/vocab/zz", -1), HasSubstr("impossible id"));
  EXPECT_THAT(error_with("/model/merges/0", "zq zq"), HasSubstr("not in the vocabulary"));
  EXPECT_THAT(error_with("/model/merges/0", 1), HasSubstr("not a pair"));
  EXPECT_THAT(error_with("/normalizer", {{"type", "Lowercase"}}), HasSubstr("Lowercase"));
  EXPECT_THAT(error_with("/pre_tokenizer", {{"type", "Metaspace"}}), HasSubstr("Metaspace"));
  EXPECT_THAT(error_with("/pre_tokenizer/add_prefix_space", true), HasSubstr("add_prefix_space"));
  EXPECT_THAT(error_with("/decoder", {{"type", "Metaspace"}}), HasSubstr("decoder"));
  EXPECT_THAT(error_with("/post_processor", {{"type", "BertProcessing"}}),
              HasSubstr("BertProcessing"));
}

TEST(Tokenizer, MissingFiles) {
  const test::TemporaryFolder folder;
  EXPECT_THAT(test::error_of([&] { Tokenizer::load(folder.path()); }),
              HasSubstr("no tokenizer.json"));
  EXPECT_THAT(test::error_of([&] { Tokenizer::load(folder / "absent.gguf"); }),
              HasSubstr("absent.gguf"));
  folder.write("tokenizer.model", "x");
  EXPECT_THAT(test::error_of([&] { Tokenizer::load(folder.path()); }), HasSubstr("sentencepiece"));
  EXPECT_THAT(test::error_of([] { Tokenizer::without_text(10).encode("x"); }),
              HasSubstr("no tokenizer"));
}

}  // namespace
}  // namespace qlab
