#include "core/ops/swiglu.h"

#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

template <class T>
struct Swiglu {
  T* y;
  const T* gate;
  const T* up;

  template <int width>
  __device__ void apply(int64_t, int64_t i) const {
    float z[width], u[width];
    load(z, gate + i);
    load(u, up + i);
    for (int j = 0; j < width; ++j) u[j] *= z[j] * sigmoid(z[j]);
    store(y + i, u);
  }
};

template <class T>
struct SwigluBackward {
  T* dgate;
  T* dup;
  const T* g;
  const T* gate;
  const T* up;

  template <int width>
  __device__ void apply(int64_t, int64_t i) const {
    float dy[width], z[width], u[width];
    load(dy, g + i);
    load(z, gate + i);
    load(u, up + i);
    for (int j = 0; j < width; ++j) {
      const float s = sigmoid(z[j]);
      const float slope = s + z[j] * s * (1.0f - s);
      u[j] *= dy[j] * slope;
      dy[j] *= z[j] * s;
    }
    store(dgate + i, u);
    store(dup + i, dy);
  }
};

}  // namespace

void swiglu(const Tensor& y, const Tensor& gate, const Tensor& up) {
  const int64_t n = y.numel();
  dispatch(CudaFloats{}, y.dtype(), "swiglu", [&]<class T>() {
    elementwise("swiglu", Swiglu<T>{y.data<T>(), gate.data<T>(), up.data<T>()}, 1, n,
                vectorizable(n, y, gate, up));
  });
}

void swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& g, const Tensor& gate,
                     const Tensor& up) {
  const int64_t n = g.numel();
  dispatch(CudaFloats{}, g.dtype(), "swiglu_backward", [&]<class T>() {
    elementwise("swiglu_backward",
                SwigluBackward<T>{dgate.data<T>(), dup.data<T>(), g.data<T>(), gate.data<T>(),
                                  up.data<T>()},
                1, n, vectorizable(n, dgate, dup, g, gate, up));
  });
}

}  // namespace qlab::cuda
