#include "core/ops/add.h"

#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

template <class T>
struct Add {
  T* y;
  const T* a;
  const T* b;
  int64_t y_pitch, a_pitch, b_pitch;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    float u[width], v[width];
    load(u, a + row * a_pitch + col);
    load(v, b + row * b_pitch + col);
    for (int i = 0; i < width; ++i) u[i] += v[i];
    store(y + row * y_pitch + col, u);
  }
};

template <class T>
struct Scale {
  T* a;
  float factor;

  template <int width>
  __device__ void apply(int64_t, int64_t col) const {
    float v[width];
    load(v, a + col);
    for (int i = 0; i < width; ++i) v[i] *= factor;
    store(a + col, v);
  }
};

template <class T>
struct AddBias {
  T* y;
  const float* bias;
  int64_t pitch;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    float u[width], v[width];
    load(u, y + row * pitch + col);
    load(v, bias + col);
    for (int i = 0; i < width; ++i) u[i] += v[i];
    store(y + row * pitch + col, u);
  }
};

}  // namespace

void add(const Tensor& y, const Tensor& a, const Tensor& b) {
  const bool flat = all_contiguous(y, a, b);
  const int64_t rows = flat ? 1 : y.rows(), cols = flat ? y.numel() : y.cols();
  dispatch(CudaFloats{}, y.dtype(), "add", [&]<class T>() {
    elementwise("add",
                Add<T>{y.data<T>(), a.data<T>(), b.data<T>(), y.pitch(), a.pitch(), b.pitch()},
                rows, cols, vectorizable(cols, y, a, b));
  });
}

void scale(const Tensor& a, float factor) {
  dispatch(CudaFloats{}, a.dtype(), "scale", [&]<class T>() {
    elementwise("scale", Scale<T>{a.data<T>(), factor}, 1, a.numel(), vectorizable(a.numel(), a));
  });
}

void add_bias(const Tensor& y, const Tensor& bias) {
  dispatch(CudaFloats{}, y.dtype(), "add_bias", [&]<class T>() {
    elementwise("add_bias", AddBias<T>{y.data<T>(), bias.data<float>(), y.pitch()}, y.rows(),
                y.cols(), vectorizable(y.cols(), y, bias));
  });
}

}  // namespace qlab::cuda
