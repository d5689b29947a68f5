// The tables behind data/unicode.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qlab::unicode {

template <class Row>
struct Table {
  const Row* rows;
  size_t size;
  const Row* begin() const { return rows; }
  const Row* end() const { return rows + size; }
};

struct Range {
  uint32_t first, last;
};
struct CombiningRange {
  uint32_t first, last;
  uint8_t combining_class;
};
struct Decomposition {
  uint32_t composed, first;
  uint32_t second = 0;    // 0 where there is one part only
  bool composes = false;  // NFC puts the parts together again
};

// Sorted by their first column.
extern const Table<Range> letters, numbers, spaces, digits, words;
extern const Table<CombiningRange> combining_classes;
extern const Table<Decomposition> decompositions;

}  // namespace qlab::unicode
