#include "data/added_tokens.h"

#include <algorithm>

#include "data/unicode.h"

namespace qlab {
namespace {

bool word_before(std::string_view text, size_t position) {
  if (position == 0) return false;
  const size_t previous = unicode::previous_position(text, position);
  return unicode::is_word(unicode::character_at(text, previous).code_point);
}

bool word_at(std::string_view text, size_t position) {
  return position < text.size() &&
         unicode::is_word(unicode::character_at(text, position).code_point);
}

size_t spaces_begin(std::string_view text, size_t position, size_t limit) {
  while (position > limit) {
    const size_t previous = unicode::previous_position(text, position);
    if (!unicode::is_space(unicode::character_at(text, previous).code_point)) break;
    position = previous;
  }
  return std::max(position, limit);
}

size_t spaces_end(std::string_view text, size_t position) {
  while (position < text.size()) {
    const unicode::Character c = unicode::character_at(text, position);
    if (!unicode::is_space(c.code_point)) break;
    position += c.bytes;
  }
  return position;
}

}  // namespace

void AddedTokenFinder::add(const AddedToken& token) {
  if (token.content.empty()) return;
  auto& bucket = by_first_byte_[static_cast<uint8_t>(token.content[0])];
  bucket.push_back(token);
  std::stable_sort(bucket.begin(), bucket.end(), [](const AddedToken& a, const AddedToken& b) {
    return a.content.size() > b.content.size();
  });
}

const AddedToken* AddedTokenFinder::longest_at(std::string_view text, size_t position) const {
  for (const AddedToken& token : by_first_byte_[static_cast<uint8_t>(text[position])])
    if (text.substr(position).starts_with(token.content)) return &token;
  return nullptr;
}

std::vector<AddedTokenFinder::Piece> AddedTokenFinder::split(std::string_view text) const {
  std::vector<Piece> pieces;
  size_t done = 0;  // up to here the text is in pieces
  for (size_t position = 0; position < text.size();) {
    const AddedToken* token = longest_at(text, position);
    if (token == nullptr) {
      ++position;
      continue;
    }
    size_t begin = position, end = position + token->content.size();
    position = end;
    if (token->single_word && (word_before(text, begin) || word_at(text, end))) continue;
    if (token->lstrip) begin = spaces_begin(text, begin, done);
    if (token->rstrip) end = spaces_end(text, end);
    if (begin < done) continue;  // the one before took it along
    if (begin > done) pieces.push_back({text.substr(done, begin - done), -1});
    pieces.push_back({text.substr(begin, end - begin), token->id});
    done = end;
  }
  if (done < text.size()) pieces.push_back({text.substr(done), -1});
  return pieces;
}

}  // namespace qlab
