// Tokens that are recognised in the text itself, before any other step.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qlab {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;             // only where no word character touches it
  bool lstrip = false, rstrip = false;  // takes the white space beside it along
  bool normalized = false;              // looked for after normalization
  bool special = false;
};

/// Finds a set of added tokens: from left to right, the longest at each place.
class AddedTokenFinder {
 public:
  void add(const AddedToken& token);
  /// Between two of these, and around them, the text is ordinary. id is -1 for such text.
  struct Piece {
    std::string_view text;
    int32_t id;
  };
  std::vector<Piece> split(std::string_view text) const;

 private:
  const AddedToken* longest_at(std::string_view text, size_t position) const;
  std::array<std::vector<AddedToken>, 256> by_first_byte_;  // longest first
};

}  // namespace qlab
