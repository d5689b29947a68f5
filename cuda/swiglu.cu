#include "core/ops/swiglu.h"

#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

// 16 bits: within 2^-19 of the value for |z| up to 16, far below half a unit of the result.
template <class T>
__device__ inline float sigmoid(float z) {
  if constexpr (Half<T>)
    return __fdividef(1.0f, 1.0f + __expf(-z));
  else
    return 1.0f / (1.0f + expf(-z));
}

template <class T>
struct Swiglu {
  T* y;
  const T* gate;
  int64_t inner, y_pitch, pitch;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    float z[width], u[width];
    load(z, gate + row * pitch + col);
    load(u, gate + row * pitch + inner + col);
    for (int j = 0; j < width; ++j) u[j] *= z[j] * sigmoid<T>(z[j]);
    store(y + row * y_pitch + col, u);
  }
};

// dgate | dup may be gate | up.
template <class T>
struct SwigluBackward {
  T* dgate;
  const T* g;
  const T* gate;
  int64_t inner, d_pitch, g_pitch, pitch;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    float dy[width], z[width], u[width];
    load(dy, g + row * g_pitch + col);
    load(z, gate + row * pitch + col);
    load(u, gate + row * pitch + inner + col);
    for (int j = 0; j < width; ++j) {
      const float s = sigmoid<T>(z[j]);
      const float slope = s + z[j] * s * (1.0f - s);
      u[j] *= dy[j] * slope;
      dy[j] *= z[j] * s;
    }
    store(dgate + row * d_pitch + col, u);
    store(dgate + row * d_pitch + inner + col, dy);
  }
};

}  // namespace

void swiglu(const Tensor& y, const Tensor& gate_up) {
  const int64_t inner = y.cols();
  dispatch(CudaFloats{}, y.dtype(), "swiglu", [&]<class T>() {
    elementwise("swiglu",
                Swiglu<T>{y.data<T>(), gate_up.data<T>(), inner, y.pitch(), gate_up.pitch()},
                y.rows(), inner, vectorizable(inner, y, gate_up));
  });
}

void swiglu_backward(const Tensor& dgate_up, const Tensor& g, const Tensor& gate_up) {
  const int64_t inner = g.cols();
  dispatch(CudaFloats{}, g.dtype(), "swiglu_backward", [&]<class T>() {
    elementwise("swiglu_backward",
                SwigluBackward<T>{dgate_up.data<T>(), g.data<T>(), gate_up.data<T>(), inner,
                                  dgate_up.pitch(), g.pitch(), gate_up.pitch()},
                g.rows(), inner, vectorizable(inner, dgate_up, g, gate_up));
  });
}

}  // namespace qlab::cuda
