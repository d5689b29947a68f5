// Blocks lie as a search through all of those before them would lay them, and never on one another.
#include "core/layout.h"

#include <gtest/gtest.h>

#include <random>

namespace qlab::test {
namespace {

struct Block {
  int64_t bytes, offset;
  int32_t taken, given;
};

/// The tightest gap among all blocks before, or behind the last of those alive at the same time.
int64_t place_plainly(const std::vector<Block>& placed, const Block& own) {
  std::vector<Block> alive;
  for (const Block& other : placed)
    if (other.given >= own.taken && own.given >= other.taken) alive.push_back(other);
  std::stable_sort(alive.begin(), alive.end(),
                   [](const Block& a, const Block& b) { return a.offset < b.offset; });
  int64_t at = 0, best = -1, tightest = std::numeric_limits<int64_t>::max();
  for (const Block& other : alive) {
    if (const int64_t gap = other.offset - at; gap >= own.bytes && gap < tightest)
      best = at, tightest = gap;
    at = std::max(at, other.offset + other.bytes);
  }
  return best < 0 ? at : best;
}

TEST(Layout, IsThatOfASearchThroughAllBlocks) {
  std::mt19937 random(7);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  for (const int32_t events : {50, 300, 2000, 40000}) {
    Layout layout(events);
    std::vector<Block> placed;
    int64_t end = 0;
    for (int i = 0; i < 600; ++i) {
      // Most live briefly, some for long, as in a step.
      const int64_t life = 1 + below(i % 7 == 0 ? events : std::min(events, 200));
      const auto taken = static_cast<int32_t>(below(events));
      const auto given = static_cast<int32_t>(std::min<int64_t>(taken + life, events));
      Block own{256 * (1 + below(40)), 0, taken, given};
      own.offset = place_plainly(placed, own);
      ASSERT_EQ(layout.place(own.bytes, taken, given), own.offset) << events << " " << i;
      for (const Block& other : placed) {
        const bool together = other.given >= taken && given >= other.taken;
        const bool apart =
            own.offset + own.bytes <= other.offset || other.offset + other.bytes <= own.offset;
        ASSERT_TRUE(!together || apart);
      }
      end = std::max(end, own.offset + own.bytes);
      placed.push_back(own);
    }
    EXPECT_EQ(layout.bytes(), end);
  }
}

}  // namespace
}  // namespace qlab::test
