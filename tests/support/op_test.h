// The idiom in which every operation is tested: one list of (device, dtype) cases, seeded inputs
// rounded to the dtype of the case, the f64 operation on the CPU as the reference, and a bound that
// is computed from the precision and the length of the sums.
#pragma once
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/ops/copy.h"
#include "core/parallel.h"
#include "core/random.h"
#include "core/tensor.h"
#include "tests/support/error_of.h"

namespace qlab::test {

struct Case {
  Device device;
  DType dtype;
};

inline std::string name_of_case(const Case& c) {
  const char* dtype = c.dtype == DType::f64    ? "f64"
                      : c.dtype == DType::f32  ? "f32"
                      : c.dtype == DType::bf16 ? "bf16"
                                               : "f16";
  return std::string(c.device.is_cuda() ? "cuda_" : "cpu_") + dtype;
}
inline std::string name(const testing::TestParamInfo<Case>& info) {
  return name_of_case(info.param);
}
inline void PrintTo(const Case& c, std::ostream* out) { *out << name_of_case(c); }

inline const Case cpu_f64{Device::cpu(), DType::f64}, cpu_f32{Device::cpu(), DType::f32},
    cpu_bf16{Device::cpu(), DType::bf16}, cpu_f16{Device::cpu(), DType::f16},
    cuda_f32{Device::cuda(), DType::f32}, cuda_bf16{Device::cuda(), DType::bf16},
    cuda_f16{Device::cuda(), DType::f16};
/// What models compute in, and with it the reference.
inline const auto model_cases =
    testing::Values(cpu_f32, cpu_bf16, cpu_f16, cuda_f32, cuda_bf16, cuda_f16);
inline const auto all_cases =
    testing::Values(cpu_f64, cpu_f32, cpu_bf16, cpu_f16, cuda_f32, cuda_bf16, cuda_f16);

inline std::vector<double> values(const Tensor& x) {
  const Tensor host = (x.contiguous() ? x : x.clone()).to(Device::cpu());
  synchronize(x.device());
  std::vector<double> out;
  dispatch(Types<double, float, bf16, f16, int64_t, int32_t, uint8_t>{}, x.dtype(), "values",
           [&]<class T>() {
             for (int64_t i = 0; i < host.numel(); ++i) {
               if constexpr (Half<T>)
                 out.push_back(static_cast<float>(host.data<T>()[i]));
               else
                 out.push_back(static_cast<double>(host.data<T>()[i]));
             }
           });
  return out;
}

/// Rounded to the dtype of the case, on its device.
inline Tensor tensor(const std::vector<double>& x, const Shape& shape, const Case& c) {
  return cast(Tensor::from_vector(x, shape, Device::cpu()), c.dtype).to(c.device);
}
template <class T>
Tensor tensor_of(const std::vector<T>& x, const Case& c) {
  return Tensor::from_vector(x, {static_cast<int64_t>(x.size())}, c.device);
}

inline std::vector<double> normals(int64_t n, uint64_t seed) {
  std::vector<double> out(static_cast<size_t>(n + 1));
  for (int64_t i = 0; i < n; i += 2) {
    const Philox u = philox(seed, static_cast<uint32_t>(i), 0, 0, 0);
    normal_pair(u.lane[0], u.lane[1], out[i], out[i + 1]);
  }
  out.resize(static_cast<size_t>(n));
  return out;
}
/// `count` integers in [0, bound).
inline std::vector<int32_t> integers(int64_t count, int64_t bound, uint64_t seed) {
  std::vector<int32_t> out;
  for (int64_t i = 0; i < count; ++i)
    out.push_back(static_cast<int32_t>(philox(seed, static_cast<uint32_t>(i), 1, 0, 0).lane[0] %
                                       static_cast<uint32_t>(bound)));
  return out;
}

/// A copy of the same values in f64 on the CPU; integers stay what they are.
inline Tensor as_reference(const Tensor& x) {
  const Tensor host = x.clone().to(Device::cpu());
  synchronize(x.device());
  const bool floating = x.dtype() == DType::f64 || x.dtype() == DType::f32 ||
                        x.dtype() == DType::bf16 || x.dtype() == DType::f16;
  return floating ? cast(host, DType::f64) : host;
}

inline double unit_roundoff(DType dtype) {
  return dtype == DType::f64   ? 0x1p-53
         : dtype == DType::f32 ? 0x1p-24
         : dtype == DType::f16 ? 0x1p-11
                               : 0x1p-8;
}

/// |a - b| <= (2u + 8 sqrt(n) v)(s + |b|): u and v the roundoffs of storage and accumulation, n the
/// length of the sums, s the RMS of the reference or the given scale where terms cancel.
inline void expect_close(const Tensor& actual, const Tensor& reference, int64_t n,
                         double scale = 0) {
  ASSERT_EQ(actual.shape().str(), reference.shape().str());
  const std::vector<double> a = values(actual), b = values(reference);
  const double u = unit_roundoff(actual.dtype());
  const double v = unit_roundoff(actual.dtype() == DType::f64 ? DType::f64 : DType::f32);
  double squares = 0;
  for (const double x : b) squares += x * x;
  const double rms = b.empty() ? 0 : std::sqrt(squares / static_cast<double>(b.size()));
  const double s = std::max(scale, rms);
  const double relative = 2 * u + 8 * std::sqrt(static_cast<double>(n)) * v;
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_FALSE(std::isnan(a[i])) << "element " << i << " is NaN, expected " << b[i];
    if (a[i] == b[i]) continue;
    const double share = std::abs(a[i] - b[i]) / (relative * (s + std::abs(b[i])));
    if (!(share <= worst)) worst = share, at = i;
  }
  EXPECT_LE(worst, 1.0) << "element " << at << " of " << actual.str() << ": " << a[at]
                        << ", expected " << b[at];
}

