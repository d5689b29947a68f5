#include "data/unicode.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "data/unicode_tables.h"

namespace qlab::unicode {
namespace {

constexpr uint32_t not_unicode = 0x110000;
constexpr uint32_t replacement = 0xfffd;

/// The last row whose first column is <= value, or null.
template <class Row>
const Row* row_before(const Table<Row>& table, uint32_t value, uint32_t Row::*column) {
  const Row* next = std::upper_bound(table.begin(), table.end(), value,
                                     [&](uint32_t v, const Row& row) { return v < row.*column; });
  return next == table.begin() ? nullptr : next - 1;
}

bool contains(const Table<Range>& table, uint32_t code_point) {
  const Range* row = row_before(table, code_point, &Range::first);
  return row != nullptr && code_point <= row->last;
}

/// The range that the second byte of a sequence must be in (Unicode, table 3-7), and its length.
struct Lead {
  uint32_t length;
  uint8_t low, high;
};
Lead lead_of(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xc2) return {0, 0, 0};
  if (byte < 0xe0) return {2, 0x80, 0xbf};
  if (byte < 0xf0)
    return {3, uint8_t(byte == 0xe0 ? 0xa0 : 0x80), uint8_t(byte == 0xed ? 0x9f : 0xbf)};
  if (byte < 0xf5)
    return {4, uint8_t(byte == 0xf0 ? 0x90 : 0x80), uint8_t(byte == 0xf4 ? 0x8f : 0xbf)};
  return {0, 0, 0};
}

/// How many bytes at `position` are part of a valid sequence, and whether it is complete.
struct Prefix {
  uint32_t bytes;
  bool complete;
};
Prefix valid_prefix(std::string_view text, size_t position) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[position + i]); };
  const Lead lead = lead_of(byte(0));
  if (lead.length == 0) return {1, false};
  for (uint32_t i = 1; i < lead.length; ++i) {
    const uint8_t low = i == 1 ? lead.low : 0x80, high = i == 1 ? lead.high : 0xbf;
    if (position + i >= text.size() || byte(i) < low || byte(i) > high) return {i, false};
  }
  return {lead.length, true};
}

// Hangul syllables are composed by arithmetic (Unicode, section 3.12).
constexpr uint32_t hangul_base = 0xac00, lead_base = 0x1100, vowel_base = 0x1161,
                   tail_base = 0x11a7;
constexpr uint32_t lead_count = 19, vowel_count = 21, tail_count = 28;
constexpr uint32_t syllable_count = lead_count * vowel_count * tail_count;

uint8_t combining_class(uint32_t code_point) {
  const CombiningRange* row = row_before(combining_classes, code_point, &CombiningRange::first);
  return row != nullptr && code_point <= row->last ? row->combining_class : 0;
}

void append_decomposed(std::vector<uint32_t>& out, uint32_t c) {
  if (c >= hangul_base && c < hangul_base + syllable_count) {
    const uint32_t s = c - hangul_base;
    out.push_back(lead_base + s / (vowel_count * tail_count));
    out.push_back(vowel_base + s / tail_count % vowel_count);
    if (s % tail_count != 0) out.push_back(tail_base + s % tail_count);
    return;
  }
  const Decomposition* row = row_before(decompositions, c, &Decomposition::composed);
  if (row == nullptr || row->composed != c) {
    out.push_back(c);
    return;
  }
  append_decomposed(out, row->first);
  if (row->second != 0) append_decomposed(out, row->second);
}

uint64_t pair_key(uint32_t first, uint32_t second) {
  return static_cast<uint64_t>(first) << 32 | second;
}

/// The composition of two characters, or 0.
uint32_t compose(uint32_t first, uint32_t second) {
  static const std::unordered_map<uint64_t, uint32_t> pairs = [] {
    std::unordered_map<uint64_t, uint32_t> result;
    for (const Decomposition& row : decompositions)
      if (row.composes) result[pair_key(row.first, row.second)] = row.composed;
    return result;
  }();
  if (first >= lead_base && first < lead_base + lead_count && second >= vowel_base &&
      second < vowel_base + vowel_count)
    return hangul_base + ((first - lead_base) * vowel_count + (second - vowel_base)) * tail_count;
  if (first >= hangul_base && first < hangul_base + syllable_count &&
      (first - hangul_base) % tail_count == 0 && second > tail_base &&
      second < tail_base + tail_count)
    return first + (second - tail_base);
  const auto found = pairs.find(pair_key(first, second));
  return found == pairs.end() ? 0 : found->second;
}

