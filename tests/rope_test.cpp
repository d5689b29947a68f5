#include "core/ops/rope.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using RopeTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, RopeTest, all_cases, name);

RopeTables small_tables() {
  return {tensor({1, 1, 0.6, 0}, {2, 2}, cpu_f32), tensor({0, 0, 0.8, -1}, {2, 2}, cpu_f32)};
}

/// A rotated copy.
Tensor rope(const Tensor& x, const Tensor& positions, const RopeTables& tables, int64_t head_dim,
            bool inverse = false) {
  const Tensor y = x.clone();
  rope_inplace(y, positions, tables, head_dim, inverse);
  return y;
}

// Position 1 turns the pair (x0, x2) by the angle of (0.6, 0.8) and (x1, x3) by -90 degrees.
TEST(Rope, Golden) {
  const Tensor x = tensor({5, 2, 10, 3, 1, 2, 3, 4}, {2, 4}, cpu_f64);
  const Tensor positions = tensor_of<int32_t>({1, 0}, cpu_f64);
  const std::vector<double> y = values(rope(x, positions, small_tables(), 4));
  const std::vector<double> expected{-5, 3, 10, -2, 1, 2, 3, 4};
  for (size_t i = 0; i < y.size(); ++i) EXPECT_NEAR(y[i], expected[i], 1e-6) << i;
}

TEST(Rope, TablesFollowTheFormula) {
  const auto [cos, sin] = rope_tables(1001, 64, 10000, std::nullopt, {}, Device::cpu());
  for (const int64_t p : {0, 1, 17, 1000})
    for (const int64_t i : {0, 1, 16, 31}) {
      const float frequency = static_cast<float>(std::pow(10000.0, -2.0 * i / 64));
      const double angle = static_cast<float>(p) * frequency;
      EXPECT_EQ(cos.data<float>()[p * 32 + i], static_cast<float>(std::cos(angle)));
      EXPECT_EQ(sin.data<float>()[p * 32 + i], static_cast<float>(std::sin(angle)));
    }
}

// Angles at position 1 of Llama-3.1 (theta 500000, D 128) as Transformers 5.17 computes inv_freq.
TEST(Rope, Llama3ScalingMatchesTransformers) {
  const auto [cos, sin] = rope_tables(2, 128, 500000, RopeScaling{}, {}, Device::cpu());
  const auto angle = [&](int64_t i) {
    return std::atan2(sin.data<float>()[64 + i], cos.data<float>()[64 + i]);
  };
  const std::pair<int, double> golden[] = {{0, 1},
                                           {1, 0.814617217},
                                           {20, 0.0165604409},
                                           {28, 0.00321144611},
                                           {29, 0.00216657063},
                                           {30, 0.00137189368},
                                           {32, 0.000524846022},
                                           {34, 0.000178507791},
                                           {35, 9.55621217e-05},
                                           {40, 3.42810235e-05},
                                           {63, 3.06892588e-07}};
  for (const auto& [i, expected] : golden) EXPECT_NEAR(angle(i) / expected, 1, 1e-6) << i;
}

TEST(Rope, DivisorsReplaceScaling) {
  const auto [cos, sin] = rope_tables(2, 4, 100, RopeScaling{}, {1, 8}, Device::cpu());
  EXPECT_FLOAT_EQ(sin.data<float>()[2], std::sin(1.0f));
  EXPECT_FLOAT_EQ(sin.data<float>()[3], std::sin(0.1f / 8));
  EXPECT_FLOAT_EQ(cos.data<float>()[3], std::cos(0.1f / 8));
}

TEST(Rope, GradientMatchesFiniteDifferences) {
  const Tensor x = tensor(normals(24, 1), {3, 8}, cpu_f64),
               g = tensor(normals(24, 2), {3, 8}, cpu_f64);
  const Tensor positions = tensor_of<int32_t>({4, 0, 2}, cpu_f64);
  const RopeTables tables = rope_tables(5, 4, 100, std::nullopt, {}, Device::cpu());
  expect_gradient(x, rope(g, positions, tables, 4, true),
                  [&] { return weighted_sum(rope(x, positions, tables, 4), g); });
}

