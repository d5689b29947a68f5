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
  float factor;
  bool accumulate;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    float v[width];
    load(v, x + row * x_pitch + col);
    // One draw decides eight features.
    const Philox random =
        dropout_bits(key, example[row], position[row], static_cast<uint32_t>(col / 8));
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const auto feature = static_cast<uint32_t>(width == 8 ? j : col % 8);
      const uint32_t bits = random.lane[feature / 2] >> feature % 2 * 16 & 0xffff;
      v[j] = bits >= threshold ? v[j] * factor : 0.0f;
    }
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
    elementwise(
        "dropout",
        Dropout<T>{y.data<T>(), x.data<T>(), example.data<int64_t>(), position.data<int32_t>(),
                   y.pitch(), x.pitch(), key.key, dropout_threshold(key.p),
                   static_cast<float>(dropout_factor(key.p)), accumulate},
        x.rows(), x.cols(), vectorizable(x.cols(), y, x));
  });
}

}  // namespace qlab::cuda
