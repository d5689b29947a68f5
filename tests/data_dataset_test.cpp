#include "data/dataset.h"

#include <algorithm>

#include "data/file.h"
#include "tests/support/files.h"

namespace qlab {
namespace {

using test::golden;
using testing::AllOf;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int32_t begin_id = 1456, end_id = 1457;  // of the golden tokenizer llama3

std::vector<int32_t> joined(const std::vector<std::vector<int32_t>>& parts) {
  std::vector<int32_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

std::vector<int32_t> masked(size_t n) { return std::vector<int32_t>(n, not_trained); }

class DatasetTest : public testing::Test {
 protected:
  /// With BOS in its template, EOS <|end|>, and no ChatML.
  Tokenizer tokenizer() const {
    folder_.write("tokenizer.json", read_text_file(golden("tokenizer/llama3.json")));
    folder_.write("tokenizer_config.json", R"({"eos_token": "<|end|>"})");
    return Tokenizer::load(folder_.path());
  }
  Tokenizer chat_tokenizer() const { return Tokenizer::from_file(golden("tokenizer/qwen2.json")); }
  Dataset load(const std::string& text, const Tokenizer& tokenizer,
               const DatasetOptions& options = {}) {
    return load_dataset(folder_.write("data.jsonl", text), tokenizer, options);
  }
  std::string error(const std::string& text, const DatasetOptions& options = {}) {
    return test::error_of([&] { load(text, tokenizer(), options); });
  }

  test::TemporaryFolder folder_;
};

TEST_F(DatasetTest, PromptAndCompletion) {
  const Tokenizer t = tokenizer();
  const std::string line = R"({"prompt": "def f(x):\n", "completion": "    return x\n", "id": 3})";
  const Dataset data = load(line + "\n", t);
  const auto prompt = t.encode("def f(x):\n"), completion = t.encode("    return x\n");
  ASSERT_EQ(data.examples.size(), 1u);
  EXPECT_EQ(data.examples[0].input_ids, joined({{begin_id}, prompt, completion, {end_id}}));
  EXPECT_EQ(data.examples[0].labels, joined({masked(1 + prompt.size()), completion, {end_id}}));
  EXPECT_EQ(data.lines, 1);
  EXPECT_EQ(data.trained_tokens, static_cast<int64_t>(completion.size()) + 1);
  EXPECT_EQ(data.tokens, static_cast<int64_t>(data.examples[0].input_ids.size()));

  const Dataset all = load(line, t, {.completion_only = false});
  EXPECT_EQ(all.examples[0].labels, joined({masked(1), prompt, completion, {end_id}}));
}

TEST_F(DatasetTest, EosIsTrainedByPosition) {
  const Tokenizer t = tokenizer();
  const Dataset data = load(R"({"prompt": "a<|end|>", "completion": "b<|end|>c"})", t);
  const auto& example = data.examples[0];
  EXPECT_EQ(
      example.input_ids,
      joined(
          {{begin_id}, t.encode("a"), {end_id}, t.encode("b"), {end_id}, t.encode("c"), {end_id}}));
  EXPECT_EQ(example.labels, joined({masked(3), t.encode("b"), {end_id}, t.encode("c"), {end_id}}));
}

TEST_F(DatasetTest, PlainText) {
  const Tokenizer t = tokenizer();
  const Dataset data = load(R"({"text": "hello, world"})", t);
  const auto text = t.encode("hello, world");
  EXPECT_EQ(data.examples[0].input_ids, joined({{begin_id}, text, {end_id}}));
  EXPECT_EQ(data.examples[0].labels, joined({masked(1), text, {end_id}}));
}

TEST_F(DatasetTest, Messages) {
  const Tokenizer t = chat_tokenizer();
  const int32_t start = t.token_id("<|im_start|>"), end = t.token_id("<|im_end|>");
  const std::string line =
      R"({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]})";
  const auto user = t.encode("user\n"), assistant = t.encode("assistant\n"),
             newline = t.encode("\n");
  const auto hi = t.encode("hi"), yo = t.encode("yo");
  const Dataset data = load(line, t);
  const auto& example = data.examples[0];
  EXPECT_EQ(example.input_ids,
            joined({{start}, user, hi, {end}, newline, {start}, assistant, yo, {end}, newline}));
  EXPECT_EQ(example.input_ids,
            t.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"));
  const size_t before = 1 + user.size() + hi.size() + 1 + newline.size() + 1 + assistant.size();
  EXPECT_EQ(example.labels, joined({masked(before), yo, {end}, masked(newline.size())}));
  const Dataset all = load(line, t, {.completion_only = false});
  EXPECT_EQ(all.examples[0].labels, example.input_ids);
}

TEST_F(DatasetTest, PromptsAreTokenizedWithTheirRole) {
  const Tokenizer t = chat_tokenizer();
  const std::string asked =
      "<|im_start|>system\n \n<|im_end|>\n<|im_start|>user\n\n\nhi<|im_end|>\n";
  const auto prompt = t.encode(asked + "<|im_start|>assistant\n"), answer = t.encode("\n\nyo"),
             closing = t.encode("<|im_end|>\n");
  ASSERT_NE(t.encode("user\n\n\nhi"), joined({t.encode("user\n"), t.encode("\n\nhi")}));
  const Dataset data = load(
      R"({"messages": [{"role": "system", "content": " \n"}, {"role": "user", "content": "\n\nhi"},)"
      R"( {"role": "assistant", "content": "\n\nyo"}]})",
      t);
  const auto& example = data.examples[0];
  EXPECT_EQ(example.input_ids, joined({prompt, answer, closing}));
  EXPECT_EQ(example.labels,
            joined({masked(prompt.size()), answer, {closing[0]}, masked(closing.size() - 1)}));
}

TEST_F(DatasetTest, Tokenized) {
  const Dataset data =
      load(R"({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]})", Tokenizer::without_text(8));
  EXPECT_THAT(data.examples[0].input_ids, ElementsAre(5, 6, 7));
  EXPECT_THAT(data.examples[0].labels, ElementsAre(-100, 6, -100));
  EXPECT_EQ(data.trained_tokens, 1);
}

TEST_F(DatasetTest, PositionZeroIsNeverTrained) {
  const Dataset data = load(R"({"input_ids": [5, 6, 7], "labels": [5, 6, 7]})", tokenizer());
  EXPECT_EQ(data.trained_tokens, 2);
  const Dataset two = load(
      "{\"input_ids\": [5, 6], \"labels\": [5, -100]}\n"
      "{\"input_ids\": [5, 6], \"labels\": [5, 6]}",
      tokenizer());
  EXPECT_EQ(two.dropped, 1);
  EXPECT_EQ(two.examples.size(), 1u);
}

TEST_F(DatasetTest, TruncatesAtTheEndAndCounts) {
  const std::string lines =
      "{\"input_ids\": [1, 2, 3, 4], \"labels\": [-100, -100, 3, 4]}\n"
      "{\"input_ids\": [1, 2, 3, 4], \"labels\": [-100, -100, -100, 4]}\n"
      "{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, 3]}\n";
  const Dataset data = load(lines, tokenizer(), {.seq_len = 3});
  EXPECT_EQ(data.lines, 3);
  EXPECT_EQ(data.truncated, 2);
  EXPECT_EQ(data.dropped, 1);
  ASSERT_EQ(data.examples.size(), 2u);
  EXPECT_THAT(data.examples[0].input_ids, ElementsAre(1, 2, 3));
  EXPECT_THAT(data.examples[0].labels, ElementsAre(-100, -100, 3));
  EXPECT_EQ(data.tokens, 6);
  EXPECT_EQ(data.trained_tokens, 2);
}

TEST_F(DatasetTest, BlankLinesDoNotCount) {
  const Dataset data = load("\n{\"text\": \"a\"}\r\n\n{\"text\": \"b\"}\n\n", tokenizer());
  EXPECT_EQ(data.lines, 2);
}

TEST_F(DatasetTest, FingerprintFollowsContent) {
  const std::string a = load(R"({"text": "a"})", tokenizer()).fingerprint;
  EXPECT_EQ(a, load(R"({"text": "a"})", tokenizer()).fingerprint);
  EXPECT_NE(a, load(R"({"text": "b"})", tokenizer()).fingerprint);
  tokenizer();
  folder_.write("tokenizer_config.json", R"({"eos_token": "<|begin|>"})");
  EXPECT_NE(a, load(R"({"text": "a"})", Tokenizer::load(folder_.path())).fingerprint);
}

TEST_F(DatasetTest, ErrorsNameFileAndLine) {
  const std::string good = "{\"text\": \"a\"}\n", path = folder_ / "data.jsonl";
  const auto second = [&](const std::string& line) {
    const std::string message = error(good + line + "\n" + good);
    EXPECT_THAT(message, HasSubstr(path + ":2: ")) << line;
    return message;
  };
  EXPECT_THAT(second("{\"text\": "), HasSubstr("not valid JSON"));
  EXPECT_THAT(second("\"text\""), HasSubstr("expected an object"));
  EXPECT_THAT(second(R"({"txt": "a", "prompt": "b"})"),
              AllOf(HasSubstr("prompt and completion"), HasSubstr("prompt, txt")));
  EXPECT_THAT(second(R"({"text": 3})"), HasSubstr("\"text\" must be a string"));
  EXPECT_THAT(second(R"({"prompt": "a", "completion": null})"), HasSubstr("\"completion\""));
  EXPECT_THAT(second(R"({"text": "a", "text": "b"})"), HasSubstr("duplicate key"));
  EXPECT_THAT(second(R"({"input_ids": [1, 2], "labels": [1]})"), HasSubstr("2 input_ids, but 1"));
  EXPECT_THAT(second(R"({"input_ids": [1, 99999], "labels": [1, 2]})"), HasSubstr("99999"));
  EXPECT_THAT(second(R"({"input_ids": [1, -100], "labels": [1, 2]})"), HasSubstr("-100"));
  EXPECT_THAT(second(R"({"input_ids": [1, 2], "labels": [1, -1]})"), HasSubstr("\"labels\""));
  EXPECT_THAT(second(R"({"input_ids": [1, 2.5], "labels": [1, 2]})"), HasSubstr("integers"));
  EXPECT_THAT(second(R"({"messages": []})"), HasSubstr("ChatML"));
}

TEST_F(DatasetTest, ErrorsInMessages) {
  const auto message = [&](const std::string& line) {
    return test::error_of([&] { load(line, chat_tokenizer()); });
  };
  EXPECT_THAT(message(R"({"messages": []})"), HasSubstr("list of objects"));
  EXPECT_THAT(message(R"({"messages": ["hi"]})"), HasSubstr("role and content"));
  EXPECT_THAT(message(R"({"messages": [{"role": "user"}]})"), HasSubstr("\"content\""));
  EXPECT_THAT(message(R"({"messages": [{"role": "bot", "content": "x"}]})"), HasSubstr("\"bot\""));
  EXPECT_THAT(message(R"({"text": "x"})"), HasSubstr("eos_token"));
  EXPECT_THAT(message(R"({"messages": [{"role": "user", "content": "x"}]})"),
              HasSubstr("its one example does not have a token to train"));
  EXPECT_THAT(message(R"({"messages": [{"role": "user", "content": "x"}]}
{"messages": [{"role": "user", "content": "y"}]})"),
              HasSubstr("none of its 2 examples has a token to train"));
}

TEST_F(DatasetTest, ErrorsOfTheWholeSet) {
  EXPECT_THAT(error(""), HasSubstr("no example"));
  EXPECT_THAT(error("\n\n"), HasSubstr("no example"));
  EXPECT_THAT(error(R"({"prompt": "a b c d e f g", "completion": "h"})", {.seq_len = 3}),
              AllOf(HasSubstr("its one example"), HasSubstr("seq_len 3"),
                    HasSubstr("data.eval_seq_len for data.eval")));
  EXPECT_THAT(error(R"({"text": "a"})", {.seq_len = 1}), HasSubstr("seq_len"));
  EXPECT_THAT(error(R"({"text": "a"})", {.chat_template = "llama3"}), HasSubstr("llama3"));
  EXPECT_THAT(test::error_of([&] { load_dataset(folder_ / "absent", tokenizer(), {}); }),
              HasSubstr("absent"));
}

TEST_F(DatasetTest, Synthetic) {
  const Dataset data = synthetic_dataset(50, 20, 10, 1);
  EXPECT_EQ(data.examples.size(), 50u);
  EXPECT_EQ(data.tokens, 1000);
  EXPECT_EQ(data.trained_tokens, 950);
  std::vector<int> seen(10);
  for (const Example& example : data.examples) {
    EXPECT_EQ(example.input_ids, example.labels);
    for (const int32_t id : example.input_ids) ++seen.at(static_cast<size_t>(id));
  }
  EXPECT_THAT(seen, Each(testing::Gt(50)));
  EXPECT_EQ(data.examples[7].input_ids, synthetic_dataset(8, 20, 10, 1).examples[7].input_ids);
  EXPECT_NE(data.examples[7].input_ids, synthetic_dataset(8, 20, 10, 2).examples[7].input_ids);
  EXPECT_NE(data.fingerprint, synthetic_dataset(50, 20, 10, 2).fingerprint);
}

TEST_F(DatasetTest, SmolLm2HasNoBosAndEndsTurns) {
  QLAB_SKIP_WITHOUT_DEMO_MODEL();
  const Tokenizer t = Tokenizer::load(test::demo_model());
  const Dataset data = load(R"({"prompt": "a", "completion": "b"})", t);
  EXPECT_EQ(data.examples[0].input_ids,
            joined({t.encode("a"), t.encode("b"), {t.token_id("<|im_end|>")}}));
}

}  // namespace
}  // namespace qlab
