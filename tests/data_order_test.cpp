#include "data/order.h"

#include <algorithm>

#include "tests/support/files.h"

namespace qlab {
namespace {

std::vector<int64_t> epoch(const ExampleOrder& order, int64_t size, int64_t number) {
  std::vector<int64_t> result;
  for (int64_t i = 0; i < size; ++i) result.push_back(order.at(number * size + i));
  return result;
}

TEST(ExampleOrder, EachEpochIsAPermutation) {
  for (const int64_t size : {1, 2, 7, 1000}) {
    const ExampleOrder order(size, 3, true);
    for (const int64_t number : {0, 1, 5}) {
      auto visited = epoch(order, size, number);
      std::sort(visited.begin(), visited.end());
      for (int64_t i = 0; i < size; ++i) EXPECT_EQ(visited[static_cast<size_t>(i)], i);
    }
  }
}

TEST(ExampleOrder, IsAFunctionOfSeedAndEpoch) {
  const ExampleOrder order(100, 3, true);
  const auto first = epoch(order, 100, 0), second = epoch(order, 100, 1);
  EXPECT_NE(first, second);
  EXPECT_NE(first, epoch(ExampleOrder(100, 4, true), 100, 0));
  EXPECT_EQ(first, epoch(ExampleOrder(100, 3, true), 100, 0));
  EXPECT_EQ(epoch(order, 100, 0), first);  // going back to an epoch gives it again
  EXPECT_EQ(ExampleOrder(100, 3, true).at(150), second[50]);
}

TEST(ExampleOrder, IsUniform) {
  constexpr int64_t size = 4, epochs = 4000;
  const ExampleOrder order(size, 1, true);
  int count[size][size] = {};
  for (int64_t e = 0; e < epochs; ++e)
    for (int64_t i = 0; i < size; ++i) ++count[i][order.at(e * size + i)];
  // Six standard deviations of a binomial with n = 4000, p = 1/4.
  for (const auto& row : count)
    for (const int n : row) EXPECT_NEAR(n, epochs / size, 6 * 27.4);
}

TEST(ExampleOrder, IdentityWithoutShuffling) {
  const ExampleOrder order(5, 3, false);
  for (int64_t i = 0; i < 12; ++i) EXPECT_EQ(order.at(i), i % 5);
}

TEST(ExampleOrder, Refuses) {
  EXPECT_THAT(test::error_of([] { ExampleOrder(0, 1, true); }), testing::HasSubstr("at least one"));
  EXPECT_THAT(test::error_of([] { ExampleOrder(3, 1, true).at(-1); }), testing::HasSubstr("-1"));
}

}  // namespace
}  // namespace qlab
