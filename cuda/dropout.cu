#include "core/ops/dropout.h"

#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

template <class T>
struct Dropout {
  T* y;
  const T* x;
  const int64_t* example;
  const int32_t* position;
  int64_t y_pitch, x_pitch;
  uint64_t key;
  uint32_t threshold;
  float kept;  // 1 - p
  bool accumulate;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    float v[width];
    load(v, x + row * x_pitch + col);
#pragma unroll
    for (int j = 0; j < width; ++j)
      v[j] =
          dropout_keeps(key, example[row], position[row], col + j, threshold) ? v[j] / kept : 0.0f;
    T* const target = y + row * y_pitch + col;
    if (accumulate) {
      float sum[width];
      load(sum, target);
      for (int j = 0; j < width; ++j) v[j] += sum[j];
    }
    store(target, v);
  }
};

}  // namespace

void dropout(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
             DropoutKey key, bool accumulate) {
  dispatch(CudaFloats{}, x.dtype(), "dropout", [&]<class T>() {
    elementwise("dropout",
                Dropout<T>{y.data<T>(), x.data<T>(), example.data<int64_t>(),
                           position.data<int32_t>(), y.pitch(), x.pitch(), key.key,
                           dropout_threshold(key.p), 1.0f - key.p, accumulate},
                x.rows(), x.cols(), vectorizable(x.cols(), y, x));
  });
}

}  // namespace qlab::cuda
