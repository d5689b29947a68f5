#include "core/ops/add.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using AddTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, AddTest, all_cases, name);

TEST_P(AddTest, Golden) {
  const Tensor a = tensor({1, -2, 3, 0.5}, {2, 2}, GetParam());
  const Tensor b = tensor({0.25, 8, -3, 4}, {2, 2}, GetParam());
  EXPECT_EQ(values(add(a, b)), (std::vector<double>{1.25, 6, 0, 4.5}));
  add_inplace(a, b);
  EXPECT_EQ(values(a), (std::vector<double>{1.25, 6, 0, 4.5}));
  add_bias(a, tensor({1, -1}, {2}, Case{device(), DType::f32}));
  EXPECT_EQ(values(a), (std::vector<double>{2.25, 5, 1, 3.5}));
  scale_inplace(a, -0.25f);
  EXPECT_EQ(values(a), (std::vector<double>{-0.5625, -1.25, -0.25, -0.875}));
}

TEST_P(AddTest, MatchesReference) {
  for (const Shape& shape : {Shape{1, 1}, Shape{3, 7}, Shape{10, 64}, Shape{129, 1023}}) {
    SCOPED_TRACE(shape.str());
    const Tensor a = random(shape), b = random(shape), bias = random_f32({shape[1]});
    const Tensor sum0 = add(as_reference(a), as_reference(b));
    const Tensor sum = add(a, b);
    expect_close(sum, sum0, 1);
    expect_same_bits(sum, add(a, b));
    const Tensor shifted = sum.clone(), shifted0 = as_reference(sum);
    add_bias(shifted, bias);
    add_bias(shifted0, bias.to(Device::cpu()));
    expect_close(shifted, shifted0, 1);
    add_inplace(a, b);
    expect_same_bits(a, sum);
    scale_inplace(a, 0.3f);
    scale_inplace(sum0, 0.3f);
    expect_close(a, sum0, 1);
  }
}

TEST(Add, RejectsWhatDoesNotFit) {
  const Tensor a = tensor(normals(6, 1), {2, 3}, cpu_f32),
               b = tensor(normals(6, 1), {3, 2}, cpu_f32);
  EXPECT_ERROR(add(a, b), "[add] b must be [2, 3]");
  EXPECT_ERROR(add(a, cast(a, DType::f64)), "[add] both must have one dtype");
  EXPECT_ERROR(add(a.slice_cols(0, 2), a.slice_cols(0, 2)), "contiguous");
  EXPECT_ERROR(add_inplace(a, b), "[add_inplace] b must be [2, 3]");
  EXPECT_ERROR(scale_inplace(a.slice_cols(0, 2), 2), "[scale_inplace] a must be contiguous");
  EXPECT_ERROR(add_bias(a, tensor({1, 2}, {2}, cpu_f32)), "bias must be [3]");
  EXPECT_ERROR(add_bias(a, tensor({1, 2, 3}, {3}, cpu_f64)), "bias must be float32");
}

}  // namespace
}  // namespace qlab::test
