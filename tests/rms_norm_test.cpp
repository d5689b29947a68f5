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
       {Shape{1, 1}, Shape{3, 7}, Shape{10, 64}, Shape{4, 1023}, Shape{5, 576}, Shape{2, 4096},
        Shape{3, 1501}, Shape{2, 8456}}) {  // the last two are more than a GPU's registers hold
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

// dx + residual is rounded once; a residual that nobody else holds is the result.
TEST_P(RmsNormTest, AddsTheResidual) {
  for (const Shape& shape :
       {Shape{1, 1}, Shape{3, 7}, Shape{10, 64}, Shape{5, 4104}, Shape{2, 8456}}) {
    SCOPED_TRACE(shape.str());
    const Tensor x = random(shape), w = random_f32({shape[1]}), g = random(shape);
    const Tensor residual = random(shape), r = rms_norm(x, w, 1e-5f).r, shared = residual;
    const Tensor dx = rms_norm_backward(g, x, w, r, residual, 16);
    const Tensor x0 = as_reference(x), w0 = w.to(Device::cpu());
    const Tensor dx0 = rms_norm_backward(as_reference(g), x0, w0, rms_norm(x0, w0, 1e-5f).r,
                                         as_reference(residual));
    expect_close(dx, dx0, shape[1], 1.0);
    EXPECT_EQ(dx.pitch(), (shape[1] + 16 + 63) / 64 * 64);
    EXPECT_NE(dx.raw(), residual.raw());
    Tensor own = Tensor::with_tail(shape[0], shape[1], 8, dtype(), device());
    copy(own, residual);
    const void* const place = own.raw();
    const int64_t pitch = own.pitch();
    own = rms_norm_backward(g, x, w, r, own);
    EXPECT_EQ(own.raw(), place);
    EXPECT_EQ(own.pitch(), pitch);
    expect_same_bits(own, dx);
  }
}

TEST_P(RmsNormTest, HonoursPitches) {
  for (const int64_t cols : {5, 64, 72, 4096}) {
    const auto apart = [&](const Tensor& t) {
      const Tensor wide = random({9, cols + 24}).slice_cols(8, 8 + cols);
      copy(wide, t);
      return wide;
    };
    const Tensor x = random({9, cols}), w = random_f32({cols}), g = random({9, cols});
    const auto [y, r] = rms_norm(x, w, 1e-5f);
    const auto [wide_y, wide_r] = rms_norm(apart(x), w, 1e-5f, 40);
    EXPECT_EQ(wide_y.pitch(), (cols + 40 + 63) / 64 * 64);
    expect_same_bits(wide_y, y);
    expect_same_bits(wide_r, r);
    expect_same_bits(rms_norm_backward(apart(g), apart(x), w, r), rms_norm_backward(g, x, w, r));
    const Tensor residual = random({9, cols}), shared = residual;
    expect_same_bits(rms_norm_backward(apart(g), apart(x), w, r, apart(residual)),
                     rms_norm_backward(g, x, w, r, residual));
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
  const Tensor half = cast(x, DType::bf16);
  EXPECT_ERROR(rms_norm(x, short_w, 0), "[rms_norm] w must be [4]");
  EXPECT_ERROR(rms_norm(x, cast(w, DType::f64), 0), "[rms_norm] w must be float32");
  EXPECT_ERROR(rms_norm(w, w, 0), "[rms_norm] x must be [T, C]");
  EXPECT_ERROR(rms_norm(x, w, -1), "eps");
  EXPECT_ERROR(rms_norm_backward(half, x, w, r), "g must be float32");
  EXPECT_ERROR(rms_norm_backward(x.slice_rows(0, 1), x, w, r), "g must be [2, 4]");
  EXPECT_ERROR(rms_norm_backward(x, x, w, w), "r must be [2]");
  EXPECT_ERROR(rms_norm_backward(x, x, w, r, w), "residual must be [2, 4]");
  EXPECT_ERROR(rms_norm_backward(x, x, w, r, half), "residual must be float32");
}

}  // namespace
}  // namespace qlab::test
