#include "data/dataset.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <utility>

#include "core/error.h"
#include "core/random.h"
#include "data/file.h"
#include "data/json.h"

namespace qlab {
namespace {

using nlohmann::json;

bool is_tokenized(const json& line) {
  return line.contains("input_ids") && line.contains("labels");
}

/// Makes examples of the lines of one file.
class LineReader {
 public:
  LineReader(const Tokenizer& tokenizer, const DatasetOptions& options)
      : tokenizer_(tokenizer), options_(options) {}

  Example read(const json& line, const std::string& where) {
    if (line.is_object()) {
      if (is_tokenized(line)) return tokenized(line, where);
      if (!tokenizer_.has_text())
        fail(
            "{}: the model has no tokenizer, so each line must have input_ids and labels; got the "
            "keys {} (data.train and data.eval may be synthetic, or give a model that has one)",
            where, key_list(line));
      if (line.contains("messages")) return chat(line["messages"], where);
      if (line.contains("prompt") && line.contains("completion")) return pair(line, where);
      if (line.contains("text")) return plain(line, where);
    }
    fail(
        "{}: expected an object with prompt and completion, or text, or messages, or input_ids and "
        "labels{}",
        where, line.is_object() ? "; got the keys " + key_list(line) : "");
  }

 private:
  static std::string key_list(const json& object) {
    std::string list;
    for (const auto& [key, value] : object.items()) list += (list.empty() ? "" : ", ") + key;
    return list.empty() ? "(none)" : list;
  }

  static std::string text_of(const json& object, const char* key, const std::string& where) {
    const auto found = object.find(key);
    if (found == object.end() || !found->is_string())
      fail("{}: \"{}\" must be a string", where, key);
    return found->get<std::string>();
  }

  static void append(Example& example, const std::vector<int32_t>& ids, bool trained) {
    example.input_ids.insert(example.input_ids.end(), ids.begin(), ids.end());
    if (trained)
      example.labels.insert(example.labels.end(), ids.begin(), ids.end());
    else
      example.labels.resize(example.input_ids.size(), not_trained);
  }

  /// What comes before any text: the tokenizer's own prefix, never trained.
  Example begin() const {
    Example example;
    append(example, tokenizer_.prefix_ids(), false);
    return example;
  }

  void append_eos(Example& example, const std::string& where) const {
    if (tokenizer_.eos_id() < 0)
      fail(
          "{}: {} does not say which token ends a sequence; put eos_token into the "
          "tokenizer_config.json beside it",
          where, tokenizer_.path());
    append(example, {tokenizer_.eos_id()}, true);
  }

  Example pair(const json& line, const std::string& where) const {
    Example example = begin();
    append(example, tokenizer_.encode(text_of(line, "prompt", where)), !options_.completion_only);
    append(example, tokenizer_.encode(text_of(line, "completion", where)), true);
    append_eos(example, where);
    return example;
  }

  Example plain(const json& line, const std::string& where) const {
    Example example = begin();
    append(example, tokenizer_.encode(text_of(line, "text", where)), true);
    append_eos(example, where);
    return example;
  }

  /// <|im_start|>role\ncontent<|im_end|>\n for each message.
  Example chat(const json& messages, const std::string& where) const {
    const int32_t start = tokenizer_.token_id("<|im_start|>"),
                  end = tokenizer_.token_id("<|im_end|>");
    if (start < 0 || end < 0)
      fail(
          "{}: messages are rendered as ChatML, but {} has no <|im_start|> and <|im_end|>; render "
          "them as prompt and completion",
          where, tokenizer_.path());
    if (!messages.is_array() || messages.empty())
      fail("{}: \"messages\" must be a list of objects with role and content", where);
    Example example;
    const bool all = !options_.completion_only;
    for (const json& message : messages) {
      if (!message.is_object())
        fail("{}: a message must be an object with role and content", where);
      const std::string role = text_of(message, "role", where);
      if (role != "system" && role != "user" && role != "assistant" && role != "tool")
        fail("{}: role \"{}\" is unknown; system, user, assistant and tool are known", where, role);
      const bool answer = role == "assistant", trained = all || answer;
      std::string heading = role + "\n", content = text_of(message, "content", where);
      // Tokens may span both, as in the whole text; an answer begins where generation begins.
      if (!answer) heading += std::exchange(content, "");
      append(example, {start}, all);
      append(example, tokenizer_.encode(heading), all);
      append(example, tokenizer_.encode(content), trained);
      append(example, {end}, trained);
      append(example, tokenizer_.encode("\n"), all);
    }
    return example;
  }

