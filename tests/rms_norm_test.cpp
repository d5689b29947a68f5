#include "core/ops/rms_norm.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using RmsNormTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, RmsNormTest, all_cases, name);

// mean(x^2) = 12.5, + 3.5 = 16: r = 1/4.
TEST(RmsNorm, Golden) {
  const Tensor x = tensor({3, 4}, {1, 2}, cpu_f64), w = tensor({2, -8}, {2}, cpu_f32);
  const auto [y, r] = rms_norm(x, w, 3.5f);
  EXPECT_EQ(values(r), (std::vector<double>{0.25}));
  EXPECT_EQ(values(y), (std::vector<double>{1.5, -8}));
  // u = g w = [2, 8], mean(u x) = 19: dx = u / 4 - x 19 / 64.
  const Tensor dx = rms_norm_backward(tensor({1, -1}, {1, 2}, cpu_f64), x, w, r);
  EXPECT_EQ(values(dx), (std::vector<double>{0.5 - 3 * 19.0 / 64, 2 - 4 * 19.0 / 64}));
}

TEST(RmsNorm, GradientMatchesFiniteDifferences) {
  const Tensor x = tensor(normals(15, 1), {3, 5}, cpu_f64), w = tensor(normals(5, 2), {5}, cpu_f32);
  const Tensor g = tensor(normals(15, 3), {3, 5}, cpu_f64);
  const Tensor dx = rms_norm_backward(g, x, w, rms_norm(x, w, 0.1f).r);
  expect_gradient(x, dx, [&] { return weighted_sum(rms_norm(x, w, 0.1f).y, g); });
}

TEST_P(RmsNormTest, MatchesReference) {
  for (const Shape& shape :
       {Shape{1, 1}, Shape{3, 7}, Shape{10, 64}, Shape{4, 1023}, Shape{5, 576}, Shape{2, 4096}}) {
    SCOPED_TRACE(shape.str());
    const int64_t cols = shape[1];
    const Tensor x = random(shape), w = random_f32({cols}), g = random(shape);
    const auto [y, r] = rms_norm(x, w, 1e-5f);
    const Tensor dx = rms_norm_backward(g, x, w, r);
    const Tensor x0 = as_reference(x);
    const auto [y0, r0] = rms_norm(x0, w.to(Device::cpu()), 1e-5f);
    const Tensor dx0 = rms_norm_backward(as_reference(g), x0, w.to(Device::cpu()), r0);
    expect_close(y, y0, cols);
    expect_close(r, r0, cols);
    expect_close(dx, dx0, cols, 1.0);  // cancels completely when C = 1
    expect_same_bits(y, rms_norm(x, w, 1e-5f).y);
    expect_same_bits(dx, rms_norm_backward(g, x, w, r));
  }
}

TEST_P(RmsNormTest, RowsAreIndependent) {
  const Tensor x = random({37, 45}), w = random_f32({45}), g = random({37, 45});
  const auto [y, r] = rms_norm(x, w, 1e-5f);
  const Tensor dx = rms_norm_backward(g, x, w, r);
  for (const int64_t i : {0, 5, 36}) {
    const Tensor xi = x.slice_rows(i, i + 1), gi = g.slice_rows(i, i + 1);
    const auto [yi, ri] = rms_norm(xi, w, 1e-5f);
    expect_same_bits(yi, y.slice_rows(i, i + 1));
    expect_same_bits(rms_norm_backward(gi, xi, w, ri), dx.slice_rows(i, i + 1));
  }
}

TEST_P(RmsNormTest, AcceptsNoRows) {
  const Tensor x = random({0, 8}), w = random_f32({8});
  const auto [y, r] = rms_norm(x, w, 1e-5f);
  EXPECT_EQ(y.shape().str(), "[0, 8]");
  EXPECT_EQ(rms_norm_backward(x, x, w, r).shape().str(), "[0, 8]");
}

TEST(RmsNorm, RejectsWhatDoesNotFit) {
  const Tensor x = tensor(normals(8, 1), {2, 4}, cpu_f32), w = tensor(normals(4, 2), {4}, cpu_f32);
  const Tensor short_w = tensor(normals(3, 2), {3}, cpu_f32), r = rms_norm(x, w, 0).r;
  const Tensor half = cast(x, DType::bf16), narrow = x.slice_cols(0, 3);
  EXPECT_ERROR(rms_norm(x, short_w, 0), "[rms_norm] w must be [4]");
  EXPECT_ERROR(rms_norm(x, cast(w, DType::f64), 0), "[rms_norm] w must be float32");
  EXPECT_ERROR(rms_norm(w, w, 0), "[rms_norm] x must be [T, C]");
  EXPECT_ERROR(rms_norm(narrow, short_w, 0), "contiguous");
  EXPECT_ERROR(rms_norm(x, w, -1), "eps");
  EXPECT_ERROR(rms_norm_backward(half, x, w, r), "g must be float32");
  EXPECT_ERROR(rms_norm_backward(x.slice_rows(0, 1), x, w, r), "g must be [2, 4]");
  EXPECT_ERROR(rms_norm_backward(x, x, w, w), "r must be [2]");
}

}  // namespace
}  // namespace qlab::test
