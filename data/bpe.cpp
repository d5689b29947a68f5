#include "data/bpe.h"

#include <algorithm>
#include <queue>
#include <tuple>

#include "core/error.h"
#include "data/unicode.h"

namespace qlab {
namespace {

struct ByteAlphabet {
  std::array<std::string, 256> character;
  std::array<int, 0x144> byte;  // by code point, -1 where there is none

  ByteAlphabet() {
    byte.fill(-1);
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      const uint32_t code_point = itself ? b : next++;
      unicode::append_utf8(character[b], code_point);
      byte[code_point] = static_cast<int>(b);
    }
  }
};

const ByteAlphabet& alphabet() {
  static const ByteAlphabet instance;
  return instance;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

void Vocabulary::add(const std::string& token, int64_t id, const std::string& where) {
  constexpr int64_t max_id = 1 << 24;
  if (id < 0 || id > max_id) fail("{}: token \"{}\" has the impossible id {}", where, token, id);
  if (id >= size()) tokens_.resize(static_cast<size_t>(id) + 1);
  std::string& slot = tokens_[static_cast<size_t>(id)];
  if (!slot.empty() && slot != token)
    fail("{}: id {} is given to \"{}\" and to \"{}\"", where, id, slot, token);
  slot = token;
  ids_[token] = static_cast<int32_t>(id);
}

int32_t Vocabulary::find(std::string_view token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? -1 : found->second;
}

const std::string& byte_character(uint8_t byte) { return alphabet().character[byte]; }

std::string token_to_bytes(const std::string& token) {
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const unicode::Character c = unicode::character_at(token, i);
    if (c.code_point >= alphabet().byte.size() || alphabet().byte[c.code_point] < 0) return token;
    bytes.push_back(static_cast<char>(alphabet().byte[c.code_point]));
    i += c.bytes;
  }
  return bytes;
}

Bpe::Bpe(const Vocabulary& vocabulary, const std::vector<Merge>& merges, const Options& options,
         const std::string& where)
    : options_(options) {
  for (int b = 0; b < 256; ++b)
    byte_ids_[static_cast<size_t>(b)] = vocabulary.find(byte_character(static_cast<uint8_t>(b)));
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const int32_t left_id = vocabulary.find(left), right_id = vocabulary.find(right);
    const int32_t id = vocabulary.find(left + right);
    if (left_id < 0 || right_id < 0 || id < 0)
      fail("{}: merge {} (\"{}\" with \"{}\") is of tokens that are not in the vocabulary", where,
           rank, left, right);
    merges_[pair_key(left_id, right_id)] = {static_cast<int32_t>(rank), id};
  }
}

const Bpe::Target* Bpe::find_merge(int32_t left, int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(std::string_view piece, const Vocabulary& vocabulary,
                 std::vector<int32_t>& ids) const {
  if (options_.ignore_merges) {
    std::string token;
    for (const char c : piece) token += byte_character(static_cast<uint8_t>(c));
    if (const int32_t id = vocabulary.find(token); id >= 0) {
      ids.push_back(id);
      return;
    }
  }

  struct Symbol {
    int32_t id, previous, next;  // id is -1 once it has merged into the one before
  };
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (const char c : piece) {
    int32_t id = byte_ids_[static_cast<uint8_t>(c)];
    if (id < 0) id = options_.unknown_id;
    if (id < 0) continue;
    const bool unknown = byte_ids_[static_cast<uint8_t>(c)] < 0;
    if (unknown && options_.fuse_unknown && !symbols.empty() && symbols.back().id == id) continue;
    const auto index = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, index - 1, index + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  struct Candidate {
    int32_t rank, position, id;
    bool operator>(const Candidate& other) const {
      return std::tie(rank, position) > std::tie(other.rank, other.position);
    }
  };
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](int32_t left) {
    if (left < 0 || symbols[static_cast<size_t>(left)].next < 0) return;
    const Symbol& a = symbols[static_cast<size_t>(left)];
    const Target* target = find_merge(a.id, symbols[static_cast<size_t>(a.next)].id);
    if (target != nullptr) queue.push({target->rank, left, target->id});
  };
  for (size_t i = 0; i < symbols.size(); ++i) offer(static_cast<int32_t>(i));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(best.position)];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    const Target* target = find_merge(left.id, right.id);
    if (target == nullptr || target->id != best.id) continue;
    left.id = best.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.position;
    offer(left.previous);
    offer(best.position);
  }
  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next)
    ids.push_back(symbols[static_cast<size_t>(i)].id);
}

}  // namespace qlab
