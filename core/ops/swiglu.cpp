#include "core/ops/swiglu.h"

#include "core/gpu_limits.h"
#include "core/lanes.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

void check_merged(const char* op, const Tensor& gate_up) {
  QLAB_CHECK(gate_up.rank() == 2 && gate_up.dim(1) % 2 == 0,
             "[{}] gate | up must be [T, 2 I], got {}", op, gate_up.str());
  check_gpu_matrix(op, gate_up);
}

}  // namespace

Tensor swiglu(const Tensor& gate_up, int64_t tail) {
  check_merged("swiglu", gate_up);
  const Tensor y = Tensor::with_tail(gate_up.dim(0), gate_up.dim(1) / 2, tail, gate_up.dtype(),
                                     gate_up.device());
  if (y.numel() == 0) return y;
  const OpScope scope("swiglu", y.device(), {0, bytes_of_all(gate_up, y)});
  on_device(
      y.device(), [&] { cpu::swiglu(y, gate_up); }, [&] { cuda::swiglu(y, gate_up); });
  return y;
}

Tensor swiglu_backward(const Tensor& g, const Tensor& gate_up, int64_t tail) {
  check_merged("swiglu_backward", gate_up);
  check_shape("swiglu_backward", "g", g, {gate_up.dim(0), gate_up.dim(1) / 2});
  QLAB_CHECK(g.dtype() == gate_up.dtype(), "[swiglu_backward] g must be {}, got {}",
             name_of(gate_up.dtype()), g.str());
  check_device("swiglu_backward", gate_up, g);
  const bool in_place = gate_up.unique() && gate_up.pitch() >= gate_up.dim(1) + tail;
  const Tensor dgate_up = in_place ? gate_up
                                   : Tensor::with_tail(gate_up.dim(0), gate_up.dim(1), tail,
                                                       gate_up.dtype(), gate_up.device());
  if (g.numel() == 0) return dgate_up;
  const OpScope scope("swiglu_backward", g.device(), {0, bytes_of_all(gate_up, g, dgate_up)});
  on_device(
      g.device(), [&] { cpu::swiglu_backward(dgate_up, g, gate_up); },
      [&] { cuda::swiglu_backward(dgate_up, g, gate_up); });
  return dgate_up;
}

namespace cpu {
namespace {

int64_t row_grain(int64_t cols) { return std::max<int64_t>(1, 8192 / cols); }

template <class L>
QLAB_INLINE inline L sigmoid(const L& z) {
  return L::all(1) / (L::all(1) + exp(L::all(0) - z));
}

template <int width, class T>
QLAB_INLINE inline void forward_row(T* y, const T* gate, const T* up, int64_t cols) {
  using L = Lanes<accumulate_t<T>, width>;
  for (int64_t i = 0; i < cols; i += 16) {
    const int64_t n = cols - i;
    const L z = L::load(gate + i, n);
    (z / (L::all(1) + exp(L::all(0) - z)) * L::load(up + i, n)).store(y + i, n);
  }
}

template <int width, class T>
QLAB_INLINE inline void backward_row(T* dgate, T* dup, const T* grad, const T* gate, const T* up,
                                     int64_t cols) {
  using L = Lanes<accumulate_t<T>, width>;
  for (int64_t i = 0; i < cols; i += 16) {
    const int64_t n = cols - i;
    const L g = L::load(grad + i, n), z = L::load(gate + i, n), s = sigmoid(z);
    const L u = L::load(up + i, n);
    (g * u * (s + z * s * (L::all(1) - s))).store(dgate + i, n);
    (g * (z * s)).store(dup + i, n);
  }
}

}  // namespace

void swiglu(const Tensor& y, const Tensor& gate_up) {
  const int64_t cols = y.cols(), y_pitch = y.pitch(), pitch = gate_up.pitch();
  dispatch(CpuFloats{}, y.dtype(), "swiglu", [&]<class T>() {
    T* out = y.data<T>();
    const T* in = gate_up.data<T>();
    parallel_for(y.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t)
          forward_row<width>(out + t * y_pitch, in + t * pitch, in + t * pitch + cols, cols);
      });
    });
  });
}

void swiglu_backward(const Tensor& dgate_up, const Tensor& g, const Tensor& gate_up) {
  const int64_t cols = g.cols(), g_pitch = g.pitch(), pitch = gate_up.pitch();
  const int64_t d_pitch = dgate_up.pitch();
  dispatch(CpuFloats{}, g.dtype(), "swiglu_backward", [&]<class T>() {
    T* out = dgate_up.data<T>();
    const T *grad = g.data<T>(), *in = gate_up.data<T>();
    parallel_for(g.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t)
          backward_row<width>(out + t * d_pitch, out + t * d_pitch + cols, grad + t * g_pitch,
                              in + t * pitch, in + t * pitch + cols, cols);
      });
    });
  });
}

}  // namespace cpu
}  // namespace qlab
