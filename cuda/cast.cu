#include "core/ops/copy.h"
#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

template <class Y, class X>
struct Cast {
  Y* y;
  const X* x;
  int64_t y_pitch, x_pitch;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    float v[width];
    load(v, x + row * x_pitch + col);
    store(y + row * y_pitch + col, v);
  }
};

}  // namespace

void cast(const Tensor& y, const Tensor& x) {
  const bool flat = all_contiguous(y, x);
  const int64_t rows = flat ? 1 : x.rows(), cols = flat ? x.numel() : x.cols();
  dispatch(CudaFloats{}, y.dtype(), "cast", [&]<class Y>() {
    dispatch(CudaFloats{}, x.dtype(), "cast", [&]<class X>() {
      elementwise("cast", Cast<Y, X>{y.data<Y>(), x.data<X>(), y.pitch(), x.pitch()}, rows, cols,
                  vectorizable(cols, y, x));
    });
  });
}

}  // namespace qlab::cuda
