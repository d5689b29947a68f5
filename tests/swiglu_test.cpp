#include "core/ops/swiglu.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using SwigluTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, SwigluTest, all_cases, name);

// With e^-z = 3, silu(z) = z / 4; the derivative is s + z s (1 - s) = 1/4 + z 3/16.
TEST(Swiglu, Golden) {
  const double z = -std::log(3.0);
  const Tensor gate = tensor({z}, {1, 1}, cpu_f64), up = tensor({-8}, {1, 1}, cpu_f64);
  const Tensor g = tensor({2}, {1, 1}, cpu_f64);
  EXPECT_NEAR(values(swiglu(gate, up))[0], -2 * z, 1e-15);
  const auto [dgate, dup] = swiglu_backward(g, gate, up);
  EXPECT_NEAR(values(dgate)[0], -16 * (0.25 + z * 3 / 16), 1e-14);
  EXPECT_NEAR(values(dup)[0], z / 2, 1e-15);
}

TEST(Swiglu, GradientMatchesFiniteDifferences) {
  const Tensor gate = tensor(normals(14, 1), {2, 7}, cpu_f64),
               up = tensor(normals(14, 2), {2, 7}, cpu_f64);
  const Tensor g = tensor(normals(14, 3), {2, 7}, cpu_f64);
  const auto [dgate, dup] = swiglu_backward(g, gate, up);
  const auto loss = [&] { return weighted_sum(swiglu(gate, up), g); };
  expect_gradient(gate, dgate, loss);
  expect_gradient(up, dup, loss);
}

TEST_P(SwigluTest, MatchesReference) {
  for (const Shape& shape : {Shape{1, 1}, Shape{3, 7}, Shape{10, 64}, Shape{129, 1023}}) {
    SCOPED_TRACE(shape.str());
    const Tensor gate = random(shape, 3), up = random(shape), g = random(shape);
    const Tensor y = swiglu(gate, up);
    const auto [dgate, dup] = swiglu_backward(g, gate, up);
    const Tensor gate0 = as_reference(gate), up0 = as_reference(up);
    const auto [dgate0, dup0] = swiglu_backward(as_reference(g), gate0, up0);
    constexpr int64_t roundings = 8;  // in the longest chain of an element
    expect_close(y, swiglu(gate0, up0), roundings);
    expect_close(dgate, dgate0, roundings);
    expect_close(dup, dup0, roundings);
    expect_same_bits(y, swiglu(gate, up));
    expect_same_bits(dgate, swiglu_backward(g, gate, up).dgate);
  }
}

TEST_P(SwigluTest, HoldsAtTheEnds) {
  const Tensor gate = tensor({-200, -89, 0, 89, 200}, {1, 5}, GetParam());
  const Tensor up = tensor({1, 1, 1, 1, 1}, {1, 5}, GetParam());
  const std::vector<double> y = values(swiglu(gate, up));
  EXPECT_NEAR(y[0], 0, 1e-30);
  EXPECT_NEAR(y[1], 0, 1e-30);
  EXPECT_EQ(y[2], 0);
  EXPECT_EQ(y[3], 89);
  EXPECT_EQ(y[4], 200);
  const auto [dgate, dup] = swiglu_backward(up, gate, up);
  EXPECT_EQ(values(dgate)[2], 0.5);
  EXPECT_EQ(values(dgate)[4], 1);
  EXPECT_NEAR(values(dgate)[0], 0, 1e-30);
}

TEST_P(SwigluTest, RowsAreIndependent) {
  const Tensor gate = random({19, 37}), up = random({19, 37}), g = random({19, 37});
  const Tensor y = swiglu(gate, up), dgate = swiglu_backward(g, gate, up).dgate;
  for (const int64_t i : {0, 7, 18}) {
    const auto row = [i](const Tensor& x) { return x.slice_rows(i, i + 1); };
    expect_same_bits(swiglu(row(gate), row(up)), row(y));
    expect_same_bits(swiglu_backward(row(g), row(gate), row(up)).dgate, row(dgate));
  }
}

TEST(Swiglu, RejectsWhatDoesNotFit) {
  const Tensor a = tensor(normals(6, 1), {2, 3}, cpu_f32),
               b = tensor(normals(6, 1), {3, 2}, cpu_f32);
  EXPECT_ERROR(swiglu(a, b), "[swiglu] up must be [2, 3]");
  EXPECT_ERROR(swiglu(a, cast(a, DType::bf16)), "one dtype");
  EXPECT_ERROR(swiglu(a.slice_cols(0, 2), a.slice_cols(0, 2)), "contiguous");
  EXPECT_ERROR(swiglu_backward(b, a, a), "[swiglu_backward] g must be [2, 3]");
}

}  // namespace
}  // namespace qlab::test
