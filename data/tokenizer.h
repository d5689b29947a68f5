// Byte-level BPE, equal to the `tokenizers` library id for id: added tokens, normalizer,
// pre-tokenizer, merges, and the template that adds BOS or EOS. From tokenizer.json or GGUF
// metadata. Truncation and padding sections are ignored: a Dataset truncates, and nothing is
// padded.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace qlab {

class Tokenizer {
 public:
  /// tokenizer.json; EOS comes from the files beside it (tokenizer_config.json, config.json, ...).
  static Tokenizer from_file(const std::string& tokenizer_json);
  /// A model directory, a hub id in the local cache, FILE.gguf, or a tokenizer.json itself.
  static Tokenizer load(const std::string& model_path);
  /// Only for data that is tokenized already: knows the range of ids, refuses text.
  static Tokenizer without_text(int64_t vocab_size);

  /// Special tokens in the text are recognised. `add_special_tokens` applies the post-processor's
  /// template. Bytes that are not UTF-8 are kept, each as a symbol of its own.
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = false) const;
  /// Incomplete or invalid UTF-8 in the result becomes U+FFFD.
  std::string decode(const std::vector<int32_t>& ids, bool skip_special_tokens = true) const;
  /// The bytes a token stands for, for streaming: they may end inside a character.
  std::string token_bytes(int32_t id) const;

  int32_t token_id(std::string_view token) const;  // -1 when absent
  bool is_special(int32_t id) const;
  int32_t bos_id() const;  // -1 when none
  int32_t eos_id() const;  // -1 when none
  /// Every id at which generation ends; eos_id() is one of them.
  const std::vector<int32_t>& stop_ids() const;
  /// What the post-processor's template puts before a text, for example BOS.
  const std::vector<int32_t>& prefix_ids() const;
  bool has_text() const;       // false: without_text()
  int64_t vocab_size() const;  // the highest id plus one
  const std::string& path() const;

  struct Parts;  // data/tokenizer_parts.h

 private:
  friend struct TokenizerBuilder;
  explicit Tokenizer(std::shared_ptr<const Parts> parts);
  std::shared_ptr<const Parts> parts_;
};

}  // namespace qlab
