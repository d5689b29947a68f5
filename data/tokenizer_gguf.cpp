// A Tokenizer from the metadata of a GGUF file.
#include "core/error.h"
#include "data/gguf.h"
#include "data/tokenizer_parts.h"

namespace qlab {
namespace {

using nlohmann::json;

/// What a name in tokenizer.ggml.pre stands for. The file does not hold normalizer and expressions.
struct Family {
  json pre_tokenizer;
  bool nfc = false, ignore_merges = false, add_bos = false;
};

Family family_of(const std::string& name, const std::string& path) {
  const json words = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  const auto split = [](const char* expression) {
    return json{{"type", "Split"},
                {"pattern", {{"Regex", expression}}},
                {"behavior", "Isolated"},
                {"invert", false}};
  };
  Family family;
  if (name == "smollm") {
    const json digits = {{"type", "Digits"}, {"individual_digits", true}};
    family.pre_tokenizer = {{"type", "Sequence"}, {"pretokenizers", {digits, words}}};
  } else if (name == "llama-bpe") {
    family.pre_tokenizer = split(llama3_expression);
    family.ignore_merges = family.add_bos = true;
  } else if (name == "qwen2") {
    family.pre_tokenizer = split(qwen2_expression);
    family.nfc = true;
  } else if (name == "gpt-2" || name == "default") {
    family.pre_tokenizer = words;
  } else {
    fail(
        "{}: the tokenizer family \"{}\" (tokenizer.ggml.pre) is not supported; smollm, llama-bpe, "
        "qwen2, gpt-2 and default are",
        path, name);
  }
  return family;
}

std::vector<Bpe::Merge> split_merges(const std::vector<std::string>& merges,
                                     const std::string& path) {
  std::vector<Bpe::Merge> result;
  result.reserve(merges.size());
  for (const std::string& merge : merges) {
    const size_t space = merge.find(' ', 1);
    if (space == std::string::npos) fail("{}: merge \"{}\" is not a pair", path, merge);
    result.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  return result;
}

/// Control tokens are special, user-defined ones are added but ordinary.
std::vector<AddedToken> added_tokens(const std::vector<std::string>& tokens,
                                     const std::vector<int32_t>& types) {
  constexpr int32_t control = 3, user_defined = 4;
  std::vector<AddedToken> result;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (types[i] != control && types[i] != user_defined) continue;
    AddedToken token;
    token.id = static_cast<int32_t>(i);
    token.content = tokens[i];
    token.special = types[i] == control;
    result.push_back(token);
  }
  return result;
}

}  // namespace

Tokenizer TokenizerBuilder::from_gguf(const std::string& path) {
  const GgufFile file(path);
  const auto model = file.get<std::string>("tokenizer.ggml.model");
  if (model != "gpt2")
    fail(
        "{}: the tokenizer \"{}\" (tokenizer.ggml.model) is not supported; byte-level BPE (gpt2) "
        "is",
        path, model);
  const Family family =
      family_of(file.get<std::string>("tokenizer.ggml.pre", std::string("default")), path);
  Tokenizer::Parts parts;
  parts.path = path;
  parts.nfc = family.nfc;
  parts.pre_tokenizer = PreTokenizer(family.pre_tokenizer, path);

  const auto tokens = file.get<std::vector<std::string>>("tokenizer.ggml.tokens");
  const auto types = file.get<std::vector<int32_t>>("tokenizer.ggml.token_type",
                                                    std::vector<int32_t>(tokens.size(), 1));
  if (types.size() != tokens.size())
    fail("{}: {} tokens, but {} token types", path, tokens.size(), types.size());
  for (size_t i = 0; i < tokens.size(); ++i)
    parts.vocabulary.add(tokens[i], static_cast<int64_t>(i), path);
  const auto merges =
      split_merges(file.get<std::vector<std::string>>("tokenizer.ggml.merges"), path);
  parts.model = Bpe(parts.vocabulary, merges, {.ignore_merges = family.ignore_merges}, path);
  set_added_tokens(parts, added_tokens(tokens, types));

  parts.bos = file.get<int32_t>("tokenizer.ggml.bos_token_id", -1);
  parts.eos = file.get<int32_t>("tokenizer.ggml.eos_token_id", -1);
  if (parts.eos >= 0) parts.stop = {parts.eos};
  for (const char* key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"})
    if (const auto id = file.get<int32_t>(key, -1); id >= 0 && id != parts.eos)
      parts.stop.push_back(id);
  if (parts.bos >= 0 && file.get<bool>("tokenizer.ggml.add_bos_token", family.add_bos))
    parts.prefix = {parts.bos};
  if (parts.eos >= 0 && file.get<bool>("tokenizer.ggml.add_eos_token", false))
    parts.suffix = {parts.eos};
  return finish(std::move(parts));
}

}  // namespace qlab
