#include "core/ops/gemm_tiling.h"

#include <gtest/gtest.h>

namespace qlab::test {
namespace {

constexpr GemmLine lines[] = {
    {"A", Op::transpose, 28672, 4096, 4096, {1, 3, 0}},
    {"A", Op::transpose, 28672, 4096, 8192, {2, 5, 0}},
    {"A", Op::transpose, 4096, 4096, 8192, {3, 5, 0}},
    {"A", Op::transpose, 4096, 14336, 8192, {4, 5, 0}},
    {"A", Op::none, 14336, 4096, 8192, {5, 3, 1}},
    {"B", Op::transpose, 28672, 4096, 8192, {6, 5, 0}},
};

/// The tile chosen for A [m, k] op(B), C [m, n]; 0 for none.
int tile(Op op_b, int64_t m, int64_t n, int64_t k, std::string_view gpu = "A") {
  const auto tiling = gemm_tiling(lines, gpu, op_b, m, n, k);
  return tiling ? tiling->tile : 0;
}

TEST(GemmTiling, OfTheSameMatrixOnTheSameGpu) {
  EXPECT_EQ(tile(Op::transpose, 8192, 28672, 4096), 2);
  EXPECT_EQ(tile(Op::transpose, 8192, 28672, 4096, "B"), 6);
  EXPECT_EQ(tile(Op::transpose, 8192, 28672, 4096, "C"), 0);
  EXPECT_EQ(tile(Op::transpose, 8192, 28671, 4096), 0);
  EXPECT_EQ(tile(Op::none, 8192, 28672, 4096), 0);
}

TEST(GemmTiling, OfDxTheMatrixIsTheOtherWayRound) {
  EXPECT_EQ(tile(Op::none, 8192, 4096, 14336), 5);
  EXPECT_EQ(tile(Op::none, 8192, 14336, 4096), 0);
}

TEST(GemmTiling, AdaptersMakeKLonger) {
  EXPECT_EQ(tile(Op::transpose, 8192, 28672, 4128), 2);
  EXPECT_EQ(tile(Op::transpose, 8192, 28672, 6144), 2);
  EXPECT_EQ(tile(Op::transpose, 8192, 28672, 6145), 0);
  EXPECT_EQ(tile(Op::transpose, 8192, 28672, 4095), 0);
  EXPECT_EQ(tile(Op::transpose, 8192, 4096, 4112), 3);
  EXPECT_EQ(tile(Op::transpose, 8192, 4096, 14352), 4);
}

TEST(GemmTiling, TheNearestNumberOfRows) {
  EXPECT_EQ(tile(Op::transpose, 4096, 28672, 4096), 1);
  EXPECT_EQ(tile(Op::transpose, 5600, 28672, 4096), 1);
  EXPECT_EQ(tile(Op::transpose, 5900, 28672, 4096), 2);
  EXPECT_EQ(tile(Op::transpose, 12288, 28672, 4096), 2);
  EXPECT_EQ(tile(Op::transpose, 12289, 28672, 4096), 0);
  EXPECT_EQ(tile(Op::transpose, 2731, 28672, 4096), 1);
  EXPECT_EQ(tile(Op::transpose, 2730, 28672, 4096), 0);
  EXPECT_EQ(tile(Op::transpose, 0, 28672, 4096), 0);
}

TEST(GemmTiling, WhatWasMeasuredIsOnceInTheTable) {
  const auto all = measured_gemm_lines();
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_FALSE(all[i].gpu.empty());
    EXPECT_GT(all[i].rows, 0);
    for (size_t j = 0; j < i; ++j)
      EXPECT_FALSE(all[i].gpu == all[j].gpu && all[i].op == all[j].op && all[i].n == all[j].n &&
                   all[i].k == all[j].k && all[i].rows == all[j].rows);
  }
}

}  // namespace
}  // namespace qlab::test