/// Unicode, section 3.11: each mark joins the last starter unless a mark of its class or a higher
/// one stands between them.
void compose_in_place(std::vector<uint32_t>& text) {
  size_t out = 0, starter = 0;
  bool has_starter = false;
  uint8_t last_class = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const uint32_t c = text[i];
    const uint8_t ccc = combining_class(c);
    const bool adjacent = has_starter && out == starter + 1;
    if (has_starter && (adjacent || (last_class != 0 && last_class < ccc))) {
      if (const uint32_t composed = compose(text[starter], c); composed != 0) {
        text[starter] = composed;
        continue;
      }
    }
    if (ccc == 0) {
      has_starter = true;
      starter = out;
    }
    last_class = ccc;
    text[out++] = c;
  }
  text.resize(out);
}

}  // namespace

Character character_at(std::string_view text, size_t position) {
  const auto first = static_cast<uint8_t>(text[position]);
  if (first < 0x80) return {first, 1};
  const Prefix prefix = valid_prefix(text, position);
  if (!prefix.complete) return {not_unicode + first, 1};
  uint32_t code_point = first & (0x7fu >> prefix.bytes);
  for (uint32_t i = 1; i < prefix.bytes; ++i)
    code_point = code_point << 6 | (static_cast<uint8_t>(text[position + i]) & 0x3fu);
  return {code_point, prefix.bytes};
}

size_t previous_position(std::string_view text, size_t position) {
  for (size_t back = std::min<size_t>(4, position); back > 1; --back)
    if (character_at(text, position - back).bytes == back) return position - back;
  return position - 1;
}

void append_utf8(std::string& text, uint32_t c) {
  const auto put = [&](uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (c < 0x80) return put(c);
  if (c < 0x800) return put(0xc0 | c >> 6), put(0x80 | (c & 0x3f));
  if (c < 0x10000) return put(0xe0 | c >> 12), put(0x80 | (c >> 6 & 0x3f)), put(0x80 | (c & 0x3f));
  if (c >= not_unicode) return put(c - not_unicode);
  put(0xf0 | c >> 18), put(0x80 | (c >> 12 & 0x3f)), put(0x80 | (c >> 6 & 0x3f)),
      put(0x80 | (c & 0x3f));
}

std::string replace_invalid(std::string_view bytes) {
  std::string result;
  for (size_t i = 0; i < bytes.size();) {
    const Prefix prefix = valid_prefix(bytes, i);
    if (prefix.complete)
      result.append(bytes.substr(i, prefix.bytes));
    else
      append_utf8(result, replacement);
    i += prefix.bytes;
  }
  return result;
}

bool is_letter(uint32_t c) {
  if (c < 0x80) return (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
  return contains(letters, c);
}

bool is_number(uint32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  return contains(numbers, c);
}

bool is_space(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= '\t' && c <= '\r');
  return contains(spaces, c);
}

bool is_digit(uint32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  return contains(digits, c);
}

bool is_word(uint32_t c) { return contains(words, c); }

std::string nfc(std::string_view text) {
  const auto ascii = [](char c) { return static_cast<uint8_t>(c) < 0x80; };
  if (std::all_of(text.begin(), text.end(), ascii)) return std::string(text);
  std::vector<uint32_t> characters;
  for (size_t i = 0; i < text.size();) {
    const Character c = character_at(text, i);
    append_decomposed(characters, c.code_point);
    i += c.bytes;
  }
  for (auto begin = characters.begin(); begin != characters.end();) {
    if (combining_class(*begin) == 0) {
      ++begin;
      continue;
    }
    const auto end =
        std::find_if(begin, characters.end(), [](uint32_t c) { return combining_class(c) == 0; });
    std::stable_sort(
        begin, end, [](uint32_t a, uint32_t b) { return combining_class(a) < combining_class(b); });
    begin = end;
  }
  compose_in_place(characters);
  std::string result;
  for (const uint32_t c : characters) append_utf8(result, c);
  return result;
}

}  // namespace qlab::unicode
