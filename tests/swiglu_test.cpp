#include "core/ops/swiglu.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using SwigluTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, SwigluTest, all_cases, name);

/// gate | up
Tensor joined(const Tensor& gate, const Tensor& up) {
  const int64_t cols = gate.dim(1);
  const Tensor both = Tensor::empty({gate.dim(0), 2 * cols}, gate.dtype(), gate.device());
  copy(both.slice_cols(0, cols), gate);
  copy(both.slice_cols(cols, 2 * cols), up);
  return both;
}
/// swiglu_backward with gate | up held elsewhere, so that it stays what it is.
Tensor backward(const Tensor& g, Tensor gate_up, int64_t tail = 0) {
  const Tensor held = gate_up;
  return swiglu_backward(g, gate_up, tail);
}

// With e^-z = 3, silu(z) = z / 4; the derivative is s + z s (1 - s) = 1/4 + z 3/16.
TEST(Swiglu, Golden) {
  const double z = -std::log(3.0);
  const Tensor gate_up = tensor({z, -8}, {1, 2}, cpu_f64), g = tensor({2}, {1, 1}, cpu_f64);
  EXPECT_NEAR(values(swiglu(gate_up))[0], -2 * z, 1e-15);
  const std::vector<double> d = values(backward(g, gate_up));
  EXPECT_NEAR(d[0], -16 * (0.25 + z * 3 / 16), 1e-14);
  EXPECT_NEAR(d[1], z / 2, 1e-15);
}

TEST(Swiglu, GradientMatchesFiniteDifferences) {
  const Tensor gate_up = tensor(normals(28, 1), {2, 14}, cpu_f64);
  const Tensor g = tensor(normals(14, 3), {2, 7}, cpu_f64);
  expect_gradient(gate_up, backward(g, gate_up), [&] { return weighted_sum(swiglu(gate_up), g); });
}

TEST_P(SwigluTest, MatchesReference) {
  for (const Shape& shape : {Shape{1, 1}, Shape{3, 7}, Shape{10, 64}, Shape{129, 1023}}) {
    SCOPED_TRACE(shape.str());
    const Tensor gate_up = joined(random(shape, 3), random(shape)), g = random(shape);
    const Tensor y = swiglu(gate_up), d = backward(g, gate_up), gate_up0 = as_reference(gate_up);
    constexpr int64_t roundings = 8;  // in the longest chain of an element
    expect_close(y, swiglu(gate_up0), roundings);
    const Tensor d0 = backward(as_reference(g), gate_up0);
    for (const int64_t begin : {int64_t{0}, shape[1]})
      expect_close(d.slice_cols(begin, begin + shape[1]), d0.slice_cols(begin, begin + shape[1]),
                   roundings);
    expect_same_bits(y, swiglu(gate_up));
    expect_same_bits(d, backward(g, gate_up));
  }
}

TEST_P(SwigluTest, HonoursPitchesAndWritesInPlaceWhereItMay) {
  for (const int64_t cols : {1, 7, 32, 1032}) {
    const Tensor gate_up = joined(random({9, cols}, 3), random({9, cols})), g = random({9, cols});
    const Tensor y = swiglu(gate_up), d = backward(g, gate_up);
    const auto with_tail = [&](int64_t tail) {
      const Tensor wide = Tensor::with_tail(9, 2 * cols, tail, dtype(), device());
      copy(wide, gate_up);
      return wide;
    };
    const Tensor wide_g = random({9, cols + 24}).slice_cols(8, 8 + cols);
    copy(wide_g, g);
    const Tensor wide_y = swiglu(with_tail(16), 40);
    EXPECT_EQ(wide_y.pitch(), (cols + 40 + 63) / 64 * 64);
    expect_same_bits(wide_y, y);

    const Tensor roomy = with_tail(16);
    const void* const place = roomy.raw();
    const Tensor in_place = swiglu_backward(wide_g, roomy, 16);
    EXPECT_EQ(in_place.raw(), place);
    EXPECT_EQ(in_place.pitch(), roomy.pitch());
    expect_same_bits(in_place, d);

    const Tensor narrow = with_tail(0);
    const Tensor moved = swiglu_backward(g, narrow, 16);
    EXPECT_NE(moved.raw(), narrow.raw());
    EXPECT_EQ(moved.pitch(), (2 * cols + 16 + 63) / 64 * 64);
    expect_same_bits(moved, d);
    expect_same_bits(narrow, gate_up);
  }
}

TEST_P(SwigluTest, HoldsAtTheEnds) {
  const Tensor gate = tensor({-200, -89, 0, 89, 200}, {1, 5}, GetParam());
  const Tensor up = tensor({1, 1, 1, 1, 1}, {1, 5}, GetParam());
  const std::vector<double> y = values(swiglu(joined(gate, up)));
  EXPECT_NEAR(y[0], 0, 1e-30);
  EXPECT_NEAR(y[1], 0, 1e-30);
  EXPECT_EQ(y[2], 0);
  EXPECT_EQ(y[3], 89);
  EXPECT_EQ(y[4], 200);
  const std::vector<double> d = values(backward(up, joined(gate, up)));
  EXPECT_EQ(d[2], 0.5);
  EXPECT_EQ(d[4], 1);
  EXPECT_NEAR(d[0], 0, 1e-30);
}

TEST_P(SwigluTest, RowsAreIndependent) {
  const Tensor gate_up = random({19, 74}), g = random({19, 37});
  const Tensor y = swiglu(gate_up), d = backward(g, gate_up);
  for (const int64_t i : {0, 7, 18}) {
    const auto row = [i](const Tensor& x) { return x.slice_rows(i, i + 1); };
    expect_same_bits(swiglu(row(gate_up)), row(y));
    expect_same_bits(backward(row(g), row(gate_up)), row(d));
  }
}

TEST(Swiglu, RejectsWhatDoesNotFit) {
  const Tensor a = tensor(normals(8, 1), {2, 4}, cpu_f32), odd = a.slice_cols(0, 3);
  const Tensor g = tensor(normals(4, 1), {2, 2}, cpu_f32);
  EXPECT_ERROR(swiglu(odd), "[swiglu] gate | up must be [T, 2 I]");
  EXPECT_ERROR(swiglu_backward(g, odd), "[swiglu_backward] gate | up must be [T, 2 I]");
  EXPECT_ERROR(swiglu_backward(a, a), "[swiglu_backward] g must be [2, 2]");
  EXPECT_ERROR(swiglu_backward(cast(g, DType::bf16), a), "g must be float32");
}

}  // namespace
}  // namespace qlab::test
