// Byte-pair encoding over the byte alphabet of GPT-2, in which each byte is one printable
// character.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace qlab {

/// Tokens by id and ids by token. An id without a token has the empty string.
class Vocabulary {
 public:
  /// Error opening with `where` when the id is taken by another token, or negative, or huge.
  void add(const std::string& token, int64_t id, const std::string& where);
  int32_t find(std::string_view token) const;  // -1 when absent
  const std::string& token(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }

 private:
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> ids_;
};

/// The character that stands for a byte, in UTF-8: itself when printable, else U+0100 and on.
const std::string& byte_character(uint8_t byte);
/// The bytes a token stands for. A token with a character outside the alphabet stands for itself.
std::string token_to_bytes(const std::string& token);

class Bpe {
 public:
  struct Options {
    bool ignore_merges = false;  // a piece that is a token as a whole stays whole
    int32_t unknown_id = -1;     // for bytes without a token, which are left out when it is -1
    bool fuse_unknown = false;   // consecutive ones become one
  };
  using Merge = std::pair<std::string, std::string>;

  Bpe() = default;
  Bpe(const Vocabulary& vocabulary, const std::vector<Merge>& merges, const Options& options,
      const std::string& where);
  /// Appends the ids of one piece: starting from bytes, the pair of lowest rank merges first, the
  /// leftmost among equals.
  void encode(std::string_view piece, const Vocabulary& vocabulary,
              std::vector<int32_t>& ids) const;

 private:
  struct Target {
    int32_t rank, id;
  };
  const Target* find_merge(int32_t left, int32_t right) const;

  Options options_;
  std::array<int32_t, 256> byte_ids_{};
  std::unordered_map<uint64_t, Target> merges_;
};

}  // namespace qlab
