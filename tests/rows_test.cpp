#include "core/ops/rows.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using RowsTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, RowsTest, all_cases, name);

TEST_P(RowsTest, GatherGolden) {
  const Tensor table = tensor({1, 2, 3, 4, 5, 6}, {3, 2}, GetParam());
  const Tensor index = tensor_of<int32_t>({2, -1, 0, 2}, GetParam());
  const Tensor y = gather_rows(table, index, dtype());
  EXPECT_EQ(y.dtype(), dtype());
  EXPECT_EQ(values(y), (std::vector<double>{5, 6, 0, 0, 1, 2, 5, 6}));
}

TEST_P(RowsTest, ScatterGolden) {
  const Tensor x = tensor({1, 2, 3, 4, 5, 6}, {3, 2}, GetParam());
  const Tensor index = tensor_of<int32_t>({3, -1, 0}, GetParam());
  EXPECT_EQ(values(scatter_rows(x, index, 4)), (std::vector<double>{5, 6, 0, 0, 0, 0, 1, 2}));
}

TEST_P(RowsTest, GatherConvertsAsCastDoes) {
  for (const Shape& shape : {Shape{5, 1}, Shape{9, 7}, Shape{40, 64}, Shape{33, 1023}}) {
    SCOPED_TRACE(shape.str());
    const Tensor index = tensor_of(integers(50, shape[0], 3), GetParam());
    const Tensor table = random(shape), f32 = random_f32(shape);
    const std::vector<int32_t> rows = index.to_vector<int32_t>();
    const Tensor same = gather_rows(table, index, dtype()),
                 cast_rows = gather_rows(f32, index, dtype());
    const Tensor converted = cast(f32, dtype());
    for (int64_t i = 0; i < 50; i += 7) {
      const int64_t r = rows[i];
      expect_same_bits(same.slice_rows(i, i + 1), table.slice_rows(r, r + 1));
      expect_same_bits(cast_rows.slice_rows(i, i + 1), converted.slice_rows(r, r + 1));
    }
  }
}

TEST_P(RowsTest, ScatterUndoesGather) {
  const Tensor x = random({6, 37});
  const Tensor index = tensor_of<int32_t>({5, 3, 0, 1, 4, 2}, GetParam());
  expect_same_bits(scatter_rows(gather_rows(x, index, dtype()), index, 6), x);
}

TEST_P(RowsTest, AcceptsNoRows) {
  const Tensor none = tensor_of<int32_t>({}, GetParam());
  EXPECT_EQ(gather_rows(random({3, 4}), none, dtype()).shape().str(), "[0, 4]");
  EXPECT_EQ(values(scatter_rows(random({0, 2}), none, 2)), (std::vector<double>{0, 0, 0, 0}));
}

TEST(Rows, RejectsWhatDoesNotFit) {
  const Tensor table = tensor(normals(6, 1), {3, 2}, cpu_f32);
  const Tensor index = tensor_of<int32_t>({0, 3}, cpu_f32);
  EXPECT_ERROR(gather_rows(table, index, DType::f32),
               "[gather_rows] index must be in [-1, 3), got 3");
  EXPECT_ERROR(gather_rows(table, table, DType::f32), "index must be int32");
  EXPECT_ERROR(gather_rows(index, index, DType::f32), "matrix");
  EXPECT_ERROR(scatter_rows(table, index, 4), "[scatter_rows] index must be [3]");
  EXPECT_ERROR(scatter_rows(table, tensor_of<int32_t>({0, 1, 4}, cpu_f32), 4), "below 4, got 4");
}

}  // namespace
}  // namespace qlab::test
