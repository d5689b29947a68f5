#include "core/ops/add.h"

#include <algorithm>

#include "core/gpu_limits.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

void check_same(const char* op, const Tensor& a, const Tensor& b) {
  check_shape(op, "b", b, a.shape());
  QLAB_CHECK(a.dtype() == b.dtype(), "[{}] both must have one dtype, got {} and {}", op, a.str(),
             b.str());
  QLAB_CHECK(a.contiguous() && b.contiguous(), "[{}] both must be contiguous, got {} and {}", op,
             a.str(), b.str());
  check_device(op, a, b);
  check_gpu_elements(op, a);
}

}  // namespace

Tensor add(const Tensor& a, const Tensor& b) {
  check_same("add", a, b);
  const Tensor y = Tensor::empty(a.shape(), a.dtype(), a.device());
  if (a.numel() == 0) return y;
  const OpScope scope("add", a.device(), {0, bytes_of_all(a, b, y)});
  on_device(
      a.device(), [&] { cpu::add(y, a, b); }, [&] { cuda::add(y, a, b); });
  return y;
}

void add_inplace(const Tensor& a, const Tensor& b) {
  check_same("add_inplace", a, b);
  if (a.numel() == 0) return;
  const OpScope scope("add", a.device(), {0, bytes_of_all(a, b, a)});
  on_device(
      a.device(), [&] { cpu::add(a, a, b); }, [&] { cuda::add(a, a, b); });
}

void scale_inplace(const Tensor& a, float factor) {
  QLAB_CHECK(a.contiguous(), "[scale_inplace] a must be contiguous, got {}", a.str());
  check_gpu_elements("scale_inplace", a);
  if (a.numel() == 0) return;
  const OpScope scope("scale", a.device(), {0, bytes_of_all(a, a)});
  on_device(
      a.device(), [&] { cpu::scale(a, factor); }, [&] { cuda::scale(a, factor); });
}

void add_bias(const Tensor& y, const Tensor& bias) {
  QLAB_CHECK(y.rank() == 2, "[add_bias] y must be [T, C], got {}", y.str());
  check_shape("add_bias", "bias", bias, {y.dim(1)});
  QLAB_CHECK(bias.dtype() == DType::f32, "[add_bias] bias must be float32, got {}", bias.str());
  check_device("add_bias", y, bias);
  check_gpu_matrix("add_bias", y);
  if (y.numel() == 0) return;
  const OpScope scope("add_bias", y.device(), {0, bytes_of_all(y, y)});
  on_device(
      y.device(), [&] { cpu::add_bias(y, bias); }, [&] { cuda::add_bias(y, bias); });
}

namespace cpu {

void add(const Tensor& y, const Tensor& a, const Tensor& b) {
  dispatch(CpuFloats{}, y.dtype(), "add", [&]<class T>() {
    using A = accumulate_t<T>;
    T* out = y.data<T>();
    const T *left = a.data<T>(), *right = b.data<T>();
    parallel_for(y.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        out[i] = static_cast<T>(static_cast<A>(left[i]) + static_cast<A>(right[i]));
    });
  });
}

void scale(const Tensor& a, float factor) {
  dispatch(CpuFloats{}, a.dtype(), "scale", [&]<class T>() {
    using A = accumulate_t<T>;
    T* values = a.data<T>();
    parallel_for(a.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        values[i] = static_cast<T>(static_cast<A>(values[i]) * static_cast<A>(factor));
    });
  });
}

void add_bias(const Tensor& y, const Tensor& bias) {
  const int64_t cols = y.cols(), pitch = y.pitch();
  const float* b = bias.data<float>();
  dispatch(CpuFloats{}, y.dtype(), "add_bias", [&]<class T>() {
    using A = accumulate_t<T>;
    T* out = y.data<T>();
    parallel_for(y.rows(), std::max<int64_t>(1, (1 << 15) / cols), [=](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < cols; ++i)
          out[t * pitch + i] =
              static_cast<T>(static_cast<A>(out[t * pitch + i]) + static_cast<A>(b[i]));
    });
  });
}

}  // namespace cpu
}  // namespace qlab
