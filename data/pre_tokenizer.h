// Cuts text into the pieces inside which BPE merges. The three regular expressions that published
// byte-level tokenizers use are scanned by hand; any other needs PCRE2.
#pragma once
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace qlab {

/// The end of the match that begins at `position`; there always is one, and it is not empty.
using Scanner = size_t (*)(std::string_view text, size_t position);

// GPT-2:  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t scan_gpt2(std::string_view text, size_t position);
// Llama 3: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
// ?[^\s\p{L}\p{N}]+[\r\n]*
//          |\s*[\r\n]+|\s+(?!\S)|\s+
size_t scan_llama3(std::string_view text, size_t position);
// Qwen 2:  as Llama 3, with \p{N} in place of \p{N}{1,3}
size_t scan_qwen2(std::string_view text, size_t position);

/// The known expressions, for tokenizers that are not described by JSON.
extern const char* const llama3_expression;
extern const char* const qwen2_expression;

/// A compiled expression of PCRE2. Error naming the package to install in a build without it.
class Regex {
 public:
  Regex(const std::string& expression, const std::string& where);
  /// The first match at or after `position`; false when there is none.
  bool find(std::string_view text, size_t position, size_t& begin, size_t& end) const;

 private:
  std::shared_ptr<void> code_;
};

class PreTokenizer {
 public:
  PreTokenizer() = default;  // the whole text is one piece
  /// From the pre_tokenizer section of tokenizer.json; `where` opens error messages.
  PreTokenizer(const nlohmann::json& description, const std::string& where);
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct Step {
    Scanner scanner = nullptr;
    std::shared_ptr<Regex> regex;  // where there is no scanner
    bool keep_gaps = true;         // text between matches is a piece too
  };
  void add(const nlohmann::json& description, const std::string& where);
  void add_split(const nlohmann::json& description, const std::string& where);
  static void apply(const Step& step, std::string_view text, std::vector<std::string_view>& pieces);

  std::vector<Step> steps_;
};

}  // namespace qlab