inline std::vector<uint8_t> bytes_of(const Tensor& x) {
  const Tensor host = x.clone().to(Device::cpu());
  synchronize(x.device());
  std::vector<uint8_t> bytes(static_cast<size_t>(host.bytes()));
  if (!bytes.empty()) std::memcpy(bytes.data(), host.raw(), bytes.size());
  return bytes;
}
inline void expect_same_bits(const Tensor& a, const Tensor& b) {
  ASSERT_EQ(a.shape().str(), b.shape().str());
  ASSERT_EQ(a.dtype(), b.dtype());
  EXPECT_TRUE(bytes_of(a) == bytes_of(b)) << a.str() << " differ in their bits";
}

/// Central differences of loss() over every element of `x` (f64, CPU) against `gradient`.
inline void expect_gradient(const Tensor& x, const Tensor& gradient,
                            const std::function<double()>& loss, double tolerance = 1e-7) {
  ASSERT_EQ(x.shape().str(), gradient.shape().str());
  constexpr double h = 1e-5;
  double* value = x.data<double>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    const double saved = value[i];
    value[i] = saved + h;
    const double above = loss();
    value[i] = saved - h;
    const double below = loss();
    value[i] = saved;
    const double expected = (above - below) / (2 * h), actual = gradient.data<double>()[i];
    EXPECT_NEAR(actual, expected, tolerance * std::max(1.0, std::abs(expected))) << "element " << i;
  }
}
/// sum w_i y_i: a loss whose gradient with respect to y is w.
inline double weighted_sum(const Tensor& y, const Tensor& w) {
  const std::vector<double> a = values(y), b = values(w);
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// Runs f with 1, 2, 3 and 7 threads and expects the same bits.
inline void expect_same_for_all_thread_counts(const std::function<std::vector<Tensor>()>& f) {
  const int before = thread_count();
  std::vector<Tensor> first;
  for (const int threads : {1, 2, 3, 7}) {
    set_thread_count(threads);
    const std::vector<Tensor> out = f();
    if (first.empty()) first = out;
    for (size_t i = 0; i < out.size(); ++i) expect_same_bits(out[i], first[i]);
  }
  set_thread_count(before);
}

class OpTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (GetParam().device.is_cuda() && cuda::device_count() == 0)
      GTEST_SKIP() << "needs a GPU and a build with CUDA";
    if (GetParam().device.is_cuda() && dtype() == DType::bf16 && !cuda::supports_bf16(0))
      GTEST_SKIP() << "needs a GPU with bf16";
  }
  Device device() const { return GetParam().device; }
  DType dtype() const { return GetParam().dtype; }
  /// Standard normals times `scale`, another stream at every call.
  Tensor random(const Shape& shape, double scale = 1) { return random(shape, GetParam(), scale); }
  Tensor random(const Shape& shape, const Case& c, double scale = 1) {
    std::vector<double> x = normals(shape.numel(), ++stream_);
    for (double& value : x) value *= scale;
    return tensor(x, shape, c);
  }
  /// fp32 on the device of the case, whatever its dtype.
  Tensor random_f32(const Shape& shape, double scale = 1) {
    return random(shape, Case{device(), DType::f32}, scale);
  }

 private:
  uint64_t stream_ = 0;
};

#define EXPECT_ERROR(expression, text) \
  EXPECT_THAT(::qlab::test::error_of([&] { (void)(expression); }), ::testing::HasSubstr(text))

}  // namespace qlab::test
