#include "data/pre_tokenizer.h"

#include <array>
#include <optional>

#include "core/error.h"
#include "data/unicode.h"

namespace qlab {
namespace {

using unicode::Character;
using unicode::is_letter;
using unicode::is_number;
using unicode::is_space;

/// [^\s\p{L}\p{N}]
bool is_other(uint32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c); }
bool is_newline(uint32_t c) { return c == '\r' || c == '\n'; }

/// Where a run of up to `limit` characters of a class ends.
template <class Class>
size_t skip(std::string_view text, size_t position, Class&& in_class, size_t limit = SIZE_MAX) {
  for (; position < text.size() && limit > 0; --limit) {
    const Character c = unicode::character_at(text, position);
    if (!in_class(c.code_point)) break;
    position += c.bytes;
  }
  return position;
}

/// The character at `position`; at the end of the text one that is in no class and no newline.
Character peek(std::string_view text, size_t position) {
  if (position < text.size()) return unicode::character_at(text, position);
  return {' ', 0};
}

/// \s+(?!\S)|\s+ : of a run before a word, the last character is left to the word.
size_t scan_spaces(std::string_view text, size_t position) {
  const size_t end = skip(text, position, is_space);
  if (end == text.size()) return end;
  const size_t last = unicode::previous_position(text, end);
  return last == position ? end : last;
}

/// 's|'t|'re|'ve|'m|'ll|'d : the end of the match, or 0.
size_t scan_contraction(std::string_view text, size_t position, bool any_case) {
  if (text[position] != '\'') return 0;
  const auto letter = [&](size_t p) -> std::pair<uint32_t, size_t> {
    const Character c = peek(text, p);
    if (!any_case) return {c.code_point, p + c.bytes};
    if (c.code_point >= 'A' && c.code_point <= 'Z') return {c.code_point + 32, p + c.bytes};
    constexpr uint32_t long_s = 0x17f;  // the only other character that folds to one of these
    return {c.code_point == long_s ? 's' : c.code_point, p + c.bytes};
  };
  const auto [first, after_first] = letter(position + 1);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return after_first;
  const auto [second, after_second] = letter(after_first);
  const bool two =
      ((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l');
  return two ? after_second : 0;
}

size_t scan_cased(std::string_view text, size_t position, size_t max_digits) {
  if (const size_t end = scan_contraction(text, position, true)) return end;
  const Character c = unicode::character_at(text, position);
  const size_t next = position + c.bytes;
  if (is_letter(c.code_point)) return skip(text, next, is_letter);
  if (is_number(c.code_point)) return skip(text, next, is_number, max_digits - 1);
  if (!is_newline(c.code_point) && is_letter(peek(text, next).code_point))
    return skip(text, next, is_letter);
  const size_t symbols = c.code_point == ' ' ? next : position;
  if (is_other(peek(text, symbols).code_point))
    return skip(text, skip(text, symbols, is_other), is_newline);
  const size_t end = skip(text, position, is_space);
  const size_t newline = text.substr(0, end).find_last_of("\r\n");
  if (newline != std::string_view::npos && newline >= position) return newline + 1;
  return scan_spaces(text, position);
}

size_t scan_digit(std::string_view text, size_t position) {
  const Character c = unicode::character_at(text, position);
  if (unicode::is_digit(c.code_point)) return position + c.bytes;
  return skip(text, position, [](uint32_t x) { return !unicode::is_digit(x); });
}

size_t scan_digits(std::string_view text, size_t position) {
  const bool digits = unicode::is_digit(unicode::character_at(text, position).code_point);
  return skip(text, position, [&](uint32_t x) { return unicode::is_digit(x) == digits; });
}

Scanner known_scanner(const std::string& expression) {
  if (expression == llama3_expression) return scan_llama3;
  if (expression == qwen2_expression) return scan_qwen2;
  if (expression == R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)")
    return scan_gpt2;
  return nullptr;
}

bool flag(const nlohmann::json& description, const char* key, bool otherwise) {
  const auto found = description.find(key);
  return found != description.end() && found->is_boolean() ? found->get<bool>() : otherwise;
}

std::string text_of(const nlohmann::json& description, const char* key) {
  const auto found = description.find(key);
  return found != description.end() && found->is_string() ? found->get<std::string>() : "";
}

}  // namespace

const char* const llama3_expression =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char* const qwen2_expression =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

size_t scan_gpt2(std::string_view text, size_t position) {
  if (const size_t end = scan_contraction(text, position, false)) return end;
  const size_t begin = text[position] == ' ' ? position + 1 : position;
  const uint32_t c = peek(text, begin).code_point;
  if (is_letter(c)) return skip(text, begin, is_letter);
  if (is_number(c)) return skip(text, begin, is_number);
  if (is_other(c)) return skip(text, begin, is_other);
  return scan_spaces(text, position);
}

size_t scan_llama3(std::string_view text, size_t position) { return scan_cased(text, position, 3); }
size_t scan_qwen2(std::string_view text, size_t position) { return scan_cased(text, position, 1); }

PreTokenizer::PreTokenizer(const nlohmann::json& description, const std::string& where) {
  if (!description.is_null()) add(description, where);
}

void PreTokenizer::add(const nlohmann::json& description, const std::string& where) {
  if (!description.is_object()) fail("{}: pre_tokenizer must be an object", where);
  const std::string type = text_of(description, "type");
  if (type == "Sequence") {
    if (!description.contains("pretokenizers") || !description["pretokenizers"].is_array())
      fail("{}: the pre_tokenizer Sequence needs a list pretokenizers", where);
    for (const auto& part : description["pretokenizers"]) add(part, where);
  } else if (type == "ByteLevel") {
    if (flag(description, "add_prefix_space", true))
      fail("{}: the ByteLevel pre_tokenizer with add_prefix_space is not supported", where);
    if (flag(description, "use_regex", true)) steps_.push_back({scan_gpt2, nullptr, true});
  } else if (type == "Digits") {
    const bool individual = flag(description, "individual_digits", false);
    steps_.push_back({individual ? scan_digit : scan_digits, nullptr, true});
  } else if (type == "Split") {
    add_split(description, where);
  } else {
    fail(
        "{}: the pre_tokenizer \"{}\" is not supported (ByteLevel, Digits, Split and Sequence are)",
        where, type);
  }
}

void PreTokenizer::add_split(const nlohmann::json& description, const std::string& where) {
  const nlohmann::json pattern = description.value("pattern", nlohmann::json());
  const std::string expression = pattern.is_object() ? text_of(pattern, "Regex") : "";
  if (expression.empty())
    fail("{}: the Split pre_tokenizer is supported with a Regex pattern only", where);
  const std::string behavior = text_of(description, "behavior");
  const bool invert = flag(description, "invert", false);
  const bool isolated = behavior == "Isolated" && !invert,
             matches = behavior == "Removed" && invert;
  if (!isolated && !matches)
    fail("{}: the Split pre_tokenizer with behavior \"{}\"{} is not supported", where, behavior,
         invert ? " and invert" : "");
  const Scanner scanner = known_scanner(expression);
  steps_.push_back(
      {scanner, scanner ? nullptr : std::make_shared<Regex>(expression, where), isolated});
}

void PreTokenizer::apply(const Step& step, std::string_view text,
                         std::vector<std::string_view>& pieces) {
  for (size_t position = 0; position < text.size();) {
    size_t begin = position, end = text.size();
    if (step.scanner != nullptr) {
      end = step.scanner(text, position);
    } else if (!step.regex->find(text, position, begin, end)) {
      begin = end;
    }
    if (begin > position && step.keep_gaps)
      pieces.push_back(text.substr(position, begin - position));
    if (end > begin) pieces.push_back(text.substr(begin, end - begin));
    position = end;
  }
}

std::vector<std::string_view> PreTokenizer::split(std::string_view text) const {
  std::vector<std::string_view> pieces = {text}, next;
  for (const Step& step : steps_) {
    next.clear();
    for (const std::string_view piece : pieces) apply(step, piece, next);
    pieces.swap(next);
  }
  return pieces;
}

}  // namespace qlab
