#include "core/error.h"
#include "data/pre_tokenizer.h"

#ifdef QLAB_WITH_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace qlab {

Regex::Regex(const std::string& expression, const std::string& where) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF, &error, &offset, nullptr);
  if (code == nullptr) {
    PCRE2_UCHAR message[256] = {};
    pcre2_get_error_message(error, message, sizeof(message));
    fail("{}: regular expression {}: {} at character {}", where, expression,
         reinterpret_cast<const char*>(message), offset);
  }
  code_ =
      std::shared_ptr<void>(code, [](void* p) { pcre2_code_free(static_cast<pcre2_code*>(p)); });
}

bool Regex::find(std::string_view text, size_t position, size_t& begin, size_t& end) const {
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const std::shared_ptr<pcre2_match_data> match(pcre2_match_data_create_from_pattern(code, nullptr),
                                                pcre2_match_data_free);
  const int count = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                position, PCRE2_NOTEMPTY, match.get(), nullptr);
  if (count == PCRE2_ERROR_NOMATCH) return false;
  if (count < 0) fail("a tokenizer's regular expression failed with PCRE2 error {}", count);
  const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
  begin = range[0];
  end = range[1];
  return true;
}

}  // namespace qlab

#else

namespace qlab {

Regex::Regex(const std::string& expression, const std::string& where) {
  fail(
      "{}: the tokenizer's regular expression needs PCRE2: install the package libpcre2-dev and "
      "configure the build again.\n  {}",
      where, expression);
}

bool Regex::find(std::string_view, size_t, size_t&, size_t&) const { return false; }

}  // namespace qlab

#endif
