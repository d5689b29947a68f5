#include "core/random.h"

#include <set>

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

void expect_lanes(const Philox& p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  EXPECT_EQ(p.lane[0], a);
  EXPECT_EQ(p.lane[1], b);
  EXPECT_EQ(p.lane[2], c);
  EXPECT_EQ(p.lane[3], d);
}

// The known answers published with Random123.
TEST(Random, PhiloxGivesTheKnownAnswers) {
  expect_lanes(philox(0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
  expect_lanes(philox(~0ull, ~0u, ~0u, ~0u, ~0u), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd);
  expect_lanes(philox(0x299f31d0a4093822ull, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344),
               0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1);
  expect_lanes(philox<7>(0, 0, 0, 0, 0), 0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48);
  expect_lanes(philox<7>(~0ull, ~0u, ~0u, ~0u, ~0u), 0x5207ddc2, 0x45165e59, 0x4d8ee751,
               0x8c52f662);
}

TEST(Random, UniformCoversTheHalfOpenInterval) {
  EXPECT_EQ(uniform(0), 0.0f);
  EXPECT_EQ(uniform(0x80000000u), 0.5f);
  EXPECT_EQ(uniform(~0u), 1.0f - 0x1p-24f);
}

TEST(Random, StreamKeysDifferBySeedAndName) {
  std::set<uint64_t> keys;
  for (uint64_t seed = 0; seed < 100; ++seed)
    for (const char* name : {"", "a", "b", "layers.0.q_proj", "layers.1.q_proj", "layers.0.q_prok"})
      keys.insert(stream_key(seed, name));
  EXPECT_EQ(keys.size(), 600u);
  EXPECT_EQ(stream_key(7, "x"), stream_key(7, "x"));
}

TEST(Random, NormalsHaveTheMomentsOfTheNormalDistribution) {
  const int64_t n = 200000;
  double mean = 0, square = 0, fourth = 0;
  for (const double x : normals(n, 42)) {
    mean += x / n;
    square += x * x / n;
    fourth += x * x * x * x / n;
  }
  EXPECT_NEAR(mean, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(square, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(fourth, 3, 5 * std::sqrt(96.0 / n));
  double n0, n1;
  normal_pair(~0u, 0, n0, n1);  // the largest u0 must not give log(0)
  EXPECT_EQ(n0, 0);
  normal_pair(0, 0, n0, n1);
  EXPECT_TRUE(std::isfinite(n0) && n0 > 6);
}

}  // namespace
}  // namespace qlab::test
