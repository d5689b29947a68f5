#include "core/ops/dropout.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using DropoutTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, DropoutTest, all_cases, name);

constexpr DropoutKey key{0x0123456789abcdefull, 0.25f};

struct Places {
  Tensor example, position;
  Places(const std::vector<int64_t>& e, const std::vector<int32_t>& p, const Case& c)
      : example(tensor_of(e, c)), position(tensor_of(p, c)) {}
};
/// Tokens of examples 3 and 2^33 + 1, in a row.
Places places(int64_t tokens, const Case& c) {
  std::vector<int64_t> example;
  std::vector<int32_t> position;
  for (int64_t t = 0; t < tokens; ++t) {
    example.push_back(t < tokens / 2 ? 3 : (int64_t{1} << 33) + 1);
    position.push_back(static_cast<int32_t>(t < tokens / 2 ? t : t - tokens / 2));
  }
  return {example, position, c};
}

TEST(Dropout, ThresholdIsPTimesTwoToThe16) {
  EXPECT_EQ(dropout_threshold(0), 0u);
  EXPECT_EQ(dropout_threshold(0.1f), 6554u);
  EXPECT_EQ(dropout_threshold(0.25f), 0x4000u);
  EXPECT_EQ(dropout_threshold(0.5f), 0x8000u);
  EXPECT_EQ(dropout_threshold(0.9999999f), 0xffffu);
}

// What is kept grows by the inverse of how often it is kept.
TEST(Dropout, KeepsTheMean) {
  for (const float p : {0.0f, 0.05f, 0.1f, 0.5f, 0.9f})
    EXPECT_DOUBLE_EQ(dropout_factor(p) * (65536 - dropout_threshold(p)), 65536) << p;
  EXPECT_EQ(dropout_factor(0), 1);
  EXPECT_NEAR(dropout_factor(0.1f), 1 / 0.9, 2e-5);
}

TEST_P(DropoutTest, FollowsTheRuleElementByElement) {
  const Places at = places(10, GetParam());
  const std::vector<int64_t> example = at.example.to_vector<int64_t>();
  const std::vector<int32_t> position = at.position.to_vector<int32_t>();
  for (const int64_t cols : {1, 7, 64, 130}) {
    const Tensor x = random({10, cols});
    const std::vector<double> in = values(x),
                              out = values(dropout(x, at.example, at.position, key));
    for (int64_t t = 0; t < 10; ++t)
      for (int64_t i = 0; i < cols; ++i) {
        const bool keep =
            dropout_keeps(key.key, example[t], position[t], i, dropout_threshold(key.p));
        const double expected = keep ? in[t * cols + i] / 0.75 : 0;
        EXPECT_NEAR(out[t * cols + i], expected, 2 * unit_roundoff(dtype()) * std::abs(expected));
      }
  }
}

// The mask and the quotient are the same operations on both devices.
TEST_P(DropoutTest, HasTheBitsOfTheCpu) {
  const Case host{Device::cpu(), dtype()};
  const Tensor x = random({33, 1027});
  const Places at = places(33, GetParam()), host_at = places(33, host);
  const Tensor y = dropout(x, at.example, at.position, key);
  expect_same_bits(y, dropout(x.to(Device::cpu()), host_at.example, host_at.position, key));
  expect_same_bits(y, dropout(x, at.example, at.position, key));
}

TEST_P(DropoutTest, MaskDoesNotDependOnTheBatch) {
  const Tensor x = random({6, 50});
  const Places at({7, 7, 7, 9, 9, 9}, {0, 1, 2, 0, 1, 2}, GetParam());
  const Tensor y = dropout(x, at.example, at.position, key);
  for (int64_t i = 0; i < 6; ++i) {
    const auto row = [i](const Tensor& t) { return t.slice_rows(i, i + 1); };
    expect_same_bits(dropout(row(x), row(at.example), row(at.position), key), row(y));
  }
}

TEST_P(DropoutTest, KeepsTheRightShare) {
  const int64_t rows = 500, cols = 1001;
  const Tensor ones = tensor(std::vector<double>(rows * cols, 1), {rows, cols}, GetParam());
  const Places at = places(rows, GetParam());
  for (const float p : {0.0f, 0.05f, 0.5f, 0.9f}) {
    int64_t kept = 0;
    for (const double y : values(dropout(ones, at.example, at.position, {99, p}))) kept += y != 0;
    const double n = static_cast<double>(rows * cols), sigma = std::sqrt(n * p * (1 - p));
    EXPECT_NEAR(static_cast<double>(kept), n * (1 - static_cast<double>(p)), 5 * sigma + 0.5) << p;
  }
}

TEST_P(DropoutTest, AddsToTheGradientOfTheBasePath) {
  const Tensor x = random({9, 70}), y = random({9, 70});
  const Places at = places(9, GetParam());
  const std::vector<double> before = values(y),
                            masked = values(dropout(x, at.example, at.position, key));
  dropout_add(y, x, at.example, at.position, key);
  const std::vector<double> after = values(y);
  for (size_t i = 0; i < after.size(); ++i) {
    const double bound = 3 * unit_roundoff(dtype()) * (std::abs(masked[i]) + std::abs(after[i]));
    EXPECT_NEAR(after[i], before[i] + masked[i], bound);
    if (masked[i] == 0) {
      EXPECT_EQ(after[i], before[i]);
    }
  }
}

TEST(Dropout, RejectsWhatDoesNotFit) {
  const Tensor x = tensor(normals(6, 1), {2, 3}, cpu_f32);
  const Places at = places(2, cpu_f32), three = places(3, cpu_f32);
  EXPECT_ERROR(dropout(x, three.example, at.position, key), "[dropout] example must be [2]");
  EXPECT_ERROR(dropout(x, at.example, three.position, key), "position must be [2]");
  EXPECT_ERROR(dropout(x, at.position, at.position, key), "example must be int64");
  EXPECT_ERROR(dropout(x, at.example, at.example, key), "position must be int32");
  EXPECT_ERROR(dropout(x, at.example, at.position, {1, 1.0f}), "p must be in [0, 1), got 1");
  EXPECT_ERROR(dropout_add(x.slice_rows(0, 1), x, at.example, at.position, key),
               "y must be [2, 3]");
}

}  // namespace
}  // namespace qlab::test
