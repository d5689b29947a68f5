// A Tokenizer from tokenizer.json and the files beside it.
#include <algorithm>
#include <filesystem>

#include "core/error.h"
#include "data/json.h"
#include "data/tokenizer_parts.h"

namespace qlab {
namespace {

using nlohmann::json;

const json& section(const json& object, const char* key) {
  static const json null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

bool flag(const json& object, const char* key) {
  const json& value = section(object, key);
  return value.is_boolean() && value.get<bool>();
}

std::string text(const json& object, const char* key, const std::string& where) {
  const json& value = section(object, key);
  if (!value.is_string()) fail("{}: \"{}\" must be a string", where, key);
  return value.get<std::string>();
}

int64_t integer(const json& value, const std::string& where, const char* what) {
  if (!value.is_number_integer()) fail("{}: {} must be an integer", where, what);
  return value.get<int64_t>();
}

bool reads_nfc(const json& normalizer, const std::string& where) {
  if (normalizer.is_null()) return false;
  const std::string type = text(normalizer, "type", where);
  if (type == "NFC") return true;
  if (type == "Sequence") {
    bool nfc = false;
    for (const json& part : section(normalizer, "normalizers")) nfc |= reads_nfc(part, where);
    return nfc;
  }
  fail("{}: the normalizer \"{}\" is not supported (NFC is)", where, type);
}

void check_decoder(const json& decoder, const std::string& where) {
  if (decoder.is_null()) return;
  const std::string type = text(decoder, "type", where);
  if (type != "ByteLevel")
    fail("{}: the decoder \"{}\" is not supported (ByteLevel is)", where, type);
}

std::vector<Bpe::Merge> read_merges(const json& merges, const std::string& where) {
  if (!merges.is_array()) fail("{}: model.merges must be a list", where);
  std::vector<Bpe::Merge> result;
  result.reserve(merges.size());
  for (const json& merge : merges) {
    if (merge.is_string()) {
      const auto& both = merge.get_ref<const std::string&>();
      const size_t space = both.find(' ');
      if (space == std::string::npos) fail("{}: merge \"{}\" is not a pair", where, both);
      result.emplace_back(both.substr(0, space), both.substr(space + 1));
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      result.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else {
      fail("{}: merge {} is not a pair of tokens", where, result.size());
    }
  }
  return result;
}

/// The ids around the text in {"type": "TemplateProcessing", "single": [...]}.
void read_template(const json& processor, std::vector<int32_t>& prefix,
                   std::vector<int32_t>& suffix, const std::string& where) {
  bool after_text = false;
  for (const json& item : section(processor, "single")) {
    if (item.contains("Sequence")) {
      after_text = true;
      continue;
    }
    const std::string name = text(section(item, "SpecialToken"), "id", where);
    const json& ids = section(section(section(processor, "special_tokens"), name.c_str()), "ids");
    if (!ids.is_array()) fail("{}: the post_processor does not say which ids {} has", where, name);
    for (const json& id : ids)
      (after_text ? suffix : prefix)
          .push_back(static_cast<int32_t>(integer(id, where, "a special token's id")));
  }
}

void read_post_processor(const json& processor, std::vector<int32_t>& prefix,
                         std::vector<int32_t>& suffix, const std::string& where) {
  if (processor.is_null()) return;
  const std::string type = text(processor, "type", where);
  if (type == "Sequence") {
    for (const json& part : section(processor, "processors"))
      read_post_processor(part, prefix, suffix, where);
  } else if (type == "TemplateProcessing") {
    read_template(processor, prefix, suffix, where);
  } else if (type != "ByteLevel") {  // ByteLevel changes offsets only
    fail("{}: the post_processor \"{}\" is not supported (TemplateProcessing is)", where, type);
  }
}

std::vector<AddedToken> read_added_tokens(const json& list, const std::string& where) {
  std::vector<AddedToken> result;
  for (const json& item : list) {
    AddedToken token;
    token.id = static_cast<int32_t>(integer(section(item, "id"), where, "an added token's id"));
    token.content = text(item, "content", where);
    token.single_word = flag(item, "single_word");
    token.lstrip = flag(item, "lstrip");
    token.rstrip = flag(item, "rstrip");
    token.normalized = flag(item, "normalized");
    token.special = flag(item, "special");
    result.push_back(token);
  }
  return result;
}

/// The id of "eos_token" or "bos_token" in tokenizer_config.json: a string, or an object with it.
int32_t named_token(const json& config, const char* key, const Vocabulary& vocabulary) {
  const json* value = &section(config, key);
  if (value->is_object()) value = &section(*value, "content");
  return value->is_string() ? vocabulary.find(value->get_ref<const std::string&>()) : -1;
}

void read_companions(const std::filesystem::path& folder, Tokenizer::Parts& parts) {
  const auto read = [&](const char* name) {
    const std::filesystem::path path = folder / name;
    return std::filesystem::exists(path) ? read_json_file(path.string()) : json::object();
  };
  const auto add_stop = [&](int64_t id) {
    const auto value = static_cast<int32_t>(id);
    if (std::find(parts.stop.begin(), parts.stop.end(), value) == parts.stop.end())
      parts.stop.push_back(value);
  };
  const json names = read("tokenizer_config.json");
  if (const int32_t eos = named_token(names, "eos_token", parts.vocabulary); eos >= 0)
    add_stop(eos);
  for (const char* file : {"generation_config.json", "config.json"}) {
    const json config = read(file);
    const json& eos = section(config, "eos_token_id");
    if (eos.is_number_integer()) add_stop(eos.get<int64_t>());
    if (eos.is_array())
      for (const json& id : eos) add_stop(integer(id, (folder / file).string(), "eos_token_id"));
    const json& bos = section(config, "bos_token_id");
    if (parts.bos < 0 && bos.is_number_integer()) parts.bos = static_cast<int32_t>(bos);
  }
  if (const int32_t bos = named_token(names, "bos_token", parts.vocabulary); bos >= 0)
    parts.bos = bos;
  if (!parts.stop.empty()) parts.eos = parts.stop.front();
}

void read_model(const json& model, Tokenizer::Parts& parts, const std::string& where) {
  if (!model.is_object()) fail("{}: has no model section: not a tokenizer.json", where);
  const json& type = section(model, "type");
  if (!type.is_null() && type != "BPE")
    fail("{}: the model {} is not supported (byte-level BPE is)", where, type.dump());
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (const json& value = section(model, key); value.is_string() && value != "")
      fail("{}: BPE with {} is not supported", where, key);
  if (const json& dropout = section(model, "dropout"); dropout.is_number() && dropout != 0.0)
    fail("{}: BPE with dropout is not supported", where);
  if (flag(model, "byte_fallback"))
    fail("{}: sentencepiece-style BPE (byte_fallback) is not supported, byte-level BPE is", where);
  const json& vocabulary = section(model, "vocab");
  if (!vocabulary.is_object()) fail("{}: model.vocab must be an object", where);
  for (const auto& [token, id] : vocabulary.items())
    parts.vocabulary.add(token, integer(id, where, "a token's id"), where);
  Bpe::Options options{.ignore_merges = flag(model, "ignore_merges"),
                       .unknown_id = -1,
                       .fuse_unknown = flag(model, "fuse_unk")};
  if (const json& unknown = section(model, "unk_token"); unknown.is_string())
    options.unknown_id = parts.vocabulary.find(unknown.get_ref<const std::string&>());
  parts.model = Bpe(parts.vocabulary, read_merges(section(model, "merges"), where), options, where);
}

}  // namespace

Tokenizer TokenizerBuilder::from_json(const std::string& path) {
  const json file = read_json_file(path);
  if (!file.is_object()) fail("{}: must be a JSON object", path);
  Tokenizer::Parts parts;
  parts.path = path;
  parts.nfc = reads_nfc(section(file, "normalizer"), path);
  check_decoder(section(file, "decoder"), path);
  read_model(section(file, "model"), parts, path);
  parts.pre_tokenizer = PreTokenizer(section(file, "pre_tokenizer"), path);
  read_post_processor(section(file, "post_processor"), parts.prefix, parts.suffix, path);
  set_added_tokens(parts, read_added_tokens(section(file, "added_tokens"), path));
  read_companions(std::filesystem::path(path).parent_path(), parts);
  return finish(std::move(parts));
}

}  // namespace qlab
