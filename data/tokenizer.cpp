#include "data/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "core/error.h"
#include "data/checkpoint.h"
#include "data/tokenizer_parts.h"
#include "data/unicode.h"

namespace qlab {

void TokenizerBuilder::set_added_tokens(Tokenizer::Parts& parts,
                                        const std::vector<AddedToken>& tokens) {
  for (const AddedToken& token : tokens) parts.vocabulary.add(token.content, token.id, parts.path);
  parts.special.resize(static_cast<size_t>(parts.vocabulary.size()));
  for (AddedToken token : tokens) {
    if (token.special) parts.special[static_cast<size_t>(token.id)] = true;
    if (token.normalized && parts.nfc) token.content = unicode::nfc(token.content);
    (token.normalized ? parts.normalized_added : parts.raw_added).add(token);
  }
}

Tokenizer TokenizerBuilder::finish(Tokenizer::Parts parts) {
  parts.vocab_size = parts.vocabulary.size();
  parts.special.resize(static_cast<size_t>(parts.vocab_size));
  for (const int32_t id : parts.stop)
    if (id < 0) fail("{}: an end-of-sequence id is negative", parts.path);
  return Tokenizer(std::make_shared<const Tokenizer::Parts>(std::move(parts)));
}

Tokenizer::Tokenizer(std::shared_ptr<const Parts> parts) : parts_(std::move(parts)) {}

Tokenizer Tokenizer::from_file(const std::string& tokenizer_json) {
  return TokenizerBuilder::from_json(tokenizer_json);
}

Tokenizer Tokenizer::load(const std::string& model_path) {
  namespace fs = std::filesystem;
  const std::string path = resolve_model_path(model_path);
  if (is_gguf_path(path)) return TokenizerBuilder::from_gguf(path);
  if (!fs::is_directory(path)) return from_file(path);
  const fs::path file = fs::path(path) / "tokenizer.json";
  if (fs::exists(file)) return from_file(file.string());
  if (fs::exists(fs::path(path) / "tokenizer.model"))
    fail(
        "{}: has only a sentencepiece tokenizer.model, which is not supported; convert it to "
        "tokenizer.json",
        path);
  fail("{}: there is no tokenizer.json; {}", path, fetch_remedy(path));
}

Tokenizer Tokenizer::without_text(int64_t vocab_size) {
  Parts parts;
  parts.path = "no tokenizer";
  parts.vocab_size = vocab_size;
  parts.has_text = false;
  return Tokenizer(std::make_shared<const Parts>(std::move(parts)));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const Parts& p = *parts_;
  if (!p.has_text)
    fail(
        "this model has no tokenizer: only tokenized data ({{\"input_ids\", \"labels\"}}) can be "
        "used with it");
  std::vector<int32_t> ids;
  if (add_special_tokens) ids = p.prefix;
  for (const auto& [raw, raw_id] : p.raw_added.split(text)) {
    if (raw_id >= 0) {
      ids.push_back(raw_id);
      continue;
    }
    const std::string normal = p.nfc ? unicode::nfc(raw) : std::string(raw);
    for (const auto& [part, id] : p.normalized_added.split(normal)) {
      if (id >= 0) {
        ids.push_back(id);
        continue;
      }
      for (const std::string_view piece : p.pre_tokenizer.split(part))
        p.model.encode(piece, p.vocabulary, ids);
    }
  }
  if (add_special_tokens) ids.insert(ids.end(), p.suffix.begin(), p.suffix.end());
  return ids;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids)
    if (!skip_special_tokens || !is_special(id)) bytes += token_bytes(id);
  return unicode::replace_invalid(bytes);
}

std::string Tokenizer::token_bytes(int32_t id) const {
  if (id < 0 || id >= parts_->vocabulary.size()) return "";
  return token_to_bytes(parts_->vocabulary.token(id));
}

int32_t Tokenizer::token_id(std::string_view token) const { return parts_->vocabulary.find(token); }

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && static_cast<size_t>(id) < parts_->special.size() &&
         parts_->special[static_cast<size_t>(id)];
}

int32_t Tokenizer::bos_id() const { return parts_->bos; }
int32_t Tokenizer::eos_id() const { return parts_->eos; }
const std::vector<int32_t>& Tokenizer::stop_ids() const { return parts_->stop; }
const std::vector<int32_t>& Tokenizer::prefix_ids() const { return parts_->prefix; }
bool Tokenizer::has_text() const { return parts_->has_text; }
int64_t Tokenizer::vocab_size() const { return parts_->vocab_size; }
const std::string& Tokenizer::path() const { return parts_->path; }

}  // namespace qlab
