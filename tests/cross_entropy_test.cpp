#include "core/ops/cross_entropy.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using CrossEntropyTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, CrossEntropyTest, all_cases, name);

DType statistic(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

struct Loss {
  Tensor nll, dz;
};
/// On a copy of z.
Loss loss(const Tensor& z, const Tensor& labels, const Tensor& scale) {
  Loss out{Tensor::empty({z.dim(0)}, statistic(z.dtype()), z.device()), z.clone()};
  cross_entropy_inplace(out.nll, out.dz, labels, scale);
  return out;
}

// softmax(log 1, log 2, log 5) = 1/8, 2/8, 5/8.
TEST(CrossEntropy, Golden) {
  const std::vector<double> row{0, std::log(2.0), std::log(5.0)};
  const Tensor z = tensor({row[0], row[1], row[2], 9, 9, 9}, {2, 3}, cpu_f64);
  const Tensor labels = tensor_of<int32_t>({1, ignore_label}, cpu_f64);
  const auto [nll, dz] = loss(z, labels, tensor({4, 4}, {2}, cpu_f32));
  EXPECT_NEAR(values(nll)[0], std::log(4.0), 1e-15);
  EXPECT_EQ(values(nll)[1], 0);
  const std::vector<double> expected{0.5, -3, 2.5, 0, 0, 0}, actual = values(dz);
  for (size_t i = 0; i < 6; ++i) EXPECT_NEAR(actual[i], expected[i], 1e-14) << i;
}

TEST(CrossEntropy, GradientMatchesFiniteDifferences) {
  const Tensor z = tensor(normals(28, 1), {4, 7}, cpu_f64);
  const Tensor labels = tensor_of<int32_t>({6, 0, ignore_label, 3}, cpu_f64);
  const Tensor scale = tensor({1, 0.5, 2, -3}, {4}, cpu_f32);
  expect_gradient(z, loss(z, labels, scale).dz,
                  [&] { return weighted_sum(loss(z, labels, Tensor()).nll, scale); });
}

void expect_matches_reference(const Tensor& z, const Tensor& labels, const Tensor& scale) {
  const auto [nll, dz] = loss(z, labels, scale);
  const auto [nll0, dz0] = loss(as_reference(z), labels.to(Device::cpu()), scale.to(Device::cpu()));
  const int64_t cols = z.dim(1);
  expect_close(nll, nll0, cols);
  expect_close(dz, dz0, cols);
  const auto [again, dz_again] = loss(z, labels, scale);
  expect_same_bits(nll, again);
  expect_same_bits(dz, dz_again);
}

TEST_P(CrossEntropyTest, MatchesReference) {
  for (const Shape& shape :
       {Shape{1, 1}, Shape{3, 7}, Shape{10, 64}, Shape{4, 1023}, Shape{9, 5000}}) {
    SCOPED_TRACE(shape.str());
    std::vector<int32_t> labels = integers(shape[0], shape[1], 5);
    if (shape[0] > 3) labels[2] = ignore_label;
    expect_matches_reference(random(shape, 3), tensor_of(labels, GetParam()),
                             random_f32({shape[0]}));
  }
}

// The longer rows do not fit into a multiprocessor's shared memory, the odd ones not into vectors.
TEST_P(CrossEntropyTest, LargeMatchesReference) {
  for (const Shape& shape : {Shape{33, 49152}, Shape{3, 128256}, Shape{2, 128257}}) {
    SCOPED_TRACE(shape.str());
    const auto vocabulary = static_cast<int32_t>(shape[1]);
    std::vector<int32_t> labels = integers(shape[0], vocabulary, 6);
    labels.back() = vocabulary - 1;
    expect_matches_reference(random(shape, 4), tensor_of(labels, GetParam()),
                             random_f32({shape[0]}));
  }
}

TEST_P(CrossEntropyTest, LossAloneLeavesTheLogits) {
  const Tensor z = random({5, 300}), labels = tensor_of(integers(5, 300, 7), GetParam());
  const auto [nll, same] = loss(z, labels, Tensor());
  expect_same_bits(same, z);
  expect_same_bits(nll, loss(z, labels, random_f32({5})).nll);
}

TEST_P(CrossEntropyTest, HoldsForLargeLogits) {
  const Tensor z = tensor({1000, -1000, 900, -1000, -1000, -1000}, {2, 3}, GetParam());
  const auto [nll, dz] = loss(z, tensor_of<int32_t>({2, 1}, GetParam()),
                              tensor({1, 1}, {2}, Case{device(), DType::f32}));
  EXPECT_NEAR(values(nll)[0], values(z)[0] - values(z)[2], 1e-3);
  EXPECT_NEAR(values(nll)[1], std::log(3.0), 1e-6);
  EXPECT_EQ(values(dz)[0], 1);
  EXPECT_EQ(values(dz)[2], -1);
}

TEST_P(CrossEntropyTest, ANotFiniteRowStaysAlone) {
  const Tensor z = random({3, 100}), clean = z.clone();
  const Tensor poison = tensor({NAN}, {1, 1}, GetParam());
  copy(z.slice_rows(1, 2).slice_cols(50, 51), poison);
  const Tensor labels = tensor_of<int32_t>({1, 2, 3}, GetParam()), scale = random_f32({3});
  const Loss a = loss(z, labels, scale), b = loss(clean, labels, scale);
  EXPECT_TRUE(std::isnan(values(a.nll)[1]));
  for (const int64_t i : {0, 2}) {
    expect_same_bits(a.nll.slice_rows(i, i + 1), b.nll.slice_rows(i, i + 1));
    expect_same_bits(a.dz.slice_rows(i, i + 1), b.dz.slice_rows(i, i + 1));
  }
}

TEST_P(CrossEntropyTest, RowsAreIndependentAndPitchIsHonoured) {
  const Tensor z = random({11, 203}), labels = tensor_of(integers(11, 203, 8), GetParam());
  const Tensor scale = random_f32({11});
  const auto [nll, dz] = loss(z, labels, scale);
  for (const int64_t i : {0, 6, 10}) {
    const auto row = [i](const Tensor& t) { return t.slice_rows(i, i + 1); };
    const auto [nll_i, dz_i] = loss(row(z), row(labels), row(scale));
    expect_same_bits(nll_i, row(nll));
    expect_same_bits(dz_i, row(dz));
  }
  const Tensor wide = random({11, 211}), guard = wide.clone(), inner = wide.slice_cols(3, 206);
  copy(inner, z);
  const Tensor nll_wide = Tensor::empty({11}, nll.dtype(), device());
  cross_entropy_inplace(nll_wide, inner, labels, scale);
  expect_same_bits(nll_wide, nll);
  expect_same_bits(inner, dz);
  expect_same_bits(wide.slice_cols(0, 3), guard.slice_cols(0, 3));
  expect_same_bits(wide.slice_cols(206, 211), guard.slice_cols(206, 211));
}

TEST(CrossEntropy, RejectsWhatDoesNotFit) {
  const Tensor z = tensor(normals(6, 1), {2, 3}, cpu_f32), nll = tensor({0, 0}, {2}, cpu_f32);
  const Tensor labels = tensor_of<int32_t>({0, 1}, cpu_f32), none;
  const char* op = "[cross_entropy] ";
  EXPECT_ERROR(cross_entropy_inplace(nll, z, labels.slice_rows(0, 1), none), "labels must be [2]");
  EXPECT_ERROR(cross_entropy_inplace(nll, z, nll, none), "labels must be int32");
  EXPECT_ERROR(cross_entropy_inplace(nll.slice_rows(0, 1), z, labels, none), "nll must be [2]");
  EXPECT_ERROR(cross_entropy_inplace(cast(nll, DType::f64), z, labels, none),
               "nll must be float32");
  EXPECT_ERROR(cross_entropy_inplace(nll, nll, labels, none), op);
  EXPECT_ERROR(cross_entropy_inplace(nll, z, labels, nll.slice_rows(0, 1)), "scale must be [2]");
  EXPECT_ERROR(cross_entropy_inplace(nll, z, labels, cast(nll, DType::f64)),
               "scale must be float32");
  EXPECT_ERROR(cross_entropy_inplace(nll, z, tensor_of<int32_t>({0, 3}, cpu_f32), none),
               "labels must be -100 or in [0, 3), got 3");
}

}  // namespace
}  // namespace qlab::test
