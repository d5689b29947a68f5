#include "core/ops/rms_norm.h"

#include "core/gpu_limits.h"
#include "core/lanes.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {

RmsNorm rms_norm(const Tensor& x, const Tensor& w, float eps, int64_t tail) {
  QLAB_CHECK(x.rank() == 2, "[rms_norm] x must be [T, C], got {}", x.str());
  check_shape("rms_norm", "w", w, {x.dim(1)});
  QLAB_CHECK(w.dtype() == DType::f32, "[rms_norm] w must be float32, got {}", w.str());
  QLAB_CHECK(eps >= 0, "[rms_norm] eps must not be negative, got {}", eps);
  check_device("rms_norm", x, w);
  check_gpu_matrix("rms_norm", x);
  const DType statistic = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  RmsNorm out{Tensor::with_tail(x.dim(0), x.dim(1), tail, x.dtype(), x.device()),
              Tensor::empty({x.dim(0)}, statistic, x.device())};
  if (x.numel() == 0) return out;
  const OpScope scope("rms_norm", x.device(), {0, bytes_of_all(x, out.y)});
  on_device(
      x.device(), [&] { cpu::rms_norm(out.y, out.r, x, w, eps); },
      [&] { cuda::rms_norm(out.y, out.r, x, w, eps); });
  return out;
}

Tensor rms_norm_backward(const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& r,
                         const Tensor& residual, int64_t tail) {
  QLAB_CHECK(x.rank() == 2, "[rms_norm_backward] x must be [T, C], got {}", x.str());
  check_shape("rms_norm_backward", "w", w, {x.dim(1)});
  check_shape("rms_norm_backward", "r", r, {x.dim(0)});
  QLAB_CHECK(w.dtype() == DType::f32, "[rms_norm_backward] w must be float32, got {}", w.str());
  check_device("rms_norm_backward", x, w);
  check_device("rms_norm_backward", x, r);
  const auto check_like_x = [&](const char* name, const Tensor& t) {
    check_shape("rms_norm_backward", name, t, x.shape());
    QLAB_CHECK(t.dtype() == x.dtype(), "[rms_norm_backward] {} must be {}, got {}", name,
               name_of(x.dtype()), t.str());
    check_device("rms_norm_backward", x, t);
  };
  check_like_x("g", g);
  if (residual.defined()) check_like_x("residual", residual);
  const Tensor dx = residual.defined() && residual.unique()
                        ? residual
                        : Tensor::with_tail(x.dim(0), x.dim(1), tail, x.dtype(), x.device());
  if (x.numel() == 0) return dx;
  const OpScope scope("rms_norm_backward", x.device(), {0, bytes_of_all(x, g, dx, residual)});
  on_device(
      x.device(), [&] { cpu::rms_norm_backward(dx, g, x, w, r, residual); },
      [&] { cuda::rms_norm_backward(dx, g, x, w, r, residual); });
  return dx;
}

namespace cpu {
namespace {

int64_t row_grain(int64_t cols) { return std::max<int64_t>(1, 16384 / cols); }

template <int width, class T>
QLAB_INLINE inline void forward_row(T* y, accumulate_t<T>* r, const T* x, const float* w,
                                    int64_t cols, float eps) {
  using A = accumulate_t<T>;
  using L = Lanes<A, width>;
  L squares = L::all(0);
  for (int64_t i = 0; i < cols; i += 16) {
    const L xi = L::load(x + i, cols - i);
    squares = squares + xi * xi;
  }
  const A inverse = A(1) / std::sqrt(squares.sum() / static_cast<A>(cols) + static_cast<A>(eps));
  *r = inverse;
  for (int64_t i = 0; i < cols; i += 16)
    (L::load(x + i, cols - i) * inverse * L::load(w + i, cols - i)).store(y + i, cols - i);
}

template <int width, class T>
QLAB_INLINE inline void backward_row(T* dx, const T* g, const T* x, const float* w,
                                     accumulate_t<T> r, const T* residual, int64_t cols) {
  using A = accumulate_t<T>;
  using L = Lanes<A, width>;
  L products = L::all(0);
  for (int64_t i = 0; i < cols; i += 16) {
    const int64_t n = cols - i;
    const L u = L::load(g + i, n) * L::load(w + i, n);
    products = products + u * L::load(x + i, n);
  }
  const A projection = r * r * r * (products.sum() / static_cast<A>(cols));
  for (int64_t i = 0; i < cols; i += 16) {
    const int64_t n = cols - i;
    const L u = L::load(g + i, n) * L::load(w + i, n);
    const L d = u * r - L::load(x + i, n) * projection;
    (residual == nullptr ? d : d + L::load(residual + i, n)).store(dx + i, n);
  }
}

}  // namespace

void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps) {
  const int64_t cols = x.cols(), y_pitch = y.pitch(), x_pitch = x.pitch();
  const float* weight = w.data<float>();
  dispatch(CpuFloats{}, x.dtype(), "rms_norm", [&]<class T>() {
    T* out = y.data<T>();
    const T* in = x.data<T>();
    auto* inverse = r.data<accumulate_t<T>>();
    parallel_for(x.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t)
          forward_row<width>(out + t * y_pitch, inverse + t, in + t * x_pitch, weight, cols, eps);
      });
    });
  });
}

void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r, const Tensor& residual) {
  const int64_t cols = x.cols(), dx_pitch = dx.pitch(), g_pitch = g.pitch(), x_pitch = x.pitch();
  const int64_t residual_pitch = residual.defined() ? residual.pitch() : 0;
  const float* weight = w.data<float>();
  dispatch(CpuFloats{}, x.dtype(), "rms_norm_backward", [&]<class T>() {
    T* out = dx.data<T>();
    const T *grad = g.data<T>(), *in = x.data<T>();
    const T* past = residual.defined() ? residual.data<T>() : nullptr;
    const auto* inverse = r.data<accumulate_t<T>>();
    parallel_for(x.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t)
          backward_row<width>(out + t * dx_pitch, grad + t * g_pitch, in + t * x_pitch, weight,
                              inverse[t], past == nullptr ? past : past + t * residual_pitch, cols);
      });
    });
  });
}

}  // namespace cpu
}  // namespace qlab
