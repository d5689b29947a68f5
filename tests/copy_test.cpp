#include "core/ops/copy.h"

#include <cstring>

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using CopyTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, CopyTest, all_cases, name);

// 1 + 1/256 lies between two bf16: to even is 1; 1 + 3/256 goes up to 1 + 4/256.
TEST_P(CopyTest, CastRoundsToNearestEven) {
  const Tensor x = tensor({1 + 0x1p-8, 1 + 3 * 0x1p-8, -1 - 0x1p-8, 0.5, INFINITY}, {5},
                          Case{device(), DType::f32});
  EXPECT_EQ(values(cast(x, DType::bf16)),
            (std::vector<double>{1, 1 + 0x1p-6, -1, 0.5, static_cast<double>(INFINITY)}));
  EXPECT_TRUE(
      std::isnan(values(cast(tensor({NAN}, {1}, Case{device(), DType::f32}), DType::bf16))[0]));
}

// Between two f16, at both ends of its range, and below the normal numbers, in steps of 2^-24.
TEST_P(CopyTest, CastToHalfRoundsToNearestEven) {
  const std::vector<std::pair<double, double>> cases = {{1 + 0x1p-11, 1},
                                                        {1 + 3 * 0x1p-11, 1 + 0x1p-9},
                                                        {-1 - 0x1p-11, -1},
                                                        {65519, 65504},
                                                        {65520, INFINITY},
                                                        {-1e30, -INFINITY},
                                                        {0x1.004p-14, 0x1.004p-14},
                                                        {0x1p-24, 0x1p-24},
                                                        {0x1p-25, 0},
                                                        {-3 * 0x1p-25, -0x1p-23},
                                                        {5 * 0x1p-26, 0x1p-24},
                                                        {0x1.ffcp-15, 0x1p-14}};
  std::vector<double> from, to;
  for (const auto& [x, y] : cases) from.push_back(x), to.push_back(y);
  const Shape shape{static_cast<int64_t>(from.size())};
  const Case f32{device(), DType::f32};
  EXPECT_EQ(values(cast(tensor(from, shape, f32), DType::f16)), to);
  EXPECT_TRUE(std::isnan(values(cast(tensor({NAN}, {1}, f32), DType::f16))[0]));
}

TEST_P(CopyTest, WideningAndBackIsExact) {
  for (const Shape& shape : {Shape{1, 1}, Shape{3, 7}, Shape{129, 1023}}) {
    const Tensor x = random(shape);
    if (dtype() != DType::f64) expect_same_bits(cast(cast(x, DType::f32), dtype()), x);
    expect_same_bits(x.clone(), x);
    expect_same_bits(x.to(Device::cpu()), x);
  }
}

TEST_P(CopyTest, HonoursPitches) {
  const Tensor wide = random({9, 40}), guard = wide.clone(), x = random({9, 13});
  const Tensor inner = wide.slice_cols(8, 21);
  copy(inner, x);
  expect_same_bits(inner, x);
  expect_same_bits(wide.slice_cols(0, 8), guard.slice_cols(0, 8));
  expect_same_bits(wide.slice_cols(21, 40), guard.slice_cols(21, 40));
  const Tensor f32 = random_f32({9, 13});
  copy(inner, f32);
  expect_same_bits(inner, cast(f32, dtype()));
  expect_same_bits(wide.slice_cols(21, 40), guard.slice_cols(21, 40));
}

TEST_P(CopyTest, ATailIsPartOfTheBlock) {
  const auto [device, type] = std::pair(this->device(), dtype());
  const Tensor x = Tensor::with_tail(5, 40, 24, type, device);
  EXPECT_EQ(x.pitch(), 64);
  EXPECT_EQ(Tensor::with_tail(5, 40, 25, type, device).pitch(), 128);
  EXPECT_TRUE(Tensor::with_tail(5, 40, 0, type, device).contiguous());
  const Tensor source = random({5, 64});
  copy(x.widened(64), source);
  expect_same_bits(x, source.slice_cols(0, 40));
  EXPECT_ERROR(x.widened(65), "has no 65 columns");
  const Tensor inner = x.slice_cols(16, 40);
  expect_same_bits(inner.widened(48), source.slice_cols(16, 64));
  EXPECT_ERROR(inner.widened(49), "from column 16 of its block of 64 has no 49 columns");
  EXPECT_ERROR(inner.slice_rows(1, 3).widened(64), "has no 64 columns");
}

