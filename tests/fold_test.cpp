#include "nn/fold.h"

#include "core/ops/copy.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using FoldTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, FoldTest, all_cases, name);

// W [3, 8] of modules of 2 and 1 rows, adapters of rank 1 and 2 in columns 0 and 16.
TEST_P(FoldTest, Golden) {
  const Tensor block = random({3 + 32, 8 + 32}), guard = block.clone();
  const Case f32{device(), DType::f32};
  const Tensor a0 = tensor({1, 2, 3, 4, 5, 6, 7, 8}, {1, 8}, f32),
               b0 = tensor({1, -2}, {2, 1}, f32);
  const Tensor a1 = tensor({8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 1, 1, 1, 1}, {2, 8}, f32);
  const Tensor b1 = tensor({3, 4}, {1, 2}, f32);
  const FoldPart parts[] = {{a0, b0, 0.5f, 0, 0}, {a1, b1, 2.0f, 2, 16}};
  fold_adapters(block, 32, parts);
  const std::vector<double> got = values(block), before = values(guard);
  const auto at = [](int64_t row, int64_t col) { return static_cast<size_t>(row * 40 + col); };
  std::vector<double> expected = before;
  for (int64_t row = 0; row < 35; ++row)
    for (int64_t col = 0; col < 40; ++col)
      if ((row < 3) != (col < 8)) expected[at(row, col)] = 0;
  expected[at(0, 8)] = 0.5, expected[at(1, 8)] = -1;
  expected[at(2, 24)] = 6, expected[at(2, 25)] = 8;
  for (int64_t k = 0; k < 8; ++k) {
    expected[at(3, k)] = static_cast<double>(k + 1);
    expected[at(19, k)] = static_cast<double>(8 - k);
    expected[at(20, k)] = k < 4 ? 0 : 1;
  }
  EXPECT_EQ(got, expected);
}

// Bit-equal on both devices: products and roundings are spelled out. So many parts that each of the
// launches with room for 4, 32 and 512 is met.
TEST_P(FoldTest, MatchesTheCpu) {
  const std::pair<int, int> modules[] = {{5, 30}, {16, 24}, {33, 16}};  // rank, outputs
  const int64_t n = 70, k = 104;
  for (const int trials : {1, 5, 12}) {
    const int64_t width = trials * 80;
    const auto make = [&](Device on) {
      const Case f32{on, DType::f32};
      const Tensor block = Tensor::with_tail(n + width, k, width, dtype(), on).widened(k + width);
      copy(block, tensor(std::vector<double>(static_cast<size_t>((n + width) * (k + width)), 7.0),
                         {n + width, k + width}, Case{on, dtype()}));
      std::vector<FoldPart> parts;
      int64_t column = 0;
      for (int trial = 0; trial < trials; ++trial) {
        int64_t row = 0;
        for (const auto& [r, out] : modules) {
          const auto seed = static_cast<uint64_t>(100 * trial);
          parts.push_back(
              {tensor(normals(r * k, seed + static_cast<uint64_t>(r)), {r, k}, f32),
               tensor(normals(out * r, seed + static_cast<uint64_t>(out)), {out, r}, f32), 0.3f,
               row, column});
          column += (r + 15) / 16 * 16;
          row += out;
        }
      }
      fold_adapters(block, width, parts);
      return values(block);
    };
    EXPECT_EQ(make(device()), make(Device::cpu())) << trials;
  }
}

// A diverged neighbour in f16: its infinities would turn the zeros of other trials into NaN.
TEST_P(FoldTest, StaysFinite) {
  const Case f32{device(), DType::f32};
  const Tensor block = tensor(std::vector<double>(24 * 24, 0.0), {24, 24}, GetParam());
  const FoldPart part{tensor(std::vector<double>(8, -1e30), {1, 8}, f32),
                      tensor(std::vector<double>(8, 1e30), {8, 1}, f32), 2.0f, 0, 0};
  fold_adapters(block, 16, std::span(&part, 1));
  for (const double x : values(block)) EXPECT_TRUE(std::isfinite(x));
}

TEST(Fold, RejectsWhatDoesNotFit) {
  const Tensor block = tensor(normals(24 * 24, 1), {24, 24}, cpu_f32);
  const Tensor a = tensor(normals(8, 1), {1, 8}, cpu_f32),
               b = tensor(normals(8, 1), {8, 1}, cpu_f32);
  const auto fold = [&](const FoldPart& part, int64_t width = 16) {
    fold_adapters(block, width, std::span(&part, 1));
  };
  EXPECT_NO_THROW(fold({a, b, 1, 0, 0}));
  EXPECT_ERROR(fold({a, b, 1, 0, 8}), "does not fit");
  EXPECT_ERROR(fold({a, b, 1, 1, 0}), "does not fit");
  EXPECT_ERROR(fold({a, b, 1, 0, 16}), "does not fit");
  EXPECT_ERROR(fold({b, a, 1, 0, 0}), "a must be");
  EXPECT_ERROR(fold({a, b, 1, 0, 0}, 20), "columns of adapters");
}

}  // namespace
}  // namespace qlab::test
