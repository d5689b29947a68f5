#include "core/ops/rms_norm.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace qlab {

RmsNorm rms_norm(const Tensor& x, const Tensor& w, float eps) {
  QLAB_CHECK(x.rank() == 2 && x.contiguous(), "[rms_norm] x must be [T, C] and contiguous, got {}",
             x.str());
  check_shape("rms_norm", "w", w, {x.dim(1)});
  QLAB_CHECK(w.dtype() == DType::f32, "[rms_norm] w must be float32, got {}", w.str());
  QLAB_CHECK(eps >= 0, "[rms_norm] eps must not be negative, got {}", eps);
  check_device("rms_norm", x, w);
  const DType statistic = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  RmsNorm out{Tensor::empty(x.shape(), x.dtype(), x.device()),
              Tensor::empty({x.dim(0)}, statistic, x.device())};
  if (x.numel() == 0) return out;
  on_device(
      x.device(), [&] { cpu::rms_norm(out.y, out.r, x, w, eps); },
      [&] { cuda::rms_norm(out.y, out.r, x, w, eps); });
  return out;
}

Tensor rms_norm_backward(const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& r) {
  QLAB_CHECK(x.rank() == 2 && x.contiguous(),
             "[rms_norm_backward] x must be [T, C] and contiguous, got {}", x.str());
  check_shape("rms_norm_backward", "g", g, x.shape());
  check_shape("rms_norm_backward", "w", w, {x.dim(1)});
  check_shape("rms_norm_backward", "r", r, {x.dim(0)});
  QLAB_CHECK(g.dtype() == x.dtype() && g.contiguous(),
             "[rms_norm_backward] g must be {} and contiguous, got {}", name_of(x.dtype()),
             g.str());
  QLAB_CHECK(w.dtype() == DType::f32, "[rms_norm_backward] w must be float32, got {}", w.str());
  check_device("rms_norm_backward", x, w);
  check_device("rms_norm_backward", x, g);
  check_device("rms_norm_backward", x, r);
  const Tensor dx = Tensor::empty(x.shape(), x.dtype(), x.device());
  if (x.numel() == 0) return dx;
  on_device(
      x.device(), [&] { cpu::rms_norm_backward(dx, g, x, w, r); },
      [&] { cuda::rms_norm_backward(dx, g, x, w, r); });
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
                                     accumulate_t<T> r, int64_t cols) {
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
    (u * r - L::load(x + i, n) * projection).store(dx + i, n);
  }
}

}  // namespace

void rms_norm(const Tensor& y, const Tensor& r, const Tensor& x, const Tensor& w, float eps) {
  const int64_t cols = x.cols();
  const float* weight = w.data<float>();
  dispatch(CpuFloats{}, x.dtype(), "rms_norm", [&]<class T>() {
    T* out = y.data<T>();
    const T* in = x.data<T>();
    auto* inverse = r.data<accumulate_t<T>>();
    parallel_for(x.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t)
          forward_row<width>(out + t * cols, inverse + t, in + t * cols, weight, cols, eps);
      });
    });
  });
}

void rms_norm_backward(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& w,
                       const Tensor& r) {
  const int64_t cols = x.cols();
  const float* weight = w.data<float>();
  dispatch(CpuFloats{}, x.dtype(), "rms_norm_backward", [&]<class T>() {
    T* out = dx.data<T>();
    const T* grad = g.data<T>();
    const T* in = x.data<T>();
    const auto* inverse = r.data<accumulate_t<T>>();
    parallel_for(x.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t)
          backward_row<width>(out + t * cols, grad + t * cols, in + t * cols, weight, inverse[t],
                              cols);
      });
    });
  });
}

}  // namespace cpu
}  // namespace qlab
