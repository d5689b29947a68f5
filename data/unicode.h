// What a tokenizer needs of Unicode: UTF-8, character classes, and normalization form C.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace qlab::unicode {

/// A character of UTF-8 text. A byte that is not UTF-8 is a character of its own, with a value
/// beyond Unicode that belongs to no class.
struct Character {
  uint32_t code_point;
  uint32_t bytes;
};
/// The character at `text[position]`, which must exist.
Character character_at(std::string_view text, size_t position);
/// Where the character that ends before `position` begins; position must be > 0.
size_t previous_position(std::string_view text, size_t position);
void append_utf8(std::string& text, uint32_t code_point);
/// Invalid sequences become U+FFFD, one for each maximal part of a character.
std::string replace_invalid(std::string_view bytes);

bool is_letter(uint32_t code_point);  // \p{L}
bool is_number(uint32_t code_point);  // \p{N}
bool is_space(uint32_t code_point);   // \s
bool is_digit(uint32_t code_point);   // what the Digits pre-tokenizer splits off
bool is_word(uint32_t code_point);    // \w, which ends where a single_word token may begin

/// Normalization form C. Text that is ASCII comes back as it is.
std::string nfc(std::string_view text);

}  // namespace qlab::unicode
