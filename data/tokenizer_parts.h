// What a Tokenizer is made of, and what its two loaders fill in.
#pragma once
#include <string>
#include <vector>

#include "data/added_tokens.h"
#include "data/bpe.h"
#include "data/pre_tokenizer.h"
#include "data/tokenizer.h"

namespace qlab {

struct Tokenizer::Parts {
  std::string path;
  Vocabulary vocabulary;
  std::vector<bool> special;          // by id
  AddedTokenFinder raw_added;         // looked for in the text as it is
  AddedTokenFinder normalized_added;  // looked for after normalization
  bool nfc = false;
  PreTokenizer pre_tokenizer;
  Bpe model;
  std::vector<int32_t> prefix, suffix;  // of the post-processor's template
  int32_t bos = -1, eos = -1;
  std::vector<int32_t> stop;
  int64_t vocab_size = 0;
  bool has_text = true;
};

struct TokenizerBuilder {
  static Tokenizer from_json(const std::string& path);
  static Tokenizer from_gguf(const std::string& path);
  /// Enters added tokens into the vocabulary and the finders.
  static void set_added_tokens(Tokenizer::Parts& parts, const std::vector<AddedToken>& tokens);
  static Tokenizer finish(Tokenizer::Parts parts);
};

}  // namespace qlab