TEST_P(RopeTest, MatchesReference) {
  for (const auto& [tokens, heads, dim] :
       {std::array{1, 1, 2}, {7, 3, 6}, {37, 9, 64}, {130, 4, 128}}) {
    SCOPED_TRACE(fmt::format("{} tokens, {} heads of {}", tokens, heads, dim));
    const Tensor x = random({tokens, heads * dim});
    const std::vector<int32_t> places = integers(tokens, 200, 9);
    const RopeTables tables = rope_tables(200, dim, 10000, std::nullopt, {}, device());
    const RopeTables tables0 = rope_tables(200, dim, 10000, std::nullopt, {}, Device::cpu());
    const Tensor positions = tensor_of(places, GetParam());
    for (const bool inverse : {false, true}) {
      const Tensor y = rope(x, positions, tables, dim, inverse);
      expect_close(y, rope(as_reference(x), positions.to(Device::cpu()), tables0, dim, inverse), 2);
      expect_same_bits(y, rope(x, positions, tables, dim, inverse));
      expect_same_bits(rope(x.slice_rows(tokens - 1, tokens),
                            positions.slice_rows(tokens - 1, tokens), tables, dim, inverse),
                       y.slice_rows(tokens - 1, tokens));
    }
  }
}

TEST_P(RopeTest, RotatesColumnsInPlace) {
  for (const auto& [tokens, heads, dim] :
       {std::array{1, 1, 2}, {7, 3, 6}, {37, 9, 64}, {130, 5, 128}}) {
    SCOPED_TRACE(fmt::format("{} tokens, {} heads of {}", tokens, heads, dim));
    const int64_t cols = heads * dim;
    const Tensor wide = random({tokens, cols + 24}), guard = wide.clone();
    const Tensor inner = wide.slice_cols(8, 8 + cols),
                 positions = tensor_of(integers(tokens, 200, 9), GetParam());
    const RopeTables tables = rope_tables(200, dim, 10000, std::nullopt, {}, device());
    const Tensor expected = rope(inner.clone(), positions, tables, dim);
    rope_inplace(inner, positions, tables, dim);
    expect_same_bits(inner, expected);
    expect_same_bits(wide.slice_cols(0, 8), guard.slice_cols(0, 8));
    expect_same_bits(wide.slice_cols(8 + cols, cols + 24), guard.slice_cols(8 + cols, cols + 24));
  }
}

TEST(Rope, RejectsWhatDoesNotFit) {
  const Tensor x = tensor(normals(8, 1), {2, 4}, cpu_f32);
  const Tensor positions = tensor_of<int32_t>({0, 1}, cpu_f32);
  const RopeTables t = small_tables();
  EXPECT_ERROR(rope_inplace(x.view({8}), positions, t, 4), "x must be [T, heads * D]");
  EXPECT_ERROR(rope_inplace(x, positions, t, 3), "head_dim must be even");
  EXPECT_ERROR(rope_inplace(x, positions, t, 2), "[rope] cos must be [2, 1]");
  EXPECT_ERROR(rope_inplace(x, positions.slice_rows(0, 1), t, 4), "positions must be [2]");
  EXPECT_ERROR(rope_inplace(x, x.view({8}).slice_rows(0, 2), t, 4), "positions must be int32");
  EXPECT_ERROR(rope_inplace(x, tensor_of<int32_t>({0, 2}, cpu_f32), t, 4), "in [0, 2), got 2");
  EXPECT_ERROR(rope_inplace(x, positions, {t.cos, t.sin.slice_rows(0, 1)}, 4),
               "sin must be [2, 2]");
  EXPECT_ERROR(rope_tables(4, 3, 1e4, std::nullopt, {}, Device::cpu()), "head_dim must be even");
  EXPECT_ERROR(rope_tables(4, 4, 1e4, std::nullopt, {1}, Device::cpu()), "needs 2 divisors");
  EXPECT_ERROR(rope_tables(0, 4, 1e4, std::nullopt, {}, Device::cpu()), "must be positive");
}

}  // namespace
}  // namespace qlab::test