TEST_P(CopyTest, FillsWithZeros) {
  const Tensor x = random({5, 33});
  fill_zero(x.slice_rows(1, 4));
  const std::vector<double> v = values(x);
  for (size_t i = 0; i < v.size(); ++i) EXPECT_EQ(v[i] == 0, i >= 33 && i < 4 * 33);
  const Tensor wide = random({5, 40}), guard = wide.clone();
  fill_zero(wide.slice_cols(8, 30));
  for (const double value : values(wide.slice_cols(8, 30))) EXPECT_EQ(value, 0);
  expect_same_bits(wide.slice_cols(0, 8), guard.slice_cols(0, 8));
  expect_same_bits(wide.slice_cols(30, 40), guard.slice_cols(30, 40));
}

// Longer than a part of what is copied by parts, and no whole number of them; the source may change
// as soon as copy() returns.
TEST(Copy, LargeUploadsToCudaAreReadBeforeTheyReturn) {
  std::vector<Device> devices{Device::cpu()};
  if (cuda::device_count() > 0) devices.push_back(Device::cuda());
  for (const Device device : devices) {
    constexpr int64_t count = (int64_t{45} << 20) / 4 + 12345;
    Tensor source = Tensor::empty({count}, DType::f32, Device::cpu());
    const Tensor first = Tensor::empty({count}, DType::f32, device), second = first.clone();
    auto* const values = source.data<float>();
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 16777213);
    copy(first, source);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(-(i % 16777199));
    copy(second, source);
    std::fill(values, values + count, 0.0f);
    const std::vector<float> a = first.to_vector<float>(), b = second.to_vector<float>();
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; ++i)
      wrong += a[static_cast<size_t>(i)] != static_cast<float>(i % 16777213) ||
               b[static_cast<size_t>(i)] != static_cast<float>(-(i % 16777199));
    EXPECT_EQ(wrong, 0) << device.str();
  }
}

// Page-locked memory of either kind (large blocks are locked after they were touched) copies there
// and back, and can be had again.
TEST(Copy, CudaPinnedBlocksOfAnySize) {
  if (cuda::device_count() == 0) GTEST_SKIP() << "needs a GPU and a build with CUDA";
  for (const int64_t bytes : {1000, 33 << 20, (100 << 20) + 7, 33 << 20}) {
    auto* const block = static_cast<char*>(cuda::allocate_pinned(static_cast<size_t>(bytes)));
    ASSERT_NE(block, nullptr);
    for (int64_t i = 0; i < bytes; ++i) block[i] = static_cast<char>(i % 251);
    const Tensor there = Tensor::empty({bytes}, DType::u8, Device::cuda());
    cuda::copy_async(there.raw(), block, static_cast<size_t>(bytes));
    synchronize(Device::cuda());
    std::memset(block, 0, static_cast<size_t>(bytes));
    cuda::copy_async(block, there.raw(), static_cast<size_t>(bytes));
    synchronize(Device::cuda());
    int64_t wrong = 0;
    for (int64_t i = 0; i < bytes; ++i) wrong += block[i] != static_cast<char>(i % 251);
    EXPECT_EQ(wrong, 0) << bytes;
    cuda::release_pinned(block);
  }
}

TEST(Copy, RejectsWhatDoesNotFit) {
  const Tensor x = tensor(normals(6, 1), {2, 3}, cpu_f32);
  EXPECT_ERROR(copy(x, x.view({3, 2})), "[copy] source must be [2, 3]");
}

}  // namespace
}  // namespace qlab::test
