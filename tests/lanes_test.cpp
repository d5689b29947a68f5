#include "core/lanes.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

template <int width>
std::vector<float> exponentials(const std::vector<float>& x) {
  std::vector<float> y(x.size());
  const int64_t n = static_cast<int64_t>(x.size());
  for (int64_t i = 0; i < n; i += 16)
    exp(cpu::Lanes<float, width>::load(x.data() + i, n - i)).store(y.data() + i, n - i);
  return y;
}

TEST(Lanes, ExpIsWithinTwoUlp) {
  std::vector<float> x;
  for (float v = -87.3f; v < 88.7f; v += 0.00037f) x.push_back(v);
  const std::vector<float> y = exponentials<16>(x);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    worst = std::max(worst, std::abs(y[i] - exact) / (exact * 0x1p-23));
  }
  EXPECT_LE(worst, 2.0);
}

TEST(Lanes, ExpHoldsAtTheEnds) {
  const std::vector<float> y =
      exponentials<16>({0, -0.0f, -INFINITY, INFINITY, NAN, -88, 89, 88.72f, -87.33f});
  EXPECT_EQ(y[0], 1);
  EXPECT_EQ(y[1], 1);
  EXPECT_EQ(y[2], 0);
  EXPECT_EQ(y[3], INFINITY);
  EXPECT_TRUE(std::isnan(y[4]));
  EXPECT_EQ(y[5], 0);
  EXPECT_EQ(y[6], INFINITY);
  EXPECT_NEAR(y[7] / std::exp(88.72f), 1, 1e-6);
  EXPECT_NEAR(y[8] / std::exp(-87.33f), 1, 1e-6);
}

template <int width>
std::vector<double> results(const std::vector<float>& x) {
  using L = cpu::Lanes<float, width>;
  const int64_t n = static_cast<int64_t>(x.size());
  L sum = L::all(0), highest = L::all(-INFINITY);
  std::vector<bf16> rounded(x.size());
  for (int64_t i = 0; i < n; i += 16) {
    const L v = L::load(x.data() + i, n - i);
    sum = sum + exp(v) * v / (v - 0.5f);
    highest = max(highest, v);
    v.store(rounded.data() + i, n - i);
  }
  std::vector<double> out{sum.sum(), highest.maximum()};
  for (const bf16 b : rounded) out.push_back(static_cast<float>(b));
  for (const float y : exponentials<width>(x)) out.push_back(y);
  return out;
}

// The three widths, and any alignment, give the same bits.
TEST(Lanes, BitsDoNotDependOnTheWidth) {
  for (const int64_t n : {1, 15, 16, 17, 100, 1001}) {
    std::vector<float> x;
    for (const double v : normals(n, 3)) x.push_back(static_cast<float>(3 * v));
    const std::vector<double> narrow = results<16>(x);
    EXPECT_EQ(results<32>(x), narrow) << n;
    EXPECT_EQ(results<64>(x), narrow) << n;
    std::vector<double> chosen;
    cpu::vectorized([&]<int width>() { chosen = results<width>(x); });
    EXPECT_EQ(chosen, narrow) << n;
  }
}

template <class T>
void expect_scalar_conversions() {
  std::vector<float> x{0x1.01p0f, 0x1.03p0f,   -0x1.01p0f,  1e-40f, 3.4e38f,
                       INFINITY,  -INFINITY,   NAN,         65519,  65520,
                       0x1p-25f,  -0x1.8p-24f, 0x1.ffdp-15f};
  for (const double v : normals(1000, 5)) x.push_back(static_cast<float>(v));
  std::vector<T> y(x.size());
  std::vector<float> back(x.size());
  const int64_t n = static_cast<int64_t>(x.size());
  for (int64_t i = 0; i < n; i += 16) {
    cpu::Lanes<float, 16>::load(x.data() + i, n - i).store(y.data() + i, n - i);
    cpu::Lanes<float, 16>::load(y.data() + i, n - i).store(back.data() + i, n - i);
  }
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(y[i].bits, T(x[i]).bits) << x[i];
    if (!std::isnan(x[i])) {
      EXPECT_EQ(back[i], static_cast<float>(y[i])) << x[i];
    }
  }
}
TEST(Lanes, StoresAsTheScalarConversion) {
  expect_scalar_conversions<bf16>();
  expect_scalar_conversions<f16>();
}

}  // namespace
}  // namespace qlab::test