  std::vector<int32_t> ids_of(const json& line, const char* key, bool labels,
                              const std::string& where) const {
    const json& list = line[key];
    if (!list.is_array()) fail("{}: \"{}\" must be a list of integers", where, key);
    std::vector<int32_t> ids;
    ids.reserve(list.size());
    for (const json& item : list) {
      if (!item.is_number_integer()) fail("{}: \"{}\" must be a list of integers", where, key);
      const auto id = item.get<int64_t>();
      const bool masked = labels && id == not_trained;
      if (!masked && (id < 0 || id >= tokenizer_.vocab_size()))
        fail("{}: \"{}\" holds {}, the vocabulary has ids 0 to {}{}", where, key, id,
             tokenizer_.vocab_size() - 1, labels ? " (and -100 marks what is not trained)" : "");
      ids.push_back(static_cast<int32_t>(id));
    }
    return ids;
  }

  Example tokenized(const json& line, const std::string& where) const {
    Example example{ids_of(line, "input_ids", false, where), ids_of(line, "labels", true, where)};
    if (example.input_ids.size() != example.labels.size())
      fail("{}: {} input_ids, but {} labels; they must be aligned", where, example.input_ids.size(),
           example.labels.size());
    return example;
  }

  const Tokenizer& tokenizer_;
  const DatasetOptions& options_;
};

/// Position 0 has nothing before it to be predicted from.
int64_t trained_count(const Example& example) {
  if (example.labels.empty()) return 0;
  return std::count_if(example.labels.begin() + 1, example.labels.end(),
                       [](int32_t label) { return label != not_trained; });
}

void add_example(Dataset& dataset, Example example, int64_t seq_len) {
  const auto limit = static_cast<size_t>(seq_len);
  if (example.input_ids.size() > limit) {
    example.input_ids.resize(limit);
    example.labels.resize(limit);
    ++dataset.truncated;
  }
  const int64_t trained = trained_count(example);
  if (trained == 0) {
    ++dataset.dropped;
    return;
  }
  dataset.trained_tokens += trained;
  dataset.tokens += static_cast<int64_t>(example.input_ids.size());
  dataset.examples.push_back(std::move(example));
}

bool blank(std::string_view line) {
  return line.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

}  // namespace

Dataset load_dataset(const std::string& path, const Tokenizer& tokenizer,
                     const DatasetOptions& options) {
  QLAB_CHECK(options.seq_len >= 2, "data.seq_len must be at least 2, got {}", options.seq_len);
  if (options.chat_template != "chatml")
    fail("the chat template \"{}\" is not supported; chatml is", options.chat_template);
  const MappedFile file(path);
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.size());
  LineReader reader(tokenizer, options);
  Dataset dataset;
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (blank(line)) continue;
    if (options.between_examples) options.between_examples();
    const std::string where = fmt::format("{}:{}", path, number);
    ++dataset.lines;
    add_example(dataset, reader.read(parse_json(line, where), where), options.seq_len);
  }
  if (dataset.lines == 0) fail("{}: holds no example", path);
  if (dataset.examples.empty())
    fail("{}: {} a token to train within seq_len {}: {}", path,
         dataset.lines == 1 ? "its one example does not have"
                            : fmt::format("none of its {} examples has", dataset.lines),
         options.seq_len,
         dataset.truncated > 0
             ? "raise data.seq_len, or data.eval_seq_len for data.eval"
             : "give each a completion, a message of the assistant, or labels other than -100");
  // The tokens besides the bytes: a tokenizer that was edited gives other numbers.
  Fingerprint fingerprint;
  fingerprint.add(file.bytes());
  for (const Example& e : dataset.examples)
    fingerprint.add(std::as_bytes(std::span(e.input_ids))).add(std::as_bytes(std::span(e.labels)));
  dataset.fingerprint = fingerprint.hex();
  return dataset;
}

bool holds_text(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line) && blank(line)) {
  }
  const json first = json::parse(line, nullptr, false);
  return first.is_object() && !is_tokenized(first);
}

Dataset synthetic_dataset(int64_t examples, int64_t seq_len, int64_t vocab_size, uint64_t seed) {
  QLAB_CHECK(
      examples > 0 && seq_len >= 2 && vocab_size > 0,
      "synthetic data needs examples, at least two tokens each, and a vocabulary; got {}, {} "
      "and {}",
      examples, seq_len, vocab_size);
  const uint64_t key = stream_key(seed, "synthetic data");
  Dataset dataset;
  for (int64_t e = 0; e < examples; ++e) {
    Example example;
    for (int64_t i = 0; i < seq_len; ++i) {
      const Philox r = philox(key, static_cast<uint32_t>(e), static_cast<uint32_t>(i), 0, 0);
      const uint64_t scaled = static_cast<uint64_t>(r.lane[0]) * static_cast<uint64_t>(vocab_size);
      example.input_ids.push_back(static_cast<int32_t>(scaled >> 32));
    }
    example.labels = example.input_ids;
    add_example(dataset, std::move(example), seq_len);
  }
  dataset.lines = examples;
  dataset.fingerprint = fmt::format("synthetic-{}x{}-{}-{}", examples, seq_len, vocab_size, seed);
  return dataset;
}

}  // namespace qlab
