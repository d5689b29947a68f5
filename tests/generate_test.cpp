#include "experiments/generate.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "tests/support/error_of.h"

namespace qlab::test {
namespace {

using testing::HasSubstr;

TEST(Sample, GreedyAndByDraw) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f), 0};
  EXPECT_EQ(sample(logits, 0, 1, 0.99), 2);
  // Likeliest first: 5, 2, 1 and 1 ninths.
  EXPECT_EQ(sample(logits, 1, 1, 0.5), 2);
  EXPECT_EQ(sample(logits, 1, 1, 0.6), 1);
  EXPECT_EQ(sample(logits, 1, 1, 0.8), 0);
  EXPECT_EQ(sample(logits, 1, 1, 0.95), 3);
  EXPECT_EQ(sample(logits, 1, 0.7, 0.99), 1);
}

TEST(Sample, RefusesLogitsThatAreNotFinite) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), HUGE_VALF, -HUGE_VALF})
    for (const double temperature : {0.0, 1.0})
      EXPECT_THAT(error_of([&] {
                    sample({1, bad, 2}, temperature, 1, 0.5);
                  }),
                  HasSubstr("logits are not finite"));
}

}  // namespace
}  // namespace qlab::test
